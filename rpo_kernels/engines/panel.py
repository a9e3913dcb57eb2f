"""A panel: the unnormalized gradient of a chunk of rows over the whole vocabulary, filled in one
pass over its logits; and the matmuls that read it, summed in float32 whatever the inputs' dtype.

For n rows, vocabulary-major, with logits in base 2, ``y = z * log2(e)``, and ``c`` a cheap guess of
every row's largest one,

    E[v, i]   = 2^(y[v, i] - c_i) * dz/dx          while the tile of logits is in cache
    S_i       = sum_v 2^(y[v, i] - c_i),      logp_i = ln 2 * (y[t_i, i] - c_i - log2 S_i)
    E[t_i, i] = S_i * expm1(logp_i) * dz/dx        accurate where p is close to 1

so that ``E = S * (P - onehot) * dz/dx``: never normalized elementwise, since ``1 / S`` can scale
rows of the matmuls' small operands instead.

A log-sum-exp is kept as the pair ``(c, S)``, in `recompute` too: as one float32 number it would
round to eps * |z|, and so would every probability.

``c`` is the largest logit of the first `PROBE` vocabulary entries, or the target's if that is
larger, which keeps S moderate: a large one would turn far tails into denormal products with 1 / S.
A row whose largest logit lies more than about 60 above ``c`` could overflow: `overflowed` then says
so, and the caller fills again with ``exact=True``, whose ``c`` is the log-sum-exp over all entries
(1U more). fp16 starts there (`starts_exact`), because its exponents are too short for anything but
probabilities.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from rpo_kernels.backends import Backend
from rpo_kernels.rows import Rows
from rpo_kernels.spec import Head

PROBE = 512  # vocabulary entries that the guess of the largest logit looks at
MAX_SUM = 2.0**86
ALIGN = 16  # rows, so that GPUs load 16 bytes at a time
ROUNDED = 2**16  # elements of a half-precision product on a CPU, or up to
ROUNDED_ROWS = 512  # rows of it where the operands are that large themselves


class Panel(NamedTuple):
    """Rows in flight."""

    rows: Rows
    h: Tensor
    """(n, D), in the matmuls' dtype."""
    values: Tensor
    """(V, n), E with its target entries."""
    logps: Tensor
    """(n,)"""
    shift: Tensor
    """(n,), c."""
    sums: Tensor
    """(n,), S."""


def row_bytes(vocab: int, width: int, itemsize: int) -> int:
    """Bytes that a row of a panel takes, its operands included: its V entries, its hidden states
    and the scaled ones, their gradient in float32 and what its matmuls hold, a few numbers.
    """
    return vocab * itemsize + width * (2 * itemsize + 16) + 64


def capacity(vocab: int, width: int, itemsize: int, max_bytes: int) -> int:
    """Rows of a panel that fits `max_bytes` together with its operands; may be 0."""
    rows = (max_bytes - slack(max_bytes)) // row_bytes(vocab, width, itemsize)
    return rows // ALIGN * ALIGN if rows > ALIGN else rows


def slack(max_bytes: int) -> int:
    """The part of the workspace left to the backend's cache tiles."""
    return min(max_bytes // 4, 2**24)


def stride(n: int, device: torch.device) -> int:
    """Elements from one vocabulary entry of a panel of n rows to the next: aligned on GPUs."""
    return n if device.type == "cpu" else -(-n // ALIGN) * ALIGN


def empty_sum(like: Tensor) -> tuple[Tensor, Tensor]:
    """``(c, S)``, each (n,) as `like`, of a sum over nothing: 0, with `c` below any logit."""
    return torch.full_like(like, -1e38), torch.zeros_like(like)


def merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Add two sums ``S * 2^c``, each ``(c (n,), S (n,))``: the result with the larger ``c``."""
    shift = torch.maximum(one[0], other[0])
    return shift, one[1] * torch.exp2(one[0] - shift) + other[1] * torch.exp2(other[0] - shift)


def normalized(shift: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """The same ``S * 2^c`` with ``c`` its base-2 logarithm, rounded, and so S close to 1."""
    rounded = shift + sums.log2()
    return rounded, sums * torch.exp2(shift - rounded)


def starts_exact(dtype: torch.dtype) -> bool:
    """Whether matmuls of `dtype` need the exact log-sum-exp as shift from the start."""
    return dtype == torch.float16


def overflowed(sums: Tensor) -> bool:
    """Whether a panel with these `sums` (any shape) must be filled again, exactly; waits for the
    device. So does a NaN, which an overflow may have made.
    """
    return not bool((sums <= MAX_SUM).all())


def fill_panel(
    hidden: Tensor,
    rows: Rows,
    head: Head,
    backend: Backend,
    max_bytes: int,
    exact: bool,
    buffer: Tensor,
) -> Panel:
    """Fill a panel for n `rows` of `hidden` (M, D), in `buffer` (V stride(n),): 1U, exact 2U."""
    n, vocab = rows.targets.shape[0], head.weight.shape[0]
    h = rows.take(hidden, 0, n).to(head.dtype)
    step = stride(n, hidden.device)
    values = buffer[: vocab * step].view(vocab, step)[:, :n]
    room = slack(max_bytes)
    found = [
        backend.lse_and_target(h, weight, bias, rows.targets, head.transform, max_bytes // 8)
        for _, weight, bias in (head.panels() if exact else [next(head.panels(PROBE))])
    ]
    if exact:
        logs = [low + part.log2() for low, part, _ in found]
        shift = functools.reduce(torch.logaddexp2, logs)
    else:
        targets = backend.target_logits(
            h, rows.targets, head.weight, head.bias, head.transform, room
        )
        shift = torch.maximum(found[0][0], targets)
    sums, target = shift.new_zeros(2, step)[:, :n]
    for v0, weight, bias in head.panels():
        backend.exp_panel(
            h, weight, bias, shift, rows.targets, v0, head.transform,
            out=values[v0 : v0 + weight.shape[0]],
            sums=sums, target=target, max_bytes=room,
        )  # fmt: skip
    sums, target = with_exact_targets(
        h, rows.targets, head, backend, shift, sums, target, max_bytes=room
    )
    logps = backend.finish_panel(values, rows.targets, shift, sums, target, head.transform)
    return Panel(rows, h, values, logps, shift, sums)


def with_exact_targets(
    h: Tensor,
    targets: Tensor,
    head: Head,
    backend: Backend,
    shift: Tensor,
    sums: Tensor,
    target: Tensor,
    max_bytes: int,
) -> tuple[Tensor, Tensor]:
    """``S`` and the target's ``y - c``, each (n,), with the targets' logits unrounded.

    Where a device rounds products, every logit is off by eps * |z|. That of the target enters its
    log-prob undamped, all others as an average, and costs D of the row's V * D products to mend.
    """
    if not rounds_products(h):
        return sums, target
    logits = backend.target_logits(h, targets, head.weight, head.bias, head.transform, max_bytes)
    exact = logits - shift
    return (sums - target.exp2()).clamp_(min=0) + exact.exp2(), exact


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
