"""The model's own forward, up to lm_head: hidden states whatever an architecture does on the way.

    R rows, L tokens, D hidden size

Transforms before lm_head, a projection or a factor on the hidden states, are part of what reaches
lm_head, so they need no list of architectures. lm_head itself does not run: no logits are made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from trainer.errors import InputError

# What the code of an architecture raises where it is asked for what it cannot do.
BROKEN = (
    RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError,
    NotImplementedError,
)  # fmt: skip


class States(NamedTuple):
    """What one forward gives."""

    hidden: Tensor
    """(R, L, D), what lm_head would have got."""
    output: ModelOutput | None
    """The backbone's, with its `router_logits` where the config has them returned; None where the
    model itself is the backbone, and so did not come to an end."""


class _Reached(Exception):  # noqa: N818  no error: it ends a forward where lm_head begins
    """lm_head is about to run."""


def run_to_head(model: PreTrainedModel, ids: Tensor, **inputs: object) -> States:
    """Run the model's own forward on token ids (R, L) until it calls lm_head.

    Raises:
        InputError: it never does, or hands it something else than a state per token.
    """
    seen: dict[str, Any] = {}

    def stop(_head: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen["hidden"] = args[0]
        raise _Reached

    def note(_backbone: nn.Module, _args: tuple[object, ...], output: object) -> None:
        seen["output"] = output

    hooks = (
        model.get_output_embeddings().register_forward_pre_hook(stop, prepend=True),
        model.base_model.register_forward_hook(note),
    )
    try:
        model(input_ids=ids, **without_cache(model), **inputs)
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    hidden = seen.get("hidden")
    if hidden is None or hidden.shape[:-1] != ids.shape:
        got = "nothing" if hidden is None else f"a tensor {tuple(hidden.shape)}"
        raise InputError(
            f"{type(model).__name__}: expected a hidden state of each of {tuple(ids.shape)} tokens "
            f"to reach the output layer, got {got}; this architecture cannot be trained here"
        )
    return States(hidden, seen.get("output"))


def without_cache(model: PreTrainedModel) -> dict[str, bool]:
    """The argument that keeps a forward from storing keys and values, where there is one."""
    parameters = inspect.signature(model.forward).parameters.values()
    takes = any(p.name == "use_cache" or p.kind is p.VAR_KEYWORD for p in parameters)
    return {"use_cache": False} if takes else {}


def quiet(model: nn.Module) -> None:
    """Evaluation mode, in which no noise is left.

    Modules with packed 4-bit weights have none, and would be repacked for a CPU's inference.
    """
    for module in model.modules():
        packed = any(not p.is_floating_point() for p in module.parameters(recurse=False))
        module.training = packed


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Let backward compute every layer again instead of keeping its activations.

    transformers' own switch wants layers in training mode, where their dropout is on.

    Raises:
        InputError: there are no layers that can be.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(
            f"gradient_checkpointing: {type(model).__name__} has no layers that backward could "
            "compute again; set it to false"
        )
    for layer in layers:
        layer.forward = _checkpointed(layer.forward)


def _checkpointed(forward: Callable) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
