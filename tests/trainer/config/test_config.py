"""Recipes and overrides; what they refuse is in the table of `test_bad_input.py`."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import yaml

from rpo_kernels.losses import LOSSES, SFT_REDUCTIONS
from trainer.config.__main__ import FILE, reference
from trainer.config.fields import GROUPS, RunConfig
from trainer.config.options import KNOWN_AS, field_docs
from trainer.config.recipe import DEMO_RECIPE, parse_config
from trainer.errors import InputError

DEMO = ["--config", str(DEMO_RECIPE)]
TRAINER = DEMO_RECIPE.parent.parent


def config(**fields):
    return RunConfig(**({"model_name_or_path": "m", "train_file": "t.jsonl"} | fields))


def test_the_readme_lists_every_module():
    text = (TRAINER / "README.md").read_text(encoding="utf-8")
    modules = [path.name for path in TRAINER.rglob("*.py") if path.name != "__init__.py"]
    elsewhere = {path.name for path in (TRAINER / "evaluation").glob("*.py")}  # EVALUATION.md's
    rooms = text.split("| room | what |\n")[1].split("\n\n")[0]
    assert {*modules} - elsewhere <= set(re.findall(r"`(\w+\.py)`", rooms)) <= {*modules}


def test_the_reference_of_fields_is_the_code_s():
    """`python -m trainer.config` writes it anew."""
    assert FILE.read_text(encoding="utf-8") == reference()


def test_every_field_has_a_sentence():
    docs = field_docs(RunConfig)
    assert list(docs) == [field.name for field in dataclasses.fields(RunConfig)]
    assert all(doc.endswith(".") and len(doc) > 20 for doc in docs.values())


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field, doc in field_docs(RunConfig).items():
        assert f"--{field} " in text and doc[:30] in text


RECIPES = sorted(DEMO_RECIPE.parent.glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.name)
def test_recipes_parse_and_round_trip(recipe, tmp_path):
    parsed = parse_config(["--config", str(recipe)])
    copy = tmp_path / "copy.yaml"
    copy.write_text(parsed.to_yaml())
    assert parse_config(["--config", str(copy)]) == parsed


def test_without_arguments_the_default_recipe_is_read():
    recipe = yaml.safe_load(DEMO_RECIPE.read_text())
    parsed = parse_config([])
    assert parsed.learning_rate == recipe["learning_rate"]
    assert parsed.train_file == (recipe["train_file"],)


def test_the_command_line_overrides_the_recipe():
    words = "--max_steps 2 --learning_rate=1e-5 --overwrite_output_dir --scale_eta_by_beta null"
    parsed = parse_config(words.split())
    assert (parsed.max_steps, parsed.learning_rate) == (2, 1e-5)
    assert parsed.overwrite_output_dir is True and parsed.scale_eta_by_beta is None
    assert parse_config(["--overwrite_output_dir", "false"]).overwrite_output_dir is False
    assert parse_config([*DEMO, "--train_file", "a", "b"]).train_file == ("a", "b")
    assert parse_config(["--learning-rate", "1e-4", "--beta=0.2"]).learning_rate == 1e-4


def test_the_command_line_takes_a_recipe_s_value_back():
    taken = parse_config(["--eval_file", "null", "--sample_prompts", "0", "--max_length", "99"])
    assert parse_config([]).eval_file and taken.eval_file == ()


def test_another_model_or_training_set_drops_what_described_the_old_one():
    assert parse_config(["--model_name_or_path", "x"]).gguf_file is None
    assert parse_config([*DEMO, "--train_file", "x.jsonl"]).eval_file == ()
    both = parse_config([*DEMO, "--train_file", "x.jsonl", "--eval_file", "y.jsonl"])
    assert both.eval_file == ("y.jsonl",)
    hub = parse_config([*DEMO, "--dataset_name", "org/pairs", "--dataset_test_split", "test"])
    assert (hub.train_file, hub.eval_file, hub.dataset_name) == ((), (), ("org/pairs",))


def test_data_of_one_s_own_start_from_the_defaults():
    """The demo's recipe is the demo's alone, so that `--help` shows what runs."""
    own = parse_config(["--model_name_or_path", "m", "--train_file", "x.jsonl"])
    assert own == RunConfig(model_name_or_path="m", train_file="x.jsonl")
    hub = parse_config(["--model_name_or_path", "m", "--dataset_name", "org/pairs"])
    assert hub == RunConfig(model_name_or_path="m", dataset_name="org/pairs")


def help_text(capsys, *words):
    with pytest.raises(SystemExit):
        parse_config([*words, "--help"])
    return " ".join(capsys.readouterr().out.split())


def test_help_shows_what_runs(capsys):
    text, demo = help_text(capsys), yaml.safe_load(DEMO_RECIPE.read_text())
    assert f"[{RunConfig.learning_rate}; demo {demo['learning_rate']}]" in text
    assert all(f"{title}:" in text for title in GROUPS.values())
    assert "--sft_reduction {sum,sequence_mean,token_mean}" in text  # choices
    assert f"{{{','.join(LOSSES)}}}" in text
    recipe = DEMO_RECIPE.with_name("zephyr-gemma-rpo.yaml")
    text = help_text(capsys, "--config", str(recipe))
    assert (
        f"[{yaml.safe_load(recipe.read_text())['learning_rate']}]" in text
        and "demo" not in (text.split("options:")[1])
    )


@pytest.mark.parametrize(
    "word, meant",
    [("lr", "learning_rate"), ("batch_size", "per_device_train_batch_size"), ("epochs", "num_train_"
     "epochs"), ("model", "model_name_or_path"), ("bf16", "dtype"), ("rpo_alpha", "eta"),
     ("load_best_model_at_end", "metric_for_best_model"), ("betta", "beta")],
)  # fmt: skip
def test_a_name_of_other_programs_is_corrected(word, meant):
    with pytest.raises(InputError, match=f"unknown key '{word}'; did you mean '{meant}'?"):
        parse_config([f"--{word}", "1"])


def test_every_known_name_means_a_field_and_hides_none():
    fields = {field.name for field in dataclasses.fields(RunConfig)}
    names = [name for names in KNOWN_AS.values() for name in names]
    assert KNOWN_AS.keys() <= fields and not fields & {*names} and len(names) == len({*names})


def test_choices_are_the_package_s():
    for reduction in SFT_REDUCTIONS:
        assert config(sft_reduction=reduction).sft_reduction == reduction
    assert RunConfig.loss_type in LOSSES


def test_no_module_hides_one_of_the_standard_library():
    """`python trainer/run.py` would put the folder first on sys.path."""
    names = {path.stem for path in Path(TRAINER).glob("*.py")} - {"__init__"}
    assert not names & set(sys.stdlib_module_names)
