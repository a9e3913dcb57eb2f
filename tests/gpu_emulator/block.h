/* A block of a launch: its state, its memories and the detectors that watch them. */

#include "vm.h"
#include "ops.inc"

#define MAX_WARPS 32
#define MAX_BARS 64
#define CLOCKS (MAX_WARPS + MAX_BARS)

typedef struct { /* memory of one storage; the arrays have an entry for each granule */
  uint64_t start, stop;
  uint32_t *writer, *reader;
  uint8_t *inside;
  int32_t shift, pad;
} Region;

typedef struct {
  int32_t kind, ins, thread, cta;
  uint64_t address;
  int64_t extra;
} Fault;

typedef struct {
  const Ins *code;
  const int32_t *lists;
  const uint8_t *image; /* initial registers of a warp: the constants */
  const int32_t *special; /* register offsets of tid, ntid, ctaid, nctaid (x, y, z), lane, warp */
  const uint8_t *params;
  Region *regions;
  Fault *faults;
  uint32_t *counts; /* code x kinds */
  uint8_t *executed; /* which instructions ever ran */
  int64_t instructions, limit;
  uint64_t seed;
  int32_t ncode, register_bytes, predicates, nregions, max_faults, nfaults, threads, shared;
  int32_t grid[3], kinds, shared_base, quantum, aborted, nearest, registers;
  float noise;
} Launch;

typedef struct { /* a copy that was issued and not waited for */
  uint32_t mask, dst[32], srcsize[32];
  uint64_t src[32];
  int32_t size, ins, group;
} Copy;

typedef struct {
  int32_t ins, group, scale_d;
  uint64_t desc_a, desc_b;
} Wgmma;

typedef struct {
  uint64_t address;
  uint32_t rank, element, swizzle, nan_fill;
  uint64_t shape[5], stride[4];
  uint32_t box[5], pad;
  char magic[8];
} __attribute__((packed)) TensorMap;

typedef struct {
  TensorMap map;
  int32_t coords[5];
  uint32_t dst, bar; /* of a store: where it reads, the number of its group */
  int32_t ins, warp;
} Tma;

typedef struct {
  uint32_t address, count, pending, phase;
  int64_t tx;
  uint32_t vc[CLOCKS], vf[CLOCKS];
  int used;
} Mbar;

enum { RUN, BARRIER, POLL, REGISTERS /* that another warp must give back first */, DONE };

typedef struct {
  uint8_t *regs;
  uint32_t *preds;
  uint8_t *pend; /* of every 128 bytes of registers: 1 no access, 2 no write */
  int npend;
  int32_t pc, lanepc[32];
  uint32_t live, active, blocked;
  int state, barrier;
  uint32_t vc[CLOCKS], vf[CLOCKS];
  Copy *copies;
  int ncopies, capcopies, group;
  Wgmma *wgmmas;
  int nwgmmas, capwgmmas, wgroup;
  Tma *stores;
  int nstores, capstores, sgroup, registers;
} Warp;

typedef struct {
  Launch *L;
  Warp warps[MAX_WARPS];
  int nwarps, cta;
  uint8_t *shared, *state, *generic, *agent; /* by byte; by granule of 2 bytes */
  uint32_t *wclock, *rclock; /* granule; warp x granule */
  uint16_t *reading, *storing; /* granule: matrix products, TMA stores under way that read it */
  int granules;
  Mbar bars[MAX_BARS];
  Tma *tmas;
  int ntmas, captmas;
  uint64_t rng;
  int abort, free_registers; /* of a thread, summed over warps */
} Block;

static uint32_t next_random(Block *B) {
  B->rng ^= B->rng << 13; B->rng ^= B->rng >> 7; B->rng ^= B->rng << 17;
  return (uint32_t)(B->rng >> 16);
}

/* ---- arithmetic -------------------------------------------------------------------------- */

float emu_noise;

static int emu_nearest;
static inline float matrix_sum(double s) { /* a sum as a tensor core rounds it */
  float f = (float)s;
  if (emu_nearest) return f;
  return fabs((double)f) > fabs(s) && isfinite(f) ? as_float(as_bits(f) - 1) : f;
}

