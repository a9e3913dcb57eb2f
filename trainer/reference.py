"""Reference log-probs: one pass of the untrained policy, before the first step.

It runs the very batches of the training plan through the very same forward, so that at step 0
policy and reference agree to the last bit, and the DPO loss is ln 2.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rpo_kernels.losses import LOSSES
from trainer.encoding import Split
from trainer.packing import Step, first_visits, pack
from trainer.report import progress


def needs_reference(loss_type: str) -> bool:
    """Whether the loss compares with a reference model at all."""
    return LOSSES[loss_type].reference


@torch.no_grad()
def reference_logps(
    model: nn.Module,
    split: Split,
    steps: list[Step],
    accelerator: Accelerator,
    description: str,
) -> Tensor:
    """Summed log-probs of every response that `steps` visit, under the model as it is now.

    Args:
        model: the prepared `PreferenceModel`.
        split: the data set.

        steps: a plan over it; every rank computes its own batches.
        accelerator: gives rank, device and the sum over ranks.
        description: name of the progress bar.

    Returns:
        (pairs, 2) float32 in nats, chosen and rejected; 0 where `steps` never come.
    """
    logps = torch.zeros(len(split.pairs), 2, device=accelerator.device)
    rounds = [ranks for step in first_visits(steps) for ranks in step.micro_batches]
    for ranks in progress(rounds, description):
        batch = pack(split.pairs, ranks[accelerator.process_index]).to(accelerator.device)
        zeros = logps.new_zeros(2 * len(batch.indices))
        out = model(batch, zeros, 1, 1)
        logps[list(batch.indices)] = torch.stack([out.chosen_logps, out.rejected_logps], 1)
    return accelerator.reduce(logps, "sum")
