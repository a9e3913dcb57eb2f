/* Executes the bytecode of one PTX kernel, block by block, on host memory.

   Warps run one at a time, in random order, for random numbers of instructions between the points
   where they must wait; lanes of a warp run together until they diverge, then the group with the
   lowest program counter first. Everything asynchronous is done as late as the program allows, and
   its destination cannot be read before.

   Order between warps is tracked with vector clocks: a component for each warp and each mbarrier.
   Barriers join them; an access to shared memory that conflicts with an earlier one must be ordered
   after it.

   `alu_table` (generated from isa.py) holds the arithmetic, `ops.inc` the numbers of the rest. */

#include "block.h"
#include "matrix.h"

/* ---- divergence ----------------------------------------------------------------------------- */

/* Let the unblocked group of lanes with the lowest program counter run. 0 if there is none. */
static int choose_group(Warp *W) {
  int32_t best = INT32_MAX;
  for (int l = 0; l < 32; l++)
    if (W->live >> l & 1 && !(W->blocked >> l & 1) && W->lanepc[l] < best) best = W->lanepc[l];
  if (best == INT32_MAX) return 0;
  W->pc = best;
  W->active = 0;
  for (int l = 0; l < 32; l++) if (W->live >> l & 1 && W->lanepc[l] == best) W->active |= 1u << l;
  W->blocked &= ~W->active; /* those that waited at this very place go along */
  return 1;
}

/* ---- the interpreter ------------------------------------------------------------------------ */

#define LANES(l) for (uint32_t m_ = m, l; m_ && (l = __builtin_ctz(m_), 1); m_ &= m_ - 1)

static void put_loaded(uint8_t *R, int32_t where, int l, const uint8_t *from, int size, int is_signed) {
  int64_t x = 0;
  memcpy(&x, from, size);
  if (is_signed && size < 8) x = (int64_t)((uint64_t)x << (64 - 8 * size)) >> (64 - 8 * size);
  if (where & 1) memcpy(R + (where & ~1) + 8 * l, &x, 8); /* bit 0: a 64-bit register */
  else { uint32_t y = (uint32_t)x; memcpy(R + where + 4 * l, &y, 4); }
}
static void get_stored(const uint8_t *R, int32_t where, int l, uint8_t *to, int size) {
  memcpy(to, R + (where & ~1) + (where & 1 ? 8 : 4) * l, size);
}

