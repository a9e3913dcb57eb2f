"""What trainers log of the distribution over the vocabulary, without logits.

    N rows, D hidden size, V vocabulary

Entropy and the most likely token need every logit of a row, which the loss engines use and forget:
this is a pass of its own, 1 U = 2 N V D FLOP, in tiles of bounded size, without gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rpo_kernels import checks
from rpo_kernels.spec import ACCUMULATOR, Transform

CPU_TILE, GPU_TILE = 2**19, 2**26  # logits of a tile; a CPU's should stay in its cache
ROWS = 512  # of a tile


class VocabularyStatistics(NamedTuple):
    """Of the distributions ``softmax(z)`` of N rows, in float32 (float64); all 0 where ignored."""

    entropy: Tensor
    """(N,), in nats."""
    mean_logits: Tensor
    """(N,), mean of z over the vocabulary."""
    is_top1: Tensor
    """(N,) bool, whether the target is the most likely token, the first one of equals."""
    log_sum_sq_probs: Tensor
    """(N,), log of the sum of squared probabilities."""


class _Fold:
    """Running statistics of n rows while tiles of their logits pass."""

    def __init__(self, like: Tensor) -> None:
        self.top = torch.full_like(like, -torch.inf)
        self.index = torch.zeros_like(like, dtype=torch.int64)
        self.sums, self.weighted, self.squares, self.total = (
            torch.zeros_like(like) for _ in "1234"
        )

    def add(self, logits: Tensor, first: int) -> None:
        """Fold in the logits (n, p) of the entries from `first` on; they are overwritten."""
        self.total += logits.sum(1)
        top, index = logits.max(1)  # the first of equals
        self.index = torch.where(top > self.top, index + first, self.index)
        top = torch.maximum(top, self.top)
        scale = torch.exp(self.top - top)
        powers = torch.exp(logits - top[:, None])
        self.top = top
        self.sums = self.sums * scale + powers.sum(1)
        self.weighted = self.weighted * scale + logits.mul_(powers).sum(1)
        self.squares = self.squares * scale.square() + powers.square_().sum(1)

    def result(self, targets: Tensor, vocab: int) -> tuple[Tensor, ...]:
        """The fields of `VocabularyStatistics` (n,)."""
        log_sum = self.sums.log()
        return (
            self.top + log_sum - self.weighted / self.sums,
            self.total / vocab,
            self.index == targets,
            self.squares.log() - 2 * log_sum,
        )


@torch.no_grad()
def vocabulary_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> VocabularyStatistics:
    """Entropy, mean logit and whether the target is the most likely token, for every target.

    Costs 1U and the elementwise work on N x V logits, in tiles of at most 2 MiB on a CPU (256 MiB
    elsewhere) and a few temporaries of that size. Ignored rows cost nothing.

    Args:
        hidden: (..., D); this and the others as in `rpo_kernels.linear_logprobs`.
        weight: (V, D).
        targets: (...), aligned: ``targets[i]`` is what ``hidden[i]`` predicts.
        bias: (V,), or None.
        ignore_index: label of the positions to leave out.
        logit_scale: factor on the logits.
        logit_softcap: ``z = cap * tanh(z / cap)`` after the scale, or None.

    Returns:
        `VocabularyStatistics`, every field of the shape of `targets`.
    """
    checks.check_head(hidden, weight, targets, bias, logit_scale, logit_softcap, ignore_index)
    device, (vocab, width) = hidden.device, weight.shape
    dtype = weight.dtype
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    transform, exact = Transform(logit_scale, logit_softcap), ACCUMULATOR[dtype]
    flat = targets.reshape(-1)
    places = (flat != ignore_index).nonzero()[:, 0]
    rows, tile = hidden.reshape(-1, width), CPU_TILE if device.type == "cpu" else GPU_TILE
    found = [hidden.new_zeros(flat.shape, dtype=exact) for _ in range(4)]
    found[2] = found[2].bool()
    with torch.autocast(device.type, enabled=False):
        for here in places.split(ROWS):
            h, fold = rows[here].to(dtype), _Fold(found[0][here])
            size = max(1, tile // len(here))
            for v0 in range(0, vocab, size):
                logits = h @ weight[v0 : v0 + size].to(dtype).t()
                if bias is not None:
                    logits += bias[v0 : v0 + size].to(dtype)
                fold.add(transform.logit(logits.to(exact)), v0)
            for whole, part in zip(found, fold.result(flat[here], vocab), strict=True):
                whole[here] = part
    return VocabularyStatistics(*(x.view(targets.shape) for x in found))
