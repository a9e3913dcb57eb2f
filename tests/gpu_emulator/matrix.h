/* ---- matrix products ------------------------------------------------------------------------ */

static float element(uint32_t bits, int kind) { return kind ? half_to_float(bits) : bf16_to_float(bits); }

/* m16n8k16 of 2-byte elements (kind 0 bf16, 1 fp16), or m16n8k8 of tf32 (kind 2) */
static void mma(Warp *W, const Ins *i, const int32_t *list, int kind) {
  uint8_t *R = W->regs;
  int depth = kind == 2 ? 8 : 16;
  float a[16][16], b[16][8];
  double s[16][8];
  const uint32_t *ra[4], *rb[2]; const float *rc[4]; float *rd[4];
  for (int k = 0; k < 4; k++) {
    rd[k] = (float *)(R + list[k]); ra[k] = (uint32_t *)(R + list[4 + k]);
    rc[k] = (float *)(R + list[10 + k]);
  }
  for (int k = 0; k < 2; k++) rb[k] = (uint32_t *)(R + list[8 + k]);
  for (int l = 0; l < 32; l++) {
    int g = l >> 2, t = l & 3;
    if (kind == 2) {
      for (int k = 0; k < 4; k++) a[g + (k & 1) * 8][t + (k >> 1) * 4] = as_float(ra[k][l] & 0xffffe000);
      for (int k = 0; k < 2; k++) b[t + k * 4][g] = as_float(rb[k][l] & 0xffffe000);
    } else {
      for (int k = 0; k < 4; k++)
        for (int h = 0; h < 2; h++)
          a[g + (k & 1) * 8][t * 2 + h + (k >> 1) * 8] = element((ra[k][l] >> (16 * h)) & 0xffff, kind);
      for (int k = 0; k < 2; k++)
        for (int h = 0; h < 2; h++) b[t * 2 + h + k * 8][g] = element((rb[k][l] >> (16 * h)) & 0xffff, kind);
    }
    for (int k = 0; k < 4; k++) s[g + (k >> 1) * 8][t * 2 + (k & 1)] = rc[k][l];
  }
  for (int r = 0; r < 16; r++)
    for (int k = 0; k < depth; k++)
      for (int n = 0; n < 8; n++) s[r][n] += (double)a[r][k] * (double)b[k][n];
  for (int l = 0; l < 32; l++) {
    int g = l >> 2, t = l & 3;
    for (int k = 0; k < 4; k++) rd[k][l] = matrix_sum(s[g + (k >> 1) * 8][t * 2 + (k & 1)]);
  }
}

/* Where element (row, k) of a matrix that a wgmma descriptor names lies, as a shared address. */
static uint32_t matrix_address(uint64_t desc, int row, int k, int transposed, int size) {
  uint32_t start = (desc & 0x3fff) << 4, lead = ((desc >> 16) & 0x3fff) << 4, stride = ((desc >> 32) & 0x3fff) << 4;
  int code = (desc >> 62) & 3, mode = code == 1 ? 3 : code == 3 ? 1 : code; /* 1 is 128 bytes, 3 is 32 */
  uint32_t span = mode == 0 ? 16 : 16u << mode, chunk = span / 16; /* bytes of a row of the atom */
  uint32_t at;
  if (!transposed) {
    uint32_t bytes = k * size;
    at = start + (row / 8) * stride + (row % 8) * span + (mode ? bytes : (bytes / 16) * lead + bytes % 16);
  } else {
    uint32_t piece = row / 8;
    if (mode) at = start + (piece / chunk) * lead + (piece % chunk) * 16 + (k % 8) * span + (k / 8) * stride + (row % 8) * 2;
    else at = start + piece * stride + (k % 8) * 16 + (k / 8) * lead + (row % 8) * 2;
  }
  return swizzled(at, mode);
}

