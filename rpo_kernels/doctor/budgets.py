"""How far rounding may put a result off, from a count of roundings.

``|fl(a . b) - a . b| <= n u |a| . |b|`` for n terms, in whatever order they are summed: derived, so
that it holds on any device.

n rows, D hidden size, V vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor

from rpo_kernels.spec import Transform

QUADRATIC = {"ipo", "sppo_hard"}  # losses that are no function of an exponential
ROUNDINGS = 4  # eps of seven operations one after another: a difference, beta, a sigmoid (two),
# a factor, a sum and a quotient, each off by half an eps


def logit_errors(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transform: Transform,
    unit: float,
    own: float,
) -> Tensor:
    """How far the logits of every row may be off, (n,) float64.

        off_i = scale * max_v [(D + 4) u (|h_i| |w_v| + |b_v|) + own |x_iv|] + 8 u max_v |z_iv|

    Args:
        hidden: (n, D), weight: (V, D), bias: (V,) or None; float64.
        transform: scale and softcap.
        unit: u, the eps of the dtype that products are summed in.
        own: the eps of the dtype that a product is rounded to; 0 where it is not rounded.
    """
    offset = 0 if bias is None else bias
    x = hidden @ weight.T + offset
    size = hidden.abs() @ weight.abs().T + (0 if bias is None else bias.abs())
    off = ((hidden.shape[1] + 4) * unit * size + own * x.abs()).amax(1)
    return abs(transform.scale) * off + 8 * unit * transform.logit(x).abs().amax(1)


def loss_limits(
    name: str, c, r, beta, epsilon, gamma, truth, dtype: torch.dtype, roundings: int = ROUNDINGS
) -> list:
    """How far rounding may put a pair's loss and its two slopes, `truth`, off.

    Every intermediate is rounded; the largest sets by how much. An exponential turns that absolute
    error of its argument into a relative one of its value. Numbers or tensors, c and r as large as
    whatever they are differences of.
    """
    unit = roundings * torch.finfo(dtype).eps
    size = (1 + beta * (abs(c) + abs(r)) + gamma) / (1 - 2 * epsilon)
    scales = (size, size * beta, size * beta)
    if name in QUADRATIC:
        root = abs(c) + abs(r) + 1 / beta
        size, scales = 1, (root**2, 2 * root, 2 * root)
    return [unit * (scale + size * abs(x)) for scale, x in zip(scales, truth, strict=True)]
