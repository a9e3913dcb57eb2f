"""The policy: its forward to the loss.

    B pairs, T packed tokens, N trained tokens, D hidden size, V vocabulary

    PreferenceModel.forward(batch)
      └─ backbone (transformers)          once, packed:     (1, T) ids, positions, layout
                                          or 2B times:      (1, t) ids of one sequence
      └─ FusedLMHead.forward(hidden, ...)  N rows of its states, weight (V, D)  ->  no logits

Alone, a sequence runs as the model was written. The loss is computed inside the forward of the
module that owns the weight, so that DDP, FSDP2 and ZeRO-3 hooks see it used.

The model is always in evaluation mode, so dropout and every other noise of its own is off, whatever
its name: policy and reference agree at step 0.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from rpo_kernels import RPOOutput, fused_rpo_loss
from rpo_kernels.backends import choose_backend
from trainer.config.fields import RunConfig
from trainer.data.batches import Batch
from trainer.errors import InputError
from trainer.model.attention import NAME as ATTENTION
from trainer.model.attention import packs
from trainer.model.backbone import quiet, run_to_head
from trainer.model.generate import sample
from trainer.model.router import balance_loss

LOSS_FIELDS = (
    "beta", "eta", "sft_reduction", "scale_eta_by_beta", "label_smoothing", "simpo_gamma",
    "loss_type", "strategy", "grad_tolerance", "max_workspace_mb", "backend",
)  # fmt: skip


class PolicyOutput(NamedTuple):
    """`RPOOutput`, whose fields these are, its loss with the routers', and that share."""

    loss: Tensor
    dpo_loss: Tensor
    sft_loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    accuracy: Tensor
    margin: Tensor
    skipped: Tensor
    aux_loss: Tensor | None
    """(), the routers' share of the loss, detached; None without one."""


def loss_options(config: RunConfig) -> dict[str, Any]:
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
        self,
        model: PreTrainedModel | PeftModel,
        options: dict[str, Any],
        offload: bool = False,
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
        language_model = self.language_model
        self.own_attention = language_model.config._attn_implementation
        self.packed = False
        """Whether a batch runs as one packed row; else every sequence runs alone."""
        self.pads = True
        """Whether prompts of different lengths are answered together, padded on the left."""
        self.pack(packs(language_model))
        self.train(language_model.training)

    def pack(self, packed: bool) -> None:
        """Run batches as packed rows, or every sequence alone."""
        if packed != self.packed:
            self.language_model.set_attn_implementation(ATTENTION if packed else self.own_attention)
        self.packed = packed

    def train(self, mode: bool = True) -> PreferenceModel:
        """Training mode for adapters alone, whose dropout is trained with."""
        quiet(self)
        self.training = mode
        for layer in self.modules():
            if isinstance(layer, BaseTunerLayer):
                for name, part in layer.named_children():
                    if name != "base_layer":
                        part.train(mode)
        return self

    @property
    def language_model(self) -> PreTrainedModel:
        """The transformers model, below peft's wrapper where there is one."""
        if not isinstance(self.model, PeftModel):
            return self.model
        base = self.model.get_base_model()
        assert isinstance(base, PreTrainedModel)
        return base

    def hidden(self, batch: Batch) -> Tensor:
        """Hidden states (N, D) that predict a packed batch's trained tokens."""
        return torch.cat([states for states, _ in self._run(batch)])

    def _run(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Of each forward of the backbone: states (n, D) of trained tokens, the routers' loss."""
        keeps = torch.autograd.graph.save_on_cpu(pin_memory=True)
        with keeps if self.offload else contextlib.nullcontext():
            for part in batch.passes(self.packed):
                layout = {
                    "position_ids": batch.position_ids,
                    "attention_mask": part.ids.new_ones(1, 1, 1, 1),  # for a finished mask
                    "pairs": batch.layout,
                }
                found = run_to_head(self.language_model, part.ids, **layout if self.packed else {})
                aux = None
                if found.output is not None and getattr(found.output, "router_logits", None):
                    aux = balance_loss(self.language_model, found.output, part.sequences)
                yield found.hidden[0].index_select(0, part.rows), aux

    def forward(
        self, batch: Batch, ref_logps: Tensor | None, num_pairs: int, num_chosen_tokens: int
    ) -> PolicyOutput:
        """The loss of B pairs as their share of a step's.

        Args:
            batch: B packed pairs.
            ref_logps: (2B,) summed reference log-probs, chosen first; None for reference-free
                losses.
            num_pairs: pairs of the whole step, over all micro-batches and ranks.
            num_chosen_tokens: trained tokens of the whole step's chosen responses.
        """
        states, aux = zip(*self._run(batch), strict=True)
        loss = functools.partial(
            fused_rpo_loss, labels=batch.labels, cu_seqlens=batch.cu_seqlens, ref_logps=ref_logps,
            num_pairs=num_pairs, num_chosen_tokens=num_chosen_tokens, **self.options,
        )  # fmt: skip
        out: RPOOutput = self.language_model.get_output_embeddings()(torch.cat(states), loss)
        if None in aux:
            return PolicyOutput(*out, None)
        routers = torch.stack(aux).sum() / (2 * num_pairs)
        return PolicyOutput(*out._replace(loss=out.loss + routers), routers.detach())

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
            max_new_tokens=max_new_tokens, temperature=0.0, synced=synced, padded=self.pads,
        )  # fmt: skip


def compile_layers(model: PreferenceModel) -> None:
    """Compile every layer of the backbone, for any number of tokens; attention stays as it is."""
    for module in model.language_model.modules():
        if isinstance(module, GradientCheckpointingLayer):  # transformers' mark of a layer
            module.compile(dynamic=True)
