"""Triton kernels; `triton_backend` launches them.

Key: n rows, D hidden size, V vocabulary, p panel entries, B pairs. With ``x = h . w + b`` logits
live in base 2,

    y = outer * x                        outer = scale * log2(e)
    y = outer * tanh(inner * x)          outer = cap * log2(e), inner = scale / cap (None: no cap)

so that ``exp(z - c) = 2^(y - c * log2(e))`` is one fused multiply-add and one `exp2`. Log-sum-exps
leave a kernel as a pair ``(c, S)``, in base 2 too, and targets' logits as ``y - c``: rounding never
exceeds that of ``y`` itself.

Operands come through tensor descriptors (Hopper, Blackwell) or pointers. Rows and vocabulary
entries beyond the end are zeros, or copies of the last one, and dropped when results are stored: no
load of a matmul loop is masked unless D is ragged. A tile's epilogue runs on a quarter of its
columns at a time: all at once would need more registers than there are. No atomics, no locks: every
value has one writer, every sum a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# lowest exponent in a panel: no denormal is ever made
FLOOR: tl.constexpr = tl.constexpr(-60 * 1.4426950408889634)
# below any logit; finite, so that rows of -inf logits do not turn into NaN
LOWEST: tl.constexpr = tl.constexpr(-1.0e38)


@triton.jit
def _tanh(x):
    square = x * x
    odd = 1.33314422036e-1 + square * (
        -5.37397155531e-2 + square * (2.06390887954e-2 - 5.70498872745e-3 * square)
    )
    near = x + x * square * (-3.33332819422e-1 + square * odd)
    far = 1 - 2 / (tl.exp2(x * (2 * LOG2E)) + 1)
    return tl.where(tl.abs(x) < 0.625, near, far)


@triton.jit
def _cap(x, inner):
    if inner is not None:
        return _tanh(x * inner)
    else:
        return x


@triton.jit
def _dot_rows(
    a, b, i, j, rows_a, rows_b, stride_a, stride_b,
    D: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``acc[x, y] = sum_d a[i + x, d] * b[j + y, d]`` in float32.

    a (rows_a, D) and b (rows_b, D) are tensor descriptors (`TMA`) or pointers.

    .           d →  BLOCK_D                 j
        i  [ a . . . | . . ]   x   d [ b^T ]   →   acc (BLOCK_A, BLOCK_B)
    """
    acc = tl.zeros((BLOCK_A, BLOCK_B), dtype=tl.float32)
    if TMA:
        for d in range(0, D, BLOCK_D):
            tile_a = a.load([i, d])
            tile_b = b.load([j, d]).T
            if INTERPRETED:  # the interpreter multiplies bf16 as raw bits
                tile_a = tile_a.to(tl.float32)
                tile_b = tile_b.to(tl.float32)
            acc = tl.dot(tile_a, tile_b, acc, input_precision=PRECISION)
    else:
        offs_d = tl.arange(0, BLOCK_D)
        offs_a = tl.minimum(i + tl.arange(0, BLOCK_A), rows_a - 1).to(tl.int64)
        offs_b = tl.minimum(j + tl.arange(0, BLOCK_B), rows_b - 1).to(tl.int64)
        a_ptrs = a + offs_a[:, None] * stride_a + offs_d[None, :]
        b_ptrs = b + offs_b[None, :] * stride_b + offs_d[:, None]
        for d in range(0, D, BLOCK_D):
            if D % BLOCK_D == 0:
                tile_a = tl.load(a_ptrs)
                tile_b = tl.load(b_ptrs)
            else:
                tile_a = tl.load(a_ptrs, mask=offs_d[None, :] < D - d, other=0.0)
                tile_b = tl.load(b_ptrs, mask=offs_d[:, None] < D - d, other=0.0)
            if INTERPRETED:
                tile_a = tile_a.to(tl.float32)
                tile_b = tile_b.to(tl.float32)
            acc = tl.dot(tile_a, tile_b, acc, input_precision=PRECISION)
            a_ptrs += BLOCK_D
            b_ptrs += BLOCK_D
    return acc


@triton.jit
def _grouped(pid, blocks, others, GROUP: tl.constexpr):
    """Programs in groups of GROUP `blocks`, fastest first: ``(block, other)`` of program `pid`."""
    first = pid // (GROUP * others) * GROUP
    size = tl.minimum(blocks - first, GROUP)
    inside = pid % (GROUP * others)
    return first + inside % size, inside // size


@triton.jit
def _halves(x):
    rows: tl.constexpr = x.shape[0]
    columns: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x, (rows, 2, columns)), (0, 2, 1)))


@triton.jit
def _quarters(acc):
    """Cut ``acc`` into four blocks of columns."""
    left, right = _halves(acc)
    first, second = _halves(left)
    third, fourth = _halves(right)
    return first, second, third, fourth