/* ---- faults --------------------------------------------------------------------------------- */

static void fault(Block *B, int kind, int ins, int warp, int lane, uint64_t address, int64_t extra) {
  Launch *L = B->L;
  if (L->counts[ins * L->kinds + kind]++ > 0 || L->nfaults >= L->max_faults) return;
  L->faults[L->nfaults++] = (Fault){kind, ins, warp * 32 + lane, B->cta, address, extra};
}

/* ---- vector clocks -------------------------------------------------------------------------- */

static void join(uint32_t *a, const uint32_t *b) {
  for (int k = 0; k < CLOCKS; k++) a[k] = a[k] > b[k] ? a[k] : b[k];
}
static int bar_index(Block *B, uint32_t address) {
  for (int k = 0; k < MAX_BARS; k++) if (B->bars[k].used && B->bars[k].address == address) return k;
  return -1;
}

/* ---- global memory -------------------------------------------------------------------------- */

static Region *find_region(Launch *L, uint64_t address, uint64_t size) {
  for (int k = 0; k < L->nregions; k++)
    if (address >= L->regions[k].start && address + size <= L->regions[k].stop) return &L->regions[k];
  return NULL;
}

/* Whether an access is allowed; keeps the books of who touched what. */
static int global_access(Block *B, int ins, int w, int lane, uint64_t address, int size, int write, int align) {
  Launch *L = B->L;
  if (address % align) {
    fault(B, write ? F_STORE_MISALIGNED : F_LOAD_MISALIGNED, ins, w, lane, address, align);
    return 0;
  }
  Region *r = find_region(L, address, size);
  if (!r) {
    fault(B, write ? F_STORE_OUTSIDE : F_LOAD_OUTSIDE, ins, w, lane, address, size);
    return 0;
  }
  uint32_t me = B->cta + 1;
  uint64_t first = (address - r->start) >> r->shift, last = (address + size - 1 - r->start) >> r->shift;
  for (uint64_t g = first; g <= last; g++) {
    if (r->inside && !r->inside[g])
      fault(B, write ? F_STORE_PADDING : F_LOAD_PADDING, ins, w, lane, address, size);
    if (write) {
      if (r->writer[g] && r->writer[g] != me) fault(B, F_RACE_WRITES, ins, w, lane, address, r->writer[g] - 1);
      else if (r->reader[g] && r->reader[g] != me) fault(B, F_RACE_READ_WRITE, ins, w, lane, address, r->reader[g] - 1);
      r->writer[g] = me;
    } else {
      if (r->writer[g] && r->writer[g] != me) fault(B, F_RACE_READ_WRITE, ins, w, lane, address, r->writer[g] - 1);
      if (r->reader[g] != me) r->reader[g] = r->reader[g] ? ALL : me;
    }
  }
  return 1;
}

/* ---- shared memory -------------------------------------------------------------------------- */

enum { EMPTY, VALID, PENDING, ARRIVED /* a pending copy's bytes: valid */ };

static int shared_range(Block *B, int ins, int w, int lane, uint32_t address, int size, int align, uint32_t *at) {
  if (address % align) { fault(B, F_SHARED_MISALIGNED, ins, w, lane, address, align); return 0; }
  *at = address - B->L->shared_base;
  if (address < (uint32_t)B->L->shared_base || (uint64_t)*at + size > (uint64_t)B->L->shared) {
    fault(B, F_SHARED_OUTSIDE, ins, w, lane, address, size);
    return 0;
  }
  return 1;
}

