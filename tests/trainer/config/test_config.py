"""Recipes and overrides; what they refuse is in the table of `test_bad_input.py`."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import yaml

from rpo_kernels.losses import LOSSES, SFT_REDUCTIONS
from trainer.config.fields import RunConfig, field_docs
from trainer.config.recipe import DEFAULT_RECIPE, parse_config

TRAINER = DEFAULT_RECIPE.parent.parent


def config(**fields):
    return RunConfig(**({"model_name_or_path": "m", "train_file": "t.jsonl"} | fields))


def test_readme_lists_every_field_and_every_module():
    text = (TRAINER / "README.md").read_text(encoding="utf-8")
    table = text.split("## Fields\n")[1].split("\n\n")[0]
    fields = [field.name for field in dataclasses.fields(RunConfig)]
    assert sorted(re.findall(r"`(\w+)`", table)) == sorted(fields)
    modules = [path.name for path in TRAINER.rglob("*.py") if path.name != "__init__.py"]
    elsewhere = {path.name for path in (TRAINER / "evaluation").glob("*.py")}  # EVALUATION.md's
    rooms = text.split("| room | what |\n")[1].split("\n\n")[0]
    assert {*modules} - elsewhere <= set(re.findall(r"`(\w+\.py)`", rooms)) <= {*modules}


def test_every_field_has_a_sentence():
    docs = field_docs()
    assert list(docs) == [field.name for field in dataclasses.fields(RunConfig)]
    assert all(doc.endswith(".") and len(doc) > 20 for doc in docs.values())


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field, doc in field_docs().items():
        assert f"--{field} " in text and doc[:30] in text


RECIPES = sorted(DEFAULT_RECIPE.parent.glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.name)
def test_recipes_parse_and_round_trip(recipe, tmp_path):
    parsed = parse_config(["--config", str(recipe)])
    copy = tmp_path / "copy.yaml"
    copy.write_text(parsed.to_yaml())
    assert parse_config(["--config", str(copy)]) == parsed


def test_without_arguments_the_default_recipe_is_read():
    recipe = yaml.safe_load(DEFAULT_RECIPE.read_text())
    parsed = parse_config([])
    assert parsed.learning_rate == recipe["learning_rate"]
    assert parsed.train_file == (recipe["train_file"],)


def test_the_command_line_overrides_the_recipe():
    words = "--max_steps 2 --learning_rate=1e-5 --overwrite_output_dir --scale_eta_by_beta null"
    parsed = parse_config(words.split())
    assert (parsed.max_steps, parsed.learning_rate) == (2, 1e-5)
    assert parsed.overwrite_output_dir is True and parsed.scale_eta_by_beta is None
    assert parse_config(["--overwrite_output_dir", "false"]).overwrite_output_dir is False
    assert parse_config(["--train_file", "a.jsonl", "b.jsonl"]).train_file == ("a.jsonl", "b.jsonl")


def test_the_command_line_takes_a_recipe_s_value_back():
    taken = parse_config(["--eval_file", "null", "--sample_prompts", "0", "--max_length", "99"])
    assert parse_config([]).eval_file and taken.eval_file == ()


def test_another_model_or_training_set_drops_what_described_the_old_one():
    assert parse_config(["--model_name_or_path", "x"]).gguf_file is None
    assert parse_config(["--train_file", "x.jsonl"]).eval_file == ()
    both = parse_config(["--train_file", "x.jsonl", "--eval_file", "y.jsonl"])
    assert both.eval_file == ("y.jsonl",)
    hub = parse_config(["--dataset_name", "org/pairs", "--dataset_test_split", "test"])
    assert (hub.train_file, hub.eval_file, hub.dataset_name) == ((), (), ("org/pairs",))


def test_choices_are_the_package_s():
    for reduction in SFT_REDUCTIONS:
        assert config(sft_reduction=reduction).sft_reduction == reduction
    assert RunConfig.loss_type in LOSSES


def test_no_module_hides_one_of_the_standard_library():
    """`python trainer/run.py` would put the folder first on sys.path."""
    names = {path.stem for path in Path(TRAINER).glob("*.py")} - {"__init__"}
    assert not names & set(sys.stdlib_module_names)
