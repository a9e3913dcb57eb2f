"""What a model folder holds against what its config describes: nothing is trained from noise.

Where a file lacks a weight transformers makes one up, what the config has no place for it drops,
and of both it only warns. Here either is an error. Names that an architecture itself declares
optional, buffers of older releases and the second of two tied weights are no difference.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from zipfile import is_zipfile

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trainer.errors import InputError

SHOWN = 3  # names in a message
QUANTIZED = re.compile(
    r"(qweight|qzeros|scales|g_idx|weight_packed|weight_scale\w*|weight_zero_point|SCB|absmax"
    r"|quant_map|_blocks|W_q|codebooks?)$"
)
OTHER_HEAD = re.compile(r"(^|\.)(score|classifier|v_head|value_head|qa_outputs|reward_head|cls)\.")
ADAPTER = re.compile(r"\.(lora_|base_layer|modules_to_save|hada_|ia3_)")
LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
# Stored types that are weights as they stand; others mean nothing without a scale, and here are the
# names under which one stands.
PLAIN = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
SCALES = ("_scale_inv", "_scale", ".absmax")
MODULE_SCALES = ("scale", "qscale_weight", "SCB")


def refuse_differences(model: PreTrainedModel, info: dict[str, set], source: str) -> None:
    """Refuse a model whose weights are not those of its file.

    Args:
        model: as it was loaded.
        info: `missing_keys`, `unexpected_keys` and `mismatched_keys` (name, shape in the file,
            shape in the model), as `from_pretrained(output_loading_info=True)` gives them.
        source: where it was loaded from.

    Raises:
        InputError: any of the three is there; the message names a few and what may be the cause.
    """
    missing, unexpected = (sorted(info[f"{kind}_keys"]) for kind in ("missing", "unexpected"))
    shapes = {name: (tuple(file), tuple(own)) for name, file, own in info["mismatched_keys"]}
    vocabulary = _vocabulary(model, shapes)
    if vocabulary and not (missing or unexpected):
        raise InputError(
            f"model_name_or_path: the vocabulary of {source} has {vocabulary[0]} tokens in its "
            f"weights and {vocabulary[1]} in its config; correct vocab_size in config.json, or "
            "save the model again after resize_token_embeddings"
        )
    other = [f"{name} {file} for {own}" for name, (file, own) in sorted(shapes.items())]
    kinds = {"missing": missing, "not in the config": unexpected, "of another shape": other}
    parts = [f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds.items() if names]
    if parts:
        raise InputError(
            f"model_name_or_path: {source} does not hold the weights of the "
            f"{type(model).__name__} that its config describes: {', '.join(parts)}; "
            + _remedy(model, missing, unexpected)
        )


def refuse_bad_numbers(model: PreTrainedModel, source: str) -> None:
    """Refuse weights that are no numbers to train on; one pass over them, without a copy.

    Raises:
        InputError: a weight holds NaN or infinity, or integers whose scale nobody knows.
    """
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            if tensor.dim() > 1 and not getattr(model, "is_quantized", False):
                raise InputError(_unscaled(source, name, str(tensor.dtype)))
        elif tensor.numel() and not _finite(tensor):
            raise InputError(
                f"model_name_or_path: {source} holds NaN or infinite numbers in {name}; such a "
                "model cannot be trained, take a checkpoint from before it broke"
            )


def refuse_unclear(folder: Path, source: str, quantization: dict) -> None:
    """Refuse files of which it is not clear which numbers, or what they mean, would be trained on.

    Names, types and shapes alone are read.

    Args:
        folder: where the files are.
        source: what the user gave for it.
        quantization: what the config says of it, empty for plain weights.

    Raises:
        InputError: two files hold the same weight; one stands without its scale, or in blocks that
            do not fill it or of an unknown size.
    """
    stored = _read_headers(folder, source)
    _refuse_lost_parts(stored, source, quantization)
    block = quantization.get("weight_block_size")
    for name, (kind, shape) in stored.items():
        if kind in PLAIN.values() or not name.endswith((".weight", "_proj")):
            continue
        module = name.removesuffix("weight")
        names = [f"{name}{end}" for end in SCALES] + [f"{module}{end}" for end in MODULE_SCALES]
        scale = next((stored[n][1] for n in names if n in stored), None)
        if scale is None:
            raise InputError(_unscaled(source, name, kind))
        parts_of = [1 < parts < size for size, parts in zip(shape, scale, strict=False)]
        if not block and quantization.get("quant_method") == "fp8" and any(parts_of):
            raise InputError(
                f"model_name_or_path: {source} holds {name} {tuple(shape)} with {tuple(scale)} "
                "scales, and its config does not say of how large blocks; add weight_block_size to "
                "its quantization_config"
            )
        if block and len(scale) == 2 and len(shape) == 2:
            ragged = any(
                parts > 1 and size != parts * side
                for size, parts, side in zip(shape, scale, block, strict=True)
            )
            if ragged:
                raise InputError(
                    f"model_name_or_path: {source} holds {name} {tuple(shape)} in blocks of "
                    f"{tuple(block)}, which transformers dequantizes wrongly where a block is cut; "
                    "give the unquantized model"
                )


def _refuse_lost_parts(stored: dict, source: str, quantization: dict) -> None:
    """Refuse compressed-tensors' weights without all that gives them back."""
    if quantization.get("quant_method") != "compressed-tensors":
        return
    groups = quantization["config_groups"].values()
    shifted = any(not (g.get("weights") or {}).get("symmetric", True) for g in groups)
    for name in stored:
        module, _, end = name.rpartition(".")
        needed = {"weight_packed": ["weight_scale", "weight_shape"]}.get(end, [])
        if end == "weight_scale" and shifted:
            needed = ["weight_zero_point"]
        lost = next((f"{module}.{part}" for part in needed if f"{module}.{part}" not in stored), "")
        if lost:
            raise InputError(
                f"model_name_or_path: {source} holds {name} without {lost}, so what its numbers "
                "mean is not known; give the unquantized model"
            )


