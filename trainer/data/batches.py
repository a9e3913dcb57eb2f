"""How pairs become one batch without padding, and which of its tokens see which.

B pairs, 2B sequences (chosen first), T packed tokens, N trained tokens of all sequences
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from trainer.data.pairs import IGNORE, Pair
from trainer.data.steps import Indices

SHOWN = 5  # pairs that an error names; the rest are counted


@dataclass(eq=False)  # torch 2.11 guards all fields of a frozen one: it would compile every batch
class PairLayout:
    """Where the tokens of B packed pairs stand in their row."""

    lengths: tuple[tuple[int, int, int], ...]
    """Tokens of every pair's prefix, rest of chosen, rest of rejected."""
    block_masks: dict[int | None, BlockMask] = field(default_factory=dict)
    """FlexAttention's masks by window, filled when first needed."""

    def sequences(self) -> list[Tensor]:
        """The places (n,) of each of the 2B sequences' tokens in the row, chosen ones first."""
        chosen, rejected = [], []
        starts = accumulate((sum(pair) for pair in self.lengths), initial=0)
        for start, (prefix, c, r) in zip(starts, self.lengths, strict=False):
            places = torch.arange(start, start + prefix + c + r)
            chosen.append(places[: prefix + c])
            rejected.append(torch.cat([places[:prefix], places[prefix + c :]]))
        return chosen + rejected

    def positions(self) -> Tensor:
        """Place of each of the T tokens in its own sequence."""
        steps = [
            torch.cat([torch.arange(p + c), torch.arange(p, p + r)]) for p, c, r in self.lengths
        ]
        return torch.cat(steps)

    def block_mask(self, window: int | None, device: torch.device) -> BlockMask:
        """What sees what, as FlexAttention takes it."""
        if window not in self.block_masks:
            total = sum(map(sum, self.lengths))
            self.block_masks[window] = create_block_mask(
                self.visible(window, device), None, None, total, total, device, _compile=True
            )
        return self.block_masks[window]

    def visible(self, window: int | None, device: torch.device):  # noqa: ANN201
        """``(batch, head, query, key) -> bool``: whether a token of the row sees another."""
        spans = torch.tensor(self.lengths).flatten()
        pair = torch.arange(len(self.lengths)).repeat_interleave(spans.view(-1, 3).sum(1))
        branch = torch.arange(3).repeat(len(self.lengths)).repeat_interleave(spans)
        position = self.positions()
        pair, branch, position = (x.to(device) for x in (pair, branch, position))

        def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            distance = position[query] - position[key]
            related = (branch[key] == 0) | (branch[key] == branch[query])
            seen = (pair[query] == pair[key]) & related & (distance >= 0)
            return seen if window is None else seen & (distance < window)

        return sees


class Pass(NamedTuple):
    """One forward of the backbone: T tokens, packed pairs or a sequence, of which n are trained."""

    ids: Tensor
    """(1, T) int64."""
    rows: Tensor
    """(n,) int64, the tokens whose hidden states predict trained tokens."""
    sequences: list[Tensor]
    """The places (m,) of each sequence's tokens."""
    packed: bool


