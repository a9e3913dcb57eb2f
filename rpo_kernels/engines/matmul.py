"""Matmuls that accumulate in float32, whatever the inputs' dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def matmul_into(out: Tensor, a: Tensor, b: Tensor, accumulate: bool, scale: float = 1.0) -> None:
    """``out (+)= scale * a (m, k) @ b (k, n)``; `a` and `b` of one dtype, `out` of that or the
    accumulators' dtype.

    Half-precision products are summed in float32 by the matrix units on GPUs. CPUs offer no
    half-precision matmul with a
    float32 result: there each product is rounded once to the inputs' dtype before it is added.
    """
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=float(accumulate), alpha=scale, out=out)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=float(accumulate), alpha=scale, out=out)
    elif accumulate:
        out.add_(torch.mm(a, b), alpha=scale)
    else:
        torch.mul(torch.mm(a, b), scale, out=out)


def put_targets_(panel: Tensor, targets: Tensor, v0: int, values: Tensor) -> None:
    """``panel[targets[i] - v0, i] = values[i]`` for the rows whose target lies in the panel ``(p,
    n)``; no synchronization.
    """
    index = targets - v0
    inside = (index >= 0) & (index < panel.shape[0])
    index = index.clamp(0, panel.shape[0] - 1)
    columns = torch.arange(panel.shape[1], device=panel.device)
    panel[index, columns] = torch.where(inside, values.to(panel.dtype), panel[index, columns])