def refuse_dropped(model: PreTrainedModel, file: Path) -> None:
    """Refuse a GGUF file of which transformers has left out something, as it does without a word.

    Numbers are counted, as names are other ones there: weights are cut and joined, none is lost.

    Raises:
        InputError: the file holds more numbers than the model.
    """
    from gguf import GGUFReader

    counts = {tensor.name: int(tensor.n_elements) for tensor in GGUFReader(file).tensors}
    sizes = {weight.data_ptr(): weight.numel() for weight in model.state_dict().values()}
    left = sum(counts.values()) - sum(sizes.values())  # a tied head counts once
    if left > 0:
        biased = any(name.endswith(".bias") for name in model.state_dict())
        named = [n for n in counts if "rope" in n or (n.endswith(".bias") and not biased)]
        raise InputError(
            f"model_name_or_path: {file} holds {left} numbers that transformers does not read"
            + (f" ({_some(named)})" if named else "")
            + "; give the model's safetensors"
        )


def _weight_files(folder: Path, source: str) -> list[Path]:
    """The files in which transformers finds a model's weights, in its order of preference."""
    for whole in (folder / "model.safetensors", folder / "pytorch_model.bin"):
        index, named = whole.with_name(f"{whole.name}.index.json"), set()
        if index.is_file():
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        parts = [folder / name for name in sorted(named) if (folder / name).is_file()]
        if whole.is_file() and parts and parts != [whole]:
            raise InputError(
                f"model_name_or_path: {source} holds two models, one in {whole.name} and one in "
                f"{parts[0].name} and the others of {index.name}; remove the one not meant"
            )
        if whole.is_file() or parts:
            return parts or [whole]
    return []


def _read_headers(folder: Path, source: str) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of every tensor in a folder's weights, by name."""
    stored: dict[str, tuple[str, list[int]]] = {}
    files: dict[str, str] = {}
    for file in _weight_files(folder, source):
        held = _pickled(file) if file.suffix == ".bin" else _header(file)
        twice = sorted(stored.keys() & held.keys())
        if twice:
            raise InputError(
                f"model_name_or_path: {source} holds {_some(twice)} in both {files[twice[0]]} and "
                f"{file.name}; they are not parts of one model, save or download it again"
            )
        stored |= held
        files |= dict.fromkeys(held, file.name)
    return stored