/* Run one warp for at most `steps` instructions; it stops where it must wait. */
static int64_t run_warp(Block *B, int w, int steps) {
  Launch *L = B->L;
  Warp *W = &B->warps[w];
  uint8_t *R = W->regs;
  uint32_t *P = W->preds;
  int64_t done = 0;
  while (done < steps && !B->abort) {
    const int pc = W->pc;
    const Ins *i = &L->code[pc];
    const int32_t *list = L->lists + i->list;
    uint32_t m = W->active;
    int next = pc + 1;
    done++;
    L->executed[pc] = 1;
    if (i->guard) m &= i->guard > 0 ? P[i->guard - 1] : ~P[-i->guard - 1];
    if (W->npend && m) check_pending(B, w, pc);
    if (i->op >= OP_SYNC_FIRST && W->active != W->live) { /* all lanes must come here first */
      for (int l = 0; l < 32; l++) if (W->active >> l & 1) W->lanepc[l] = pc;
      W->blocked |= W->active;
      if (!choose_group(W)) {
        fault(B, F_DIVERGENT_SYNC, pc, w, 0, W->active, W->live);
        B->abort = 1;
      }
      continue;
    }
    if (m == 0 && i->op != OP_BRA) goto advance;
    if (i->op < ALU_END) {
      alu_table[i->op](R, P, i, m);
      goto advance;
    }
    switch (i->op) {
    case OP_BRA: {
      if (m == W->active) next = (int)i->imm;
      else if (m) {
        for (int l = 0; l < 32; l++)
          if (W->active >> l & 1) W->lanepc[l] = m >> l & 1 ? (int)i->imm : pc + 1;
        choose_group(W);
        continue;
      }
      break;
    }
    case OP_BRX: { /* a: index, the same for all lanes; list: targets */
      uint32_t *index = (uint32_t *)(R + i->a), first = index[__builtin_ctz(m)];
      LANES(l) if (index[l] != first) fault(B, F_DIVERGENT_SYNC, pc, w, l, index[l], first);
      if (first >= (uint32_t)i->count) { fault(B, F_UNSUPPORTED, pc, w, 0, first, 0); B->abort = 1; break; }
      next = list[first];
      break;
    }
    case OP_SETMAXNREG: { /* flags: 1 takes registers, waits for them; 0 gives some back */
      int change = (int)i->imm - W->registers;
      if (i->imm % 8 || i->imm < 24 || i->imm > 256 || (i->flags ? change < 0 : change > 0))
        fault(B, F_BAD_REGISTERS, pc, w, 0, i->imm, W->registers);
      if (change > B->free_registers) { W->state = REGISTERS; return done; }
      W->registers += change;
      B->free_registers -= change;
      for (int k = 0; change < 0 && k < B->nwarps; k++) if (B->warps[k].state == REGISTERS) B->warps[k].state = RUN;
      break;
    }
    case OP_RET: {
      W->live &= ~m;
      if (W->live == 0) {
        if (W->ncopies) fault(B, F_UNWAITED, pc, w, 0, 0, W->ncopies);
        if (W->nwgmmas) fault(B, F_UNWAITED, pc, w, 0, 1, W->nwgmmas);
        if (W->nstores) fault(B, F_UNWAITED, pc, w, 0, 3, W->nstores);
        W->state = DONE;
        return done;
      }
      for (int l = 0; l < 32; l++) if (W->active >> l & 1) W->lanepc[l] = pc + 1;
      if (!choose_group(W)) { fault(B, F_DIVERGENT_SYNC, pc, w, 0, 0, 0); B->abort = 1; }
      continue;
    }
    case OP_LD_PARAM: {
      for (int k = 0; k < i->count; k++)
        LANES(l) put_loaded(R, list[k], l, L->params + i->imm + k * i->size, i->size, i->flags);
      break;
    }
    case OP_LD_GLOBAL: {
      int total = i->size * i->count;
      LANES(l) {
        uint64_t address = ((uint64_t *)(R + i->a))[l] + i->imm;
        uint8_t poison[64];
        memset(poison, 0xff, 64);
        const uint8_t *from = global_access(B, pc, w, l, address, total, 0, total) ? (uint8_t *)address : poison;
        for (int k = 0; k < i->count; k++) put_loaded(R, list[k], l, from + k * i->size, i->size, i->flags);
      }
      break;
    }
    case OP_ST_GLOBAL: {
      int total = i->size * i->count;
      LANES(l) {
        uint64_t address = ((uint64_t *)(R + i->a))[l] + i->imm;
        if (!global_access(B, pc, w, l, address, total, 1, total)) continue;
        for (int k = 0; k < i->count; k++) get_stored(R, list[k], l, (uint8_t *)address + k * i->size, i->size);
      }
      break;
    }
    case OP_LD_SHARED: {
      int total = i->size * i->count;
      LANES(l) {
        uint32_t at, address = ((uint32_t *)(R + i->a))[l] + (uint32_t)i->imm;
        if (!shared_range(B, pc, w, l, address, total, total, &at)) continue;
        shared_read(B, pc, w, l, at, total, 0);
        for (int k = 0; k < i->count; k++) put_loaded(R, list[k], l, B->shared + at + k * i->size, i->size, i->flags);
      }
      break;
    }
    case OP_ST_SHARED: {
      int total = i->size * i->count;
      LANES(l) {
        uint32_t at, address = ((uint32_t *)(R + i->a))[l] + (uint32_t)i->imm;
        if (!shared_range(B, pc, w, l, address, total, total, &at)) continue;
        uint8_t value[64];
        for (int k = 0; k < i->count; k++) get_stored(R, list[k], l, value + k * i->size, i->size);
        shared_write(B, pc, w, l, at, total, VALID, 0, !memcmp(B->shared + at, value, total));
        memcpy(B->shared + at, value, total);
      }
      break;
    }
    case OP_CP_ASYNC: {
      if (W->ncopies == W->capcopies) W->copies = realloc(W->copies, (W->capcopies = 2 * W->capcopies + 16) * sizeof(Copy));
      Copy *c = &W->copies[W->ncopies];
      c->mask = 0; c->size = i->size; c->ins = pc; c->group = W->group;
      LANES(l) {
        uint32_t at, address = ((uint32_t *)(R + i->a))[l] + (uint32_t)i->imm;
        uint64_t source = ((uint64_t *)(R + i->b))[l] + i->flags;
        uint32_t bytes = i->c >= 0 ? ((uint32_t *)(R + i->c))[l] : (uint32_t)i->size;
        if (bytes > (uint32_t)i->size) bytes = i->size;
        if (!shared_range(B, pc, w, l, address, i->size, i->size, &at)) continue;
        if (bytes && !global_access(B, pc, w, l, source, bytes, 0, i->size)) bytes = 0;
        shared_write(B, pc, w, l, at, i->size, PENDING, 0, 0);
        memset(B->shared + at, 0xff, i->size);
        c->mask |= 1u << l; c->dst[l] = at; c->src[l] = source; c->srcsize[l] = bytes;
      }
      W->ncopies++;
      break;
    }
    case OP_CP_COMMIT: W->group++; break;
    case OP_CP_WAIT: finish_copies(B, w, (int)i->imm); break;
    case OP_BULK_COMMIT: W->sgroup++; break;
    case OP_BULK_WAIT: finish_stores(B, w, (int)i->imm); break;
    case OP_FENCE_PROXY: memcpy(W->vf, W->vc, sizeof W->vf); W->vc[w]++; break;
    case OP_NOP: break;
    case OP_PACK: { /* list: the parts; `size` bytes each; out a register of all of them */
      LANES(l) {
        uint64_t x = 0;
        for (int k = 0; k < i->count; k++) {
          uint64_t y = 0;
          get_stored(R, list[k], l, (uint8_t *)&y, i->size);
          x |= y << (8 * i->size * k);
        }
        if (i->flags) ((uint64_t *)(R + i->out))[l] = x; else ((uint32_t *)(R + i->out))[l] = (uint32_t)x;
      }
      break;
    }
    case OP_UNPACK: {
      LANES(l) {
        uint64_t x = i->flags ? ((uint64_t *)(R + i->a))[l] : ((uint32_t *)(R + i->a))[l];
        for (int k = 0; k < i->count; k++) {
          uint64_t y = x >> (8 * i->size * k);
          if (list[k] != -1) put_loaded(R, list[k], l, (uint8_t *)&y, i->size, 0);
        }
      }
      break;
    }
    case OP_MBAR_INIT: {
      if (!m) break;
      int l = __builtin_ctz(m);
      uint32_t at, address = ((uint32_t *)(R + i->a))[l] + (uint32_t)i->imm;
      if (__builtin_popcount(m) > 1) fault(B, F_BAD_MBARRIER, pc, w, l, address, 2);
      if (!shared_range(B, pc, w, l, address, 8, 8, &at)) break;
      if (bar_index(B, address) >= 0) fault(B, F_BAD_MBARRIER, pc, w, l, address, 3);
      shared_write(B, pc, w, l, at, 8, VALID, 0, 0);
      int k = 0;
      while (k < MAX_BARS && B->bars[k].used) k++;
      if (k == MAX_BARS) { fault(B, F_BAD_MBARRIER, pc, w, l, address, 4); B->abort = 1; break; }
      uint32_t stamp = B->bars[k].vc[MAX_WARPS + k]; /* phases are counted on over reuse */
      memset(&B->bars[k], 0, sizeof(Mbar));
      B->bars[k].address = address; B->bars[k].used = 1;
      B->bars[k].count = B->bars[k].pending = ((uint32_t *)(R + i->b))[l];
      B->bars[k].vc[MAX_WARPS + k] = stamp;
      break;
    }
    case OP_MBAR_INVAL: {
      if (!m) break;
      int l = __builtin_ctz(m), k;
      uint32_t at, address = ((uint32_t *)(R + i->a))[l] + (uint32_t)i->imm;
      if (!shared_range(B, pc, w, l, address, 8, 8, &at)) break;
      shared_write(B, pc, w, l, at, 8, VALID, 0, 0);
      if ((k = bar_index(B, address)) < 0) fault(B, F_BAD_MBARRIER, pc, w, l, address, 5);
      else B->bars[k].used = 0;
      break;
    }
    case OP_MBAR_ARRIVE: { /* of `b` expected bytes (-1: none) */
      LANES(l) {
        uint32_t at, address = ((uint32_t *)(R + i->a))[l] + (uint32_t)i->imm;
        int k = bar_index(B, address);
        if (k < 0) { fault(B, F_BAD_MBARRIER, pc, w, l, address, 6); continue; }
        if (!shared_range(B, pc, w, l, address, 8, 8, &at)) continue;
        int u = B->agent[at >> 1];
        if (u != w && W->vc[u] < B->wclock[at >> 1]) fault(B, F_SHARED_RACE_READ, pc, w, l, at, u);
        Mbar *b = &B->bars[k];
        if (i->b >= 0) b->tx += ((uint32_t *)(R + i->b))[l];
        join(b->vc, W->vc); join(b->vf, W->vf);
        if (b->pending == 0) fault(B, F_BAD_MBARRIER, pc, w, l, address, 7); else b->pending--;
        bar_maybe_complete(B, b);
      }
      W->vc[w]++;
      break;
    }
    case OP_MBAR_TRY: { /* list: address, parity; out: predicate */
      uint32_t t = 0;
      LANES(l) {
        uint32_t address = ((uint32_t *)(R + i->a))[l] + (uint32_t)i->imm;
        int k = bar_index(B, address);
        if (k < 0) { fault(B, F_BAD_MBARRIER, pc, w, l, address, 8); B->abort = 1; break; }
        Mbar *b = &B->bars[k];
        shared_read(B, pc, w, l, address - L->shared_base, 8, 0);
        if ((b->phase & 1) != (((uint32_t *)(R + i->b))[l] & 1)) {
          t |= 1u << l;
          join(W->vc, b->vc); join(W->vf, b->vf);
        }
      }
      PUTP(i->out, t);
      if (m && t != m) { W->state = POLL; W->pc = next; return done; }
      break;
    }
    case OP_TMA_LOAD: { /* a: shared address, b: descriptor, c: mbarrier, list: coordinates */
      if (!m) break;
      if (__builtin_popcount(m) > 1) fault(B, F_BAD_MBARRIER, pc, w, 0, 0, 9);
      LANES(l) {
        if (B->ntmas == B->captmas) B->tmas = realloc(B->tmas, (B->captmas = 2 * B->captmas + 16) * sizeof(Tma));
        Tma *t = &B->tmas[B->ntmas];
        memcpy(&t->map, (void *)((uint64_t *)(R + i->b))[l], sizeof(TensorMap));
        t->dst = ((uint32_t *)(R + i->a))[l];
        t->bar = ((uint32_t *)(R + i->c))[l];
        t->ins = pc; t->warp = w;
        for (int k = 0; k < i->count; k++) t->coords[k] = ((int32_t *)(R + list[k]))[l];
        if (memcmp(t->map.magic, "EMUTMAP", 7) || t->map.rank != (uint32_t)i->count) {
          fault(B, F_BAD_DESCRIPTOR, pc, w, l, t->map.address, i->count);
          continue;
        }
        if (bar_index(B, t->bar) < 0) { fault(B, F_BAD_MBARRIER, pc, w, l, t->bar, 10); continue; }
        uint32_t bytes = t->map.element, at;
        for (uint32_t d = 0; d < t->map.rank; d++) bytes *= t->map.box[d];
        if (!shared_range(B, pc, w, l, t->dst, bytes, 128, &at)) continue;
        shared_write(B, pc, w, l, at, bytes, PENDING, 1, 0);
        memset(B->shared + at, 0xff, bytes);
        B->ntmas++;
      }
      break;
    }
    case OP_TMA_STORE: { /* a: shared address, b: descriptor, list: coordinates */
      if (__builtin_popcount(m) > 1) fault(B, F_BAD_DESCRIPTOR, pc, w, 0, 0, 9);
      LANES(l) {
        Tma t;
        memcpy(&t.map, (void *)((uint64_t *)(R + i->b))[l], sizeof(TensorMap));
        t.dst = ((uint32_t *)(R + i->a))[l];
        t.bar = W->sgroup; t.ins = pc; t.warp = w;
        for (int k = 0; k < i->count; k++) t.coords[k] = ((int32_t *)(R + list[k]))[l];
        if (memcmp(t.map.magic, "EMUTMAP", 7) || t.map.rank != (uint32_t)i->count)
          fault(B, F_BAD_DESCRIPTOR, pc, w, l, t.map.address, i->count);
        else begin_store(B, w, l, &t);
      }
      break;
    }
    /* ---- all lanes of the warp together from here on ---- */
    case OP_BAR: {
      W->pc = next;
      W->barrier = (int)i->imm;
      W->state = BARRIER;
      return done;
    }
    case OP_WARP_SYNC: break;
    case OP_SHFL: { /* flags: 0 bfly, 1 idx, 2 up, 3 down */
      uint32_t t[32], *va = (uint32_t *)(R + i->a), *vb = (uint32_t *)(R + i->b), *vc = (uint32_t *)(R + i->c), p = 0;
      for (int l = 0; l < 32; l++) {
        int seg = (vc[l] >> 8) & 31, clamp = vc[l] & 31, b = vb[l] & 31, low = l & seg, high = low | (clamp & ~seg), j;
        if (i->flags == 0) j = l ^ b; else if (i->flags == 1) j = low | (b & ~seg); else if (i->flags == 2) j = l - b; else j = l + b;
        int ok = i->flags == 2 ? j >= high : j <= high;
        if (!ok) j = l;
        t[l] = va[j & 31];
        p |= (uint32_t)ok << l;
      }
      PUT32(i->out, t);
      if (i->d >= 0) PUTP(i->d, p);
      break;
    }
    case OP_REDUX: { /* flags: 0 max.s32 1 min.s32 2 max.u32 3 min.u32 4 add 5 and 6 or 7 xor */
      uint32_t *va = (uint32_t *)(R + i->a), t[32], x = 0;
      int first = 1;
      LANES(l) {
        uint32_t y = va[l];
        if (first) { x = y; first = 0; continue; }
        switch (i->flags) {
        case 0: x = (int32_t)x > (int32_t)y ? x : y; break;
        case 1: x = (int32_t)x < (int32_t)y ? x : y; break;
        case 2: x = x > y ? x : y; break;
        case 3: x = x < y ? x : y; break;
        case 4: x += y; break;
        case 5: x &= y; break;
        case 6: x |= y; break;
        default: x ^= y;
        }
      }
      for (int l = 0; l < 32; l++) t[l] = x;
      PUT32(i->out, t);
      break;
    }
    case OP_VOTE: { /* flags: 0 ballot 1 any 2 all; a: predicate, negated if b */
      uint32_t v = (i->b ? ~P[i->a] : P[i->a]) & m, t[32];
      for (int l = 0; l < 32; l++) t[l] = v;
      if (i->flags == 0) PUT32(i->out, t);
      else { uint32_t p = (i->flags == 1 ? v != 0 : v == m) ? ALL : 0; PUTP(i->out, p); }
      break;
    }
    case OP_ELECT: {
      uint32_t t[32], leader = m ? __builtin_ctz(m) : 0;
      for (int l = 0; l < 32; l++) t[l] = leader;
      if (i->out >= 0) PUT32(i->out, t);
      PUTP(i->d, (m ? 1u << leader : 0));
      break;
    }
    case OP_LDMATRIX: { /* count matrices; flags: transposed */
      uint32_t *va = (uint32_t *)(R + i->a), out[4][32];
      for (int k = 0; k < i->count; k++)
        for (int r = 0; r < 8; r++) {
          int l = k * 8 + r;
          uint32_t at, address = va[l] + (uint32_t)i->imm;
          if (!shared_range(B, pc, w, l, address, 16, 16, &at)) continue;
          shared_read(B, pc, w, l, at, 16, 0);
          uint16_t row[8];
          memcpy(row, B->shared + at, 16);
          for (int c = 0; c < 8; c++) {
            int to = i->flags ? c * 4 + r / 2 : r * 4 + c / 2, half = i->flags ? r & 1 : c & 1;
            ((uint16_t *)&out[k][to])[half] = row[c];
          }
        }
      for (int k = 0; k < i->count; k++) PUT32(list[k], out[k]);
      break;
    }
    case OP_STMATRIX: {
      uint32_t *va = (uint32_t *)(R + i->a);
      for (int k = 0; k < i->count; k++)
        for (int r = 0; r < 8; r++) {
          int l = k * 8 + r;
          uint32_t at, address = va[l] + (uint32_t)i->imm;
          if (!shared_range(B, pc, w, l, address, 16, 16, &at)) continue;
          uint16_t row[8];
          for (int c = 0; c < 8; c++) {
            int from = i->flags ? c * 4 + r / 2 : r * 4 + c / 2, half = i->flags ? r & 1 : c & 1;
            row[c] = ((uint16_t *)((uint32_t *)(R + list[k]) + from))[half];
          }
          shared_write(B, pc, w, l, at, 16, VALID, 0, !memcmp(B->shared + at, row, 16));
          memcpy(B->shared + at, row, 16);
        }
      break;
    }
    case OP_MMA: {
      if (m != ALL) fault(B, F_DIVERGENT_SYNC, pc, w, 0, m, 0);
      mma(W, i, list, i->flags);
      break;
    }
    case OP_WGMMA: {
      if (m != ALL) fault(B, F_DIVERGENT_SYNC, pc, w, 0, m, 0);
      if (W->nwgmmas == W->capwgmmas) W->wgmmas = realloc(W->wgmmas, (W->capwgmmas = 2 * W->capwgmmas + 16) * sizeof(Wgmma));
      Wgmma *q = &W->wgmmas[W->nwgmmas];
      *q = (Wgmma){pc, W->wgroup, i->c < 0 ? 1 : (int)(P[i->c] & 1), 0, 0};
      if (i->imm >= 0) q->scale_d = (int)i->imm;
      if (!(i->flags & 2)) q->desc_a = ((uint64_t *)(R + i->a))[0];
      q->desc_b = ((uint64_t *)(R + i->b))[0];
      for (int l = 1; l < 32; l++)
        if (((uint64_t *)(R + i->b))[l] != q->desc_b) fault(B, F_BAD_DESCRIPTOR, pc, w, l, q->desc_b, 0);
      wgmma(B, w, q, 1);
      W->nwgmmas++;
      mark_registers(B, W);
      break;
    }
    case OP_WGMMA_FENCE: break;
    case OP_WGMMA_COMMIT: W->wgroup++; break;
    case OP_WGMMA_WAIT: finish_wgmmas(B, w, (int)i->imm); break;
    default:
      fault(B, F_UNSUPPORTED, pc, w, 0, i->op, 0);
      B->abort = 1;
    }
  advance:
    if (W->active == W->live) W->pc = next;
    else {
      for (int l = 0; l < 32; l++) if (W->active >> l & 1) W->lanepc[l] = next;
      choose_group(W);
    }
  }
  return done;
}

