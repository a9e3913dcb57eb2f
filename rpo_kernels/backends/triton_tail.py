"""The tail of the loss in one Triton kernel: segmented sums, pair losses, metrics, coefficients;
and what backward does with the gradients that were made in forward.

The losses are those of `rpo_kernels.losses`, compiled from the same source: a loss function's code
object with Triton's `exp`, `log`, `where`, ... as its globals.

Key: N rows, B pairs.
"""

from __future__ import annotations

import types

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpo_kernels.backends import tiles
from rpo_kernels.backends.launch import dense, on_device
from rpo_kernels.losses import LOSSES
from rpo_kernels.spec import Objective


@triton.jit
def _exp(x):
    return tl.exp(x)


@triton.jit
def _log(x):
    return tl.log(x)


@triton.jit
def _where(condition, x, y):
    return tl.where(condition, x, y)


@triton.jit
def _relu(x):
    return tl.where(x < 0, 0.0, x)


@triton.jit
def _sigmoid(x):
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0, small, 0 * small + 1) / (1 + small)


@triton.jit
def _logsigmoid(x):
    small = tl.exp(-tl.abs(x))
    return -_relu(-x) - tl.where(small < 1e-5, small - 0.5 * small * small, tl.log(1 + small))


def _compile(pair):
    """A loss of `rpo_kernels.losses` as a device function: the same code, with Triton's globals."""
    here = {"tl": tl, "exp": _exp, "log": _log, "where": _where}
    here |= {"relu": _relu, "sigmoid": _sigmoid, "logsigmoid": _logsigmoid}
    return triton.jit(
        types.FunctionType(pair.__code__, {**pair.__globals__, **here}, pair.__name__)
    )


LOSS_FUNCTIONS = {name: _compile(loss.pair) for name, loss in LOSSES.items()}


@triton.jit
def _sum_rows(logps, start, stop, BLOCK: tl.constexpr):
    """``sum(logps[start:stop])`` in float64, rounded to float32 like stored reference log-probs."""
    acc = tl.zeros((BLOCK,), tl.float64)
    for i in range(start, stop, BLOCK):
        offs_n = i + tl.arange(0, BLOCK)
        acc += tl.load(logps + offs_n, mask=offs_n < stop, other=0.0).to(tl.float64)
    return tl.sum(acc, 0).to(tl.float32).to(tl.float64)


@triton.jit
def _fill_rows(coef, start, stop, value, BLOCK: tl.constexpr):
    for i in range(start, stop, BLOCK):
        offs_n = i + tl.arange(0, BLOCK)
        tl.store(
            coef + offs_n, tl.zeros((BLOCK,), tl.float32) + value.to(tl.float32), mask=offs_n < stop
        )


