"""What concerns one logit of a row, that of its target: three small Triton kernels, each in place
of ten or more of PyTorch's, whose launches would take longer than their work.

Key: n rows, D hidden size, V vocabulary, p panel entries.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpo_kernels.backends import tiles
from rpo_kernels.backends.launch import base2_factors, dense, on_device
from rpo_kernels.backends.triton_kernels import _cap
from rpo_kernels.spec import Transform

LN2: tl.constexpr = tl.constexpr(math.log(2))


@triton.jit(do_not_specialize=["n"])
def pick_logits(
    hidden,  # (n, D)
    weight,  # (V, D)
    bias,  # (V,) or None
    targets,  # (n,) int64
    out,  # (n,) float32
    n,
    stride_hn,
    stride_wv,
    inner,
    outer,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``out[i] = y[i, targets[i]]``: the products of one row of W each, in float32.

    Grid (row blocks,).
    """
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < n
    v = tl.load(targets + offs_n, mask=mask_n, other=0)
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        mask = mask_n[:, None] & (offs_d < D)[None, :]
        h = tl.load(hidden + offs_n[:, None] * stride_hn + offs_d[None, :], mask=mask, other=0.0)
        w = tl.load(weight + v[:, None] * stride_wv + offs_d[None, :], mask=mask, other=0.0)
        acc += h.to(tl.float32) * w.to(h.dtype).to(tl.float32)
    x = tl.sum(acc, 1)
    if bias is not None:
        x += tl.load(bias + v, mask=mask_n, other=0.0).to(tl.float32)
    tl.store(out + offs_n, outer * _cap(x, inner), mask=mask_n)


@triton.jit
def _put(panel, offs_n, mask_n, local, p, stride_pv, values):
    inside = mask_n & (local >= 0) & (local < p)
    place = panel + local * stride_pv + offs_n
    tl.store(place, values.to(panel.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n", "v0"])
def put_entries(
    panel,  # (p, n), stride (stride_pv, 1)
    targets,  # (n,) int64
    values,  # (n,) float32
    n,
    p,
    v0,
    stride_pv,
    BLOCK_N: tl.constexpr,
):
    """``panel[targets[i] - v0, i] = values[i]`` where that lies in the panel.

    Grid (row blocks,).
    """
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < n
    local = tl.load(targets + offs_n, mask=mask_n, other=-1) - v0
    values = tl.load(values + offs_n, mask=mask_n, other=0.0)
    _put(panel, offs_n, mask_n, local, p, stride_pv, values)


@triton.jit(do_not_specialize=["n"])
def finish_rows(
    panel,  # (V, n), stride (stride_pv, 1)
    targets,  # (n,) int64
    shift,  # (n,) float32
    sums,  # (n,) float32
    target,  # (n,) float32: y - shift of the targets
    logps,  # (n,) float32
    n,
    V,
    stride_pv,
    inner_slope,  # 1 / (cap * log2(e)), or None
    slope,
    BLOCK_N: tl.constexpr,
):
    """``logps[i] = ln 2 * (y_t - c - log2 S)``, and ``panel[t, i] = S * expm1(logp) * dz/dx``.

    In float64, which costs nothing for n numbers: the approximate logarithm would lose what p
    differs from 1 by. Grid (row blocks,).
    """
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < n
    total = tl.load(sums + offs_n, mask=mask_n, other=1.0)
    y = tl.load(target + offs_n, mask=mask_n, other=0.0)
    logp = (y.to(tl.float64) - tl.log2(total.to(tl.float64))) * LN2
    miss = tl.where(logp > -1e-5, logp + 0.5 * logp * logp, tl.exp(logp) - 1)
    entry = total * miss.to(tl.float32) * slope
    if inner_slope is not None:
        capped = (y + tl.load(shift + offs_n, mask=mask_n, other=0.0)) * inner_slope
        entry *= 1 - capped * capped
    tl.store(logps + offs_n, logp.to(tl.float32), mask=mask_n)
    local = tl.load(targets + offs_n, mask=mask_n, other=-1)
    _put(panel, offs_n, mask_n, local, V, stride_pv, entry)


def target_logits(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transform: Transform,
    max_bytes: int,
) -> Tensor:
    """`Backend.target_logits` in one kernel, without temporaries."""
    n = hidden.shape[0]
    out = hidden.new_empty(n, dtype=torch.float32)
    if n == 0:
        return out
    with on_device(hidden):
        pick_logits[(-(-n // tiles.PICK_ROWS),)](
            hidden=hidden,
            weight=weight,
            bias=dense(bias),
            targets=dense(targets),
            out=out,
            n=n,
            stride_hn=hidden.stride(0),
            stride_wv=weight.stride(0),
            **base2_factors(transform),
            D=hidden.shape[1],
            BLOCK_N=tiles.PICK_ROWS,
            BLOCK_D=tiles.PICK_WIDTH,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out


def put_targets_(panel: Tensor, targets: Tensor, v0: int, values: Tensor) -> None:
    """`Backend.put_targets_` in one kernel."""
    if panel.numel() == 0:
        return
    n = panel.shape[1]
    with on_device(panel):
        put_entries[(-(-n // tiles.TARGET_ROWS),)](
            panel=panel,
            targets=dense(targets),
            values=dense(values),
            n=n,
            p=panel.shape[0],
            v0=v0,
            stride_pv=panel.stride(0),
            BLOCK_N=tiles.TARGET_ROWS,
            num_warps=4,
            enable_fp_fusion=True,
        )


def finish_panel(
    panel: Tensor,
    targets: Tensor,
    shift: Tensor,
    sums: Tensor,
    target: Tensor,
    transform: Transform,
) -> Tensor:
    """`Backend.finish_panel` in one kernel."""
    logps = torch.empty_like(sums)
    if panel.numel() == 0:
        return logps
    n, cap = panel.shape[1], transform.softcap
    with on_device(panel):
        finish_rows[(-(-n // tiles.TARGET_ROWS),)](
            panel=panel,
            targets=dense(targets),
            shift=dense(shift),
            sums=dense(sums),
            target=dense(target),
            logps=logps,
            n=n,
            V=panel.shape[0],
            stride_pv=panel.stride(0),
            inner_slope=None if cap is None else math.log(2) / cap,
            slope=float(transform.scale),
            BLOCK_N=tiles.TARGET_ROWS,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return logps