/* Release barriers that all live warps (of the count it names) have reached. */
static int release_barriers(Block *B) {
  int released = 0;
  for (int id = 0; id < 16; id++) {
    uint32_t vc[CLOCKS] = {0}, vf[CLOCKS] = {0};
    int waiting = 0, live = 0, need = -1; /* 0: all */
    for (int w = 0; w < B->nwarps; w++) {
      Warp *W = &B->warps[w];
      live += W->state != DONE;
      if (W->state == BARRIER && (W->barrier & 15) == id) {
        waiting++;
        int count = (W->barrier >> 4) / 32;
        if (need >= 0 && need != count) fault(B, F_BAD_BARRIER, W->pc - 1, w, 0, need, count);
        need = count;
      }
    }
    if (!waiting || waiting < (need > 0 ? need : live)) continue;
    for (int w = 0; w < B->nwarps; w++) {
      Warp *W = &B->warps[w];
      if (W->state == BARRIER && (W->barrier & 15) == id) { join(vc, W->vc); join(vf, W->vf); }
    }
    for (int w = 0; w < B->nwarps; w++) {
      Warp *W = &B->warps[w];
      if (W->state != BARRIER || (W->barrier & 15) != id) continue;
      memcpy(W->vc, vc, sizeof vc);
      memcpy(W->vf, vf, sizeof vf);
      W->vc[w]++;
      W->state = RUN;
    }
    released = 1;
  }
  return released;
}

