"""A run's config from a recipe, a YAML file, and the command line's overrides.

    accelerate launch trainer/run.py --config my.yaml --learning_rate 1e-5

Without `--config` the default recipe is read. An unknown key is an error that names the nearest
valid one.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Iterable
from pathlib import Path

import yaml

from trainer.config import ROOT, InputError, RunConfig, field_docs, find_file

DEFAULT_RECIPE = ROOT / "trainer" / "recipes" / "smollm2-cpu.yaml"
DATA = (
    "train_file", "eval_file", "dataset_name", "dataset_config", "dataset_train_split",
    "dataset_test_split", "prompt_column", "chosen_column", "rejected_column", "implicit_prompt",
    "train_weights", "eval_split_ratio", "sample_prompts",
)  # fmt: skip
# Overriding the first on the command line drops what the recipe says of the old one.
DESCRIBED_BY = {
    "model_name_or_path": ("gguf_file", "logit_scale", "logit_softcap"),
    "train_file": DATA,
    "dataset_name": DATA,
}


def check_keys(keys: Iterable[str], source: str) -> None:
    """Raise `InputError` for the first key that is no field, naming the nearest field."""
    valid = [field.name for field in dataclasses.fields(RunConfig)]
    for key in keys:
        if key not in valid:
            near = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else "--help lists all of them"
            raise InputError(f"{source}: unknown key {key!r}; {hint}")


def _read_yaml(path: Path) -> dict[str, object]:
    try:
        text = path.read_text(encoding="utf-8")
        values, node = yaml.safe_load(text), yaml.compose(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected 'field: value' lines, got {type(values).__name__}")
    check_keys(values, str(path))
    keys = [key.value for key, _ in node.value]
    for key in values:
        if keys.count(key) > 1:
            raise InputError(f"{path}: {key} is given {keys.count(key)} times; keep one of them")
    return values


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trainer/run.py",
        description="Fine-tune a language model on preference pairs with RPO.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help=f"recipe to start from (default: {DEFAULT_RECIPE.name})",
    )
    docs, kinds = field_docs(), typing.get_type_hints(RunConfig)
    for field in dataclasses.fields(RunConfig):
        default = "" if field.default is dataclasses.MISSING else f" [{field.default}]"
        many = typing.get_origin(kinds[field.name]) is tuple
        how = (
            {"nargs": "*"}
            if many
            else {"nargs": "?", "const": "true"}
            if kinds[field.name] is bool
            else {}
        )
        parser.add_argument(
            f"--{field.name}",
            default=argparse.SUPPRESS,
            metavar="X",
            help=(docs[field.name] + default).replace("%", "%%"),
            **how,
        )
    return parser


def parse_config(argv: list[str]) -> RunConfig:
    """Read the recipe and apply the overrides of the command line.

    Args:
        argv: arguments after the program's name; `--help` prints every field and exits.

    Raises:
        InputError: unknown key, wrong type, value out of range, or missing file.
    """
    given, unknown = _parser().parse_known_args(argv)
    overrides = vars(given)
    recipe = overrides.pop("config")
    for word in unknown:
        if not word.startswith("--"):
            raise InputError(f"command line: expected --field value, got {word!r}")
        check_keys([word[2:].partition("=")[0]], "command line")
    values = _read_yaml(DEFAULT_RECIPE if recipe is None else find_file(recipe))
    for owner in DESCRIBED_BY.keys() & overrides.keys():
        for field in DESCRIBED_BY[owner]:
            values.pop(field, None)
    values.update(overrides)
    for field in dataclasses.fields(RunConfig):
        if field.default is dataclasses.MISSING and field.name not in values:
            raise InputError(f"{field.name}: no value; give it in the recipe or as --{field.name}")
    return RunConfig(**values)
