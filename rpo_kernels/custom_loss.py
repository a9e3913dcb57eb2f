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
from rpo_kernels.rows import keep_rows
from rpo_kernels.spec import Head, Transform


class CustomLoss(torch.autograd.Function):
    """``hidden (M, D), weight (V, D), bias, labels (M,), ... -> loss (), logps (2, B)``."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, cu_seqlens, layer, run, loss_fn, norm, needs):
        """Run one sweep; keep the gradients."""
        ignore_index, scale, softcap, dtype, validate = layer
        tolerance, max_bytes, backend = run
        module = choose_backend(backend, hidden)
        rows, offsets = keep_rows(labels, weight.shape[0], ignore_index, validate, cu_seqlens)
        count = len(offsets) // 2
        lengths = labels.new_tensor(offsets).diff().view(2, count)

        def settle(first: int, last: int, logps: Tensor) -> tuple[Tensor, Tensor]:
            counts = lengths[:, first:last]
            edges = torch.cat([counts.new_zeros(1), counts.flatten().cumsum(0)])
            sums = sequence_sums(logps, edges).view(2, last - first)
            given = counts.to(sums.dtype), torch.arange(first, last, device=hidden.device)
            if not any(needs):
                losses, slopes = pair_losses(loss_fn, sums, *given), torch.zeros_like(sums)
            else:
                with torch.enable_grad():
                    leaf = sums.requires_grad_()
                    losses = pair_losses(loss_fn, leaf, *given)
                    check_leaves(losses, leaf)
                    (slopes,) = torch.autograd.grad(losses.sum() / norm, leaf)
            coef = torch.repeat_interleave(
                slopes.flatten(), counts.flatten(), output_size=logps.shape[0]
            )
            return torch.stack([losses.detach(), *sums.detach()], dim=1), coef

        head = Head(weight, bias, Transform(scale, softcap), dtype, max_bytes // 8)
        with torch.autocast(hidden.device.type, enabled=False):
            pairs, _, *grads = streaming.loss_and_grads(
                hidden, rows, offsets, head, module, settle, max_bytes, tuple(needs), tolerance
            )
        ctx.save_for_backward(*grads)
        logps = pairs[:, 1:].t().contiguous()
        ctx.mark_non_differentiable(logps)
        return pairs[:, 0].sum() / norm, logps

    @staticmethod
    def backward(ctx, grad, _):
        """Multiply the kept gradients by the upstream scalar."""
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(ONCE)
        return *times(ctx.saved_tensors, grad), *[None] * 7
