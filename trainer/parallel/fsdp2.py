"""FSDP2: weights, gradients and moments in shards on all ranks, by torch's `fully_shard`.

    decoder layer   a unit: its weights are gathered for its forward and for its backward
    root            embeddings, final norm, lm_head: gathered for the whole pass, so the fused head
                    sees its weight, tied or not

With `dtype: bfloat16` a layer's matrices are gathered in bfloat16. Under autocast alone they would
be gathered in float32, and autocast would keep its own cast copy of every one until backward: the
whole model, unsharded. Norms, embeddings and lm_head stay as they are stored, so the residual
stream, norms and the fused head compute what one process computes; a layer's gradients come out of
autocast's matmuls in bfloat16 there, too. Sums over ranks are float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from accelerate import Accelerator
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

from trainer.errors import InputError
from trainer.model.policy import PreferenceModel


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
        stored = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        matrices = dataclasses.replace(stored, param_dtype=torch.bfloat16)
    names = model.language_model._no_split_modules or ()
    layers = [module for module in model.modules() if type(module).__name__ in names]
    units = []
    for layer in layers:
        for norm in _norms(layer) if half else ():
            fully_shard(norm, mesh=mesh, mp_policy=stored)
        units.append(fully_shard(layer, mesh=mesh, mp_policy=matrices))
    fully_shard(model, mesh=mesh, mp_policy=stored)
    for earlier, unit in pairwise(units):  # by default it would be the unit before: a norm
        unit.set_modules_to_backward_prefetch([earlier])
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


def whole_weights(model: PreferenceModel) -> dict[str, Tensor]:
    """The gathered weights, on rank 0's CPU; every rank must call this."""
    adapters = model.language_model is not model.model  # saved without the frozen weights
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapters, strict=False
    )
    weights: dict[str, Any] = get_model_state_dict(model.model, options=options)
    own = [*model.model.named_parameters(), *model.model.named_buffers()]  # tied ones once
    return {name: weights[name] for name, _ in own if name in weights}
