"""Which pairs each optimizer step sees, and how pairs become one batch without padding.

    B pairs, 2B sequences (chosen first), T packed tokens, N trained tokens of all sequences

The plan of the whole run is made before it starts and is the same on every rank: a step's pairs do
not depend on how it is split over micro-batches and ranks, and the counts that the loss divides by
are known without communication.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trainer.attention import PairLayout
from trainer.pairs import IGNORE, Pair

Indices = tuple[int, ...]
# Length at which the attention of a sequence costs what its matrices cost: 12 D^2 weights a layer,
# 2 x 12 D^2 operations a token, T / 2 keys of 4 D operations each, so T = 12 D; D is that of 8B.
ATTENTION_TOKENS = 12 * 4096


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

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        names = ("input_ids", "position_ids", "rows", "labels", "cu_seqlens")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


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


def cost(pair: Pair) -> float:
    """What a pair's forward and backward cost, in tokens: T + c T^2 by its sequences.

    Every packed token passes the matrices; attention goes by the (query, key) couples, of which a
    prefix that both sequences share has its own once.
    """
    lengths = len(pair.chosen.ids), len(pair.rejected.ids)
    return pair.packed_tokens + (sum(n * n for n in lengths) - pair.shared**2) / ATTENTION_TOKENS


def spread(step: Step, costs: list[float], batch_size: int) -> Step:
    """The same step in as many micro-batches, of about equal cost, so that no rank waits for long.

    Pairs go, the most expensive first, into the micro-batch that is cheapest so far and has room.
    Where a pair costs more than an even share, micro-batches of like cost run at the same time.

    Args:
        step: its pairs; how it was split gives the numbers of micro-batches and ranks.
        costs: of every pair of the data set.
        batch_size: most pairs of one micro-batch; all of them must have room for the step.
    """
    rounds, ranks = len(step.micro_batches), len(step.micro_batches[0])
    batches: list[list[int]] = [[] for _ in range(rounds * ranks)]
    cheapest = [(0.0, k) for k in range(len(batches))]  # a heap of those with room
    order = {i: place for place, i in enumerate(step.indices)}
    for i in sorted(step.indices, key=lambda i: (-costs[i], order[i])):
        load, k = heapq.heappop(cheapest)
        batches[k].append(i)
        if len(batches[k]) < batch_size:
            heapq.heappush(cheapest, (load + costs[i], k))
    return _line_up([sorted(batch, key=order.__getitem__) for batch in batches], costs, ranks)


def _line_up(batches: list[list[int]], costs: list[float], ranks: int) -> Step:
    """Rounds of `ranks` micro-batches of like cost; every other round goes through the ranks
    backwards, so that none has the most expensive of all.
    """
    batches = sorted(batches, key=lambda batch: -sum(costs[i] for i in batch))
    rounds = [batches[k : k + ranks] for k in range(0, len(batches), ranks)]
    turned = [batches[::-1] if k % 2 else batches for k, batches in enumerate(rounds)]
    return Step(tuple(tuple(map(tuple, batches)) for batches in turned))


def regroup(step: Step, tokens: list[int], costs: list[float], budget: int, ranks: int) -> Step:
    """The same step in micro-batches of at most `budget` tokens, their costs spread over ranks.

    Pairs go, the most expensive first, to the rank with the least cost so far, and there into the
    first micro-batch that has room. A rank with fewer micro-batches than another has empty ones;
    each begins with its most expensive one, so that those of like cost run at the same time.

    Args:
        step: its pairs; how it was split does not matter.
        tokens: of every pair of the data set, in a packed row.
        costs: of every pair of the data set.
        budget: most tokens of one micro-batch; at least those of the step's longest pair.
        ranks: number of processes.
    """
    shares: list[list[list[int]]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for i in sorted(step.indices, key=lambda i: (-costs[i], i)):
        rank = loads.index(min(loads))
        loads[rank] += costs[i]
        for batch in shares[rank]:
            if sum(tokens[j] for j in batch) + tokens[i] <= budget:
                batch.append(i)
                break
        else:
            shares[rank].append([i])
    for share in shares:
        share.sort(key=lambda batch: -sum(costs[i] for i in batch))
    rounds = max(map(len, shares))
    return Step(
        tuple(
            tuple(tuple(share[k]) if k < len(share) else () for share in shares)
            for k in range(rounds)
        )
    )


def first_visits(steps: list[Step]) -> list[Step]:
    """The leading steps that see every pair of the plan, once each: an epoch repeats none."""
    wanted = {i for step in steps for i in step.indices}
    for count, step in enumerate(steps, 1):
        wanted -= set(step.indices)
        if not wanted:
            return steps[:count]
    return steps


def share_prefixes(pairs: list[Pair]) -> list[Pair]:
    """The same pairs, the tokens that both sequences begin with marked as computed once."""
    return [replace(pair, shared=_common(pair.chosen.ids, pair.rejected.ids)) for pair in pairs]


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix."""
    size = min(len(a), len(b))
    differs = np.asarray(a[:size]) != np.asarray(b[:size])
    return int(differs.argmax()) if differs.any() else size


def pack(pairs: list[Pair], indices: Indices) -> Batch:
    """Pack the pairs at `indices`; no pair at all becomes one token that nothing is trained on."""
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
        torch.as_tensor(np.concatenate(ids or [[0]]), dtype=torch.long)[None],
        layout.positions()[None],
        layout,
        torch.cat(rows),
        torch.cat([rows[0], *labels]),
        torch.tensor(counts).cumsum(0, dtype=torch.int32),
        indices,
    )
