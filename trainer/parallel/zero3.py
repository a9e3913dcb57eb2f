"""ZeRO-3: weights, gradients and moments in parts on all ranks, by DeepSpeed's engine.

accelerate's integration is never active on a CPU, and says nothing. So the engine is used itself,
on every device: what tests run on two CPU processes is what runs on GPUs.

Every module gathers its own weights for its forward and for its backward, by hooks, so the fused
head sees its weight, tied or not. Gradients are reduced to parts after each micro-batch and
averaged over ranks, hence the factor in `loop.run_step`. The engine clips and updates in one call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trainer.config.fields import RunConfig
from trainer.errors import InputError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

PERSISTENT = 100_000  # parameters of fewer elements stay whole, as by DeepSpeed's default


def check_zero3(config: RunConfig) -> None:
    """Refuse what the engine cannot do.

    Raises:
        InputError: a field that would need another set-up.
    """
    if config.use_peft:
        raise InputError(
            "use_peft: expected false with ZeRO-3; use trainer/accelerate/fsdp2.yaml or ddp.yaml"
        )
    if config.model_dtype != "float32":
        raise InputError(
            f"model_dtype: expected float32 with ZeRO-3, got {config.model_dtype}; its parts are "
            "small, and dtype decides on the matmuls"
        )
    if config.torch_compile:
        raise InputError("torch_compile: expected false with ZeRO-3, whose hooks gather weights")


def partition(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig
) -> tuple[DeepSpeedEngine, torch.optim.Optimizer]:
    """The engine, which stands for `model`, and the optimizer that it steps."""
    import deepspeed

    precision = {"enabled": config.dtype == "bfloat16", "dtype": "bfloat16"}
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # not used; the loss is normalized by the step's pairs
        "gradient_accumulation_steps": 1,  # passes are counted by `waiting`
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": PERSISTENT},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # No module is listed whose weights and gradients would travel in half precision.
        "torch_autocast": precision | {"lower_precision_safe_modules": []},
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings, dist_init_required=False
    )
    engine.set_gradient_accumulation_boundary(True)
    return engine, optimizer


@contextlib.contextmanager
def waiting(engine: DeepSpeedEngine) -> Iterator[None]:
    """A pass that is not the step's last."""
    engine.set_gradient_accumulation_boundary(False)
    try:
        yield
    finally:
        engine.set_gradient_accumulation_boundary(True)


def update(engine: DeepSpeedEngine) -> float:
    """Clip, update, clear the gradients; returns their norm before clipping."""
    engine.step()
    return float(engine.get_global_grad_norm())


def whole_weights(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """The weights, gathered one by one, on rank 0's CPU; every rank must call this."""
    import deepspeed

    model, weights = engine.module.model, {}
    for name, parameter in model.named_parameters():  # tied ones once
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):  # frees it after
            if engine.global_rank == 0:
                weights[name] = parameter.detach().cpu().clone()
    saved = model.state_dict().keys()
    return weights | {name: x.cpu() for name, x in model.named_buffers() if name in saved}


def save(engine: DeepSpeedEngine, folder: Path) -> None:
    """Write the parts of weights and moments; every rank must call this."""
    engine.save_checkpoint(folder.parent, tag=folder.name, save_latest=False)


def load(engine: DeepSpeedEngine, folder: Path, ranks: int) -> None:
    """Read what as many ranks have written.

    Raises:
        InputError: it was written by another number of ranks.
    """
    written = len(list(folder.glob("*zero_pp_rank_*_optim_states.pt")))
    if written != ranks:
        raise InputError(
            f"resume_from_checkpoint: {folder.parent} holds the parts of {written} processes, "
            f"got {ranks}; ZeRO-3 resumes with as many"
        )
    engine.load_checkpoint(folder.parent, tag=folder.name)
