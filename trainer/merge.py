"""Adapters as whole models: merged into the base that they were trained beside.

python -m trainer.merge outputs/run/model --output_dir merged

An adapter's folder says in `adapter_config.json` where its base is, in the form in which the
evaluator takes models: a folder, a hub id or `package:NAME`, each with `/FILE.gguf` or without.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.config import options
from trainer.config.fields import RunConfig
from trainer.errors import InputError
from trainer.model.adapters import ADAPTER_FILE, refuse_tied_adapters
from trainer.model.loading import load_model, load_tokenizer, locate_model, named, save_model, told
from trainer.model.weights import PLAIN
from trainer.paths import open_folder


def adapter_folder(config: RunConfig) -> Path | None:
    """The folder of `model_name_or_path` if it holds an adapter."""
    folder = Path(config.model_name_or_path).expanduser()
    return folder if (folder / ADAPTER_FILE).is_file() else None


def at(path: str, config: RunConfig) -> RunConfig:
    """`config` with the model of a path to which `/FILE.gguf` may be added."""
    folder, _, name = path.rpartition("/")
    if path.endswith(".gguf"):
        return replace(config, model_name_or_path=folder, gguf_file=name)
    return replace(config, model_name_or_path=path, gguf_file=None)


def base_of(folder: Path, config: RunConfig) -> RunConfig:
    """`config` with the model that the adapter in `folder` was trained beside.

    Raises:
        InputError: the adapter does not say which one.
    """
    with told(f"cannot read {folder / ADAPTER_FILE}"):
        base = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))
        base = base.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(
            f"model_name_or_path: {folder / ADAPTER_FILE} names no base_model_name_or_path; add "
            "the folder or hub id of the model that the adapter was trained beside"
        )
    return at(base, config)


def load_whole(config: RunConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer; an adapter is merged into its base.

    Raises:
        InputError: either is not there, or they do not belong together.
    """
    folder = adapter_folder(config)
    if folder is None:
        source = locate_model(config)
        tokenizer = load_tokenizer(source, config.gguf_file)
        return load_model(source, config), tokenizer
    base = base_of(folder, config)
    with named(f"model_name_or_path: base_model_name_or_path in {folder / ADAPTER_FILE}"):
        source = locate_model(base)
        own = (folder / "tokenizer_config.json").is_file()
        tokenizer = load_tokenizer(*((str(folder), None) if own else (source, base.gguf_file)))
        model = load_model(source, base)
    return merge(model, folder), tokenizer


def merge(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`model`, changed as the adapter in `folder` changes it.

    Raises:
        InputError: the adapter is of another model, damaged, or of a kind that cannot be merged.
    """
    with told(f"cannot put the adapter in {folder} into its base"):
        held = load_peft_weights(str(folder), device="cpu")
        _check_numbers(held, folder)
        _check_vocabulary(model, held, folder)
        adapted = PeftModel.from_pretrained(model, folder)
        _check_kind(adapted, folder)
        refuse_tied_adapters(adapted)
        needed, known = (
            set(get_peft_model_state_dict(adapted, save_embedding_layers=embeddings))
            for embeddings in (False, True)
        )
        differing = sorted((needed - set(held)) | (set(held) - known))
        if differing:
            raise InputError(
                f"model_name_or_path: the adapter in {folder} is not of this model: "
                f"{len(differing)} of its weights have no counterpart ({differing[0]})"
            )
        return adapted.merge_and_unload()


def _check_numbers(held: dict[str, Tensor], folder: Path) -> None:
    """Refuse an adapter's weights that are NaN, infinite, or of a type without a meaning alone."""
    for name, weight in held.items():
        if weight.dtype not in PLAIN:
            raise InputError(
                f"model_name_or_path: the adapter in {folder} holds {name} as {weight.dtype} "
                "without a scale, so what its numbers mean is not known; save it in float32"
            )
        if not weight.isfinite().all():
            raise InputError(
                f"model_name_or_path: the adapter in {folder} holds NaN or infinite numbers in "
                f"{name}; take an earlier one"
            )


def _check_vocabulary(model: PreTrainedModel, held: dict[str, Tensor], folder: Path) -> None:
    """Refuse an adapter that brings embeddings of another vocabulary than its base's."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    for path, module in model.named_modules():
        weight = held.get(f"base_model.model.{path}.weight")
        if module in ends and weight is not None and len(weight) != len(module.weight):
            raise InputError(
                f"model_name_or_path: the adapter in {folder} was trained on a vocabulary of "
                f"{len(weight)} tokens, its base has {len(module.weight)}; save the base after "
                "resize_token_embeddings, and name that as base_model_name_or_path"
            )


def _check_kind(adapted: PeftModel, folder: Path) -> None:
    """Refuse an adapter that is no change of its base's weights."""
    settings = adapted.active_peft_config
    kind = settings.peft_type.value
    if getattr(settings, "layer_replication", None):  # copies share the weights of one layer
        kind += " with layer_replication"
    elif hasattr(adapted.base_model, "merge_and_unload"):
        return
    raise InputError(
        f"model_name_or_path: the adapter in {folder} is {kind}, which cannot be merged into its "
        "base; expected one that changes its weights, as LoRA, DoRA or IA3 do"
    )


@dataclass(frozen=True, kw_only=True)
class Options:
    """An adapter and its base as one model."""

    adapter: str
    """Folder of the adapter, as the trainer or peft saved it."""
    output_dir: str
    """Where the whole model goes, a new or empty folder."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of its weights, which are merged in float32."""


def main(argv: list[str] | None = None, prog: str = "python -m trainer.merge") -> None:
    """Read the command line, merge, save; what the user got wrong is one message."""
    parser = options.make_parser(Options, prog, __doc__.strip(), positional="adapter")
    words = sys.argv[1:] if argv is None else argv
    try:
        asked = options.build(Options, options.read(parser, Options, words))
        merge_folder(**vars(asked))
    except InputError as error:
        sys.exit(f"error: {error}")
    print(f"written: {asked.output_dir}")


def merge_folder(adapter: str, output_dir: str, dtype: str) -> None:
    """Write the whole model that an adapter and its base make, with the adapter's tokenizer.

    Args:
        adapter: folder of the adapter.
        output_dir: a new or empty folder.
        dtype: type of the weights.

    Raises:
        InputError: no adapter, one that does not fit its base, or a folder that holds something.
    """
    config = RunConfig(model_name_or_path=adapter, train_file=("none",))
    if adapter_folder(config) is None:
        raise InputError(f"adapter: expected a folder with an {ADAPTER_FILE}, got {adapter}")
    out = open_folder(output_dir)
    if any(out.iterdir()):
        raise InputError(f"output_dir: expected a new or empty folder, got {out}")
    with named("adapter"):
        model, tokenizer = load_whole(config)
    save_model(model.to(getattr(torch, dtype)), tokenizer, out)


if __name__ == "__main__":
    main()
