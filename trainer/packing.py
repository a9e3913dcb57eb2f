"""Which pairs each optimizer step sees, and how pairs become one batch without padding.

B pairs, 2B sequences (chosen first), T tokens of all sequences together.

The plan of the whole run is made before it starts and is the same on every rank: a step's pairs do
not depend on how it is split over micro-batches and ranks, and the counts that the loss divides by
are known without communication.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.encoding import Pair

Indices = tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One optimizer step: `micro_batches[k][rank]` are the pairs of a rank's k-th pass, or none."""

    micro_batches: tuple[tuple[Indices, ...], ...]

    @property
    def indices(self) -> Indices:
        """Every pair of the step."""
        return tuple(i for ranks in self.micro_batches for indices in ranks for i in indices)


@dataclass(frozen=True)
class Batch:
    """B packed pairs: one row of sequences, chosen ones first; positions restart at each."""

    input_ids: Tensor
    """(1, T) int64."""
    position_ids: Tensor
    """(1, T) int64, 0 at the start of every sequence."""
    labels: Tensor
    """(T,) int64, aligned with hidden states: the next token where it is trained on, else -100."""
    cu_seqlens: Tensor
    """(2B + 1,) int32, where every sequence starts, and T."""
    indices: Indices
    """The B pairs' places in their data set."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        tensors = (self.input_ids, self.position_ids, self.labels, self.cu_seqlens)
        return Batch(*(tensor.to(device) for tensor in tensors), self.indices)


def _split(indices: list[int], parts: int) -> list[Indices]:
    """`parts` consecutive runs whose lengths differ by one at most."""
    bounds = [round(k * len(indices) / parts) for k in range(parts + 1)]
    return [tuple(indices[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]


def plan_pass(order: list[int], pairs_per_step: int, ranks: int, accumulation: int) -> list[Step]:
    """Cut one pass over the pairs `order` into steps; a smaller last one is spread evenly."""
    steps = []
    for start in range(0, len(order), pairs_per_step):
        parts = _split(order[start : start + pairs_per_step], accumulation * ranks)
        steps.append(
            Step(tuple(tuple(parts[k * ranks : (k + 1) * ranks]) for k in range(accumulation)))
        )
    return steps


def plan_training(
    num_pairs: int,
    *,
    batch_size: int,
    accumulation: int,
    ranks: int,
    epochs: float,
    max_steps: int,
    seed: int,
) -> list[Step]:
    """Plan a whole run: every epoch is its own random order of all pairs.

    Args:
        num_pairs: size of the training set.
        batch_size: pairs per forward pass of one rank.
        accumulation: forward passes per step; the step's size is ``batch_size * accumulation *
            ranks``.
        ranks: number of processes.
        epochs: passes over the data, used where `max_steps` is -1.
        max_steps: number of steps, or -1.
        seed: seed of the orders.
    """
    pairs_per_step = batch_size * accumulation * ranks
    per_epoch = math.ceil(num_pairs / pairs_per_step)
    total = max_steps if max_steps > 0 else math.ceil(epochs * per_epoch)
    generator = torch.Generator().manual_seed(seed)
    steps: list[Step] = []
    while len(steps) < total:
        order = torch.randperm(num_pairs, generator=generator).tolist()
        steps += plan_pass(order, pairs_per_step, ranks, accumulation)
    return steps[:total]


def first_visits(steps: list[Step]) -> list[Step]:
    """The leading steps that see every pair of the plan, once each: an epoch repeats none."""
    wanted = {i for step in steps for i in step.indices}
    for count, step in enumerate(steps, 1):
        wanted -= set(step.indices)
        if not wanted:
            return steps[:count]
    return steps


def pack(pairs: list[Pair], indices: Indices) -> Batch:
    """Pack the pairs at `indices`; no pair at all becomes one token that nothing is trained on."""
    chosen, rejected = [pairs[i].chosen for i in indices], [pairs[i].rejected for i in indices]
    sequences = chosen + rejected
    lengths = [len(sequence.ids) for sequence in sequences]
    ids = [token for sequence in sequences for token in sequence.ids] or [0]
    positions = [position for length in lengths for position in range(length)] or [0]
    labels = [label for sequence in sequences for label in sequence.labels]
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return Batch(
        torch.tensor([ids]),
        torch.tensor([positions]),
        torch.tensor(labels, dtype=torch.long),
        ends,
        indices,
    )
