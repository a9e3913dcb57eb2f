"""What the rows bring to the backward pass of `recompute`, whatever part of the vocabulary it
walks: the factors that turn E into gradients, and a chunk of rows that fills panels of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rpo_kernels.backends import Backend
from rpo_kernels.engines.panel import row_factors, row_sizes, scale_of
from rpo_kernels.rows import Rows
from rpo_kernels.spec import Head, Transform, target_entry


class Saved(NamedTuple):
    """What backward gets of the M rows given."""

    grad: Tensor
    """(M,) upstream gradient."""
    logps: Tensor
    """(M,), as `forward` found them."""
    norm: Tensor
    """(M, 2), likewise."""


class Chunk(NamedTuple):
    """Rows in flight: all that their panels and matmuls need."""

    h: Tensor
    """(n, D), in the matmuls' dtype."""
    scaled: Tensor
    """(n, D), ``coef * h``."""
    coef: Tensor
    """(n,), see `Terms`, in the matmuls' dtype."""
    targets: Tensor
    """(n,)"""
    shift: Tensor
    entry: Tensor

    def panel(
        self,
        out: Tensor,
        v0: int,
        weight: Tensor,
        bias: Tensor | None,
        transform: Transform,
        backend: Backend,
        max_bytes: int = 2**24,
    ) -> Tensor:
        """Fill `out` (p, n) with E of the entries `weight` (p, D), `bias` (p,) from `v0` on."""
        h, shift, targets = self.h, self.shift, self.targets
        backend.exp_panel(h, weight, bias, shift, targets, v0, transform, out, max_bytes=max_bytes)
        backend.put_targets_(out, targets, v0, self.entry)
        return out


class Terms(NamedTuple):
    """What the N kept rows bring to backward, each (N,) but `scale` ()."""

    targets: Tensor
    shift: Tensor
    entry: Tensor
    """E of the targets."""
    factor: Tensor
    """``-g / S``, for the rows of dH."""
    coef: Tensor
    """``-g / S`` over `scale`, for the rows of H in matmuls: no denormals."""
    scale: Tensor

    def chunk(self, h: Tensor, where: slice | Tensor, dtype: torch.dtype) -> Chunk:
        """The rows `where`, whose hidden states are `h` (n, D), for matmuls in `dtype`."""
        h, coef = h.to(dtype), self.coef[where]
        scaled = (h * coef[:, None]).to(dtype)
        rows = self.targets[where], self.shift[where], self.entry[where]
        return Chunk(h, scaled, coef.to(dtype), *rows)


def terms_of(saved: Saved, hidden: Tensor, rows: Rows, head: Head) -> Terms:
    """The terms of the kept `rows` of `hidden` (M, D), before any panel is filled."""
    total = rows.targets.shape[0]
    grad, logps, norm = (rows.take(x, 0, total) for x in saved)
    shift, sums = norm.t().contiguous().unbind()  # kernels read them panel after panel
    sizes = row_sizes(hidden, head)
    scale = scale_of(grad, None if sizes is None else rows.take(sizes, 0, total))
    return Terms(
        rows.targets,
        shift,
        target_entry(logps, shift, sums, head.transform),
        -grad / sums,
        row_factors(grad, scale, sums),
        scale,
    )
