"""The policy: its forward to the loss, and the check that packing and head changed nothing.

    B pairs, T packed tokens, N trained tokens, D hidden size, V vocabulary

    PreferenceModel.forward(batch)
      └─ backbone (transformers)          (1, T) ids, positions, layout  ->  states (1, T, D)
      └─ FusedLMHead.forward(hidden, ...)  N rows of them, weight (V, D)  ->  RPOOutput, no logits

The loss is computed inside the forward of the module that owns the weight, so that DDP, FSDP2 and
ZeRO-3 hooks see it used.
"""

from __future__ import annotations

import contextlib
import inspect

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from rpo_kernels import RPOOutput, linear_logprobs
from rpo_kernels.backends import choose_backend
from trainer.attention import NAME as ATTENTION
from trainer.attention import use_pair_attention
from trainer.config import InputError, RunConfig
from trainer.packing import Batch, pack
from trainer.pairs import IGNORE, Pair
from trainer.samples import sample

LOSS_FIELDS = (
    "beta", "eta", "sft_reduction", "scale_eta_by_beta", "label_smoothing", "loss_type",
    "max_workspace_mb", "backend",
)  # fmt: skip
# Relative error by type of weights. Rounding is 1e-6 in float32; a leak between sequences or a
# missed softcap, 1e-2 and more, and on real models' scales more than bfloat16's 1e-2, too.
HEAD_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def loss_options(config: RunConfig) -> dict[str, object]:
    """The arguments of `fused_rpo_loss` that the config decides.

    Raises:
        InputError: the backend cannot run on this machine; everything else the config has checked.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        choose_backend(config.backend, torch.empty(0, device=device))
    except RuntimeError as error:
        raise InputError(str(error)) from None
    return {name: getattr(config, name) for name in LOSS_FIELDS}


class PreferenceModel(nn.Module):
    """A causal language model whose forward is the loss of a batch of preference pairs."""

    def __init__(
        self, model: PreTrainedModel, options: dict[str, object], offload: bool = False
    ) -> None:
        """Wrap `model` (with a `FusedLMHead`).

        Args:
            model: the causal language model, or peft's wrapper of it.
            options: loss arguments fixed for the run.
            offload: whether what the backbone keeps for backward waits in CPU memory.
        """
        super().__init__()
        self.model = model
        self.options = options
        self.offload = offload
        self.own_attention = use_pair_attention(self.language_model)

    @property
    def language_model(self) -> PreTrainedModel:
        """The transformers model, below peft's wrapper where there is one."""
        wrapped = hasattr(self.model, "get_base_model")
        return self.model.get_base_model() if wrapped else self.model

    def hidden(self, batch: Batch) -> Tensor:
        """Hidden states (N, D) that predict a packed batch's trained tokens."""
        keeps = torch.autograd.graph.save_on_cpu(pin_memory=True)
        with keeps if self.offload else contextlib.nullcontext():
            output = self.language_model.base_model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=batch.input_ids.new_ones(1, 1, 1, 1),  # stands for a finished mask
                use_cache=False,
                pairs=batch.layout,
            )
        return output.last_hidden_state[0].index_select(0, batch.rows)

    def forward(
        self, batch: Batch, ref_logps: Tensor | None, num_pairs: int, num_chosen_tokens: int
    ) -> RPOOutput:
        """The loss of B pairs as their share of a step's.

        Args:
            batch: B packed pairs.
            ref_logps: (2B,) summed reference log-probs, chosen first; None for reference-free
                losses.
            num_pairs: pairs of the whole step, over all micro-batches and ranks.
            num_chosen_tokens: trained tokens of the whole step's chosen responses.
        """
        hidden = self.hidden(batch)
        head = self.language_model.get_output_embeddings()
        return head(
            hidden, batch.labels, cu_seqlens=batch.cu_seqlens, ref_logps=ref_logps,
            num_pairs=num_pairs, num_chosen_tokens=num_chosen_tokens, **self.options,
        )  # fmt: skip

    def answer(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: list[list[int]],
        max_new_tokens: int,
        synced: bool = False,
    ) -> list[list[int]]:
        """Greedy continuations of prompts, adapters included; for FSDP2 a forward as well."""
        return sample(
            self.language_model, tokenizer, prompts,
            max_new_tokens=max_new_tokens, temperature=0.0, synced=synced,
        )  # fmt: skip


def compile_layers(model: PreferenceModel) -> None:
    """Compile every layer of the backbone, for any number of tokens; attention stays as it is."""
    for module in model.language_model.modules():
        if isinstance(module, GradientCheckpointingLayer):  # transformers' mark of a layer
            module.compile(dynamic=True)


@torch.no_grad()
def check_model(model: PreferenceModel, pair: Pair) -> None:
    """Compare a packed batch with the model's own forward, one sequence at a time.

    Args:
        model: the policy, before it is wrapped for training.
        pair: any pair; it is packed twice into one batch, as training would.

    Raises:
        InputError: this architecture lets packed sequences see each other, attends in a way that
            `attention` does not, or transforms its logits in another way.
    """
    language_model = model.language_model
    device, name = language_model.device, type(language_model).__name__
    tolerance = HEAD_TOLERANCE[language_model.dtype]
    batch = pack([pair], (0, 0)).to(device)
    try:
        packed, ends = model.hidden(batch), batch.cu_seqlens.tolist()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError) as error:  # of its own code, given our masks
        raise InputError(
            f"{name}: cannot run packed sequences: {error}; this architecture cannot be packed"
        ) from error
    language_model.set_attn_implementation(model.own_attention)
    try:
        for k, sequence in enumerate((pair.chosen, pair.chosen, pair.rejected, pair.rejected)):
            ids = torch.as_tensor(sequence.ids, device=device)[None]
            states = language_model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
            trained = torch.as_tensor(sequence.labels, device=device) != IGNORE
            difference = (packed[ends[k] : ends[k + 1]] - states[trained]).norm()
            if not difference <= tolerance * states[trained].norm():
                raise InputError(
                    f"{name}: packed sequences do not attend as they do alone; "
                    "this architecture cannot be packed"
                )
        _check_logits(language_model, ids, states)
    finally:
        language_model.set_attn_implementation(ATTENTION)


def _check_logits(language_model: PreTrainedModel, ids: Tensor, states: Tensor) -> None:
    """Compare log-probs of the fused head with those of the model's logits on a few tokens."""
    name, head = type(language_model).__name__, language_model.get_output_embeddings()
    last, targets = states[-8:], ids[0, -8:]  # any token ids do as targets
    few = "logits_to_keep" in inspect.signature(language_model.forward).parameters
    keep = {"logits_to_keep": 8} if few else {}
    logits = language_model(input_ids=ids, use_cache=False, **keep).logits[0, -8:]
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    fused = linear_logprobs(last, head.weight, targets, **head.transform())
    if not (fused - expected).norm() <= HEAD_TOLERANCE[states.dtype] * expected.norm():
        raise InputError(
            f"{name}: its logits are not softcap(scale * lm_head(hidden)) with "
            f"scale {head.logit_scale} and softcap {head.logit_softcap}; pass the right "
            "logit_scale and logit_softcap, if there are any"
        )
