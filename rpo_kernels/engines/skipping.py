"""Leave out the part of the gradient that cannot matter, and certify how much that was.

A softmax puts nearly all of its mass on few of its V entries, and entry v contributes to the
gradients of a block of rows in proportion to its mass there. With weights ``|g_i|`` for the rows,

    mass[v] = sum_i |g_i| * |P - onehot|[v, i] * dz/dx         the L1 mass of entry v in dlogits

Keep the heaviest (entry, block) combinations until at most ``grad_tolerance`` of the total is
dropped; an entry that is a target of its block always stays. The matmuls then run on gathered rows
of W, contiguous along D (`kept_products` of the backends). What is kept is not renormalized: that
would make the error worse.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256  # rows that share one choice of vocabulary entries
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
    scale = weights / sums
    columns = torch.arange(panel.shape[1], device=panel.device)
    on_target = panel[targets, columns].to(scale.dtype) * scale  # negative
    largest = weights.amax().clamp(min=1e-37)
    mass = scale.new_empty(len(blocks), panel.shape[0])
    total = scale.new_empty(len(blocks))
    for row, (start, stop) in enumerate(blocks):
        unscaled = (scale[start:stop] / largest).to(panel.dtype)
        mass[row] = torch.mv(panel[:, start:stop], unscaled)
        total[row] = mass[row].sum() * largest - 2 * on_target[start:stop].sum()
        mass[row, targets[start:stop]] = torch.inf  # always kept
    mass.mul_(largest)
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
