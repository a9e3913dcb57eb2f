"""Preference pairs as token ids and labels, and the data sets that they form.

Labels are aligned with hidden states: `labels[t]` is the token that position t predicts, if it is
trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    pass

IGNORE = -100


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
    """Tokens that both begin with and that are computed once (`batches.share_prefixes`)."""
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