def _header(file: Path) -> dict[str, tuple[str, list[int]]]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(min(length, os.fstat(stream.fileno()).st_size)))
        except ValueError:  # whoever loads it says so
            return {}
    header.pop("__metadata__", None)
    return {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}


def _pickled(file: Path) -> dict[str, tuple[str, list[int]]]:
    held = torch.load(file, map_location="meta", weights_only=True, mmap=is_zipfile(file))
    return {
        name: (PLAIN.get(tensor.dtype, str(tensor.dtype)), list(tensor.shape))
        for name, tensor in held.items()
        if isinstance(tensor, Tensor)
    }


def _unscaled(source: str, name: str, kind: str) -> str:
    return (
        f"model_name_or_path: {source} holds {name} as {kind} without a scale, so what its numbers "
        "mean is not known; give the unquantized model"
    )


def _finite(tensor: Tensor) -> bool:
    low, high = torch.aminmax(tensor.detach())
    return bool(low.isfinite() & high.isfinite())


def _vocabulary(model: PreTrainedModel, shapes: dict) -> tuple[int, int] | None:
    """Rows of the embedding or head, in the file and in the model, where only they differ."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [id(layer.weight) for layer in layers if layer is not None]
    named = model.named_parameters(remove_duplicate=False)
    names = {name for name, parameter in named if id(parameter) in weights}
    rows = {(file[0], own[0]) for file, own in shapes.values() if file[1:] == own[1:] != ()}
    return rows.pop() if shapes.keys() <= names and len(rows) == 1 else None


def _remedy(model: PreTrainedModel, missing: list[str], unexpected: list[str]) -> str:
    """What may have happened to a file, judged by the names, and what to do."""
    prefix = _prefix(missing, unexpected)
    if any(map(ADAPTER.search, unexpected)):
        return "adapters are not merged into it; save it after merge_and_unload()"
    if prefix:
        return (
            f"its names begin with {prefix!r}, those of a wrapped model; save the model inside "
            "(_orig_mod of a compiled one, module of DDP)"
        )
    if any(map(QUANTIZED.search, unexpected)):
        return "it is quantized, and its config does not say how; give the unquantized model"
    kind = ", ".join(model.config.architectures or [])
    if any(map(OTHER_HEAD.search, unexpected)):
        return f"it was saved for another task ({kind}); give a causal language model"
    head = model.get_output_embeddings()
    heads = [name for name, p in model.named_parameters() if head is not None and p is head.weight]
    if missing and missing == heads and not unexpected:
        return (
            "if its head is the input embedding, set tie_word_embeddings to true in config.json, "
            "else save it with its head"
        )
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    depths = [int(found[1]) for found in map(LAYER.search, [*missing, *unexpected]) if found]
    if depths and len(depths) == len(missing) + len(unexpected) and not (missing and unexpected):
        whole = unexpected and min(depths) >= (count or 0)
        if whole or (missing and max(depths) + 1 == count and _whole_layers(model, missing)):
            return f"config.json speaks of {count} layers; correct num_hidden_layers"
    if unexpected and not missing and all(name.endswith(".bias") for name in unexpected):
        return "its config lacks these biases; correct it (attention_bias, mlp_bias)"
    return "correct its config.json, or save the model again with save_pretrained"


def _whole_layers(model: PreTrainedModel, missing: list[str]) -> bool:
    """Whether all that is missing is the weights of some layers from one on."""
    first = min(int(found[1]) for found in map(LAYER.search, missing) if found)
    later = {n for n in model.state_dict() if (f := LAYER.search(n)) and int(f[1]) >= first}
    return later == set(missing)


def _prefix(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    """What stands before a missing name in an unexpected one, `""` where nothing does."""
    wanted = set(missing)
    for name in unexpected:
        parts = name.split(".")
        for count in range(1, min(len(parts), 5)):
            if ".".join(parts[count:]) in wanted:
                return ".".join(parts[:count]) + "."
    return ""


def _some(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
