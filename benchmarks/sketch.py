"""The plainest program that keeps the memory contract: 4U by recompute, forty lines, any device.

A yardstick, not a product: `rpo_kernels` must beat it. N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 2048  # vocabulary entries


class SketchLogprobs(torch.autograd.Function):
    """``hidden (N, D), weight (V, D), targets (N,) -> log-probs (N,)``, panel by panel."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Online log-sum-exp over vocabulary panels."""
        lse = hidden.new_full(targets.shape, -torch.inf, dtype=torch.float32)
        for v0 in range(0, weight.shape[0], PANEL):
            logits = (hidden @ weight[v0 : v0 + PANEL].t()).float()
            lse = torch.logaddexp(lse, logits.logsumexp(1))
        picked = (hidden.float() * weight[targets].float()).sum(1)
        ctx.save_for_backward(hidden, weight, targets, lse)
        return picked - lse

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Recompute each panel, turn it into dlogits in place, two matmuls."""
        hidden, weight, targets, lse = ctx.saved_tensors
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        d_weight = torch.empty_like(weight)
        rows = torch.arange(len(targets), device=hidden.device)
        for v0 in range(0, weight.shape[0], PANEL):
            panel = weight[v0 : v0 + PANEL]
            logits = (hidden @ panel.t()).float()
            logits.sub_(lse[:, None]).exp_().neg_()
            inside = (targets >= v0) & (targets < v0 + PANEL)
            logits[rows[inside], targets[inside] - v0] += 1
            logits = logits.mul_(grad[:, None]).to(hidden.dtype)
            d_hidden += logits @ panel
            d_weight[v0 : v0 + PANEL] = logits.t() @ hidden
        return d_hidden.to(hidden.dtype), d_weight, None
