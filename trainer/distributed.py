"""Several processes: DDP by accelerate, FSDP2 by torch, ZeRO-3 by DeepSpeed; which is asked for.

accelerate asks for sharding through the environment (`accelerate launch --config_file
trainer/accelerate/fsdp2.yaml` sets it), but never shards on a CPU, and says nothing. So the request
is read here and FSDP2 is torch's `fully_shard`, on every device: what tests run on two CPU
processes is what runs on GPUs. ZeRO-3 is in `zero3`.

    decoder layer   a unit: its weights are gathered for its forward and for its backward
    root            embeddings, final norm, lm_head: gathered for the whole pass, so the fused head
                    sees its weight, tied or not

With `dtype: bfloat16` a layer's matrices are gathered in bfloat16. Under autocast alone they would
be gathered in float32, and autocast would keep its own cast copy of every one until backward: the
whole model, unsharded. Norms, embeddings and lm_head stay as they are stored, so the residual
stream, norms and the fused head compute what one process computes; a layer's gradients come out of
autocast's matmuls in bfloat16 there, too. Sums over ranks are float32.

Gradients are reduced to shards after each micro-batch, which costs communication and saves the
memory of whole gradients; DDP reduces once a step. Both average over ranks, hence the factor in
`loop.run_step`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from datetime import timedelta
from itertools import pairwise

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, KwargsHandler
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
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
    if len(asked) > 1:
        names = " and ".join(REQUESTS[how] for how in asked)
        raise InputError(
            f"expected one way to shard, got {' and '.join(asked)}: {names} are both set; unset "
            "one, or give accelerate launch one of trainer/accelerate's files"
        )
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
    if config.load_in_4bit:
        raise InputError(
            f"load_in_4bit: expected false with {how}, which would cut packed 4-bit weights and "
            "their scales apart; use model_dtype bfloat16, or trainer/accelerate/ddp.yaml"
        )
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


def handlers(config: RunConfig) -> list[KwargsHandler]:
    """What the process group and DDP are told by way of accelerate."""
    return [
        InitProcessGroupKwargs(timeout=timedelta(seconds=config.ddp_timeout)),
        # DDP would order its buckets anew after its first backward, and with them its sums over
        # ranks: a resumed run would begin with other roundings than the run that went on. It does
        # not where it looks for unused parameters, which also may be there then.
        DistributedDataParallelKwargs(find_unused_parameters=True),
    ]


def shard(model: PreferenceModel, accelerator: Accelerator) -> nn.Module:
    """Shard every parameter over all ranks, in place, each decoder layer as a unit.

    Args:
        model: the policy, adapters included; units go to the device one by one, so it may be
            larger than that.
        accelerator: gives the device, the number of ranks and the precision.

    Raises:
        InputError: a parameter is left unsharded, or a unit trains weights of two types.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    half = accelerator.mixed_precision == "bf16"
    stored, matrices = MixedPrecisionPolicy(), MixedPrecisionPolicy()
    if half:  # inputs stay as autocast has them
        sums = {"reduce_dtype": torch.float32, "cast_forward_inputs": False}
        stored = MixedPrecisionPolicy(**sums)
        matrices = MixedPrecisionPolicy(param_dtype=torch.bfloat16, **sums)
    names = model.language_model._no_split_modules or ()
    layers = [module for module in model.modules() if type(module).__name__ in names]
    for layer in layers:
        for norm in _norms(layer) if half else ():
            fully_shard(norm, mesh=mesh, mp_policy=stored)
        fully_shard(layer, mesh=mesh, mp_policy=matrices)
    fully_shard(model, mesh=mesh, mp_policy=stored)
    for earlier, layer in pairwise(layers):  # by default it would be the unit before: a norm
        layer.set_modules_to_backward_prefetch([earlier])
    register_fsdp_forward_method(model, "answer")  # gathers weights as forward does
    check_sharded(model)
    return accelerator.prepare_model(model, evaluation_mode=True)  # autocast, and no DDP


def _norms(layer: nn.Module) -> list[nn.Module]:
    """The innermost modules all of whose parameters are vectors."""
    leaves = [module for module in layer.modules() if not any(module.children())]
    return [m for m in leaves if {p.dim() for p in m.parameters()} == {1}]


def check_sharded(model: nn.Module) -> None:
    """Refuse what FSDP2 would not train as it should.

    Raises:
        InputError: naming a parameter that is whole on every rank, or two of different types that
            are trained in one unit.
    """
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            raise InputError(f"FSDP is asked for, but {name} is not sharded; use ddp.yaml")
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            trained = {p.dtype: name for name, p in _own(unit) if p.requires_grad}
            if len(trained) > 1:
                found = ", ".join(f"{name} of {dtype}" for dtype, name in trained.items())
                raise InputError(
                    f"model_dtype: expected float32 with FSDP, which sums one type in a layer, but "
                    f"{type(unit).__name__} trains {found}; change it, or use ddp.yaml"
                )


def _own(unit: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """Name and value of the parameters that are gathered with `unit`."""
    for name, parameter in unit.named_parameters(path, recurse=False):
        yield name, parameter
    for name, child in unit.named_children():
        if not isinstance(child, FSDPModule):
            yield from _own(child, f"{path}.{name}".lstrip("."))


def whole_weights(model: nn.Module) -> dict[str, Tensor] | None:
    """The gathered weights of a sharded model, on rank 0's CPU; None where nothing is sharded.

    Args:
        model: the prepared `PreferenceModel`; every rank must call this.
    """
    if zero3.is_engine(model):
        return zero3.whole_weights(model)
    if not isinstance(model, FSDPModule):
        return None
    adapters = model.language_model is not model.model  # saved without the frozen weights
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapters, strict=False
    )
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
