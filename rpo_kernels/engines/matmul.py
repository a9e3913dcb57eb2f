"""Matmuls that accumulate in float32, whatever the inputs' dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from rpo_kernels.spec import Head

ROUNDED = 2**16  # elements of a half-precision product on a CPU, or up to
ROUNDED_ROWS = 512  # rows of it where the operands are that large themselves


def rounds_products(x: Tensor) -> bool:
    """Whether matmuls of `x` are rounded to its dtype: half precision on a CPU."""
    return x.dtype.itemsize < 4 and x.device.type == "cpu"


def matmul_into(out: Tensor, a: Tensor, b: Tensor, accumulate: bool, scale: float = 1.0) -> None:
    """``out (+)= scale * a (m, k) @ b (k, n)``; `a` and `b` of one dtype, `out` of that or the
    accumulators' dtype.

    Half-precision products are summed in float32 by the matrix units on GPUs. CPUs offer no
    half-precision matmul with a float32 result: there each product is rounded once to the inputs'
    dtype before it is added, some rows of `out` at a time.
    """
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=float(accumulate), alpha=scale, out=out)
    elif a.device.type != "cpu":
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=float(accumulate), alpha=scale, out=out)
    else:
        step = max(1, ROUNDED // out.shape[1], min(ROUNDED_ROWS, a.shape[0] // 2, a.shape[1] // 2))
        for row in range(0, out.shape[0], step):
            part = out[row : row + step]
            product = torch.mm(a[row : row + step], b).to(out.dtype)
            part.add_(product, alpha=scale) if accumulate else torch.mul(product, scale, out=part)


def row_sizes(h: Tensor, head: Head) -> Tensor | None:
    """For fp16, else None: the largest ``|dz/dx h|`` of every row of `h` (n, D), at least that of
    the bias, (n,).
    """
    if head.dtype != torch.float16:
        return None
    low, high = torch.aminmax(h, dim=1)
    largest = torch.maximum(-low, high)
    largest = torch.where(largest.isfinite(), largest, 1).float().clamp(min=1)
    return largest * head.transform.scale


def scale_of(coef: Tensor, sizes: Tensor | None) -> Tensor:
    """A power of two () to divide `coef` (n,) by before a matmul that sums over rows: at least the
    largest ``|coef|``, 1 if there is none.

    fp16 sums must not overflow either: with `sizes` (n,), those of the rows, it is also at least
    ``sum |coef| size`` over 2^15, half of the largest float16.
    """
    magnitude = coef.abs()
    scale = magnitude.amax() if coef.shape[0] else coef.new_zeros(())
    if sizes is not None:
        scale = torch.maximum(scale, (magnitude * sizes).sum() / 2**15)
    return torch.where(scale > 0, torch.exp2(scale.log2().ceil().clamp(min=-100)), 1)


def row_factors(coef: Tensor, scale: Tensor | float, sums: Tensor) -> Tensor:
    """``-coef / (scale * S)`` (n,): what rows of H are multiplied by on the way to dW.

    On a CPU a `coef` 1e20 times smaller than the largest counts as 0: it would add nothing but
    denormal products, which slow CPUs tenfold.
    """
    if coef.device.type != "cpu":
        return coef / (sums * -scale)
    scaled = -coef / scale
    return torch.where(scaled.abs() < 1e-20, 0, scaled / sums)
