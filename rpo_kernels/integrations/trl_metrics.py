"""What `RPOTrainer` logs: a table with a row per pair, made at the head, and what its sums say.

    B pairs, 2B sequences (chosen first), T positions, D hidden size, V vocabulary

Sums over pairs and tokens, taken over micro-batches and ranks and divided once, do not depend on
how pairs were split; means of means do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rpo_kernels import fused_rpo_loss
from rpo_kernels.integrations.statistics import vocabulary_statistics
from rpo_kernels.integrations.transformers import IGNORE
from rpo_kernels.losses import LOSSES

COLUMNS = (
    "dpo", "chosen_logps", "rejected_logps", "chosen_rewards", "rejected_rewards", "wins",
    "chosen_tokens", "rejected_tokens", "chosen_mean_logps", "measured_chosen",
    "measured_rejected", "entropy", "chosen_logits", "rejected_logits", "top1", "pairs",
)  # fmt: skip


def loss_and_table(
    hidden: Tensor,
    weight: Tensor,
    *,
    labels: Tensor,
    ref_logps: Tensor,
    statistics: bool,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """At the head: ``loss ()`` and a table (B, len(COLUMNS)) of what the metrics are made of.

    Args:
        hidden: (2B, T, D).
        weight: (V, D).
        labels: (2B, T), shifted.
        ref_logps: (2B,).
        statistics: whether to measure entropy, logits and token accuracy, 1U.
        loss_type: this and the others as in `fused_rpo_loss`.
    """
    head: dict[str, Any] = {
        "bias": bias,
        "logit_scale": logit_scale,
        "logit_softcap": logit_softcap,
    }
    out = fused_rpo_loss(
        hidden, weight, labels, ref_logps, loss_type=loss_type, beta=beta,
        label_smoothing=label_smoothing, **head, **options,
    )  # fmt: skip
    kept = labels != IGNORE
    tokens = kept.sum(1).to(out.chosen_logps.dtype)
    chosen_tokens, rejected_tokens = tokens.chunk(2)
    real = chosen_tokens + rejected_tokens > 0  # a pair without tokens contributes nothing
    ratios = (torch.cat([out.chosen_logps, out.rejected_logps]) - ref_logps).view(2, -1) * real
    gap = ratios[0] - ratios[1]
    loss = LOSSES[loss_type]
    compared = ratios / tokens.view(2, -1).clamp(min=1) if loss.mean else ratios
    losses, *_ = loss.pair(*compared, beta, label_smoothing, 0.0)
    columns = {
        "dpo": losses * real,
        "chosen_logps": out.chosen_logps,
        "rejected_logps": out.rejected_logps,
        "chosen_rewards": beta * ratios[0],
        "rejected_rewards": beta * ratios[1],
        "wins": (gap > 0).to(gap.dtype) + 0.5 * ((gap == 0) & real).to(gap.dtype),
        "chosen_tokens": chosen_tokens,
        "rejected_tokens": rejected_tokens,
        "chosen_mean_logps": out.chosen_logps / chosen_tokens.clamp(min=1),
        "pairs": torch.ones_like(gap),
    }
    if statistics:
        found = vocabulary_statistics(hidden, weight, labels, **head)
        columns |= {"measured_chosen": chosen_tokens, "measured_rejected": rejected_tokens}
        columns["entropy"] = torch.stack(found.entropy.sum(1).chunk(2)).sum(0)
        columns["chosen_logits"], columns["rejected_logits"] = found.mean_logits.sum(1).chunk(2)
        columns["top1"] = (found.is_top1 & kept).sum(1).chunk(2)[0]
    zeros = torch.zeros_like(gap)
    return out.loss, torch.stack([columns.get(name, zeros).to(gap.dtype) for name in COLUMNS], 1)


def metrics(sums: dict[str, float], sft_reduction: str) -> dict[str, float]:
    """TRL's metrics of the sums over pairs of all columns."""
    pairs, chosen, rejected = sums["pairs"], sums["measured_chosen"], sums["measured_rejected"]
    sft = {
        "sum": sums["chosen_logps"] / pairs,
        "sequence_mean": sums["chosen_mean_logps"] / pairs,
        "token_mean": sums["chosen_logps"] / max(sums["chosen_tokens"], 1),
    }
    found = {
        "loss/dpo": sums["dpo"] / pairs,
        "loss/sft": -sft[sft_reduction],
        "rewards/chosen": sums["chosen_rewards"] / pairs,
        "rewards/rejected": sums["rejected_rewards"] / pairs,
        "rewards/accuracies": sums["wins"] / pairs,
        "rewards/margins": (sums["chosen_rewards"] - sums["rejected_rewards"]) / pairs,
        "logps/chosen": sums["chosen_logps"] / pairs,
        "logps/rejected": sums["rejected_logps"] / pairs,
    }
    if chosen + rejected > 0:
        found |= {
            "entropy": sums["entropy"] / (chosen + rejected),
            "logits/chosen": sums["chosen_logits"] / max(chosen, 1),
            "logits/rejected": sums["rejected_logits"] / max(rejected, 1),
            "mean_token_accuracy": sums["top1"] / max(chosen, 1),
        }
    return found
