"""LoRA and QLoRA through peft: small trained matrices beside frozen, perhaps quantized weights.

lm_head stays frozen, so the fused loss skips the gradient of its weight, a third of its matmuls,
and the accumulators of that gradient. An adapter on lm_head would be silently left out of a loss
that reads lm_head's weight itself, so it is refused; a whole copy of an untied lm_head may be
trained by `lora_modules_to_save`.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from trainer.config.fields import RunConfig
from trainer.errors import InputError

ADAPTER_FILE = "adapter_config.json"


def quantization(config: RunConfig) -> BitsAndBytesConfig | None:
    """How frozen weights are stored with `load_in_4bit`: QLoRA's NF4, its scales quantized too.

    Raises:
        InputError: bitsandbytes is not installed, or there is no GPU.
    """
    if not config.load_in_4bit:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            "load_in_4bit: needs the package bitsandbytes; run: pip install bitsandbytes"
        )
    if not torch.cuda.is_available():  # bitsandbytes repacks weights on CPUs, for inference only
        raise InputError("load_in_4bit: needs a GPU; on a CPU use model_dtype bfloat16")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config.model_dtype),
    )


def refuse_adapter_folder(source: str) -> None:
    """Refuse a folder that holds an adapter, which loading would put into a model unseen.

    Raises:
        InputError: `source` holds a peft adapter instead of a model.
    """
    if (Path(source) / ADAPTER_FILE).is_file():
        refuse_adapter(source)


def refuse_adapter(source: str) -> NoReturn:
    """Say how to make a whole model of the adapter in `source`."""
    raise InputError(
        f"model_name_or_path: {source} holds a peft adapter; expected a whole model, which "
        f"python -m trainer.merge {source} --output_dir merged makes of it"
    )


def add_adapters(model: PreTrainedModel, config: RunConfig) -> PeftModel:
    """Freeze `model` and put trained float32 adapters into it, which change nothing at first.

    Raises:
        InputError: `lora_target_modules` or `lora_modules_to_save` name nothing, or a module that
            cannot be adapted.
    """
    targets = list(config.lora_target_modules)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # a factor, any number will do
        lora_dropout=config.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        modules_to_save=list(config.lora_modules_to_save) or None,
    )
    if targets != ["all-linear"]:
        _check_names("lora_target_modules", targets, model)
    _check_names("lora_modules_to_save", config.lora_modules_to_save, model)
    try:
        adapted = get_peft_model(model, lora)
    except ValueError as error:
        raise InputError(f"lora_target_modules: {error}") from None
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise InputError(
            "lora_target_modules: an adapter on lm_head would not reach the fused loss; leave it "
            "out, or train a copy of an untied one by lora_modules_to_save"
        )
    refuse_tied_adapters(adapted)
    adapted.active_peft_config.base_model_name_or_path = _base_path(config)
    return adapted


def refuse_tied_adapters(adapted: PeftModel) -> None:
    """Refuse adapters that would make two weights of one.

    Raises:
        InputError: the input embedding or lm_head is adapted, and they are tied.
    """
    model = adapted.get_base_model()
    assert isinstance(model, PreTrainedModel)
    tied = model.config.get_text_config().tie_word_embeddings
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if tied and isinstance(layer, BaseTunerLayer | ModulesToSaveWrapper):
            raise InputError(
                "lora_target_modules, lora_modules_to_save: this model's lm_head and input "
                "embedding are one weight, so neither can be adapted without the other"
            )


def _base_path(config: RunConfig) -> str:
    """Where the adapters' base is, as `trainer.merge` takes it from wherever it is run."""
    name = config.model_name_or_path
    folder = Path(name).expanduser()
    name = str(folder.resolve()) if folder.is_dir() else name
    return name if config.gguf_file is None else f"{name}/{config.gguf_file}"


def _check_names(field: str, names: Iterable[str], model: nn.Module) -> None:
    """Refuse names that no module has, as its own or as the end of its path; peft ignores them."""
    paths = [f".{path}" for path, _ in model.named_modules()]
    missing = [name for name in names if not any(path.endswith(f".{name}") for path in paths)]
    if missing:
        own = sorted({path.rpartition(".")[2] for path in paths} - {""})
        own = [name for name in own if not name.isdigit()]
        raise InputError(
            f"{field}: no module is called {', '.join(missing)}; the model has {', '.join(own)}"
        )


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Let `model`, prepared or not, with adapters or not, run on its frozen weights alone."""
    adapted = next((m for m in model.modules() if isinstance(m, PeftModel)), None)
    training, trained = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval()
    try:
        with contextlib.nullcontext() if adapted is None else adapted.disable_adapter():
            for parameter in trained:  # peft freezes them; FSDP2 looks once, at its first forward
                parameter.requires_grad_(True)
            yield
    finally:
        model.train(training)
