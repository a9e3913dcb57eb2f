"""A run's config from a recipe, a YAML file, and the command line's overrides.

    accelerate launch trainer/run.py --config my.yaml --learning_rate 1e-5

Without `--config` and without your own data the demo's recipe is read; your own data start
from the defaults of `RunConfig`. An unknown key is an error that names the field that is meant.
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from pathlib import Path

import yaml

from trainer.config import options
from trainer.config.fields import GROUPS, RunConfig
from trainer.config.values import convert
from trainer.errors import InputError
from trainer.paths import ROOT, find_file

DEMO_RECIPE = ROOT / "trainer" / "recipes" / "smollm2-cpu.yaml"
DATA = (
    "train_file", "eval_file", "dataset_name", "dataset_config", "dataset_train_split",
    "dataset_test_split", "prompt_column", "chosen_column", "rejected_column", "implicit_prompt",
    "train_weights", "eval_split_ratio", "sample_prompts",
)  # fmt: skip
# Overriding the first on the command line drops what the recipe says of the old one.
DESCRIBED_BY = {
    "model_name_or_path": ("gguf_file",),
    "train_file": DATA,
    "dataset_name": DATA,
}


def _read_yaml(path: Path) -> dict[str, typing.Any]:
    try:
        text = path.read_text(encoding="utf-8")
        values, node = yaml.safe_load(text), yaml.compose(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected 'field: value' lines, got {type(values).__name__}")
    options.check_keys(values, RunConfig, str(path))
    keys = [key.value for key, _ in node.value]
    for key in values:
        if keys.count(key) > 1:
            raise InputError(f"{path}: {key} is given {keys.count(key)} times; keep one of them")
    return values


def _shown(values: dict[str, object], label: str) -> dict[str, str]:
    """What `--help` shows behind each field: its default, and a recipe's value where it differs."""
    kinds, shown = typing.get_type_hints(RunConfig), {}
    for field in dataclasses.fields(RunConfig):
        default = options.default(field)
        there = default
        if field.name in values:
            there = options.spelled(convert(values[field.name], kinds[field.name]))
        parts = [default, label + there] if label else [there]
        text = "; ".join(filter(None, parts if there != default else [default]))
        shown[field.name] = f" [{text}]" if text else ""
    return shown


def _parser(prog: str, shown: dict[str, str]) -> argparse.ArgumentParser:
    """The command line of a run, with what its help shows behind each field."""
    from rpo_kernels.losses import LOSSES  # it imports torch, for which other commands would wait

    return options.make_parser(
        RunConfig,
        prog,
        "Fine-tune a language model on preference pairs with RPO.\n\n"
        f"  {prog} --model_name_or_path MODEL --train_file FILE   on data of your own\n"
        f"  {prog} --config FILE.yaml --beta 0.05                 a recipe, with an override\n"
        f"  {prog}                                                the demo\n\n"
        "In brackets: the default, which is in force with data of your own and for what a recipe\n"
        "leaves open; behind it, where it differs, the demo's value.",
        first={"config": "YAML file with a line 'field: value' for each field that it decides"},
        shown=shown,
        groups=GROUPS,
        choices={"loss_type": LOSSES},
    )


def parse_config(argv: list[str], prog: str = "trainer/run.py") -> RunConfig:
    """Read the recipe and apply the overrides of the command line.

    Args:
        argv: arguments after the program's name; `--help` prints every field and exits.
        prog: the program's name.

    Raises:
        InputError: unknown key, wrong type, value out of range, or missing file.
    """
    asks = {"-h", "--help"} & {*argv}
    given = options.read(_parser(prog, {}), RunConfig, [word for word in argv if word not in asks])
    recipe = given.pop("config", None)
    values = {} if recipe is None else _read_yaml(find_file(recipe))
    if asks:
        shown = _shown(_read_yaml(DEMO_RECIPE), "demo ") if recipe is None else _shown(values, "")
        _parser(prog, shown).parse_args(["--help"])
    if recipe is None and not {"train_file", "dataset_name"} & given.keys():
        values = _read_yaml(DEMO_RECIPE)
    for owner in DESCRIBED_BY.keys() & given.keys():
        for field in DESCRIBED_BY[owner]:
            values.pop(field, None)
    values |= given
    if "model_name_or_path" not in values:
        raise InputError(
            "model_name_or_path: no value; give it in the recipe or as --model_name_or_path, a "
            "folder or a hub id"
        )
    return RunConfig(**values)