@dataclass(frozen=True)
class Batch:
    """B packed pairs in one row; each is its prefix, the rest of chosen, the rest of rejected."""

    input_ids: Tensor
    """(1, T) int64."""
    position_ids: Tensor
    """(1, T) int64, a token's place in its own sequence."""
    layout: PairLayout
    """Which of the T tokens see which."""
    rows: Tensor
    """(N,) int64, the token whose hidden state predicts each trained token; a prefix's last token
    predicts the first of both responses."""
    labels: Tensor
    """(N,) int64, the trained tokens, sequence by sequence, chosen ones first."""
    cu_seqlens: Tensor
    """(2B + 1,) int32, where every sequence's trained tokens start, and N."""
    indices: Indices
    """The B pairs' places in their data set."""
    most_pairs: int = 0
    """Pairs of the rank with the most of this micro-batch, if there are several ranks."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        names = ("input_ids", "position_ids", "rows", "labels", "cu_seqlens")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def passes(self, packed: bool) -> Iterator[Pass]:
        """The forwards of the backbone that this batch takes: one of the row, or one a sequence.

        Sequences alone are at least one, and as many as the rank with the most pairs has: what they
        lack are single tokens that nothing is trained on.
        """
        sequences = self.layout.sequences()[: 2 * len(self.indices)]
        if packed:
            yield Pass(self.input_ids, self.rows, sequences, packed)
            return
        device, ends = self.input_ids.device, self.cu_seqlens.tolist()
        for k, places in enumerate(sequences):
            rows = self.position_ids[0, self.rows[ends[k] : ends[k + 1]]]
            ids = self.input_ids[:, places.to(device)]
            yield Pass(ids, rows, [torch.arange(len(places))], packed)
        for _ in range(max(1, 2 * self.most_pairs) - len(sequences)):
            yield Pass(self.input_ids[:, :1], self.rows[:0], [], packed)


def share_prefixes(pairs: list[Pair]) -> list[Pair]:
    """The same pairs, the tokens that both sequences begin with marked as computed once."""
    return [replace(pair, shared=_common(pair.chosen.ids, pair.rejected.ids)) for pair in pairs]


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix."""
    size = min(len(a), len(b))
    differs = np.asarray(a[:size]) != np.asarray(b[:size])
    return int(differs.argmax()) if differs.any() else size


def pack(pairs: list[Pair], indices: Indices, ranks: tuple[Indices, ...] = ()) -> Batch:
    """Pack the pairs at `indices`; no pair at all becomes one token that nothing is trained on.

    `ranks` are the pairs of every rank in the same micro-batch, where there are several.
    """
    picked = [pairs[i] for i in indices]
    ids = [part for p in picked for part in (p.chosen.ids, p.rejected.ids[p.shared :])]
    lengths = [
        (pair.shared, len(pair.chosen.ids) - pair.shared, len(pair.rejected.ids) - pair.shared)
        for pair in picked
    ]
    layout = PairLayout(tuple(lengths) or ((1, 0, 0),))
    sequences = [pair.chosen for pair in picked] + [pair.rejected for pair in picked]
    rows, labels, counts = [torch.empty(0, dtype=torch.long)], [], [0]
    for sequence, places in zip(sequences, layout.sequences(), strict=False):
        targets = torch.as_tensor(sequence.labels, dtype=torch.long)
        trained = targets != IGNORE
        rows.append(places[trained])
        labels.append(targets[trained])
        counts.append(len(labels[-1]))
    return Batch(
        torch.as_tensor(np.concatenate(ids or [np.zeros(1, np.int32)]), dtype=torch.long)[None],
        layout.positions()[None],
        layout,
        torch.cat(rows),
        torch.cat([rows[0], *labels]),
        torch.tensor(counts).cumsum(0, dtype=torch.int32),
        indices,
        max(map(len, (indices, *ranks))),
    )


@dataclass
class Split:
    """A data set ready to train on or to evaluate: its pairs, and what the report says of them."""

    pairs: list[Pair]
    report: dict[str, object] = field(default_factory=dict)
    reference: Callable[[Batch], Tensor] | None = None
    """Summed reference log-probs (2B,) in nats of a batch of pairs, chosen ones first."""
    own_reference: bool = False
    """Whether the reference is the policy as it is at the start."""

    @cached_property
    def tokens(self) -> np.ndarray:
        """Tokens of every pair's two sequences, prompts included; of a step, indexed by it."""
        return np.array([pair.tokens for pair in self.pairs])

    @cached_property
    def chosen_tokens(self) -> np.ndarray:
        """Trained tokens of every pair's chosen response."""
        return np.array([pair.chosen.trained_tokens for pair in self.pairs])


def named_pairs(split: Split, indices: Iterable[int]) -> str:
    """The pairs at `indices` by where they come from, the first few, for an error."""
    names = [split.pairs[i].source or f"pair {i}" for i in indices]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
