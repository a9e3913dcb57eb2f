"""Recipes, overrides, and every way to get them wrong."""

import dataclasses
import sys
from pathlib import Path

import pytest
import yaml

from rpo_kernels.losses import LOSSES, SFT_REDUCTIONS
from trainer.config import DEFAULT_RECIPE, InputError, RunConfig, field_docs, parse_config

TRAINER = DEFAULT_RECIPE.parent.parent


def config(**fields):
    return RunConfig(**({"model_name_or_path": "m", "train_file": "t.jsonl"} | fields))


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


def test_another_model_or_training_set_drops_what_described_the_old_one():
    assert parse_config(["--model_name_or_path", "x"]).gguf_file is None
    assert parse_config(["--train_file", "x.jsonl"]).eval_file == ()
    both = parse_config(["--train_file", "x.jsonl", "--eval_file", "y.jsonl"])
    assert both.eval_file == ("y.jsonl",)
    hub = parse_config(["--dataset_name", "org/pairs", "--dataset_test_split", "test"])
    assert (hub.train_file, hub.eval_file, hub.dataset_name) == ((), (), ("org/pairs",))


BAD_FIELDS = [
    ({"learning_rate": "fast"}, "learning_rate: expected a number, got 'fast'"),
    ({"learning_rate": 0}, "learning_rate: expected a number > 0, got 0.0"),
    ({"learning_rate": float("nan")}, "learning_rate: expected a number > 0, got nan"),
    ({"beta": -0.1}, "beta: expected a number > 0, got -0.1"),
    ({"beta": True}, "beta: expected a number, got True"),
    ({"eta": -1}, "eta: expected a number >= 0, got -1.0"),
    ({"eta": float("inf")}, "eta: expected a number >= 0, got inf"),
    ({"label_smoothing": 0.5}, "label_smoothing: expected a number in [0, 0.5), got 0.5"),
    ({"max_steps": 0}, "max_steps: expected -1 or an integer >= 1, got 0"),
    ({"max_steps": 2.5}, "max_steps: expected an integer, got 2.5"),
    ({"num_train_epochs": 0}, "num_train_epochs: expected a number > 0, got 0.0"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: expected an integer >= 1"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: expected an integer >= 1"),
    ({"per_device_eval_batch_size": -4}, "per_device_eval_batch_size: expected an integer >= 1"),
    ({"max_length": 4}, "max_length: expected an integer >= 8, got 4"),
    ({"warmup_ratio": 1.5}, "warmup_ratio: expected a number in [0, 1], got 1.5"),
    ({"weight_decay": -0.1}, "weight_decay: expected a number >= 0"),
    ({"max_grad_norm": -1}, "max_grad_norm: expected a number >= 0"),
    ({"seed": -1}, "seed: expected an integer in [0, 2^32), got -1"),
    ({"cpu_threads": -1}, "cpu_threads: expected an integer >= 0"),
    ({"logging_steps": 0}, "logging_steps: expected an integer >= 1"),
    ({"eval_steps": -1}, "eval_steps: expected an integer >= 0"),
    ({"max_workspace_mb": 0}, "max_workspace_mb: expected null or a number > 0, got 0.0"),
    ({"sft_reduction": "mean"}, "expected one of sum, sequence_mean, token_mean, got 'mean'"),
    ({"dtype": "fp16"}, "dtype: expected one of float32, bfloat16, got 'fp16'"),
    ({"backend": "cuda"}, "backend: expected one of auto, triton, torch, got 'cuda'"),
    ({"lr_scheduler_type": "step"}, "lr_scheduler_type: expected one of linear, cosine"),
    ({"on_bad_row": "ignore"}, "on_bad_row: expected one of error, skip, got 'ignore'"),
    ({"scale_eta_by_beta": "maybe"}, "scale_eta_by_beta: expected true or false, got 'maybe'"),
    ({"overwrite_output_dir": 1}, "overwrite_output_dir: expected true or false, got 1"),
    ({"train_file": 3}, "train_file: expected a string, got 3"),
    ({"train_file": []}, "train_file: expected training data, got none; give train_file or"),
    ({"train_weights": [1, "much"]}, "train_weights: expected a number, got 'much'"),
    ({"train_weights": [0]}, "train_weights: expected numbers > 0, got (0.0,)"),
    ({"train_weights": [1, 1]}, "train_weights: expected one weight per train_file and"),
    ({"eval_split_ratio": 1}, "eval_split_ratio: expected a number in [0, 1), got 1.0"),
    ({"eval_split_ratio": 0.1, "eval_file": "e"}, "eval_split_ratio: expected 0 where eval_file"),
    ({"dataset_config": "x"}, "dataset_config: 'x' is of no data set; give dataset_name"),
    ({"dataset_test_split": "x"}, "dataset_test_split: 'x' is of no data set; give dataset_name"),
    ({"max_prompt_length": 0}, "max_prompt_length: expected null or an integer >= 1, got 0"),
    ({"max_prompt_length": 1024}, "max_prompt_length: expected less than max_length (1024)"),
    ({"truncation_mode": "keep"}, "truncation_mode: expected one of keep_end, keep_start, drop"),
    ({"output_dir": ""}, "output_dir: expected a value, got an empty one"),
    ({"output_dir": 7}, "output_dir: expected a string, got 7"),
    ({"reference": "cached"}, "reference: expected one of precomputed, online, adapter, none"),
    ({"lora_r": 0, "use_peft": True}, "lora_r: expected an integer >= 1, got 0"),
    ({"lora_alpha": 0, "use_peft": True}, "lora_alpha: expected a number > 0, got 0.0"),
    ({"lora_dropout": 1, "use_peft": True}, "lora_dropout: expected a number in [0, 1), got 1.0"),
    ({"lora_target_modules": [], "use_peft": True}, "lora_target_modules: expected a value, got"),
    ({"model_dtype": "fp16"}, "model_dtype: expected one of float32, bfloat16, got 'fp16'"),
]  # fmt: skip


