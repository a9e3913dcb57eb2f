"""Losses of `transformers` models without logits: `fuse_lm_head`, and what it makes possible.

    B pairs, 2B sequences (chosen first), T positions, D hidden size, V vocabulary

`fuse_lm_head` puts a `FusedLMHead` with lm_head's own parameters in its place, and a forward over
the model's own that can end in a function of the last hidden states and the head instead of in
logits (``at_head``). It runs inside the forward of the module that owns the weight, so the hooks of
DDP, FSDP, peft and accelerate see it used. Everything else is such a function.

Scale and softcap, what a model does to lm_head's output, are measured (`head.measure_transform`),
here with stand-ins for backbone and lm_head, so that no weight is touched.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutput

from rpo_kernels import RPOOutput, fused_rpo_loss, linear_logprobs
from rpo_kernels.integrations.head import (
    TOKENS,
    FusedLMHead,
    HeadError,
    HeadFunction,
    measure_transform,
    output_layer,
    replace_head,
)

IGNORE = -100


def fuse_lm_head(model: PreTrainedModel) -> PreTrainedModel:
    """Let a causal language model compute losses without logits, in place.

    Afterwards ``model(input_ids, labels=labels)`` returns the SFT loss with ``logits=None``: the
    mean over the labels that are not -100, or their sum over `num_items_in_batch`, as
    `transformers.Trainer` passes it. So the fused SFT loss in a `Trainer` is this one line; only
    its `compute_metrics` has no logits. Without labels the forward, and with it generation, is the
    model's own. `model_rpo_loss` and `model_logps` need it too.

    Args:
        model: a causal language model, not yet wrapped (under peft: its base model).

    Returns:
        The same model.

    Raises:
        ValueError: the output layer is not a plain Linear, or the forward does more to hidden
            states and logits than scale and softcap; the message says what.
    """
    if isinstance(model.get_output_embeddings(), FusedLMHead):
        return model
    head = output_layer(model)
    if backbone_of(model) is model:
        raise ValueError(
            f"{type(model).__name__}: expected a backbone at model.base_model or model.model"
        )
    replace_head(model, FusedLMHead(head, *_measure_without_backbone(model)))
    kind: Any = type(model)
    own, fused = model.forward, types.MethodType(_fused_forward(kind), model)
    model.__dict__.update(forward_to_logits=own, forward=fused)
    model.__dict__["accepts_loss_kwargs"] = True  # num_items_in_batch
    return model


@functools.cache
def _fused_forward(kind: type[PreTrainedModel]) -> Callable[..., object]:
    """The forward of a fused model of class `kind`. It holds no model, so that copies are whole."""

    def forward(self, *args, labels=None, at_head=None, **kwargs):
        if at_head is None and labels is None:
            return self.forward_to_logits(*args, **kwargs)
        if at_head is None:
            return _sft_output(self, labels, args, kwargs)
        return _run(self, at_head, args, kwargs)[0]

    # generation and Trainer read it; `functools.wraps` would let accelerate unwrap past us
    forward.__dict__["__signature__"] = inspect.signature(kind.forward)
    forward.__doc__ = kind.forward.__doc__
    return forward


def backbone_of(model: PreTrainedModel) -> Any:
    """The model without its head; the model itself if it names none."""
    own = model.base_model
    return getattr(model, "model", model) if own is model else own


def _run(model: PreTrainedModel, at_head: HeadFunction, args: tuple, kwargs: dict) -> tuple:
    """``at_head`` of the last hidden states, and the backbone's output."""
    ours = ("logits_to_keep", "return_dict", "use_cache")
    kwargs = {name: value for name, value in kwargs.items() if name not in ours}
    router = getattr(model.config.get_text_config(), "output_router_logits", False)
    if kwargs.get("output_router_logits", router):
        raise ValueError(
            "output_router_logits: expected False with a fused head, which leaves the router's "
            "auxiliary loss out, got True; set it to False in the model's config"
        )
    output = backbone_of(model)(*args, use_cache=False, return_dict=True, **kwargs)
    return model.get_output_embeddings()(output.last_hidden_state, at_head), output


def shifted(labels: Tensor) -> Tensor:
    """Labels (..., T) aligned with hidden states: each position gets its next one, the last none.

    The hidden state at position t predicts the token at t + 1: ``targets[t] = labels[t + 1]``.
    """
    return torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], IGNORE)], dim=-1)


