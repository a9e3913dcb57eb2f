"""Leave out the part of the gradient that cannot matter, and certify how much that was.

A softmax puts nearly all of its mass on few of its V entries, and entry v contributes to the
gradients of a block of rows in proportion to its mass there. With weights ``|g_i|`` for the rows,

    mass[v] = sum_i |g_i| * |P - onehot|[v, i] * dz/dx         the L1 mass of entry v in dlogits

Keep the heaviest (entry, block) combinations until at most ``grad_tolerance`` of the total is
dropped; an entry that is a target of its block always stays. The matmuls then run on gathered rows
of W, contiguous along D (`kept_products` of the backends). What is kept is not renormalized: that
would make the error worse.

A tolerance is leave, not an order. Gathered products are slower than dense ones, so they pay only
where few combinations are kept: `pays` estimates that share from one entry in `SAMPLE` of the first
panel of a call, and above `break_even` all of the call runs exactly, with nothing skipped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 256  # rows that share one choice of vocabulary entries
SAMPLE = 32  # one vocabulary entry in so many tells whether skipping pays
# `benchmarks/break_even.py` found 0.46 to 0.7 of the combinations on CPUs, the least where D is
# small. Half precision with matrix units (AMX) never gains: they multiply faster than one gathers.
CPU_BREAK_EVEN = 0.45
# On an H100, as shares of the dense products that a call needs: for every share kept; for choosing,
# which reads a panel, D times cheaper than a product; in FLOP, for launches that nothing hides. Of
# 14 problems (4k to 64k tokens, D = 2,048 and 4,096, a quarter kept), they get right which gained.
KEPT_COST, CHOICE_COST, LAUNCHES_COST = 2.2, 700.0, 4.4e12
STEPS = 18  # bisection steps for the threshold, in log2 of the mass


def split_rows(edges: list[int]) -> list[tuple[int, int]]:
    """``(start, stop)`` of blocks of at most `BLOCK` rows that never cross one of `edges`
    (ascending, from 0 to n).
    """
    return [
        (start, min(start + BLOCK, edge))
        for begin, edge in zip(edges[:-1], edges[1:], strict=True)
        for start in range(begin, edge, BLOCK)
    ]


def mask_shape(rows: int, sequences: int, vocab: int, tolerance: float) -> tuple[int, int]:
    """Shape (blocks, V) of the mask of kept entries that `recompute` leaves for backward: known
    before the rows are counted, so with room for the blocks of any rows kept.
    """
    return (rows // BLOCK + sequences + 1, vocab) if tolerance else (0, vocab)


def break_even(weight: Tensor, dtype: torch.dtype, rows: int, needs: Sequence[bool]) -> float:
    """The largest share of combinations kept at which skipping pays; 0 or less for never.

    Args:
        weight: (V, D). dtype: of the matmuls.
        rows: N of the whole call.
        needs: whether hidden and weight need a gradient, a product each; what follows is not read.
    """
    if weight.device.type == "cpu":
        units = dtype.itemsize < 4 and torch.cpu._is_amx_tile_supported()
        return 0.0 if units else CPU_BREAK_EVEN
    products = 2.0 * rows * weight.numel() * sum(needs[:2])
    fixed = CHOICE_COST / weight.shape[1] + LAUNCHES_COST / max(products, 1.0)
    return (1 - fixed) / KEPT_COST


def pays(
    panel: Tensor, sums: Tensor, targets: Tensor, weights: Tensor, tolerance: float, most: float
) -> bool:
    """Whether a panel keeps at most the share `most` of its (entry, block) combinations; waits for
    the device.

    Light entries are what is dropped, and they are many: a sample of entries, with its share of the
    budget, finds the threshold of all of them. Nothing of the certificate depends on it.

    Args:
        panel, sums, targets, weights, tolerance: as in `choose_entries`, of at least one row.
        most: from `break_even`.
    """
    sample = panel[::SAMPLE]
    share = sample.shape[0] / panel.shape[0]
    scale = weights / sums
    largest = weights.amax().clamp(min=1e-37)
    unscaled = (scale / largest).to(panel.dtype)
    mass = torch.stack([
        torch.mv(sample[:, start:stop], unscaled[start:stop]).to(scale.dtype)
        for start, stop in split_rows([0, panel.shape[1]])
    ])  # fmt: skip
    mass = torch.where(mass < 0, 0, mass)  # a block whose heaviest entry is a target's
    columns = torch.arange(panel.shape[1], device=panel.device)
    total = -2 * (panel[targets, columns].to(scale.dtype) * scale / largest).sum()
    budget = (total * (tolerance * share)).view(1)
    kept = (~(mass <= _threshold(mass.view(1, -1), budget))).double().mean()  # NaN is kept
    return bool(kept <= most)


def choose_entries(
    panel: Tensor,
    sums: Tensor,
    targets: Tensor,
    weights: Tensor,
    tolerance: float,
    blocks: list[tuple[int, int]],
    together: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the entries to keep.

    Args:
        panel: (V, n) ``S * (P - onehot) * dz/dx``: all entries but the targets' are positive.
        sums: (n,) S. targets: (n,). weights: (n,) ``|g|``, or ones where g is not known yet.
        tolerance: share of the L1 mass that may be dropped, in (0, 1).
        blocks: ranges of rows that cover the panel.
        together: one budget for all blocks; else each block keeps within its own, so that the bound
            holds for any weights that are constant within blocks.

    Returns:
        ``keep (blocks, V)`` bool; ``dropped`` and ``total`` L1 mass, weighted, each (blocks,).
    """
    (vocab, rows), scale = panel.shape, weights / sums
    columns = torch.arange(rows, device=panel.device)
    on_target = panel[targets, columns].to(scale.dtype) * scale  # negative
    largest = weights.amax().clamp(min=1e-37)
    unscaled = (scale / largest).to(panel.dtype)
    rounded, place = panel.new_empty(len(blocks), vocab), torch.empty_like(targets)
    for row, (start, stop) in enumerate(blocks):
        torch.mv(panel[:, start:stop], unscaled[start:stop], out=rounded[row])
        place[start:stop] = row * vocab
    mass = rounded.to(scale.dtype).mul_(largest)
    ends = torch.stack([on_target[start:stop].sum() for start, stop in blocks])
    total = mass.sum(1) - 2 * ends
    mass.view(-1).index_fill_(0, place + targets, torch.inf)  # always kept
    if panel.dtype.itemsize < 4:
        mass.mul_(1 + 2**-6)  # rounding of half-precision sums must not break the certificate
    finite = torch.where(mass == torch.inf, 0, mass)
    if together:
        threshold = _threshold(finite.view(1, -1), total.sum(0, keepdim=True) * tolerance)
    else:
        threshold = _threshold(finite, total * tolerance)
    keep = ~(mass <= threshold)  # all, where a row is NaN
    return keep, torch.where(keep, 0, finite).sum(1), total


def _threshold(mass: Tensor, budget: Tensor) -> Tensor:
    """Per row of `mass` (r, k) a bound (r, 1) such that all at or below it sum to at most `budget`
    (r,): bisection.
    """
    high = mass.amax(1, keepdim=True).clamp(min=1e-37).log2() + 1
    low = high - 64  # entries 2^63 times lighter than the heaviest are dropped in any case
    for _ in range(STEPS):
        middle = (low + high) / 2
        fits = torch.where(mass <= middle.exp2(), mass, 0).sum(1, keepdim=True) <= budget[:, None]
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return low.exp2()