BAD_COMBINATIONS = [
    ({"reference": "none", "ref_model_name_or_path": "m"}, "ref_model_name_or_path: expected null"),
    (
        {"reference": "adapter", "ref_model_name_or_path": "m", "use_peft": True},
        "ref_model_name_or_path: expected null with reference adapter, got m",
    ),
    ({"reference": "adapter"}, "reference: expected precomputed or online where use_peft is false"),
    ({"load_in_4bit": True}, "load_in_4bit: expected false without use_peft"),
    (
        {"load_in_4bit": True, "use_peft": True, "gguf_file": "a.gguf"},
        "load_in_4bit: expected false with gguf_file",
    ),
    ({"lora_r": 8}, "use_peft: expected true where a lora_ field"),
    ({"lora_target_modules": "q_proj"}, "use_peft: expected true where a lora_ field"),
    ({"model_dtype": "bfloat16"}, "model_dtype: expected float32 with dtype float32, got bfloat16"),
]


@pytest.mark.parametrize(
    ("fields", "message"), BAD_FIELDS + BAD_COMBINATIONS, ids=lambda x: str(x)[:40]
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(InputError) as error:
        config(**fields)
    assert message in str(error.value)


BAD_COMMANDS = [
    (["--learning_rat", "1"], "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
    (["--learning_rte=1"], "unknown key 'learning_rte'; did you mean 'learning_rate'?"),
    (["--zzz", "1"], "command line: unknown key 'zzz'; --help lists all of them"),
    (["beta"], "command line: expected --field value, got 'beta'"),
    (["--config", "none.yaml"], "none.yaml: no such file"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "message"), BAD_COMMANDS, ids=lambda x: str(x)[:40])
def test_bad_command_lines_are_named(argv, message):
    with pytest.raises(InputError) as error:
        parse_config(argv)
    assert message in str(error.value)


BAD_FILES = [
    ("betta: 0.1\n", "bad.yaml: unknown key 'betta'; did you mean 'beta'?"),
    ("beta: [\n", "bad.yaml: not valid YAML"),
    ("- beta\n", "bad.yaml: expected 'field: value' lines, got list"),
    ("beta: 0.1\n", "no value; give it in the recipe or as --model_name_or_path"),
    ("beta: lots\nmodel_name_or_path: m\ntrain_file: t\n", "beta: expected a number, got 'lots'"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD_FILES, ids=lambda x: repr(x)[:40])
def test_bad_recipes_are_named(text, message, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        parse_config(["--config", str(tmp_path / "bad.yaml")])
    assert message in str(error.value)


def test_choices_are_the_package_s():
    for reduction in SFT_REDUCTIONS:
        assert config(sft_reduction=reduction).sft_reduction == reduction
    assert RunConfig.loss_type in LOSSES


def test_no_module_hides_one_of_the_standard_library():
    """`python trainer/run.py` would put the folder first on sys.path."""
    names = {path.stem for path in Path(TRAINER).glob("*.py")} - {"__init__"}
    assert not names & set(sys.stdlib_module_names)