def _sft_output(model: PreTrainedModel, labels: Tensor, args: tuple, kwargs: dict) -> Any:
    """The SFT loss as the model's own forward returns it."""
    targets, count = kwargs.pop("shift_labels", None), kwargs.pop("num_items_in_batch", None)
    if targets is None:
        targets = shifted(labels)
    run = functools.partial(linear_logprobs, targets=targets)
    logps, output = _run(model, run, args, kwargs)
    count = (targets != IGNORE).sum().clamp(min=1) if count is None else count
    loss = -logps.sum() / count
    rest = {name: output.get(name) for name in ("hidden_states", "attentions")}
    found = CausalLMOutput(loss=loss, **rest)
    return found.to_tuple() if kwargs.get("return_dict") is False else found


def last_positions(function: HeadFunction, length: int) -> HeadFunction:
    """`function` of the last `length` positions: peft's prompt tuning puts virtual ones first."""

    def run(hidden: Tensor, weight: Tensor, **transform: Any) -> Any:
        return function(hidden[:, -length:], weight, **transform)

    return run


def _at_head(model: nn.Module, input_ids: Tensor, mask: Tensor | None, run: HeadFunction) -> Any:
    """`run` at the head of a fused model, wrapped or not."""
    run = last_positions(run, input_ids.shape[1])
    found = model(input_ids=input_ids, attention_mask=mask, at_head=run)
    if hasattr(found, "logits"):  # a forward with **kwargs swallows at_head
        raise ValueError(
            f"model: expected one prepared by fuse_lm_head, got {type(model).__name__} without"
        )
    return found


def model_rpo_loss(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    ref_logps: Tensor | None,
    **options: Any,
) -> RPOOutput:
    """`rpo_kernels.fused_rpo_loss` of a model and a padded batch of preference pairs.

    Args:
        model: prepared by `fuse_lm_head`; may be wrapped by peft, DDP or FSDP since.
        input_ids: (2B, T), B chosen sequences, then their B rejected ones.
        attention_mask: (2B, T), 0 at padding; or None.
        labels: (2B, T), `input_ids` with -100 at prompts and padding. The shift to next tokens is
            done here, as in transformers.
        ref_logps: (2B,), as `model_logps` of the reference model returns them; None = no reference.
        **options: of `fused_rpo_loss`: beta, eta, sft_reduction, num_pairs, num_chosen_tokens ...

    Returns:
        `RPOOutput`; call ``.loss.backward()``.

    Raises:
        ValueError: `fuse_lm_head` has not prepared the model, or as `fused_rpo_loss`.
    """
    options |= {"labels": shifted(labels), "ref_logps": ref_logps}
    return _at_head(model, input_ids, attention_mask, functools.partial(fused_rpo_loss, **options))


def model_logps(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor
) -> Tensor:
    """Summed log-probs (S,) in nats of the labelled tokens of S sequences, for `model_rpo_loss`.

    Args:
        model: prepared by `fuse_lm_head`; call it under `torch.no_grad` for a reference.
        input_ids: (S, T); this and the others as in `model_rpo_loss`.
        attention_mask: (S, T) or None.
        labels: (S, T), unshifted.
    """
    run = functools.partial(linear_logprobs, targets=shifted(labels))
    return _at_head(model, input_ids, attention_mask, run).sum(1)


def _measure_without_backbone(model: PreTrainedModel) -> tuple[float, float | None]:
    """`measure_transform` with stand-ins for backbone and lm_head, so that no weight is read.

    Raises:
        ValueError: the forward does not hand the last hidden states to lm_head as they are, fails,
            or its logits are no ``softcap(scale * x)`` of lm_head's output x.
    """
    name, head, seen = type(model).__name__, output_layer(model), []
    hidden = torch.linspace(-1, 1, TOKENS * head.in_features).view(1, TOKENS, -1)
    hidden = hidden.to(head.weight.dtype)

    def run_head(states: Tensor) -> Tensor:
        seen.append(states)
        return states

    def run_backbone(*_, **__) -> BaseModelOutputWithPast:
        return _Stub(last_hidden_state=hidden)

    with _forward(head, run_head), _forward(backbone_of(model), run_backbone):
        try:
            transform = measure_transform(model, use_cache=False, return_dict=True)
        except HeadError:
            raise
        except Exception as error:  # of its own code, given stand-ins
            raise ValueError(f"{name}: cannot measure what it does to logits: {error}") from error
    if len(seen) != 1 or seen[0].shape != hidden.shape or not torch.equal(seen[0], hidden):
        raise ValueError(f"{name}: expected lm_head to get the last hidden states as they are")
    return transform


class _Stub(BaseModelOutputWithPast):
    """A backbone's output: hidden states, and None for whatever else a model asks for."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


@contextlib.contextmanager
def _forward(module: nn.Module, function: Callable) -> Iterator[None]:
    """Let `module` run `function` instead of its forward, for a while."""
    own = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