/* A read of shared memory by a warp; `async`: by the asynchronous proxy on its behalf. */
static void shared_read(Block *B, int ins, int w, int lane, uint32_t at, int size, int async) {
  Warp *W = &B->warps[w];
  uint32_t *mine = B->rclock + (size_t)w * B->granules, now = W->vc[w];
  for (uint32_t g = at >> 1; g <= (at + size - 1) >> 1; g++) {
    if (B->state[g] == EMPTY) fault(B, F_UNINITIALISED, ins, w, lane, at, 0);
    else if (B->state[g] == PENDING) fault(B, F_PENDING, ins, w, lane, at, 0);
    else {
      int u = B->agent[g];
      if (u != w && W->vc[u] < B->wclock[g]) fault(B, F_SHARED_RACE_READ, ins, w, lane, at, u);
      else if (async && B->generic[g] && W->vf[u] < B->wclock[g]) fault(B, F_NO_PROXY_FENCE, ins, w, lane, at, u);
    }
    mine[g] = now;
  }
}

/* A write by a warp. `same`: it changes nothing (layouts that replicate values write them twice). */
static void shared_write(Block *B, int ins, int w, int lane, uint32_t at, int size, int state, int async, int same) {
  Warp *W = &B->warps[w];
  for (uint32_t g = at >> 1; g <= (at + size - 1) >> 1; g++) {
    int u = B->agent[g];
    if (B->reading[g]) fault(B, F_WGMMA_OPERAND, ins, w, lane, at, 0);
    if (B->storing[g]) fault(B, F_STORE_OPERAND, ins, w, lane, at, 0);
    if (B->state[g] == PENDING && state != ARRIVED) fault(B, F_PENDING_OVERWRITTEN, ins, w, lane, at, 0);
    else if (B->state[g] == VALID && u != w && !same && W->vc[u] < B->wclock[g])
      fault(B, F_SHARED_RACE_WRITE, ins, w, lane, at, u);
    if (async && B->state[g] == VALID && B->generic[g] && W->vf[u] < B->wclock[g])
      fault(B, F_NO_PROXY_FENCE, ins, w, lane, at, u);
    for (int r = 0; r < B->nwarps; r++) {
      uint32_t clock = B->rclock[(size_t)r * B->granules + g];
      if (r != w && clock && W->vc[r] < clock) fault(B, F_SHARED_RACE_READ_WRITE, ins, w, lane, at, r);
    }
    B->state[g] = state == ARRIVED ? VALID : state;
    B->agent[g] = w;
    B->wclock[g] = W->vc[w];
    B->generic[g] = !async;
  }
}

/* ---- waiting copies ------------------------------------------------------------------------- */

static void finish_copies(Block *B, int w, int keep) {
  Warp *W = &B->warps[w];
  int left = 0;
  for (int k = 0; k < W->ncopies; k++) {
    Copy *c = &W->copies[k];
    if (c->group >= W->group - keep) { W->copies[left++] = *c; continue; }
    for (int l = 0; l < 32; l++) {
      if (!(c->mask >> l & 1)) continue;
      uint8_t *to = B->shared + c->dst[l];
      if (c->srcsize[l]) memcpy(to, (void *)c->src[l], c->srcsize[l]);
      memset(to + c->srcsize[l], 0, c->size - c->srcsize[l]);
      shared_write(B, c->ins, w, l, c->dst[l], c->size, ARRIVED, 0, 0);
    }
  }
  W->ncopies = left;
}

static uint32_t swizzled(uint32_t address, int mode) { /* 1: 32 bytes, 2: 64, 3: 128 */
  if (mode == 0) return address;
  uint32_t mask = mode == 3 ? 7 : mode == 2 ? 3 : 1;
  return address ^ (((address >> 7) & mask) << 4);
}

static void bar_maybe_complete(Block *B, Mbar *b) {
  if (b->pending == 0 && b->tx == 0) {
    b->phase++;
    b->pending = b->count;
    b->vc[MAX_WARPS + (b - B->bars)]++;
    for (int w = 0; w < B->nwarps; w++) if (B->warps[w].state == POLL) B->warps[w].state = RUN;
  }
}

/* Element e of a copy's box: its place in the tensor, its shared address; whether it is inside. Of
 * the innermost dimension an H100 stores whole units of `unit` bytes: what begins inside is written. */