/* One warp's 16 rows of a wgmma. `test` only checks that the operands may be read. */
static void wgmma(Block *B, int w, const Wgmma *q, int test) {
  const Ins *i = &B->L->code[q->ins];
  const int32_t *list = B->L->lists + i->list;
  Warp *W = &B->warps[w];
  int n = i->size, tf32 = (i->flags >> 4) & 1, kind = i->flags & 1, from_registers = (i->flags >> 1) & 1;
  int trans_a = (i->flags >> 2) & 1, trans_b = (i->flags >> 3) & 1, depth = tf32 ? 8 : 16, size = tf32 ? 4 : 2;
  static double s[16][256], b[16][256];
  float a[16][16];
  uint32_t at;
#define FROM_SHARED() (tf32 ? as_float(*(uint32_t *)(B->shared + at) & 0xffffe000) : element(*(uint16_t *)(B->shared + at), kind))
  for (int k = 0; k < depth; k++)
    for (int c = 0; c < n; c++) {
      uint32_t address = matrix_address(q->desc_b, c, k, trans_b, size);
      if (!shared_range(B, q->ins, w, 0, address, size, size, &at)) { B->abort = 1; return; }
      shared_read(B, q->ins, w, 0, at, size, 1);
      B->reading[at >> 1] += test ? 1 : -1;
      b[k][c] = FROM_SHARED();
    }
  for (int r = 0; r < 16 && !from_registers; r++)
    for (int k = 0; k < depth; k++) {
      uint32_t address = matrix_address(q->desc_a, (w & 3) * 16 + r, k, trans_a, size);
      if (!shared_range(B, q->ins, w, 0, address, size, size, &at)) { B->abort = 1; return; }
      shared_read(B, q->ins, w, 0, at, size, 1);
      B->reading[at >> 1] += test ? 1 : -1;
      a[r][k] = FROM_SHARED();
    }
  if (test) return;
  for (int l = 0; l < 32; l++) {
    int g = l >> 2, t = l & 3;
    for (int k = 0; k < 4 && from_registers; k++) {
      uint32_t x = ((uint32_t *)(W->regs + list[n / 2 + k]))[l];
      if (tf32) a[g + (k & 1) * 8][t + (k >> 1) * 4] = as_float(x & 0xffffe000);
      else for (int h = 0; h < 2; h++) a[g + (k & 1) * 8][t * 2 + h + (k >> 1) * 8] = element((x >> (16 * h)) & 0xffff, kind);
    }
    for (int k = 0; k < n / 2; k++) {
      float c = q->scale_d ? ((float *)(W->regs + list[k]))[l] : 0;
      s[g + ((k >> 1) & 1) * 8][(k >> 2) * 8 + t * 2 + (k & 1)] = c;
    }
  }
  for (int r = 0; r < 16; r++)
    for (int k = 0; k < depth; k++) {
      double x = a[r][k];
      for (int c = 0; c < n; c++) s[r][c] += x * b[k][c];
    }
  for (int l = 0; l < 32; l++)
    for (int k = 0; k < n / 2; k++)
      ((float *)(W->regs + list[k]))[l] =
          matrix_sum(s[(l >> 2) + ((k >> 1) & 1) * 8][(k >> 2) * 8 + (l & 3) * 2 + (k & 1)]);
}

static void mark_registers(Block *B, Warp *W) { /* what the pending products still use */
  memset(W->pend, 0, B->L->register_bytes / 128);
  W->npend = W->nwgmmas;
  for (int k = 0; k < W->nwgmmas; k++) {
    const Ins *i = &B->L->code[W->wgmmas[k].ins];
    const int32_t *list = B->L->lists + i->list;
    for (int j = 0; j < i->size / 2; j++) W->pend[list[j] / 128] = 1;
    if (i->flags & 2) for (int j = 0; j < 4; j++) W->pend[list[i->size / 2 + j] / 128] |= 2;
  }
}

static void finish_wgmmas(Block *B, int w, int keep) {
  Warp *W = &B->warps[w];
  int left = 0;
  for (int k = 0; k < W->nwgmmas; k++) {
    if (W->wgmmas[k].group >= W->wgroup - keep) W->wgmmas[left++] = W->wgmmas[k];
    else wgmma(B, w, &W->wgmmas[k], 0);
  }
  W->nwgmmas = left;
  mark_registers(B, W);
}

static void check_pending(Block *B, int w, int pc) {
  Warp *W = &B->warps[w];
  const Ins *i = &B->L->code[pc];
  int32_t sources[4] = {i->a, i->b, i->c, i->d};
  if (i->op == OP_WGMMA) return;
  for (int k = 0; k < 4; k++)
    if (sources[k] >= 0 && (i->op < ALU_END || k == 0) && sources[k] < B->L->register_bytes && W->pend[sources[k] / 128] & 1)
      fault(B, F_WGMMA_REGISTER, pc, w, 0, sources[k], 0);
  if (i->op < ALU_END && i->out >= 0 && W->pend[i->out / 128]) fault(B, F_WGMMA_REGISTER, pc, w, 0, i->out, 1);
  if (i->op >= ALU_END && i->op != OP_BRA)
    for (int k = 0; k < i->count; k++) {
      int32_t r = B->L->lists[i->list + k];
      if (r >= 0 && W->pend[r / 128] & 1) fault(B, F_WGMMA_REGISTER, pc, w, 0, r, 2);
    }
}
