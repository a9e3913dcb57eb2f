"""Preference pairs as token ids and labels, and the data sets that they form.

Labels are aligned with hidden states: `labels[t]` is the token that position t predicts, if it is
trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from trainer.packing import Batch

IGNORE = -100
SHOWN = 5  # pairs that an error names; the rest are counted


@dataclass(frozen=True, eq=False, slots=True)
class Sequence:
    """One prompt and response: T token ids; T labels, the next id if it is trained on, or -100."""

    ids: np.ndarray
    """(T,) int32."""
    labels: np.ndarray
    """(T,) int32."""

    @property
    def trained_tokens(self) -> int:
        """Number of tokens that the loss sees."""
        return int((self.labels != IGNORE).sum())


@dataclass(frozen=True, eq=False, slots=True)
class Pair:
    """The chosen and the rejected sequence of one row."""

    chosen: Sequence
    rejected: Sequence
    shared: int = 0
    """Tokens that both begin with and that are computed once (`packing.share_prefixes`)."""
    source: str = ""
    """Where it comes from, `file:line` or `dataset[split]:row`, for errors."""

    @property
    def tokens(self) -> int:
        """Tokens of both sequences, prompt included."""
        return len(self.chosen.ids) + len(self.rejected.ids)

    @property
    def longest(self) -> int:
        """Tokens of the longer sequence."""
        return max(len(self.chosen.ids), len(self.rejected.ids))

    @property
    def place(self) -> str:
        """Where the pair comes from, as words to put into an error."""
        return f" ({self.source})" if self.source else ""

    @property
    def packed_tokens(self) -> int:
        """Tokens of the pair in a packed row, where the shared ones stand once."""
        return self.tokens - self.shared


@dataclass
class Split:
    """A data set ready to train on or to evaluate: its pairs, and what the report says of them."""

    pairs: list[Pair]
    report: dict[str, object] = field(default_factory=dict)
    reference: Callable[[Batch], Tensor] | None = None
    """Summed reference log-probs (2B,) in nats of a batch of pairs, chosen ones first."""
    own_reference: bool = False
    """Whether the reference is the policy as it is at the start."""


def named_pairs(split: Split, indices: Iterable[int]) -> str:
    """The pairs at `indices` by where they come from, the first few, for an error."""
    names = [split.pairs[i].source or f"pair {i}" for i in indices]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
