"""Checkpoints that are stored quantized: dequantized while they load, kept for QLoRA, or refused.

A quantized checkpoint says in its config how its numbers are to be read. What transformers turns
back into plain weights is trained on as such, in `model_dtype`; bitsandbytes' 4 bits stay as they
are with `load_in_4bit`. The rest would need kernels without a gradient, or be read as noise.
"""

from __future__ import annotations

import importlib.util

from transformers import PretrainedConfig, PreTrainedModel

from trainer.config.fields import RunConfig
from trainer.errors import InputError
from trainer.model.adapters import quantization

WHILE_LOADING = ("fp8", "mxfp8", "mxfp4", "compressed-tensors")
PACKAGES = {"compressed-tensors": "compressed_tensors", "bitsandbytes": "bitsandbytes"}
# Formats of compressed-tensors of which every number was compared with the unquantized one.
FORMATS = ("float-quantized", "int-quantized", "pack-quantized", "naive-quantized")


def stored_quantization(settings: PretrainedConfig) -> dict:
    """How a model's config says that its weights are stored; empty for plain weights."""
    text = settings.get_text_config(decoder=True)
    for config in (settings, text):
        stored = getattr(config, "quantization_config", None)
        if stored:
            return stored if isinstance(stored, dict) else stored.to_dict()
    return {}


def method_of(stored: dict) -> str:
    """The name of a quantization, as in transformers; bitsandbytes' older configs have none."""
    if stored.get("load_in_4bit") or stored.get("load_in_8bit"):
        return "bitsandbytes"
    method = stored.get("quant_method", "unknown")
    return str(getattr(method, "value", method))


def read_as(settings: PretrainedConfig, config: RunConfig) -> dict[str, object]:
    """What `from_pretrained` is given so that the weights are read as what they are.

    Args:
        settings: the model's config; changed where it says how to dequantize.
        config: the run's.

    Returns:
        `quantization_config` for plain weights that are to be kept in 4 bits, else nothing.

    Raises:
        InputError: the weights are stored in a way that cannot be trained on.
    """
    stored = stored_quantization(settings)
    if not stored:
        if hasattr(settings, "quantization_config"):  # an empty one says nothing
            del settings.quantization_config
        how = quantization(config)
        return {} if how is None else {"quantization_config": how}
    method = method_of(stored)
    if method == "bitsandbytes" and stored.get("load_in_4bit") and config.load_in_4bit:
        quantization(config)  # for its checks
        return _set(settings, stored, bnb_4bit_compute_dtype=config.model_dtype)
    if config.load_in_4bit:
        raise InputError(
            f"load_in_4bit: expected false, as the checkpoint is stored by {method} already, got "
            "true; give the unquantized model, or set it to false"
        )
    _check_method(method, stored)
    if method == "bitsandbytes":
        return _set(settings, stored)
    return _set(settings, stored, dequantize=True)


def is_dequantized(settings: PretrainedConfig, config: RunConfig) -> bool:
    """Whether a model becomes plain weights that was none in its file."""
    stored = config.gguf_file is not None or stored_quantization(settings)
    return bool(stored) and not config.load_in_4bit


def dequantize(model: PreTrainedModel) -> PreTrainedModel:
    """A loaded model in plain weights, where it is not yet: bitsandbytes' come after loading."""
    return model.dequantize() if getattr(model, "is_quantized", False) else model


def _check_method(method: str, stored: dict) -> None:
    remedy = "give the unquantized model that it was made of (with load_in_4bit for QLoRA)"
    if method != "bitsandbytes" and method not in WHILE_LOADING:
        raise InputError(
            f"model_name_or_path: the checkpoint is quantized by {method}, expected plain weights "
            f"or {', '.join(WHILE_LOADING)}, bitsandbytes; {remedy}"
        )
    if method in PACKAGES and importlib.util.find_spec(PACKAGES[method]) is None:
        raise InputError(
            f"model_name_or_path: the checkpoint is quantized by {method}, whose package is not "
            f"installed; run: pip install {method}"
        )
    if method != "compressed-tensors":
        return
    groups = stored.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    groups = [group for group in groups if isinstance(group, dict)]
    formats = {stored.get("format"), *(group.get("format") for group in groups)} - {None}
    sparse = (stored.get("sparsity_config") or {}).get("format", "dense")
    if len(groups) != 1 or not formats <= set(FORMATS) or not formats or sparse != "dense" or (
        stored.get("transform_config")
    ):  # fmt: skip
        raise InputError(
            f"model_name_or_path: the checkpoint is quantized by compressed-tensors, expected one "
            f"group in a format of {', '.join(FORMATS)}, got {len(groups)} in "
            f"{', '.join(sorted(formats)) or 'none'}, sparsity {sparse}; {remedy}"
        )


def _set(settings: PretrainedConfig, stored: dict, **fields: object) -> dict[str, object]:
    """Write `stored` and `fields` into the config, where transformers looks for them."""
    settings.quantization_config = stored | fields
    return {}
