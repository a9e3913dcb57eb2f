"""The few plain values that travel from the public functions down to engines and backends.

Dimension key used across the package:

    N  response tokens (rows), after every ignored label was dropped
    n  rows of the chunk at hand
    D  hidden size
    V  vocabulary size
    p  vocabulary entries of the panel at hand
    B  preference pairs; sequences 0..B-1 are chosen, B..2B-1 rejected
"""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

LN2 = math.log(2)
# The dtype of every sum, log-prob and loss, by that of the inputs.
ACCUMULATOR = {
    torch.float64: torch.float64, torch.float32: torch.float32, torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}  # fmt: skip


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


class Objective(NamedTuple):
    """Which loss: the preference term, the SFT term, and what the two are divided by."""

    loss_type: str
    """A key of `losses.LOSSES`."""
    beta: float
    epsilon: float
    """Label smoothing."""
    gamma: float
    """SimPO's target margin."""
    sft_weight: float
    """What the SFT term is multiplied by, eta and beta included."""
    sft_reduction: str
    """One of `losses.SFT_REDUCTIONS`."""
    num_pairs: float
    """Pairs of the whole optimizer step; 0, until `normalized`, stands for the local ones."""
    num_chosen_tokens: float
    """Chosen response tokens of the whole step; 0, until `normalized`, for the local ones."""

    def normalized(self, pairs: int, chosen_tokens: int) -> Objective:
        """The same with its two normalizers as numbers, given the local counts."""
        return self._replace(
            num_pairs=float(normalizer(self.num_pairs, pairs)),
            num_chosen_tokens=float(normalizer(self.num_chosen_tokens, chosen_tokens)),
        )

    @property
    def sft_normalizer(self) -> float:
        """What the sum of the pairs' SFT terms is divided by; asks for `normalized`."""
        return self.num_chosen_tokens if self.sft_reduction == "token_mean" else self.num_pairs


def normalizer(given: float | None, local: int) -> float:
    """What a sum is divided by: the whole step's count if the caller gave it, else the local one.

    Without any pair or token the sum is 0, and so is its quotient by 1.
    """
    return given or max(local, 1)


class Settings(NamedTuple):
    """How to run: the numbers and names of one call, beside its tensors.

    PyTorch's operators take no structures: it crosses their border unpacked, as `ops` explains.
    """

    ignore_index: int
    scale: float
    softcap: float | None
    dtype: torch.dtype
    """Of the matmuls; the weight's, but under autocast."""
    validate: bool
    tolerance: float
    """`grad_tolerance`, 0 for exact gradients."""
    max_bytes: int
    """The workspace."""
    strategy: str
    """One of "recompute" and "stream": "auto" is resolved by then."""
    backend: str
    """One of `backends.BACKENDS`."""
    needs: list[bool]
    """Whether hidden, weight and bias get a gradient; operators cannot see `requires_grad`."""

    def head(self, weight: Tensor, bias: Tensor | None) -> Head:
        """The output layer (V, D); casts of its weight take an eighth of the workspace."""
        return Head(
            weight, bias, Transform(self.scale, self.softcap), self.dtype, self.max_bytes // 8
        )


_SCHEMA = {
    int: "SymInt", float: "float", float | None: "float?", bool: "bool", list[bool]: "bool[]",
    str: "str", torch.dtype: "ScalarType",
}  # fmt: skip


def schema(kind: type[Objective] | type[Settings]) -> str:
    """The fields of `kind` as arguments in the language of operator schemas."""
    hints = typing.get_type_hints(kind)
    return ", ".join(f"{_SCHEMA[hint]} {name}" for name, hint in hints.items())


def gathered_rows(width: int, itemsize: int) -> int:
    """Rows of the weight (V, D) that skipping gathers at a time: they and their product stay in a
    CPU's cache, and well within the smallest sensible workspace.
    """
    return min(2048, max(64, 2**22 // (width * itemsize)))


def target_entry(logps: Tensor, shift: Tensor, sums: Tensor, transform: Transform) -> Tensor:
    """``S * (p - 1) * dz/dx`` of every row's target, (n,): its entry of a panel with shift c (n,)
    and sums S (n,).
    """
    logit = logps + (shift + sums.log2()) * LN2
    return sums * torch.expm1(logps) * transform.slope(logit)