static void run_block(Block *B) {
  Launch *L = B->L;
  int x = B->cta % L->grid[0], y = B->cta / L->grid[0] % L->grid[1], z = B->cta / L->grid[0] / L->grid[1];
  memset(B->shared, 0xff, L->shared);
  memset(B->state, EMPTY, B->granules);
  memset(B->generic, 0, B->granules);
  memset(B->agent, 0, B->granules);
  memset(B->wclock, 0, 4 * B->granules);
  memset(B->reading, 0, 2 * B->granules);
  memset(B->storing, 0, 2 * B->granules);
  memset(B->rclock, 0, (size_t)4 * B->granules * B->nwarps);
  memset(B->bars, 0, sizeof B->bars);
  B->ntmas = B->free_registers = 0;
  B->abort = 0;
  for (int w = 0; w < B->nwarps; w++) {
    Warp *W = &B->warps[w];
    memcpy(W->regs, L->image, L->register_bytes);
    memset(W->preds, 0, 4 * L->predicates);
    memset(W->pend, 0, L->register_bytes / 128);
    W->npend = W->ncopies = W->group = W->nwgmmas = W->wgroup = W->nstores = W->sgroup = 0;
    W->registers = L->registers;
    W->pc = 0; W->live = W->active = ALL; W->blocked = 0; W->state = RUN;
    memset(W->vc, 0, sizeof W->vc);
    memset(W->vf, 0, sizeof W->vf);
    W->vc[w] = 1;
    uint32_t values[14] = {0, 0, 0, L->threads, 1, 1, x, y, z, L->grid[0], L->grid[1], L->grid[2], 0, w};
    for (int k = 0; k < 14; k++) {
      if (L->special[k] < 0) continue;
      uint32_t *to = (uint32_t *)(W->regs + L->special[k]);
      for (int l = 0; l < 32; l++) to[l] = k == 0 ? w * 32 + l : k == 12 ? l : values[k];
    }
  }
  int64_t done = 0;
  while (!B->abort) {
    int runnable[MAX_WARPS], count = 0, live = 0;
    for (int w = 0; w < B->nwarps; w++) {
      live += B->warps[w].state != DONE;
      if (B->warps[w].state == RUN) runnable[count++] = w;
    }
    if (!live) break;
    if (!count || next_random(B) % 8 == 0) {
      if (B->ntmas) finish_tma(B, next_random(B) % B->ntmas);
      else if (!count && !release_barriers(B)) {
        int w = 0;
        while (B->warps[w].state == DONE) w++;
        fault(B, F_DEADLOCK, B->warps[w].pc, w, 0, 0, B->warps[w].state);
        break;
      }
      continue;
    }
    int w = runnable[next_random(B) % count];
    done += run_warp(B, w, 1 + next_random(B) % L->quantum);
    release_barriers(B);
    if (done > L->limit) { fault(B, F_DEADLOCK, B->warps[w].pc, w, 0, 1, done); break; }
  }
  if (B->ntmas && !B->abort) fault(B, F_UNWAITED, B->tmas[0].ins, 0, 0, 2, B->ntmas);
  if (B->abort) L->aborted++;
  L->instructions += done;
}

