"""`linear_logprobs` under TRL's own losses, in one line: `patch_trl`.

TRL's trainers share one function for a head without logits. In its place stands ours, with the same
arguments and results: log-probs by `linear_logprobs`, and the statistics that trainers log by
`vocabulary_statistics`.

    N rows, D hidden size, V vocabulary; 1 U = 2 N V D FLOP

    log-probs        1 U forward, 3 U backward
    any statistics   1 U together, where asked for: entropy, mean logits, most likely token
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from trl.trainer import utils

from rpo_kernels import linear_logprobs
from rpo_kernels.integrations.statistics import vocabulary_statistics
from rpo_kernels.integrations.trl_checks import check_trl


class _Entropy(torch.autograd.Function):
    """The entropies (N,) of rows of `hidden`, as statistics: to differentiate them is an error."""

    @staticmethod
    def forward(ctx, entropy: Tensor, hidden: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return entropy.view_as(entropy)

    @staticmethod
    def backward(ctx, grad: Tensor | None) -> tuple[Tensor | None, None]:
        if grad is not None:
            raise RuntimeError(
                "patch_trl: the entropy is a statistic without a gradient, and this loss takes "
                "one; call unpatch_trl() to train with an entropy bonus"
            )
        return None, None


class LinearLogProbs:
    """`linear_logprobs` in the place of TRL's `ChunkedLogProbFunction`."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> tuple[Tensor | None, ...]:
        """Log-probs (N,) of `targets` (N,), and those of TRL's statistics that `outputs` names.

        Log-probs cost 1U forward and 3U backward; any statistics together another 1U forward.
        """
        from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

        if is_deepspeed_zero3_enabled():
            raise RuntimeError("patch_trl: expected no DeepSpeed ZeRO-3, which shards the weight")
        head: dict[str, Any] = {"bias": bias, "logit_scale": logit_scale / temperature}
        # tanh(s x / c) c / T is tanh((s / T) x / (c / T)) (c / T)
        if final_logit_softcapping is not None:
            head["logit_softcap"] = final_logit_softcapping / temperature
        logps = linear_logprobs(hidden, weight, targets, **head)
        if not set(outputs) - {"log_probs"}:
            return logps, None, None, None, None
        found = vocabulary_statistics(hidden.detach(), weight.detach(), targets, **head)._asdict()
        found["entropy"] = _Entropy.apply(found["entropy"], hidden)
        names = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        return logps, *(found[name] if name in outputs else None for name in names)


def _everywhere(device: torch.device) -> bool:
    """In place of TRL's `_use_triton`, which decides where ignored positions are dropped."""
    return device.type != "neuron"


def patch_trl() -> None:
    """Put `linear_logprobs` under TRL's own losses, for all trainers made before or after.

    DPO, SFT, KTO, GRPO and RLOO of TRL share one head. Losses and all logged statistics stay those
    of TRL; ignored positions cost nothing, on CPUs too, where TRL computes them.

    Raises:
        RuntimeError: this version of TRL moved what is patched.
    """
    check_trl()
    _put(LinearLogProbs, _everywhere)


def unpatch_trl() -> None:
    """Take `patch_trl` back."""
    from trl.kernels import chunked_logprob

    _put(chunked_logprob.ChunkedLogProbFunction, chunked_logprob._use_triton)


def _put(function: type, everywhere: Callable[[torch.device], bool]) -> None:
    utils.__dict__.update(_ChunkedLogProbFunction=function, _use_triton=everywhere)
