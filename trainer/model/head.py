"""The output layer that computes the loss: what stands in lm_head's place.

    N rows, D hidden size, V vocabulary

    logits = softcap(scale * (hidden @ weight^T + bias)),   softcap(z) = cap * tanh(z / cap)

Weight and bias are lm_head's own parameters, tied or not. Scale and softcap are what the model's
forward does to lm_head's output. They are measured: known values, small and large ones, take the
place of lm_head's output, and the model's own logits tell what became of them. A model that does
anything else to them is refused; what its config says of its logits is not needed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rpo_kernels import RPOOutput, fused_rpo_loss
from trainer.errors import InputError
from trainer.model.backbone import BROKEN, quiet, without_cache

TOKENS = 4  # rows of the measurement
EXPONENTS = (-48, 24)  # of its values: from where tanh is linear to rounding, to where it is 1
LINEAR = 2.0**-30  # values up to here give the scale


class FusedLMHead(nn.Linear):
    """An output layer (V, D) that also computes the preference loss, without logits.

    It holds lm_head's own parameters under their own names, so generation, saving, tying and peft
    see an ordinary Linear.
    """

    def __init__(
        self, head: nn.Linear, logit_scale: float = 1.0, logit_softcap: float | None = None
    ) -> None:
        """Take over `head`'s parameters; scale, softcap: what the model does to its logits."""
        super().__init__(
            head.in_features, head.out_features, bias=head.bias is not None, device="meta"
        )
        self.weight, self.bias = head.weight, head.bias
        self.logit_scale, self.logit_softcap = logit_scale, logit_softcap
        self.train(head.training)

    def forward(
        self, hidden: Tensor, labels: Tensor | None = None, **loss: object
    ) -> Tensor | RPOOutput:
        """`fused_rpo_loss` of hidden (N, D), labels (N,); without labels, logits (..., V)."""
        if labels is None:
            return super().forward(hidden)
        ref_logps = loss.pop("ref_logps")
        return fused_rpo_loss(hidden, self.weight, labels, ref_logps, **self.transform(), **loss)

    def transform(self) -> dict[str, object]:
        """Bias, scale and softcap, as `rpo_kernels` takes them."""
        return {
            "bias": self.bias,
            "logit_scale": self.logit_scale,
            "logit_softcap": self.logit_softcap,
        }


def fuse_lm_head(model: PreTrainedModel) -> PreTrainedModel:
    """Replace the model's output layer, in place, by a `FusedLMHead` with the same parameters.

    Raises:
        InputError: the output layer is not a plain Linear, the model does something else to its
            output than a scale and a softcap, its forward fails, or changes its weights.
    """
    head, versions = output_layer(model), [p._version for p in model.parameters()]
    try:
        transform = measure_transform(model)
    except (InputError, torch.OutOfMemoryError):
        raise
    except BROKEN as error:
        raise InputError(
            f"{type(model).__name__}: its forward fails on {TOKENS} made-up tokens, so it cannot "
            f"be trained: {error}; check the model's config"
        ) from error
    fused = FusedLMHead(head, *transform)
    if versions != [p._version for p in model.parameters()]:
        raise InputError(
            f"{type(model).__name__}: a forward in evaluation changes the weights in place, so "
            "that they could not be saved; it cannot be trained here"
        )
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module is head:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, fused)
    return model


def output_layer(model: PreTrainedModel) -> nn.Linear:
    """lm_head, which must be a plain Linear."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise InputError(
            f"{type(model).__name__}: expected an output layer of type Linear, "
            f"got {type(head).__name__}"
        )
    return head


@torch.no_grad()
def measure_transform(model: PreTrainedModel) -> tuple[float, float | None]:
    """Scale and softcap that a model's forward applies to lm_head's output; (1.0, None) is nothing.

    The model may be without numbers, on the meta device: lm_head's output is replaced. It is in
    evaluation mode afterwards.

    Raises:
        InputError: the logits are another function of lm_head's output.
    """
    head = output_layer(model)
    device = head.weight.device if head.weight.device.type != "meta" else torch.device("cpu")
    values = _known_values((1, TOKENS, head.out_features)).to(device)
    hook = head.register_forward_hook(lambda _head, _args, _output: values.clone())
    ids = torch.arange(TOKENS, device=head.weight.device)[None]
    quiet(model)
    try:
        logits = model(input_ids=ids, **without_cache(model)).logits
    finally:
        hook.remove()
    name = type(model).__name__
    if logits.shape != values.shape:
        raise InputError(
            f"{name}: its logits are not softcap(scale * lm_head(hidden)): lm_head's output is "
            f"{tuple(values.shape)}, the logits are {tuple(logits.shape)}; such a model cannot be "
            "trained here"
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
        raise InputError(
            f"{name}: its logits are not softcap(scale * lm_head(hidden)) with a scale > 0: "
            f"{values[0]:.6g} becomes {logits[0]:.6g}; change the sign of both, in the config and "
            "of lm_head's weight"
        )
    if not 0 < scale < float("inf") or off.any():
        k = int(off.nonzero()[0]) if off.any() else 0
        raise InputError(
            f"{name}: its logits are not softcap(scale * lm_head(hidden)): {values[k]:.6g} becomes "
            f"{logits[k]:.6g}, where a scale of {scale:.6g} and a softcap of {softcap} make it "
            f"{fitted[k]:.6g}; such a model cannot be trained here"
        )
    return scale, softcap
