"""The few plain values that travel from the API down to engines and backends.

Dimension key used across the package:

    N  response tokens (rows), after every ignored label was dropped
    n  rows of the chunk at hand
    D  hidden size
    V  vocabulary size
    p  vocabulary entries of the panel at hand
    B  preference pairs; sequences 0..B-1 are chosen, B..2B-1 rejected
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Transform(NamedTuple):
    """What turns ``x = h . w + b`` into a logit: ``z = cap * tanh(scale * x / cap)``, or ``scale *
    x`` without a cap.
    """

    scale: float = 1.0
    softcap: float | None = None

    def logit(self, x: Tensor) -> Tensor:
        """``z``."""
        x = x * self.scale
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)

    def slope(self, logit: Tensor) -> Tensor:
        """``dz/dx`` from the logit ``z``: ``scale * (1 - (z / cap)^2)``."""
        if self.softcap is None:
            return torch.full_like(logit, self.scale)
        return self.scale * (1 - (logit / self.softcap).square())


class Head(NamedTuple):
    """The output layer: ``weight (V, D)``, ``bias (V,)`` or None, the logit transform, and the
    dtype of its matmuls.

    `dtype` differs from ``weight.dtype`` under autocast only; then the weight is cast panel by
    panel, never whole.
    """

    weight: Tensor
    bias: Tensor | None
    transform: Transform
    dtype: torch.dtype
    cast_bytes: int = 2**25

    def panels(self, size: int | None = None) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Yield ``(v0, weight (p, D), bias (p,) or None)`` down the vocabulary, ``p <= size``, cast
        to `dtype`.

        ``size=None`` means as few panels as the cast allows: one if there is nothing to cast, else
        `cast_bytes` of weight each.
        """
        vocab, width = self.weight.shape
        if size is None:
            size = (
                vocab
                if self.weight.dtype == self.dtype
                else max(1, self.cast_bytes // (width * self.dtype.itemsize))
            )
        for v0 in range(0, vocab, size):
            bias = None if self.bias is None else self.bias[v0 : v0 + size]
            yield v0, self.weight[v0 : v0 + size].to(self.dtype), bias


def gathered_rows(width: int, itemsize: int) -> int:
    """Rows of the weight (V, D) that skipping gathers at a time: they and their product stay in a
    CPU's cache, and well within the smallest sensible workspace.
    """
    return min(2048, max(64, 2**22 // (width * itemsize)))


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of every sum, log-prob and loss: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