@triton.jit
def rpo_tail(
    logps,  # (N,) float32
    offsets,  # (2B + 1,) int64
    ref_logps,  # (2B,) or None
    pairs,  # (B, 6) float32
    coef,  # (N,) float32
    beta,
    epsilon,
    gamma,
    inv_pairs,  # 1 / num_pairs
    sft_factor,  # sft_weight / num_pairs, or / num_chosen_tokens
    LOSS: tl.constexpr,
    MEAN: tl.constexpr,
    SFT_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``value, d_c, d_r = LOSS(q(chosen), q(rejected))`` of pair b, in float64; metrics; `coef`.

    Grid (B,).

    .   logps  | chosen 0 | ... | chosen B-1 | rejected 0 | ... | rejected B-1 |
        program b: sum chosen b, sum rejected b → LOSS → pairs[b], coef of the same rows
    """
    b = tl.program_id(0).to(tl.int64)
    num = tl.num_programs(0)
    start_c, stop_c = tl.load(offsets + b), tl.load(offsets + b + 1)
    start_r, stop_r = tl.load(offsets + num + b), tl.load(offsets + num + b + 1)
    s_c = _sum_rows(logps, start_c, stop_c, BLOCK)
    s_r = _sum_rows(logps, start_r, stop_r, BLOCK)
    per_c = 1 / tl.maximum(stop_c - start_c, 1).to(tl.float64)
    per_r = 1 / tl.maximum(stop_r - start_r, 1).to(tl.float64)
    live = (stop_c - start_c) + (stop_r - start_r) > 0
    c, r = s_c, s_r
    if ref_logps is not None:
        c = tl.where(live, s_c - tl.load(ref_logps + b).to(tl.float64), 0.0)
        r = tl.where(live, s_r - tl.load(ref_logps + num + b).to(tl.float64), 0.0)
    if MEAN:
        c *= per_c
        r *= per_r
    beta = tl.cast(beta, tl.float64)
    value, d_c, d_r = LOSS(c, r, beta, tl.cast(epsilon, tl.float64), tl.cast(gamma, tl.float64))
    if MEAN:
        d_c *= per_c
        d_r *= per_r
    sft, d_sft = -s_c, tl.cast(sft_factor, tl.float64)
    if SFT_MEAN:
        sft *= per_c
        d_sft *= per_c
    row = pairs + b * 6
    tl.store(row, tl.where(live, value, 0.0).to(tl.float32))
    tl.store(row + 1, sft.to(tl.float32))
    tl.store(row + 2, s_c.to(tl.float32))
    tl.store(row + 3, s_r.to(tl.float32))
    tl.store(row + 4, (beta * c).to(tl.float32))
    tl.store(row + 5, (beta * r).to(tl.float32))
    _fill_rows(coef, start_c, stop_c, d_c * inv_pairs - d_sft, BLOCK)
    _fill_rows(coef, start_r, stop_r, d_r * inv_pairs, BLOCK)


@triton.jit(do_not_specialize=["size"])
def scale_in_place(tensor, factor, size, BLOCK: tl.constexpr):
    """``tensor[i] *= factor`` for i < size; reads nothing but the factor where that is 1.

    Grid (programs,), each of which takes every ``programs``-th block.
    """
    value = tl.load(factor).to(tl.float32)
    if value != 1:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, step):
            offs = start + tl.arange(0, BLOCK)
            x = tl.load(tensor + offs, mask=offs < size)
            scaled = (x.to(tl.float32) * value).to(tensor.dtype.element_ty)
            tl.store(tensor + offs, scaled, mask=offs < size)


def scale_(tensor: Tensor, factor: Tensor) -> None:
    """`Backend.scale_`: the factor is looked at on the device."""
    blocks = -(-tensor.numel() // tiles.SCALE_BLOCK)
    programs = min(blocks, 8 * tiles.of_device(tensor.device)[1])
    with on_device(tensor):
        scale_in_place[(programs,)](
            tensor=tensor,
            factor=factor,
            size=tensor.numel(),
            BLOCK=tiles.SCALE_BLOCK,
            num_warps=8,
            enable_fp_fusion=True,
        )


def tail(
    logps: Tensor, offsets: Tensor, ref_logps: Tensor | None, objective: Objective
) -> tuple[Tensor, Tensor]:
    """`Backend.tail` in one kernel."""
    num = offsets.shape[0] // 2
    pairs = logps.new_empty(num, 6)
    coef = torch.empty_like(logps)
    if num == 0:
        return pairs, coef
    with on_device(logps):
        rpo_tail[(num,)](
            logps=dense(logps),
            offsets=dense(offsets),
            ref_logps=dense(ref_logps),
            pairs=pairs,
            coef=coef,
            beta=float(objective.beta),
            epsilon=float(objective.epsilon),
            gamma=float(objective.gamma),
            inv_pairs=1.0 / objective.num_pairs,
            sft_factor=objective.sft_weight / objective.sft_normalizer,
            LOSS=LOSS_FUNCTIONS[objective.loss_type],
            MEAN=LOSSES[objective.loss_type].mean,
            SFT_MEAN=objective.sft_reduction == "sequence_mean",
            BLOCK=tiles.TAIL_TOKENS,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return pairs, coef
