"""Where the tokens of packed pairs stand in their row, and which of them see which."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


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
