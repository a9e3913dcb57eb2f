"""Models to evaluate, loaded as the trainer loads them, and sampling from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from trainer.config import InputError, RunConfig
from trainer.model import load_model, load_tokenizer, locate_model


@dataclass(frozen=True)
class Source:
    """Where a model is: a folder, hub id or `package:NAME`, each with `/FILE.gguf` or without."""

    path: str

    def config(self, file: str) -> RunConfig:
        """The trainer's config for this model and a data file."""
        folder, _, name = self.path.rpartition("/")
        gguf = self.path.endswith(".gguf")
        return RunConfig(
            model_name_or_path=folder if gguf else self.path,
            gguf_file=name if gguf else None,
            train_file=(file,),
        )

    def state(self) -> list[tuple[str, int, int]]:
        """Names, sizes and times of a folder's files: they change when it is trained again."""
        folder = Path(self.path)
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def open_model(source: Source, file: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model, on the GPU where there is one, and its tokenizer.

    Raises:
        InputError: it is not there, or cannot be loaded.
    """
    config = source.config(file)
    place = locate_model(config)
    tokenizer = load_tokenizer(place, config.gguf_file)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_model(place, config).to(device).eval(), tokenizer


def named_sources(models: dict[str, str]) -> dict[str, Source]:
    """Sources by name; a name becomes a file name.

    Raises:
        InputError: no model, or a name that is no file name.
    """
    for name in models:
        if Path(name).name != name:
            raise InputError(f"models: {name!r} cannot be a file name; use NAME=PATH")
    if not models:
        raise InputError("models: expected NAME=PATH, got nothing")
    return {name: Source(path) for name, path in models.items()}


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
) -> list[list[int]]:
    """Continue a batch of prompts; the model's own sampling defaults are not used.

    Args:
        model: the policy.
        tokenizer: gives the end token, beside those of the model.
        prompts: B lists of token ids.
        max_new_tokens: where an answer is cut.
        temperature: 0 is greedy; 1 with `top_p` 1 draws from the model's own distribution.
        top_p: share of the probability mass that is drawn from.

    Returns:
        B lists of new token ids, each with its end token, if it came.
    """
    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    pad = next(iter(ends), 0) if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=model.device)
    seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    drawn = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends) or None, pad_token_id=pad)
    output = model.generate(
        input_ids=ids,
        attention_mask=seen.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        **drawn,
    )
    return [_until_end(row, ends) for row in output[:, longest:].tolist()]


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    stop = next((k + 1 for k, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]
