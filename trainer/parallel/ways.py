"""The ways in which a run uses its processes: three classes with the same methods.

    Replicated   one process, or DDP, where every rank has the whole model
    FSDP2        each rank a shard of everything, by torch (`fsdp2`)
    Zero3        the same, by DeepSpeed's engine (`zero3`)

The loss of a micro-batch on a rank is its pairs' share of the whole step's, so the step's gradient
is the *sum* over passes and ranks. Passes add up by themselves. Over R ranks all three *average*,
so the loss is multiplied by R:

    gradient = 1/R sum_r d(R * loss_r) = sum_r d(loss_r)

DDP reduces once a step, after the last pass; the other two after every pass, which costs
communication and saves the memory of whole gradients.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from trainer.config.fields import RunConfig
from trainer.model.policy import PreferenceModel
from trainer.parallel import fsdp2, zero3

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

Make = Callable[[nn.Module, RunConfig], torch.optim.Optimizer]
Prepared = tuple[nn.Module, torch.optim.Optimizer]
# Frozen parameters (all but the adapters, with LoRA) are what the model folder says.
_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


class Replicated:
    """One process, or DDP."""

    def __init__(self, model: nn.Module, accelerator: Accelerator) -> None:
        """Take a model that `prepare` returned."""
        self.model, self.accelerator = model, accelerator

    @staticmethod
    def check_device(config: RunConfig, accelerator: Accelerator) -> torch.device:
        """Where the whole policy is checked before it is prepared."""
        return accelerator.device

    @staticmethod
    def prepare(
        policy: PreferenceModel, config: RunConfig, make: Make, accelerator: Accelerator
    ) -> Prepared:
        """The model to train, and the optimizer that `make` makes of it."""
        return accelerator.prepare(policy, make(policy, config))

    def waiting(self) -> contextlib.AbstractContextManager:
        """A pass that is not the step's last, so that nothing need be reduced yet."""
        return self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of R times a pass's loss, which ranks average: the sum over ranks."""
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def update(
        self, optimizer: torch.optim.Optimizer, max_norm: float, check: Callable[[float], None]
    ) -> float | None:
        """Clip the gradients, step the optimizer, clear; returns the norm before clipping.

        With float16, accelerate's scaler multiplies the loss, and divides the gradient before it is
        clipped. Where the scaled gradient overflows, the scaler leaves out the optimizer's step and
        halves its factor, and there is no norm: None.

        Args:
            optimizer: as `prepare` returned it.
            max_norm: to which gradients are scaled down; 0 is infinity.
            check: is called with the norm before anything is changed, and may raise.
        """
        scaler = self.accelerator.scaler
        found = self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm or math.inf)
        norm = float(found.full_tensor() if isinstance(found, DTensor) else found)
        skipped = scaler is not None and scaler.get_scale() >= 1 and not math.isfinite(norm)
        check(0.0 if skipped else norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return None if skipped else norm

    def whole_weights(self) -> dict[str, Tensor] | None:
        """Gathered weights on rank 0's CPU, None if they are whole there; every rank calls this."""
        return None

    def save(self, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        """Write weights and moments, each rank its part; `optimizer` below accelerate's wrapper."""
        dcp.save(self._state(optimizer), checkpoint_id=folder)

    def load(self, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        """Read what `save` wrote on any number of ranks."""
        state = self._state(optimizer)
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            self.model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=_OPTIONS,
        )

    def _state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        model, moments = get_state_dict(self.model, optimizer, options=_OPTIONS)
        return {"model": model, "optimizer": moments}


class FSDP2(Replicated):
    """Shards by torch."""

    model: PreferenceModel

    @staticmethod
    def check_device(config: RunConfig, accelerator: Accelerator) -> torch.device:
        """The CPU, as the model may be larger than a device; Liger's kernels do not run there."""
        return accelerator.device if config.use_liger_kernel else torch.device("cpu")

    @staticmethod
    def prepare(
        policy: PreferenceModel, config: RunConfig, make: Make, accelerator: Accelerator
    ) -> Prepared:
        """Cut the model, then give the shards an optimizer."""
        model = fsdp2.shard(policy, accelerator)
        return model, make(model, config)

    def whole_weights(self) -> dict[str, Tensor] | None:
        """Gathered weights on rank 0's CPU."""
        return fsdp2.whole_weights(self.model)


class Zero3(Replicated):
    """Shards by DeepSpeed, whose engine clips and updates in one call."""

    model: DeepSpeedEngine

    @staticmethod
    def prepare(
        policy: PreferenceModel, config: RunConfig, make: Make, accelerator: Accelerator
    ) -> Prepared:
        """The engine that stands for the model, and the optimizer that it steps."""
        return zero3.partition(policy, make(policy, config), config)

    def waiting(self) -> contextlib.AbstractContextManager:
        """A pass that is not the step's last."""
        return zero3.waiting(self.model)

    def backward(self, loss: Tensor) -> None:
        """As the others do."""
        self.model.backward(loss * self.accelerator.num_processes)

    def update(
        self, optimizer: torch.optim.Optimizer, max_norm: float, check: Callable[[float], None]
    ) -> float | None:
        """The same; the norm is known after the update only, and a NaN still ends the run."""
        check(0.0)
        norm = zero3.update(self.model)
        check(norm)
        return norm

    def whole_weights(self) -> dict[str, Tensor] | None:
        """Gathered weights on rank 0's CPU."""
        return zero3.whole_weights(self.model)

    def save(self, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        """Write the engine's parts."""
        zero3.save(self.model, folder)

    def load(self, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        """Read the parts that as many ranks wrote."""
        zero3.load(self.model, folder, self.accelerator.num_processes)


WAYS: dict[str | None, type[Replicated]] = {None: Replicated, "fsdp2": FSDP2, "zero3": Zero3}


def way_of(model: nn.Module, accelerator: Accelerator) -> Replicated:
    """The way in which a model was prepared."""
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine):
        return Zero3(model, accelerator)
    return (FSDP2 if isinstance(model, FSDPModule) else Replicated)(model, accelerator)
