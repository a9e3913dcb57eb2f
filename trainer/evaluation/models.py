"""Models to evaluate, loaded as the trainer loads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.config import InputError, RunConfig
from trainer.loading import load_model, load_tokenizer, locate_model


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

    Args:
        models: paths by name.

    Raises:
        InputError: no model, or a name that is no file name.
    """
    for name in models:
        if Path(name).name != name:
            raise InputError(f"models: {name!r} cannot be a file name; use NAME=PATH")
    if not models:
        raise InputError("models: expected NAME=PATH, got nothing")
    return {name: Source(path) for name, path in models.items()}
