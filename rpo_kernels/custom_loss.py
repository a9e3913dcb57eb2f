"""Streaming for a loss function given as Python code: autograd on two numbers per pair
(`fused_preference_loss`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rpo_kernels.backends import choose_backend
from rpo_kernels.checks import check_leaves, pair_losses
from rpo_kernels.engines import streaming
from rpo_kernels.ops import ONCE, sequence_sums, times
from rpo_kernels.rows import keep_rows, send


class CustomLoss(torch.autograd.Function):
    """``hidden (M, D), weight (V, D), bias, labels (M,), ... -> loss (), logps (2, B)``."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, cu_seqlens, loss_fn, num_pairs, settings):
        """Run one sweep; keep the gradients."""
        backend, head = choose_backend(settings.backend, hidden), settings.head(weight, bias)
        rows, offsets = keep_rows(
            labels, weight.shape[0], settings.ignore_index, settings.validate, cu_seqlens
        )
        count = len(offsets) // 2
        lengths = send(offsets, labels.device).diff().view(2, count)

        def loss_of_pairs(first: int, last: int, logps: Tensor) -> tuple[Tensor, Tensor]:
            """`streaming.PairLoss`: `loss_fn` and its slopes."""
            counts = lengths[:, first:last]
            edges = torch.cat([counts.new_zeros(1), counts.flatten().cumsum(0)])
            sums = sequence_sums(logps, edges).view(2, last - first)
            given = counts.to(sums.dtype), torch.arange(first, last, device=hidden.device)
            if not any(settings.needs):
                losses, slopes = pair_losses(loss_fn, sums, *given), torch.zeros_like(sums)
            else:
                with torch.enable_grad():
                    leaf = sums.requires_grad_()
                    losses = pair_losses(loss_fn, leaf, *given)
                    check_leaves(losses, leaf)
                    (slopes,) = torch.autograd.grad(losses.sum() / num_pairs, leaf)
            coef = torch.repeat_interleave(
                slopes.flatten(), counts.flatten(), output_size=logps.shape[0]
            )
            return torch.stack([losses.detach(), *sums.detach()], dim=1), coef

        with torch.autocast(hidden.device.type, enabled=False):
            pairs, _, *grads = streaming.loss_and_grads(
                hidden, rows, offsets, head, backend, loss_of_pairs, settings
            )
        ctx.save_for_backward(*grads)
        ctx.backend = settings.backend
        logps = pairs[:, 1:].t().contiguous()
        ctx.mark_non_differentiable(logps)
        return pairs[:, 0].sum() / num_pairs, logps

    @staticmethod
    def backward(ctx, grad, _):
        """Multiply the kept gradients by the upstream scalar."""
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(ONCE)
        return *times(ctx.saved_tensors, grad, ctx.backend), *[None] * 5
