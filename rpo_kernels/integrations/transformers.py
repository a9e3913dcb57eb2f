"""Losses of `transformers` models without logits: `fuse_lm_head`, and what it makes possible.

    B pairs, 2B sequences (chosen first), T positions, D hidden size, V vocabulary

    logits = softcap(scale * (hidden @ weight^T + bias)),   softcap(z) = cap * tanh(z / cap)

`fuse_lm_head` puts a `FusedLMHead` with lm_head's own parameters in its place, and a forward over
the model's own that can end in a function of the last hidden states and the head instead of in
logits (``at_head``). It runs inside the forward of the module that owns the weight, so the hooks of
DDP, FSDP, peft and accelerate see it used. Everything else is such a function.

Scale and softcap, what a model does to lm_head's output, are measured: its forward is run on chosen
"outputs" of lm_head, in place of backbone and head. So no weight is touched, no list of
architectures is needed, and a model that does something else is refused instead of trained wrongly.
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

IGNORE = -100
HeadFunction = Callable[..., Any]
"""``(hidden (..., D), weight (V, D), *, bias, logit_scale, logit_softcap) -> anything``, such as a
`functools.partial` of a function of `rpo_kernels` with its labels."""


class FusedLMHead(nn.Linear):
    """An output layer (V, D) that can also run a function of its inputs and weight, without logits.

    It holds lm_head's own parameters under their own names, so generation, saving, tying and peft
    see an ordinary Linear.
    """

    def __init__(self, head: nn.Linear, logit_scale: float, logit_softcap: float | None) -> None:
        """Take over `head`'s parameters; scale, softcap: what the model does to its logits."""
        super().__init__(
            head.in_features, head.out_features, bias=head.bias is not None, device="meta"
        )
        self.weight, self.bias = head.weight, head.bias
        self.logit_scale, self.logit_softcap = logit_scale, logit_softcap
        self.train(head.training)

    def forward(self, hidden: Tensor, function: HeadFunction | None = None) -> Any:
        """``function(hidden, weight, bias=, logit_scale=, logit_softcap=)``; without a function,
        lm_head's output (..., V).
        """
        if function is None:
            return super().forward(hidden)
        return function(hidden, self.weight, **self.transform())

    def transform(self) -> dict[str, Any]:
        """Bias, scale and softcap, as `rpo_kernels` takes them."""
        return {
            "bias": self.bias,
            "logit_scale": self.logit_scale,
            "logit_softcap": self.logit_softcap,
        }


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
    name, head = type(model).__name__, model.get_output_embeddings()
    if isinstance(head, FusedLMHead):
        return model
    if type(head) is not nn.Linear:
        raise ValueError(
            f"{name}: expected an output layer of type Linear, got {type(head).__name__}"
            " (a quantized or adapted lm_head has no weight to compute with)"
        )
    if backbone_of(model) is model:
        raise ValueError(f"{name}: expected a backbone at model.base_model or model.model")
    scale, softcap = measure_transform(model)
    model.set_output_embeddings(FusedLMHead(head, scale, softcap))
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


def backbone_of(model: PreTrainedModel) -> PreTrainedModel:
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


# What stands in for lm_head's output while the transform is measured. Powers of two, so that a
# scale of one comes out as exactly that; the last would overflow nothing but saturates any softcap.
TINY, HUGE = 2.0**-40, 2.0**60
PROBE = (TINY, HUGE, -HUGE, 0.5, -1.0, 3.0, -12.0, 50.0, 400.0, 0.0)


def measure_transform(model: PreTrainedModel) -> tuple[float, float | None]:
    """``(scale, softcap)`` that the model's forward applies to lm_head's output.

    Raises:
        ValueError: the forward does not hand the last hidden states to lm_head as they are, or its
            logits are no ``softcap(scale * x)`` of lm_head's output x.
    """
    name, head, seen = type(model).__name__, model.get_output_embeddings(), []
    probe = torch.tensor(PROBE, dtype=torch.float64)
    probe = probe.repeat(-(-head.out_features // len(PROBE)))[: head.out_features]
    probe = torch.stack([probe, probe.flip(0)])[None]  # (1, 2, V): every entry has many places
    hidden = torch.linspace(-1, 1, 2 * head.in_features).view(1, 2, -1).to(head.weight.dtype)

    def run_head(states: Tensor) -> Tensor:
        seen.append(states)
        return probe

    def run_backbone(*_, **__) -> BaseModelOutputWithPast:
        return _Stub(last_hidden_state=hidden)

    ids = torch.zeros(1, 2, dtype=torch.long)
    with torch.no_grad(), _forward(head, run_head), _forward(backbone_of(model), run_backbone):
        try:
            logits = model(input_ids=ids, use_cache=False, return_dict=True).logits
        except Exception as error:  # of its own code, given stand-ins
            raise ValueError(f"{name}: cannot measure what it does to logits: {error}") from error
    if len(seen) != 1 or seen[0].shape != hidden.shape or not torch.equal(seen[0], hidden):
        raise ValueError(f"{name}: expected lm_head to get the last hidden states as they are")
    if logits.shape != probe.shape:
        raise ValueError(
            f"{name}: expected logits {tuple(probe.shape)} of lm_head's output of that shape, got "
            f"{tuple(logits.shape)}"
        )
    logits = logits.double()
    top = logits[0, 0, 1].item()
    softcap = top if 0 < top < HUGE**0.5 else None
    scale = logits[0, 0, 0].item() / TINY
    expected = probe * scale
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    if not scale > 0 or not torch.allclose(logits, expected, rtol=1e-5, atol=0):
        raise ValueError(
            f"{name}: expected logits of the form softcap(scale * lm_head(hidden)), got a forward "
            f"that maps {[*PROBE]} to {logits[0, 0, : len(PROBE)].tolist()}"
        )
    return scale, softcap


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
