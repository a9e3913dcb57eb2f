"""A panel: the unnormalized gradient of a chunk of rows over the whole vocabulary, filled in one
pass over its logits.

For n rows, vocabulary-major, with ``c`` a cheap guess of every row's largest logit,

    E[v, i]   = exp(z[v, i] - c_i) * dz/dx         while the tile of logits is in cache
    S_i       = sum_v exp(z[v, i] - c_i),     logp_i = z[t_i, i] - c_i - log S_i
    E[t_i, i] = S_i * expm1(logp_i) * dz/dx        accurate where p is close to 1

so that ``E = S * (P - onehot) * dz/dx``: never normalized elementwise, since ``1 / S`` can scale
rows of the matmuls' small operands instead.

``c`` is the log-sum-exp over the first `PROBE` vocabulary entries. A row whose largest logit lies
more than about 60 above it
could overflow: `sums` then exceed `MAX_SUM`, and the caller fills again with ``exact=True``, whose
    ``c`` is the log-sum-exp
over all entries (1U more). fp16 starts there, because its exponents are too short for anything but
probabilities.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from rpo_kernels.engines.matmul import put_targets_
from rpo_kernels.rows import Rows
from rpo_kernels.spec import Head, accumulator_dtype

PROBE = 512  # vocabulary entries that the guess of the largest logit looks at
MAX_SUM = 2.0**86
ALIGN = 16  # rows, so that GPUs load 16 bytes at a time


class Panel(NamedTuple):
    """Rows in flight."""

    rows: Rows
    h: Tensor
    """(n, D), in the matmuls' dtype."""
    values: Tensor
    """(V, n), E with its target entries."""
    logps: Tensor
    """(n,)"""
    lse: Tensor
    """(n,)"""
    sums: Tensor
    """(n,), S."""


def capacity(vocab: int, width: int, itemsize: int, max_bytes: int) -> int:
    """Rows of a panel that fits `max_bytes` together with its operands; may be 0."""
    rows = (max_bytes - slack(max_bytes)) // (vocab * itemsize + width * (2 * itemsize + 16) + 64)
    return rows // ALIGN * ALIGN if rows > ALIGN else rows


def slack(max_bytes: int) -> int:
    """The part of the workspace left to the backend's cache tiles."""
    return min(max_bytes // 4, 2**24)


def stride(n: int, device: torch.device) -> int:
    """Elements from one vocabulary entry of a panel of n rows to the next: aligned on GPUs."""
    return n if device.type == "cpu" else -(-n // ALIGN) * ALIGN


def fill(
    hidden: Tensor,
    rows: Rows,
    head: Head,
    backend: ModuleType,
    max_bytes: int,
    exact: bool,
    buffer: Tensor,
) -> Panel:
    """Fill a panel for n `rows` of `hidden` (M, D), in `buffer` (V stride(n),): 1U, exact 2U."""
    n, vocab = rows.targets.shape[0], head.weight.shape[0]
    h = rows.take(hidden, 0, n).to(head.dtype)
    step = stride(n, hidden.device)
    values = buffer[: vocab * step].view(vocab, step)[:, :n]
    none = torch.full_like(rows.targets, -1)
    shift = h.new_full((n,), -torch.inf, dtype=accumulator_dtype(head.dtype))
    for _, weight, bias in head.panels() if exact else [next(head.panels(PROBE))]:
        part, _ = backend.lse_and_target(h, weight, bias, none, head.transform, max_bytes // 8)
        shift = torch.logaddexp(shift, part)
    sums, picked = torch.zeros_like(shift), torch.zeros_like(shift)
    for v0, weight, bias in head.panels():
        part = values[v0 : v0 + weight.shape[0]]
        backend.exp_panel(
            h, weight, bias, shift, rows.targets, v0, head.transform, part, sums, picked,
            max_bytes=slack(max_bytes),
        )  # fmt: skip
    lse = shift + sums.log()
    entry = sums * torch.expm1(picked - lse) * head.transform.slope(picked)
    put_targets_(values, rows.targets, 0, entry)
    return Panel(rows, h, values, picked - lse, lse, sums)
