"""The oracle: log-probs and losses in a few lines of PyTorch on materialized logits.

In float64 it is the truth that the tests and the doctor measure against; in another dtype the plain
expression (logits rounded to it, sums in float32), whose error is a budget. Nothing else imports
it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rpo_kernels.spec import ACCUMULATOR


def linear_logprobs(
    hidden, weight, targets, *, bias=None, ignore_index=-100, logit_scale=1.0, logit_softcap=None
) -> Tensor:
    """Log-probs (...) of targets (...) from the whole matrix of logits (..., V)."""
    logits = F.linear(hidden, weight, bias).to(ACCUMULATOR[hidden.dtype]) * logit_scale
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    kept = targets != ignore_index
    picked = logits.log_softmax(-1).gather(-1, torch.where(kept, targets, 0)[..., None])[..., 0]
    return torch.where(kept, picked, 0)


def preference_losses(
    loss_type: str, c: Tensor, r: Tensor, beta: float, eps: float, gamma: float
) -> Tensor:
    """Loss of each pair (B,) from what the loss compares; sources stand in `rpo_kernels.losses`."""
    ls, m = F.logsigmoid, beta * (c - r)
    smoothed = lambda x: -(1 - eps) * ls(x) - eps * ls(-x)  # noqa: E731
    log_odds = lambda x: x - torch.log(-torch.expm1(x))  # noqa: E731
    return {
        "sigmoid": lambda: smoothed(m),
        "cpo": lambda: smoothed(m),
        "simpo": lambda: smoothed(m - gamma),
        "robust": lambda: (-(1 - eps) * ls(m) + eps * ls(-m)) / (1 - 2 * eps),
        "hinge": lambda: torch.relu(1 - m),
        "ipo": lambda: (c - r - 1 / (2 * beta)) ** 2,
        "exo_pair": lambda: (
            m.sigmoid() * (ls(m) - math.log(1 - eps)) + (-m).sigmoid() * (ls(-m) - math.log(eps))
        ),
        "apo_zero": lambda: 1 - (beta * c).sigmoid() + (beta * r).sigmoid(),
        "apo_down": lambda: (beta * c).sigmoid() + 1 - m.sigmoid(),
        "sppo_hard": lambda: (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2,
        "nca_pair": lambda: -ls(beta * c) - 0.5 * ls(-beta * c) - 0.5 * ls(-beta * r),
        "orpo": lambda: -beta * ls(log_odds(c) - log_odds(r)),
    }[loss_type]()


def rpo_loss(
    hidden, weight, labels, ref_logps, *, bias=None, beta=0.1, eta=0.005, sft_reduction="sum",
    scale_eta_by_beta=None, label_smoothing=0.0, loss_type="sigmoid", simpo_gamma=0.5,
    logit_scale=1.0, logit_softcap=None, num_pairs=None, num_chosen_tokens=None,
):  # fmt: skip
    """Loss (), of hidden (2B, T, D) and labels (2B, T), as `fused_rpo_loss` defines it."""
    logps = linear_logprobs(
        hidden, weight, labels, bias=bias, logit_scale=logit_scale, logit_softcap=logit_softcap
    )
    sums, counts = logps.sum(1), (labels != -100).sum(1)
    quantity = sums if ref_logps is None else sums - ref_logps
    if loss_type in ("ipo", "simpo", "orpo"):
        quantity = quantity / counts.clamp(min=1)
    (c, r), (s_c, _), (n_c, n_r) = quantity.chunk(2), sums.chunk(2), counts.chunk(2)
    losses = preference_losses(loss_type, c, r, beta, label_smoothing, simpo_gamma)
    losses = torch.where(n_c + n_r > 0, losses, 0)
    pairs = num_pairs or max(len(c), 1)
    if sft_reduction == "sum":
        sft = -s_c.sum() / pairs
    elif sft_reduction == "sequence_mean":
        sft = -(s_c / n_c.clamp(min=1)).sum() / pairs
    else:
        sft = -s_c.sum() / (num_chosen_tokens or max(int(n_c.sum()), 1))
    scaled = sft_reduction == "sum" if scale_eta_by_beta is None else scale_eta_by_beta
    return losses.sum() / pairs + eta * (beta if scaled else 1) * sft
