"""Which rows count, and to which sequence they belong: ignored labels are dropped before the first
matmul, with one device synchronization a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

MOVED = 256  # rows that are copied at a time


def send(values: list[int], device: torch.device) -> Tensor:
    """`values` as an int64 tensor on `device`; `Tensor.new_tensor` would wait for the device."""
    pinned = device.type == "cuda"
    host = torch.tensor(values, dtype=torch.int64, pin_memory=pinned)
    return host.to(device, non_blocking=True)


class Rows(NamedTuple):
    """The kept rows of a ``(M, D)`` tensor: `positions` (N,) (None if all are kept),
    `targets` (N,) their labels.
    """

    positions: Tensor | None
    targets: Tensor

    def take(self, source: Tensor, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the kept rows of `source` (M, ...): a view if all are kept,
        else a copy.
        """
        return (
            source[start:stop]
            if self.positions is None
            else source.index_select(0, self.positions[start:stop])
        )

    def accumulator(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Zeros for `put`, whose first N rows gather what belongs to the kept rows: (M, D) as
        `like` if of its dtype, since they become the result, else (N, D).
        """
        rows = like.shape[0] if dtype == like.dtype else self.targets.shape[0]
        return like.new_zeros(rows, like.shape[1], dtype=dtype)

    def put(self, like: Tensor, values: Tensor) -> Tensor:
        """A tensor like `like` (M, D) with the first N rows of `values`, an `accumulator`, in the
        kept rows and zeros elsewhere.
        """
        if self.positions is None:
            return values.to(like.dtype)
        in_place = values.dtype == like.dtype  # rows move up, the last ones first
        out = values if in_place else torch.zeros_like(like)
        for start, stop in reversed(list(self.chunks(MOVED))):
            rows = values[start:stop].to(like.dtype, copy=True)
            out.index_copy_(0, self.positions[start:stop], rows)
        if in_place:
            empty = torch.ones(like.shape[0], 1, dtype=torch.bool, device=like.device)
            out.masked_fill_(empty.index_fill_(0, self.positions, False), 0)
        return out

    def spread(self, values: Tensor, total: int) -> Tensor:
        """``values (N, ...)`` at their rows' places among `total` rows M, zeros elsewhere."""
        if self.positions is None:
            return values
        zeros = values.new_zeros(total, *values.shape[1:])
        return zeros.index_copy_(0, self.positions, values)

    def ranges(self, parts: list[tuple[int, int]]) -> Rows:
        """The kept rows ``(start, stop)`` of each of `parts`, in that order: needs `positions`."""
        assert self.positions is not None
        kept = (self.positions, self.targets)
        found = ([x[start:stop] for start, stop in parts] for x in kept)
        positions, targets = (x[0] if len(x) == 1 else torch.cat(x) for x in found)
        return Rows(positions, targets)

    def subset(self, order: Tensor) -> Rows:
        """The kept rows at positions `order` (n,), in that order."""
        return Rows(
            order if self.positions is None else self.positions.index_select(0, order),
            self.targets[order],
        )

    def chunks(self, size: int) -> Iterator[tuple[int, int]]:
        """``(start, stop)`` of consecutive chunks of at most `size` rows."""
        total = self.targets.shape[0]
        for start in range(0, total, size):
            yield start, min(start + size, total)


def check_offsets(offsets: list[int], rows: int) -> None:
    """Raise ValueError unless the sequences' offsets rise from 0 to `rows`."""
    steps = [stop - start for start, stop in zip(offsets[:-1], offsets[1:], strict=True)]
    if offsets[0] != 0 or offsets[-1] != rows or min(steps, default=0) < 0:
        raise ValueError(
            f"cu_seqlens: expected offsets that rise from 0 to {rows} (the rows of hidden), got "
            f"first {offsets[0]}, last {offsets[-1]}, smallest step {min(steps, default=0)}"
        )


def sum_sequences(values: Tensor, offsets: Tensor) -> Tensor:
    """Sums (S,) of `values` (N,) over the sequences that `offsets` (S + 1,) int64 delimit: in
    float64 and a fixed order, then rounded, as reference log-probs are that somebody stored.
    """
    sums = torch.segment_reduce(values.double(), "sum", offsets=offsets, initial=0.0)
    return sums.to(values.dtype)


def count_tokens(labels: Tensor, ignore_index: int, cu_seqlens: Tensor) -> Tensor:
    """Kept labels (M,) of every sequence that `cu_seqlens` (S + 1,) delimits: (S,) int64."""
    kept = labels != ignore_index
    ends = torch.cat([cu_seqlens.new_zeros(1), kept.cumsum(0)])  # traced: nothing in place
    return ends[cu_seqlens.long()].diff()


def keep_rows(
    targets: Tensor, vocab: int, ignore_index: int, validate: bool, cu_seqlens: Tensor | None = None
) -> tuple:
    """Drop ignored labels.

    Args:
        targets: (M,) int64.
        vocab: V; labels must lie in [0, V) or equal `ignore_index`.
        ignore_index: label of the rows to drop.
        validate: check the labels' range (and `cu_seqlens`), in the synchronization that counting
            needs anyway.
        cu_seqlens: (2B + 1,) row offsets of the sequences, or None.

    Returns:
        `Rows`, and the kept rows' offsets of every sequence as a list of 2B + 1 ints (``[0, N]``
        without `cu_seqlens`).

    Raises:
        ValueError: a label out of range, or offsets that do not rise from 0 to M.
    """
    rows = targets.shape[0]
    kept = targets != ignore_index
    ends = torch.zeros(rows + 1, dtype=torch.int64, device=targets.device)
    torch.cumsum(kept, 0, out=ends[1:])
    given = send([0, rows], targets.device) if cu_seqlens is None else cu_seqlens.long()
    # wrong offsets must not index out of range: they are refused below, once all is on the host
    facts = [ends[given.clamp(0, rows)]]
    if validate:
        inside = torch.where(kept, targets, torch.zeros_like(targets))
        bounds = inside.new_zeros(1) if rows == 0 else inside
        facts += [torch.stack([bounds.min(), bounds.max()]), given]
    flat = torch.cat(facts).tolist()
    offsets = flat[: given.shape[0]]
    if validate:
        low, high, *ends_given = flat[given.shape[0] :]
        name = "targets" if cu_seqlens is None else "labels"  # the public functions' argument
        if low < 0 or high >= vocab:
            raise ValueError(
                f"{name}: expected values in [0, {vocab}) or ignore_index={ignore_index}, got "
                f"values from {low} to {high}; mask padding with ignore_index and check that "
                "weight covers the tokenizer's vocabulary"
            )
        check_offsets(ends_given, rows)
    if offsets[-1] == rows:
        return Rows(None, targets), offsets
    # nonzero would wait for the device again to learn the count, which is known by now
    on_cpu = kept.device.type == "cpu"
    index = kept.nonzero() if on_cpu else torch.nonzero_static(kept, size=offsets[-1])
    index = index[:, 0]
    return Rows(index, targets[index]), offsets