/* Run the blocks first, first + step, ... below last. */
void run_blocks(Launch *L, int64_t first, int64_t last, int64_t step) {
  Block *B = calloc(1, sizeof(Block));
  B->L = L;
  emu_noise = L->noise;
  emu_nearest = L->nearest;
  B->nwarps = (L->threads + 31) / 32;
  B->granules = L->shared / 2 + 1;
  B->shared = aligned_alloc(1024, (L->shared / 1024 + 2) * 1024);
  B->state = malloc(B->granules);
  B->generic = malloc(B->granules);
  B->agent = malloc(B->granules);
  B->wclock = malloc(4 * B->granules);
  B->reading = malloc(2 * B->granules);
  B->storing = malloc(2 * B->granules);
  B->rclock = malloc((size_t)4 * B->granules * B->nwarps);
  for (int w = 0; w < B->nwarps; w++) {
    B->warps[w].regs = aligned_alloc(256, L->register_bytes + 256 - L->register_bytes % 256);
    B->warps[w].preds = malloc(4 * L->predicates + 4);
    B->warps[w].pend = malloc(L->register_bytes / 128 + 1);
  }
  for (int64_t cta = first; cta < last; cta += step) {
    B->cta = (int)cta;
    B->rng = (L->seed + 1) * 0x9e3779b97f4a7c15ull ^ (cta + 1) * 0xbf58476d1ce4e5b9ull;
    run_block(B);
  }
  for (int w = 0; w < B->nwarps; w++) {
    free(B->warps[w].regs); free(B->warps[w].preds); free(B->warps[w].pend);
    free(B->warps[w].copies); free(B->warps[w].wgmmas);
    free(B->warps[w].stores);
  }
  free(B->shared); free(B->state); free(B->generic); free(B->agent); free(B->wclock); free(B->rclock);
  free(B->reading); free(B->storing);
  free(B->tmas); free(B);
}
