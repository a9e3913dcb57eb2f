"""Models to evaluate, loaded as the trainer loads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer import merge
from trainer.config.fields import RunConfig
from trainer.data.chat import ChatOptions
from trainer.errors import InputError
from trainer.model.loading import named


@dataclass(frozen=True)
class Source:
    """Where a model or an adapter is: a folder, hub id or `package:NAME`, perhaps `/FILE.gguf`."""

    path: str

    def config(self, file: str) -> RunConfig:
        """The trainer's config for this model and a data file."""
        return merge.at(self.path, RunConfig(self.path, train_file=(file,)))

    def state(self) -> list[tuple[str, int, int]]:
        """Names, sizes and times of a folder's files: they change when it is trained again.

        Those of an adapter's base are among them.
        """
        config = self.config("none")
        folder = Path(config.model_name_or_path).expanduser()
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        state = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        if merge.adapter_folder(config):
            base = merge.base_of(folder, config)
            state += Source(base.model_name_or_path).state()
        return state


def open_model(source: Source, file: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model, on the GPU where there is one, and its tokenizer; an adapter is merged.

    Raises:
        InputError: it is not there, or cannot be loaded.
    """
    with named(f"models: {source.path}"):
        model, tokenizer = merge.load_whole(source.config(file))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)  # type: ignore[arg-type]  # transformers wraps it, so mypy binds no self
    return model.eval(), tokenizer


def chat_options(kwargs: dict[str, object] | None, date: str | None) -> ChatOptions:
    """What chat templates are told, from a command's options.

    Raises:
        InputError: `kwargs` holds what is no variable of a template, or `date` is no day.
    """
    config = RunConfig("none", train_file=("none",), chat_template_kwargs=kwargs, date=date)
    return ChatOptions(config.chat_template_kwargs or {}, config.date)


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
