"""Which tokens of a pair that is longer than `max_length` remain: a function of lengths only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Limits:
    """How long a pair may be, and what happens to a longer one.

    A longer pair first loses prompt tokens, no more than needed and never below
    `max_prompt_length`; what is still too long loses the ends of its responses. Both sequences keep
    the same prompt, and every response keeps its first tokens.
    """

    max_length: int
    """Most tokens of a sequence, >= 2."""
    max_prompt_length: int | None = None
    """Prompt tokens that a longer pair may keep in any case; None is half of `max_length`."""
    mode: Literal["keep_end", "keep_start", "drop"] = "keep_end"
    """Which end of the prompt remains; `drop` leaves longer pairs out."""

    def too_long(self, prompt: int, longest: int) -> str | None:
        """Why `mode` drop leaves a pair out; lengths of the prompt and of the longer response."""
        if prompt + longest > self.max_length:
            return "longer than max_length"
        if self.max_prompt_length is not None and prompt > self.max_prompt_length:
            return "prompt longer than max_prompt_length"
        return None

    def cut(self, prompt: int, longest: int, head: int, tail: int) -> tuple[np.ndarray, int]:
        """What remains of a pair.

        Args:
            prompt, longest: tokens of the prompt and of the longer response.
            head: tokens at the prompt's start that are never cut (BOS).
            tail: tokens at its end that are never cut (what opens the assistant's turn).

        Returns:
            Positions of the prompt tokens that remain, and the most tokens of a response.
        """
        least = self.max_length // 2 if self.max_prompt_length is None else self.max_prompt_length
        kept = min(prompt, max(least, self.max_length - longest))
        head, tail = (head, tail) if head + tail < kept else (0, 0)
        if self.mode == "keep_end":
            start, end = head, kept - head
        else:
            start, end = kept - tail, tail
        positions = np.arange(prompt)
        remains = np.concatenate([positions[:start], positions[prompt - end :]])
        return remains, self.max_length - kept
