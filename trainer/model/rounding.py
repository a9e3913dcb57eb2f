"""What rounding makes of a model's numbers, to tell it from what is another computation.

Both are compared in float32, whatever the weights' type: there a change in the last digit of what
every matrix gives moves a state by some 1e-6, and anything that is computed otherwise by far more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

MARGIN = 4  # two equal things have roundings of their own


@contextlib.contextmanager
def in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Let a model in bfloat16, whose rounding could hide anything, compute in float32.

    Its weights are exact there, too. A layer's are converted for its forward alone, so the memory
    is that of one layer. Packed 4-bit weights stay as they are.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    inside = {id(x) for layer in layers for x in _tensors(layer)}
    stored: dict[int, Tensor] = {}

    def widen(tensors: Iterable[Tensor]) -> None:
        for x in tensors:
            if x.dtype in (torch.bfloat16, torch.float16):
                stored[id(x)], x.data = x.data, x.data.float()

    def restore(tensors: Iterable[Tensor]) -> None:
        for x in tensors:
            x.data = stored.pop(id(x), x.data)

    if not all(p.is_floating_point() for p in model.parameters()):
        yield
        return
    hooks = [m.register_forward_pre_hook(lambda layer, _: widen(_tensors(layer))) for m in layers]
    hooks += [
        m.register_forward_hook(lambda layer, *_: restore(_tensors(layer)), always_call=True)
        for m in layers
    ]
    rest = [x for x in _tensors(model) if id(x) not in inside]
    widen(rest)
    try:
        yield
    finally:
        restore(rest)
        for hook in hooks:
            hook.remove()


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@contextlib.contextmanager
def last_digits(model: PreTrainedModel) -> Iterator[None]:
    """Let what every matrix and table gives differ in its last digit, as rounding does."""
    dice = torch.Generator().manual_seed(0)

    def change(_module: nn.Module, _args: tuple, output: object) -> object:
        if not isinstance(output, Tensor):  # a router that is a Linear gives several things
            return output
        signs = torch.randint(0, 2, output.shape, generator=dice).to(output) * 2 - 1
        return output * (1 + torch.finfo(output.dtype).eps * signs)

    rounding = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    hooks = [module.register_forward_hook(change) for module in rounding]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def difference_of(states: Tensor, wanted: Tensor) -> float:
    """The largest relative difference of a token's state; N tokens (N, D)."""
    errors = (states - wanted).float().norm(dim=-1) / wanted.float().norm(dim=-1)
    return errors.max().item()
