"""Several processes: DDP by accelerate, FSDP2 by torch, ZeRO-3 by DeepSpeed; which is asked for.

accelerate asks for sharding through the environment (`accelerate launch --config_file
trainer/accelerate/fsdp2.yaml` sets it), but never shards on a CPU, and says nothing. So the request
is read here and FSDP2 is torch's `fully_shard`, on every device: what tests run on two CPU
processes is what runs on GPUs. ZeRO-3 is in `zero3`.

    decoder layer   a unit: its weights are gathered for its forward and for its backward
    root            embeddings, final norm, lm_head: gathered for the whole pass, so the fused head
                    sees its weight, tied or not

Gradients are reduced to shards after each micro-batch, which costs communication and saves the
memory of whole gradients; DDP reduces once a step. Both average over ranks, hence the factor in
`loop.run_step`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os

from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from trainer import zero3
from trainer.config import InputError, RunConfig
from trainer.model import PreferenceModel

# Variable by which each way is asked for.
REQUESTS = {"fsdp2": "ACCELERATE_USE_FSDP", "zero3": "ACCELERATE_USE_DEEPSPEED"}
# Settings of accelerate's config that would change what is done: variable, setting, value.
SETTINGS = {
    "always": (  # gradient_accumulation_steps and torch_compile of the recipe decide
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "gradient_accumulation_steps", "1"),
        ("ACCELERATE_DYNAMO_BACKEND", "dynamo_backend", "no"),
    ),
    "fsdp2": (
        ("FSDP_VERSION", "fsdp_version", "2"),
        ("FSDP_AUTO_WRAP_POLICY", "fsdp_auto_wrap_policy", "transformer_based_wrap"),
        ("FSDP_RESHARD_AFTER_FORWARD", "fsdp_reshard_after_forward", "true"),
        ("FSDP_OFFLOAD_PARAMS", "fsdp_offload_params", "false"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "fsdp_activation_checkpointing", "false"),
    ),
    "zero3": (
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "zero_stage", "3"),
        ("ACCELERATE_DEEPSPEED_ZERO3_INIT", "zero3_init_flag", "false"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "offload_optimizer_device", "none"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "offload_param_device", "none"),
        ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "deepspeed_config_file", "none"),
        ("ACCELERATE_GRADIENT_CLIPPING", "gradient_clipping", "none"),  # max_grad_norm decides
    ),
}
# Those whose update of a shard is that of the whole weight.
SHARDED_OPTIMIZERS = ("adamw_torch", "sgd")


def take_request(config: RunConfig) -> str | None:
    """How to shard, "fsdp2" or "zero3"; accelerate is then not told, as it must not shard as well.

    Raises:
        InputError: with settings that the trainer does not implement, for one process, or without
            DeepSpeed.
    """
    asked = [k for k, v in REQUESTS.items() if os.environ.get(v, "").lower() in ("true", "1")]
    for variable, setting, value in (row for how in ("always", *asked) for row in SETTINGS[how]):
        got = os.environ.get(variable, value).lower()
        if got != value:
            raise InputError(
                f"accelerate's {setting}: expected {value}, got {got}; set it in its file or on "
                "its command line, as the recipe decides"
            )
    if not asked:
        return None
    [how] = asked
    if config.use_peft:
        raise InputError(f"use_peft: expected false with {how}; use trainer/accelerate/ddp.yaml")
    if config.dtype == "float16":
        raise InputError(
            f"dtype: expected bfloat16 or float32 with {how}, as overflow on one rank is not told "
            "to the others, got float16; change it, or use trainer/accelerate/ddp.yaml"
        )
    if config.optim not in SHARDED_OPTIMIZERS:
        raise InputError(
            f"optim: expected {' or '.join(SHARDED_OPTIMIZERS)} with {how}, as a shard lacks what "
            f"{config.optim} needs; change it, or use trainer/accelerate/ddp.yaml"
        )
    if "WORLD_SIZE" not in os.environ:
        raise InputError(
            f"{how} is asked for, but this is a single process without a process group; start "
            "several with torchrun or with num_processes, or use trainer/accelerate/ddp.yaml"
        )
    if how == "zero3":
        zero3.check_zero3(config)
        if importlib.util.find_spec("deepspeed") is None:
            raise InputError(
                "zero3 is asked for, but DeepSpeed is not installed; run: pip install deepspeed, "
                "or use trainer/accelerate/fsdp2.yaml"
            )
    del os.environ[REQUESTS[how]]
    return how


def shard(model: PreferenceModel, accelerator: Accelerator) -> nn.Module:
    """Shard every parameter over all ranks, in place, each decoder layer as a unit.

    Raises:
        InputError: the model has adapters, or a parameter is left unsharded.
    """
    if model.language_model is not model.model:
        raise InputError(
            "use_peft: expected false with FSDP, which was not tried with adapters; "
            "use trainer/accelerate/ddp.yaml"
        )
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    units = model.language_model._no_split_modules or ()
    for module in model.modules():
        if type(module).__name__ in units:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "answer")  # gathers weights as forward does
    check_sharded(model)
    return accelerator.prepare_model(model, evaluation_mode=True)  # autocast, and no DDP


def check_sharded(model: nn.Module) -> None:
    """Raise `InputError` for the first parameter that is whole on every rank."""
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            raise InputError(f"FSDP is asked for, but {name} is not sharded; use ddp.yaml")


def whole_weights(model: nn.Module) -> dict[str, Tensor] | None:
    """The gathered weights of a sharded model, on rank 0's CPU; None where nothing is sharded.

    Args:
        model: the prepared `PreferenceModel`; every rank must call this.
    """
    if zero3.is_engine(model):
        return zero3.whole_weights(model)
    if not isinstance(model, FSDPModule):
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model.model, options=options)
    own = [*model.model.named_parameters(), *model.model.named_buffers()]  # tied ones once
    return {name: weights[name] for name, _ in own if name in weights}


def no_sync(model: nn.Module, accelerator: Accelerator) -> contextlib.AbstractContextManager:
    """A micro-batch after which the step goes on: DDP need not reduce its gradients yet."""
    return zero3.waiting(model) if zero3.is_engine(model) else accelerator.no_sync(model)


def backward(loss: Tensor, model: nn.Module, accelerator: Accelerator) -> None:
    """Backward through the prepared model that gave the loss."""
    if zero3.is_engine(model):
        model.backward(loss)
    else:
        accelerator.backward(loss)


def norm_value(norm: Tensor) -> float:
    """A gradient norm as a number, the same on every rank."""
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