@triton.jit
def _online(x, v, stop, bias, target, running_max, running_sum, picked, inner, outer):
    """Continue ``max`` and ``sum 2^(y - max)`` over the columns of ``x (n, v)``; pick targets."""
    offs_v = v + tl.arange(0, x.shape[1])
    if bias is not None:
        x += tl.load(bias + tl.minimum(offs_v, stop - 1)).to(tl.float32)[None, :]
    y = outer * _cap(x, inner)
    hit = (target >= v) & (target < v + x.shape[1])
    if tl.max(hit.to(tl.int32), 0) > 0:
        picked += tl.sum(tl.where(target[:, None] == offs_v[None, :], y, 0.0), 1)
    y = tl.where((offs_v < stop)[None, :], y, float("-inf"))
    new_max = tl.maximum(running_max, tl.max(y, 1))
    running_sum = running_sum * tl.exp2(running_max - new_max) + tl.sum(
        tl.exp2(y - new_max[:, None]), 1
    )
    return new_max, running_sum, picked


@triton.jit(do_not_specialize=["n", "span", "splits"])
def lse_partials(
    hidden,  # (n, D)
    weight,  # (V, D)
    bias,  # (V,) or None
    targets,  # (n,) int64
    partials,  # (2, splits, n) float32: running max and sum, in base 2
    target,  # (n,) float32: y[i, targets[i]]
    n,
    V,
    span,  # vocabulary entries of a split, a multiple of BLOCK_V
    splits,
    stride_hn,
    stride_wv,
    inner,
    outer,
    D: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``max_v y[i, v]``, ``sum_v 2^(y[i, v] - max)`` over a span of entries; ``y`` of targets.

    Grid (row blocks * splits,), row blocks of a group fastest: they share the tiles of W, and their
    H stays in L2.

    .            V →  |  split 0    |  split 1    |
        H block i     | acc acc acc | acc acc acc |    one program walks one span, online
    """
    pid_n, split = _grouped(tl.program_id(0), tl.cdiv(n, BLOCK_N), splits, GROUP)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < n
    column = tl.load(targets + offs_n, mask=mask_n, other=-1).to(tl.int32)
    running_max = tl.full((BLOCK_N,), LOWEST, tl.float32)
    running_sum = tl.zeros((BLOCK_N,), tl.float32)
    picked = tl.zeros((BLOCK_N,), tl.float32)
    start = split * span
    stop = tl.minimum(start + span, V)
    for v in range(start, stop, BLOCK_V):
        acc = _dot_rows(
            hidden, weight, pid_n * BLOCK_N, v, n, V, stride_hn, stride_wv,
            D, TMA, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        quarters = _quarters(acc)
        for k in tl.static_range(4):
            running_max, running_sum, picked = _online(
                quarters[k], v + k * (BLOCK_V // 4), stop, bias, column,
                running_max, running_sum, picked, inner, outer,
            )  # fmt: skip
    row = partials + split.to(tl.int64) * n + offs_n
    tl.store(row, running_max, mask=mask_n)
    tl.store(row + splits.to(tl.int64) * n, running_sum, mask=mask_n)
    tl.store(target + offs_n, picked, mask=mask_n & (column >= start) & (column < stop))


@triton.jit(do_not_specialize=["n", "splits"])
def lse_merge(
    partials,  # (2, splits, n) float32
    shift,  # (n,) float32: c
    sums,  # (n,) float32: S
    n,
    splits,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``c[i] = max_s max[s, i]`` and ``S[i] = sum_s 2^(max[s, i] - c[i]) * sum[s, i]``.

    Grid (row blocks,).

    .            n →
        s [ max, sum ]   (BLOCK_S, BLOCK_N) at a time, online down the splits
    """
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    running_max = tl.full((BLOCK_N,), LOWEST, tl.float32)
    running_sum = tl.zeros((BLOCK_N,), tl.float32)
    for s in range(0, splits, BLOCK_S):
        offs_s = s + tl.arange(0, BLOCK_S).to(tl.int64)
        mask = (offs_s < splits)[:, None] & (offs_n < n)[None, :]
        tile = partials + offs_s[:, None] * n + offs_n[None, :]
        part_max = tl.load(tile, mask=mask, other=LOWEST)
        part_sum = tl.load(tile + splits.to(tl.int64) * n, mask=mask, other=0.0)
        new_max = tl.maximum(running_max, tl.max(part_max, 0))
        part_sum *= tl.exp2(part_max - new_max[None, :])
        running_sum = running_sum * tl.exp2(running_max - new_max) + tl.sum(part_sum, 0)
        running_max = new_max
    tl.store(shift + offs_n, running_max, mask=offs_n < n)
    tl.store(sums + offs_n, running_sum, mask=offs_n < n)


@triton.jit
def _finish(
    x, v, offs_n, bias, shift, targets, out, target,
    n, reach, p, v0, stride_ov, inner, outer, slope,
):  # fmt: skip
    """From ``x (n, v)`` to its tile of the panel and the targets' ``y - shift``; the row sums.

    Columns from n to `reach` get numbers without a meaning: a store that must end at n, not at a
    multiple of 16, would be one of 2 bytes for each element.
    """
    offs_v = v + tl.arange(0, x.shape[1])
    mask_v = offs_v < p
    mask_n = offs_n < n
    if bias is not None:
        x += tl.load(bias + offs_v, mask=mask_v, other=0.0).to(tl.float32)[None, :]
    capped = _cap(x, inner)
    y = outer * capped
    if target is not None:
        local = tl.load(targets + offs_n, mask=mask_n, other=-1) - v0
        hit = (local >= v) & (local < tl.minimum(v + x.shape[1], p))
        if tl.max(hit.to(tl.int32), 0) > 0:
            column = tl.where(hit, local, -1).to(tl.int32)
            picked = tl.sum(tl.where(column[:, None] == offs_v[None, :], y, 0.0), 1)
            low = tl.load(shift + offs_n, mask=mask_n, other=0.0)
            tl.store(target + offs_n, picked - low, mask=hit)
    low = tl.load(shift + offs_n, mask=mask_n, other=0.0)
    e = tl.exp2(tl.maximum(y - low[:, None], FLOOR, propagate_nan=tl.PropagateNan.ALL))
    jacobian = 1.0
    if inner is not None:
        jacobian = slope * (1 - capped * capped)
    elif slope is not None:
        jacobian = slope
    tile = out + offs_v.to(tl.int64)[None, :] * stride_ov + offs_n[:, None]
    mask = (offs_n < reach)[:, None] & mask_v[None, :]
    tl.store(tile, (e * jacobian).to(out.dtype.element_ty), mask=mask)
    return tl.sum(tl.where(mask_v[None, :], e, 0.0), 1)


@triton.jit(do_not_specialize=["n", "v0"])
def exp_fused(
    hidden,  # (n, D)
    weight,  # (p, D)
    bias,  # (p,) or None
    shift,  # (n,) float32
    targets,  # (n,) int64
    out,  # (p, n), stride (stride_ov, 1)
    part_sum,  # (vocabulary blocks, n) float32 or None
    target,  # (n,) float32 or None
    n,
    reach,  # columns of out that may be written: at least n, a multiple of 16 if possible
    p,
    v0,
    stride_hn,
    stride_wv,
    stride_ov,
    inner,
    outer,
    slope,
    D: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``out[v, i] = 2^(y[v, i] - shift[i]) * dz/dx[v, i]``; its block sums over v, unsloped.

    Grid (vocabulary blocks * row blocks,), GROUP vocabulary blocks take turns on each row block.

    .             D →              n →                 n →
        v  [ W . . . | . . ]  x  [ H^T ]  →  out  v [ tile ]     part_sum  v/BLOCK_V [ ---- ]
    """
    pid_v, pid_n = _grouped(tl.program_id(0), tl.cdiv(p, BLOCK_V), tl.cdiv(n, BLOCK_N), GROUP)
    acc = _dot_rows(
        hidden, weight, pid_n * BLOCK_N, pid_v * BLOCK_V, n, p, stride_hn, stride_wv,
        D, TMA, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    v = pid_v * BLOCK_V
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    quarters = _quarters(acc)
    for k in tl.static_range(4):
        start = v + k * (BLOCK_V // 4)
        total += _finish(
            quarters[k], start, offs_n, bias, shift, targets, out, target,
            n, reach, p, v0, stride_ov, inner, outer, slope,
        )  # fmt: skip
    if part_sum is not None:
        tl.store(part_sum + pid_v.to(tl.int64) * n + offs_n, total, mask=offs_n < n)


@triton.jit(do_not_specialize=["n", "v0"])
def exp_epilogue(
    out,  # (p, n), stride (stride_ov, 1): h . w on entry
    bias,  # (p,) or None
    shift,  # (n,) float32
    targets,  # (n,) int64
    part_sum,  # (vocabulary blocks, n) float32 or None
    target,  # (n,) float32 or None
    n,
    reach,  # columns of out that may be written: at least n, a multiple of 16 if possible
    p,
    v0,
    stride_ov,
    inner,
    outer,
    slope,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Turn ``h . w`` in `out` into what `exp_fused` writes, in place; the same by-products.

    Grid (vocabulary blocks, row blocks).

    .         n →
        v  [ tile ]     part_sum  v/BLOCK_V [ ---- ]     a program reads and writes one tile
    """
    v = tl.program_id(0) * BLOCK_V
    offs_v = (v + tl.arange(0, BLOCK_V)).to(tl.int64)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_n < reach)[:, None] & (offs_v < p)[None, :]
    x = tl.load(out + offs_v[None, :] * stride_ov + offs_n[:, None], mask=mask, other=0.0).to(
        tl.float32
    )
    total = _finish(
        x, v, offs_n, bias, shift, targets, out, target,
        n, reach, p, v0, stride_ov, inner, outer, slope,
    )  # fmt: skip
    if part_sum is not None:
        tl.store(part_sum + tl.program_id(0).to(tl.int64) * n + offs_n, total, mask=offs_n < n)
