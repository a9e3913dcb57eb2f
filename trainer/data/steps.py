"""Which pairs each optimizer step sees, and how they are spread over micro-batches and ranks.

The plan of the whole run is made before it starts and is the same on every rank: a step's pairs do
not depend on how it is split over micro-batches and ranks, and the counts that the loss divides by
are known without communication.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from functools import cached_property

import torch

from trainer.data.pairs import Pair

Indices = tuple[int, ...]
# Length at which the attention of a sequence costs what its matrices cost: 12 D^2 weights a layer,
# 2 x 12 D^2 operations a token, T / 2 keys of 4 D operations each, so T = 12 D; D is that of 8B.
ATTENTION_TOKENS = 12 * 4096


@dataclass(frozen=True)
class Step:
    """One optimizer step: `micro_batches[k][rank]` are the pairs of a rank's k-th pass, or none."""

    micro_batches: tuple[tuple[Indices, ...], ...]

    @cached_property
    def indices(self) -> Indices:
        """Every pair of the step."""
        return tuple(i for ranks in self.micro_batches for indices in ranks for i in indices)


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
