"""What turns gradients into updates: the optimizer that `optim` names, and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler, optimization

from trainer.config.fields import RunConfig
from trainer.errors import InputError


class Adafactor(optimization.Adafactor):
    """Hugging Face's, with the learning rate as it is given, and a state that stays in float32."""

    def __init__(self, groups: Iterable[dict], learning_rate: float) -> None:
        """`groups`: parameters, and their weight decay."""
        super().__init__(groups, learning_rate, scale_parameter=False, relative_step=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would round the state to the weights' type."""
        super().load_state_dict(state_dict)
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for name, parameter in zip(names, parameters, strict=True):
            if name in state_dict["state"]:
                self.state[parameter] = dict(state_dict["state"][name])


def check_optimizer(config: RunConfig) -> None:
    """Refuse 8-bit AdamW where it cannot run; it is tried out on a small weight.

    Raises:
        InputError: bitsandbytes is missing, or has no kernels for this device.
    """
    if config.optim != "adamw_8bit":
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trial = nn.Linear(64, 64, device=device, dtype=getattr(torch, config.model_dtype))
    try:
        optimizer = make_optimizer(trial, config)
        for parameter in trial.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    except ImportError:
        raise InputError(
            "optim: adamw_8bit needs the package bitsandbytes, which is not installed; "
            "run: pip install bitsandbytes"
        ) from None
    except (RuntimeError, NotImplementedError) as error:
        raise InputError(
            f"optim: this bitsandbytes cannot run adamw_8bit on {device} ({error}); "
            "upgrade it, or use adafactor"
        ) from None


def make_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """The optimizer of what is trained; weight decay spares vectors (norms and biases)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    if config.optim == "sgd":
        return torch.optim.SGD(groups, config.learning_rate)
    if config.optim == "adafactor":
        return Adafactor(groups, config.learning_rate)
    adam = (config.learning_rate, (config.adam_beta1, config.adam_beta2), config.adam_epsilon)
    if config.optim == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, *adam)
    return torch.optim.AdamW(groups, *adam, fused=True)


def make_schedule(
    optimizer: torch.optim.Optimizer, config: RunConfig, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate over `steps` steps, warm-up included, whose first has none."""
    warmup = min(math.ceil(config.warmup_ratio * steps), steps - 1)
    if config.min_lr_rate:
        how = {"min_lr_rate": config.min_lr_rate}
        return get_scheduler("cosine_with_min_lr", optimizer, warmup, steps, how)
    return get_scheduler(config.lr_scheduler_type, optimizer, warmup, steps)