static int box_element(const Tma *t, uint64_t e, uint32_t unit, uint64_t *place, uint32_t *address) {
  const TensorMap *m = &t->map;
  uint64_t rest = e;
  int inside = 1;
  *place = m->address;
  for (uint32_t d = 0; d < m->rank; d++) {
    int64_t x = (int64_t)t->coords[d] + (int64_t)(rest % m->box[d]);
    rest /= m->box[d];
    uint64_t end = d ? m->shape[d] : (m->shape[0] * m->element + unit - 1) / unit * unit / m->element;
    if (x < 0 || (uint64_t)x >= end) inside = 0;
    else *place += x * (d ? m->stride[d - 1] : m->element);
  }
  *address = swizzled(t->dst + e * m->element, m->swizzle);
  return inside;
}
static uint64_t box_elements(const TensorMap *m) {
  uint64_t count = 1;
  for (uint32_t d = 0; d < m->rank; d++) count *= m->box[d];
  return count;
}

/* Begin a TMA store: from now on nobody may write what it reads. */
static void begin_store(Block *B, int w, int lane, const Tma *t) {
  Warp *W = &B->warps[w];
  uint32_t size = t->map.element, at;
  if (!shared_range(B, t->ins, w, lane, t->dst, box_elements(&t->map) * size, 128, &at)) return;
  for (uint32_t g = at >> 1; g <= (at + box_elements(&t->map) * size - 1) >> 1; g++) B->storing[g]++;
  shared_read(B, t->ins, w, lane, at, box_elements(&t->map) * size, 1);
  if (W->nstores == W->capstores) W->stores = realloc(W->stores, (W->capstores = 2 * W->capstores + 16) * sizeof(Tma));
  W->stores[W->nstores++] = *t;
}

/* Do the stores of all but the last `keep` groups: as late as may be, elements outside dropped. */
static void finish_stores(Block *B, int w, int keep) {
  Warp *W = &B->warps[w];
  int left = 0;
  for (int k = 0; k < W->nstores; k++) {
    Tma *t = &W->stores[k];
    if ((int)t->bar >= W->sgroup - keep) { W->stores[left++] = *t; continue; }
    uint32_t size = t->map.element, address, start = t->dst - B->L->shared_base;
    uint64_t place, count = box_elements(&t->map);
    for (uint64_t e = 0; e < count; e++)
      if (box_element(t, e, 16, &place, &address) && global_access(B, t->ins, w, 0, place, size, 1, size))
        memcpy((void *)place, B->shared + address - B->L->shared_base, size);
    for (uint32_t g = start >> 1; g <= (start + count * size - 1) >> 1; g++) B->storing[g]--;
  }
  W->nstores = left;
}

/* Do the copy number k of those under way: write the box, then count its bytes on the mbarrier. */
static void finish_tma(Block *B, int k) {
  Tma t = B->tmas[k];
  B->tmas[k] = B->tmas[--B->ntmas];
  TensorMap *m = &t.map;
  int index = bar_index(B, t.bar);
  if (index < 0) { fault(B, F_BAD_MBARRIER, t.ins, t.warp, 0, t.bar, 0); return; }
  Mbar *bar = &B->bars[index];
  uint64_t boxes = box_elements(m), total = boxes * m->element;
  for (uint64_t e = 0; e < boxes; e++) {
    uint64_t source;
    uint32_t at;
    int inside = box_element(&t, e, 1, &source, &at);
    at -= B->L->shared_base;
    if (at + m->element > (uint32_t)B->L->shared) { fault(B, F_SHARED_OUTSIDE, t.ins, t.warp, 0, at, 0); continue; }
    if (inside && !global_access(B, t.ins, t.warp, 0, source, m->element, 0, m->element)) inside = 0;
    if (inside) memcpy(B->shared + at, (void *)source, m->element);
    else memset(B->shared + at, 0, m->element);
    for (uint32_t g = at >> 1; g <= (at + m->element - 1) >> 1; g++) {
      B->state[g] = VALID;
      B->agent[g] = MAX_WARPS + index;
      B->wclock[g] = bar->vc[MAX_WARPS + index] + 1; /* seen by who waits for this phase */
      B->generic[g] = 0;
    }
  }
  bar->tx -= total;
  bar_maybe_complete(B, bar);
}
