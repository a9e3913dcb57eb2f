"""The output layer that computes the loss: what stands in lm_head's place.

    N rows, D hidden size, V vocabulary

    logits = softcap(scale * (hidden @ weight^T + bias)),   softcap(z) = cap * tanh(z / cap)

Weight and bias are lm_head's own parameters, tied or not. Scale and softcap are what the model's
forward does to lm_head's output; they stand in its config, under names that differ by architecture.
A transform that is missed changes the loss without an error, so an architecture that is not listed
here is refused, and `model.check_model` compares log-probs with the model's own logits.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from rpo_kernels import RPOOutput, fused_rpo_loss
from trainer.config import InputError

# Architectures (config.model_type) that return lm_head's output as it is.
PLAIN = frozenset(
    (
        "gemma", "gemma3", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "olmo", "olmo2",
        "olmo3", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
    )
)  # fmt: skip
SOFTCAPPED = frozenset(("gemma2", "gemma3_text"))  # config.final_logit_softcapping
MULTIPLIED = frozenset(("cohere", "cohere2"))  # config.logit_scale
DIVIDED = frozenset(("granite", "granitemoe"))  # config.logits_scaling
KNOWN = PLAIN | SOFTCAPPED | MULTIPLIED | DIVIDED


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


def fuse_lm_head(
    model: PreTrainedModel, logit_scale: float | None = None, logit_softcap: float | None = None
) -> PreTrainedModel:
    """Replace the model's output layer, in place, by a `FusedLMHead` with the same parameters.

    Args:
        model: a causal language model.
        logit_scale, logit_softcap: what the model's forward does to lm_head's output. With neither
            they are read from the config of a known architecture; one that is not given is none.

    Raises:
        InputError: the output layer is not a plain Linear, or nothing is given for an architecture
            that is not known.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise InputError(
            f"{type(model).__name__}: expected an output layer of type Linear, "
            f"got {type(head).__name__}"
        )
    if logit_scale is None and logit_softcap is None:
        logit_scale, logit_softcap = _transform_of(model)
    model.set_output_embeddings(FusedLMHead(head, logit_scale or 1.0, logit_softcap))
    return model


def _transform_of(model: PreTrainedModel) -> tuple[float, float | None]:
    """Scale and softcap of a known architecture's logits."""
    config = model.config
    if config.model_type in PLAIN:
        return 1.0, None
    if config.model_type in SOFTCAPPED:
        return 1.0, config.final_logit_softcapping
    if config.model_type in MULTIPLIED:
        return config.logit_scale, None
    if config.model_type in DIVIDED:
        return 1.0 / config.logits_scaling, None
    raise InputError(
        f"{type(model).__name__}: nothing is known of what architecture {config.model_type!r} does "
        "to its logits after lm_head; pass logit_scale (1.0 where it does nothing) or logit_softcap"
    )
