"""The fused head: what stands in lm_head's place, and what a model does to lm_head's output.

    N rows, L tokens, D hidden size, V vocabulary

    logits = softcap(scale * (hidden @ weight^T + bias)),   softcap(z) = cap * tanh(z / cap)

Weight and bias are lm_head's own parameters, tied or not. Scale and softcap are what the model's
forward does to lm_head's output. They are measured: known values, small and large ones, take the
place of lm_head's output, and the model's own logits tell what became of them. So no list of
architectures is needed, what a config says of its logits neither, and a model that does anything
else to them is refused instead of trained wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

HeadFunction = Callable[..., Any]
"""``(hidden (..., D), weight (V, D), *, bias, logit_scale, logit_softcap) -> anything``, such as a
`functools.partial` of a function of `rpo_kernels` with its labels."""

TOKENS = 4  # rows of the measurement
EXPONENTS = (-48, 24)  # of its values: from where tanh is linear to rounding, to where it is 1
LINEAR = 2.0**-30  # values up to here give the scale


class HeadError(ValueError):
    """The output layer, or what the model does to its output, is not what a fused head computes."""


class Transform(TypedDict):
    """What becomes of ``hidden @ weight^T``, as the functions of `rpo_kernels` take it."""

    bias: Tensor | None
    """(V,)"""
    logit_scale: float
    logit_softcap: float | None


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

    def transform(self) -> Transform:
        """Bias, scale and softcap."""
        return {
            "bias": self.bias,
            "logit_scale": self.logit_scale,
            "logit_softcap": self.logit_softcap,
        }


def output_layer(model: PreTrainedModel) -> nn.Linear:
    """lm_head.

    Raises:
        HeadError: it is not a plain Linear.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise HeadError(
            f"{type(model).__name__}: expected an output layer of type Linear, got "
            f"{type(head).__name__} (a quantized or adapted lm_head has no weight to compute with)"
        )
    return head


def replace_head(model: PreTrainedModel, fused: FusedLMHead) -> None:
    """Put a fused head in lm_head's place, in place, under every name that lm_head has."""
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module is head:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, fused)


@torch.no_grad()
def measure_transform(model: PreTrainedModel, **inputs: object) -> tuple[float, float | None]:
    """Scale and softcap that a model's forward applies to lm_head's output; (1.0, None) is nothing.

    The model's own forward runs, in the mode it is in, on a few tokens. It may be without numbers,
    on the meta device: lm_head's output is replaced.

    Args:
        model: a causal language model.
        **inputs: arguments of its forward beside the token ids.

    Raises:
        HeadError: the output layer is not a plain Linear, or the logits are another function of
            its output. What the model's own code raises comes as it is.
    """
    head, name = output_layer(model), type(model).__name__
    device = head.weight.device if head.weight.device.type != "meta" else torch.device("cpu")
    values = _known_values((1, TOKENS, head.out_features)).to(device)
    hook = head.register_forward_hook(lambda _head, _args, _output: values.clone())
    ids = torch.arange(TOKENS, device=head.weight.device)[None]
    try:
        logits = model(input_ids=ids, **inputs).logits
    finally:
        hook.remove()
    if logits.shape != values.shape:
        raise HeadError(
            f"{name}: its logits are not softcap(scale * lm_head(hidden)): lm_head's output is "
            f"{tuple(values.shape)}, the logits are {tuple(logits.shape)}; such a model cannot "
            "have a fused head"
        )
    return _fit(name, values.flatten(), logits.flatten())


def _known_values(shape: tuple[int, ...]) -> Tensor:
    """Values of either sign and of many sizes in any order, exact in every floating type."""
    dice = torch.Generator().manual_seed(0)
    exponents = torch.randint(*EXPONENTS, shape, generator=dice)
    digits = torch.randint(128, 256, shape, generator=dice).double() / 128
    signs = torch.randint(0, 2, shape, generator=dice) * 2 - 1
    return signs * digits * 2.0**exponents


def _fit(name: str, values: Tensor, logits: Tensor) -> tuple[float, float | None]:
    """Scale and softcap that make logits (n,) of values (n,), to rounding."""
    eps, logits = torch.finfo(logits.dtype).eps, logits.double()
    small = values.abs() <= LINEAR
    scale, softcap = (logits[small] / values[small]).mean().item(), None
    fitted = scale * values
    if not torch.allclose(fitted, logits, rtol=8 * eps, atol=0):
        softcap = logits.abs().max().item()
        fitted = softcap * torch.tanh(fitted / softcap)
    off = ~torch.isclose(fitted, logits, rtol=8 * eps, atol=0)
    if scale <= 0 and not off.any():
        raise HeadError(
            f"{name}: its logits are not softcap(scale * lm_head(hidden)) with a scale > 0: "
            f"{values[0]:.6g} becomes {logits[0]:.6g}; change the sign of both, in the config and "
            "of lm_head's weight"
        )
    if not 0 < scale < float("inf") or off.any():
        k = int(off.nonzero()[0]) if off.any() else 0
        raise HeadError(
            f"{name}: its logits are not softcap(scale * lm_head(hidden)): {values[k]:.6g} becomes "
            f"{logits[k]:.6g}, where a scale of {scale:.6g} and a softcap of {softcap} make it "
            f"{fitted[k]:.6g}; such a model cannot have a fused head"
        )
    return scale, softcap
