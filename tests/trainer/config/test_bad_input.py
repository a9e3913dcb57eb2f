"""Every bad key, value, combination, recipe, file and row, and what is said of it: one table."""

import json
from contextlib import nullcontext

import pytest
import torch

from rpo_kernels import fused_rpo_loss
from rpo_kernels.losses import LOSSES
from tests.trainer.tiny import ANSWER, GOOD, TALK, USER, tiny_config
from trainer.config.fields import RunConfig
from trainer.config.recipe import parse_config
from trainer.data.files import read_file
from trainer.data.rows import BadRows
from trainer.data.sources import check_rows
from trainer.errors import InputError
from trainer.model.loading import locate_model
from trainer.model.policy import loss_options


def fields(values, _):
    RunConfig(**({"model_name_or_path": "m", "train_file": "t.jsonl"} | values))


def before_start(values, _):
    config = tiny_config(**values)
    loss_options(config)
    locate_model(config)


def command(words, _):
    parse_config(words)


def recipe(text, folder):
    (folder / "bad.yaml").write_text(text)
    parse_config(["--config", str(folder / "bad.yaml")])


def data_file(file, folder):
    name, content = file
    if content is not None:
        (folder / name).write_bytes(content)
    read_rows(folder / name)


def row(content, folder):
    """After a good row and an empty line, so that the message must name line 3."""
    file = folder / "rows.jsonl"
    file.write_bytes(as_line(GOOD) + b"\n\n" + as_line(content) + b"\n")
    try:
        read_rows(file)
    except InputError as error:
        assert f"{file}:3: " in str(error) and "--on_bad_row skip" in str(error)
        raise


def as_line(content):
    return content if isinstance(content, bytes) else json.dumps(content).encode()


def read_rows(file, policy="error"):
    bad = BadRows(policy)
    rows = check_rows(f"{file}:", read_file(str(file)), bad)
    bad.settle(len(rows))
    return rows, bad


BAD = [
    # A value that a field does not take.
    (fields, {"learning_rate": "fast"}, "learning_rate: expected a number, got 'fast'"),
    (fields, {"learning_rate": 0}, "learning_rate: expected a number > 0, got 0.0"),
    (fields, {"learning_rate": float("nan")}, "learning_rate: expected a number > 0, got nan"),
    (fields, {"beta": -0.1}, "beta: expected a number > 0, got -0.1"),
    (fields, {"beta": True}, "beta: expected a number, got True"),
    (fields, {"eta": -1}, "eta: expected a number >= 0, got -1.0"),
    (fields, {"eta": float("inf")}, "eta: expected a number >= 0, got inf"),
    (fields, {"label_smoothing": 0.5}, "label_smoothing: expected a number in [0, 0.5), got 0.5"),
    (fields, {"max_steps": 0}, "max_steps: expected -1 or an integer >= 1, got 0"),
    (fields, {"max_steps": 2.5}, "max_steps: expected an integer, got 2.5"),
    (fields, {"num_train_epochs": 0}, "num_train_epochs: expected a number > 0, got 0.0"),
    (
        fields,
        {"per_device_train_batch_size": 0},
        "per_device_train_batch_size: expected an integer >= 1",
    ),
    (
        fields,
        {"gradient_accumulation_steps": 0},
        "gradient_accumulation_steps: expected an integer >= 1",
    ),
    (
        fields,
        {"per_device_eval_batch_size": -4},
        "per_device_eval_batch_size: expected an integer >= 1",
    ),
    (fields, {"max_length": 4}, "max_length: expected an integer >= 8, got 4"),
    (fields, {"warmup_ratio": 1.5}, "warmup_ratio: expected a number in [0, 1], got 1.5"),
    (fields, {"min_lr_rate": 1}, "min_lr_rate: expected a number in [0, 1), got 1.0"),
    (fields, {"adam_beta1": 1}, "adam_beta1: expected a number in [0, 1), got 1.0"),
    (fields, {"adam_beta2": -0.1}, "adam_beta2: expected a number in [0, 1), got -0.1"),
    (fields, {"adam_epsilon": 0}, "adam_epsilon: expected a number > 0, got 0.0"),
    (fields, {"weight_decay": -0.1}, "weight_decay: expected a number >= 0"),
    (fields, {"max_grad_norm": -1}, "max_grad_norm: expected a number >= 0"),
    (fields, {"seed": -1}, "seed: expected an integer in [0, 2^32), got -1"),
    (fields, {"cpu_threads": -1}, "cpu_threads: expected an integer >= 0"),
    (fields, {"logging_steps": 0}, "logging_steps: expected an integer >= 1"),
    (fields, {"eval_steps": -1}, "eval_steps: expected an integer >= 0"),
    (fields, {"max_workspace_mb": 0}, "max_workspace_mb: expected null or a number > 0, got 0.0"),
    (
        fields,
        {"sft_reduction": "mean"},
        "expected one of sum, sequence_mean, token_mean, got 'mean'",
    ),
    (fields, {"dtype": "fp16"}, "dtype: expected one of auto, float32, bfloat16, float16"),
    (
        fields,
        {"optim": "adam"},
        "optim: expected one of adamw_torch, adamw_8bit, adafactor, sgd, got 'adam'",
    ),
    (
        fields,
        {"optim": "sgd", "adam_beta2": 0.95},
        "optim: expected adamw_torch or adamw_8bit where an adam_ field is given, got sgd",
    ),
    (fields, {"backend": "cuda"}, "backend: expected one of auto, triton, torch, got 'cuda'"),
    (fields, {"lr_scheduler_type": "step"}, "lr_scheduler_type: expected one of linear, cosine"),
    (fields, {"on_bad_row": "ignore"}, "on_bad_row: expected one of error, skip, got 'ignore'"),
    (
        fields,
        {"scale_eta_by_beta": "maybe"},
        "scale_eta_by_beta: expected true or false, got 'maybe'",
    ),
    (fields, {"overwrite_output_dir": 1}, "overwrite_output_dir: expected true or false, got 1"),
    (fields, {"train_file": 3}, "train_file: expected a string, got 3"),
    (
        fields,
        {"train_file": []},
        "train_file: expected training data, got none; give train_file or",
    ),
    (fields, {"train_weights": [1, "much"]}, "train_weights: expected a number, got 'much'"),
    (fields, {"train_weights": [0]}, "train_weights: expected numbers > 0, got (0.0,)"),
    (fields, {"train_weights": [1, 1]}, "train_weights: expected one weight per train_file and"),
    (fields, {"eval_split_ratio": 1}, "eval_split_ratio: expected a number in [0, 1), got 1.0"),
    (
        fields,
        {"eval_split_ratio": 0.1, "eval_file": "e"},
        "eval_split_ratio: expected 0 where eval_file",
    ),
    (fields, {"dataset_config": "x"}, "dataset_config: 'x' is of no data set; give dataset_name"),
    (
        fields,
        {"dataset_test_split": "x"},
        "dataset_test_split: 'x' is of no data set; give dataset_name",
    ),
    (
        fields,
        {"max_prompt_length": 0},
        "max_prompt_length: expected null or an integer >= 1, got 0",
    ),
    (
        fields,
        {"max_prompt_length": 1024},
        "max_prompt_length: expected less than max_length (1024)",
    ),
    (
        fields,
        {"truncation_mode": "keep"},
        "truncation_mode: expected one of keep_end, keep_start, drop",
    ),
    (fields, {"output_dir": ""}, "output_dir: expected a value, got an empty one"),
    (fields, {"output_dir": 7}, "output_dir: expected a string, got 7"),
    (
        fields,
        {"reference": "cached"},
        "reference: expected one of precomputed, online, adapter, none",
    ),
    (fields, {"lora_r": 0, "use_peft": True}, "lora_r: expected an integer >= 1, got 0"),
    (fields, {"date": "0999-01-01"}, "date: expected null or a day as 2026-11-26, got 0999-01-01"),
    (fields, {"lora_alpha": 0, "use_peft": True}, "lora_alpha: expected a number > 0, got 0.0"),
    (
        fields,
        {"lora_dropout": 1, "use_peft": True},
        "lora_dropout: expected a number in [0, 1), got 1.0",
    ),
    (
        fields,
        {"lora_target_modules": [], "use_peft": True},
        "lora_target_modules: expected a value, got",
    ),
    (
        fields,
        {"lora_target_modules": ["all-linear", "embed_tokens"], "use_peft": True},
        "lora_target_modules: expected names, or all-linear alone, got ('all-linear',",
    ),
    (fields, {"model_dtype": "fp16"}, "model_dtype: expected one of float32, bfloat16, got 'fp16'"),
    # Fields that do not go together.
    (
        fields,
        {"reference": "none", "ref_model_name_or_path": "m"},
        "ref_model_name_or_path: expected null",
    ),
    (
        fields,
        {"reference": "adapter", "ref_model_name_or_path": "m", "use_peft": True},
        "ref_model_name_or_path: expected null with reference adapter, got m",
    ),
    (
        fields,
        {"reference": "adapter"},
        "reference: expected precomputed or online where use_peft is false",
    ),
    (fields, {"load_in_4bit": True}, "load_in_4bit: expected false without use_peft"),
    (
        fields,
        {"load_in_4bit": True, "use_peft": True, "gguf_file": "a.gguf"},
        "load_in_4bit: expected false with gguf_file",
    ),
    (fields, {"lora_r": 8}, "use_peft: expected true where a lora_ field"),
    (fields, {"lora_target_modules": "q_proj"}, "use_peft: expected true where a lora_ field"),
    (
        fields,
        {"model_dtype": "bfloat16", "dtype": "float32"},
        "model_dtype: expected float32 with dtype float32, got bfloat16",
    ),
    (
        fields,
        {"min_lr_rate": 0.1, "lr_scheduler_type": "linear"},
        "min_lr_rate: expected 0 with lr_scheduler_type linear, as only cosine ends there, got 0.1",
    ),
    (
        fields,
        {"lr_scheduler_type": "constant", "warmup_ratio": 0.2},
        "lr_scheduler_type: expected constant_with_warmup where warmup_ratio is given",
    ),
    # What the loss does not define.
    (fields, {"loss_type": "Sigmoid"}, "got 'Sigmoid'; did you mean sigmoid?"),
    (fields, {"loss_type": "simp0", "reference": "none"}, "got 'simp0'; did you mean simpo?"),
    (fields, {"loss_type": "dpo"}, "got 'dpo'; did you mean sigmoid?"),
    (fields, {"loss_type": "RPO"}, "got 'RPO'; did you mean sigmoid (with eta, its SFT term)?"),
    (fields, {"dtype": "bf16"}, "got 'bf16'; did you mean bfloat16?"),
    (fields, {"beta": 1e39}, "beta: expected a finite number > 0 in float32, got 1e+39"),
    (fields, {"eta": 1e39}, "eta: expected a finite number >= 0 in float32"),
    (fields, {"max_workspace_mb": 1e15}, "max_workspace_mb: expected None or a number of MiB > 0"),
    (fields, {"reference": "none"}, "reference: sigmoid compares with a reference model, got none"),
    (fields, {"loss_type": "simpo"}, "reference: expected none, as simpo is reference-free"),
    # What the model refuses before anything is loaded.
    (
        before_start,
        {"model_name_or_path": "package:no_such_package"},
        "'no_such_package' is not installed; install it",
    ),
    (
        before_start,
        {"model_name_or_path": "package:torch/a.gguf"},
        "expected package:NAME, got package:torch/a.gguf; give package:torch and gguf_file a.gguf",
    ),
    (
        before_start,
        {"model_name_or_path": ".", "gguf_file": "m.gguf"},
        "gguf_file: no file 'm.gguf'",
    ),
    (fields, {"simpo_gamma": 1.0}, "simpo_gamma: expected None"),
    (fields, {"grad_tolerance": 1}, "grad_tolerance: expected a number in [0, 1), got 1.0"),
    (fields, {"strategy": "fast"}, "strategy: expected one of auto, stream, recompute, got 'fast'"),
    (
        fields,
        {"metric_for_best_model": "loss", "eval_steps": 2},
        "metric_for_best_model: expected null without an evaluation set, got loss; give eval_file",
    ),
    (
        fields,
        {"metric_for_best_model": "loss", "eval_file": "e.jsonl"},
        "eval_steps: expected an integer >= 1 with metric_for_best_model",
    ),
    (
        fields,
        {"metric_for_best_model": "accuracy"},
        "metric_for_best_model: expected one of loss, loss/dpo",
    ),
    (
        fields,
        {"early_stopping_patience": 2},
        "early_stopping_patience: expected null without metric_for_best_model, got 2",
    ),
    # Keys of the command line.
    (command, ["--beta", "1", "--beta=2"], "command line: --beta is given twice; keep one of them"),
    (command, ["--beta"], "command line: argument --beta: expected one argument"),
    (
        command,
        ["--train_file", "x.jsonl"],
        "model_name_or_path: no value; give it in the recipe or as --model_name_or_path",
    ),
    (command, ["--learning_rat", "1"], "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
    (command, ["--learning_rte=1"], "unknown key 'learning_rte'; did you mean 'learning_rate'?"),
    (command, ["--zzz", "1"], "command line: unknown key 'zzz'; --help lists all of them"),
    (command, ["beta"], "command line: expected --field value, got 'beta'"),
    (command, ["--config", "none.yaml"], "none.yaml: no such file"),
    # Recipes.
    (recipe, "betta: 0.1\n", "bad.yaml: unknown key 'betta'; did you mean 'beta'?"),
    (recipe, "beta: [\n", "bad.yaml: not valid YAML"),
    (recipe, "beta: 0.1\neta: 1\nbeta: 0.9\n", "bad.yaml: beta is given 2 times; keep one of"),
    (recipe, "- beta\n", "bad.yaml: expected 'field: value' lines, got list"),
    (recipe, "beta: 0.1\n", "no value; give it in the recipe or as --model_name_or_path"),
    (
        recipe,
        "beta: lots\nmodel_name_or_path: m\ntrain_file: t\n",
        "beta: expected a number, got 'lots'",
    ),
    # Data files.
    (data_file, ("none.jsonl", None), "no such file"),
    (
        data_file,
        ("rows.txt", b"a,b\n"),
        "expected a .jsonl, .json, .csv or .parquet file (all but the last",
    ),
    (data_file, ("rows.csv", b"\xff\n"), "not a readable CSV file"),
    (data_file, ("rows.parquet", b"no parquet"), "not a readable Parquet file"),
    (data_file, ("rows.json", b'\n[{"prompt": "a"}]\n'), "rows.json:2: missing field: chosen"),
    (data_file, ("rows.jsonl", b"[\n{}\n]\n"), "one a line, as jq -c '.[]' does"),
    (data_file, ("empty.jsonl", b"\n"), "no usable preference pair"),
    # Rows.
    (row, b"{not json", "not valid JSON: Expecting property name"),
    (row, b'{"prompt": "\xff"}', "not valid JSON"),
    (row, GOOD | {"prompt": "\ud83d"}, "not valid JSON: '\\ud83d' is half of a surrogate pair"),
    (row, TALK | {"chosen": [{"role": "assistant", "content": "\udc00"}]}, "half of a surrogate"),
    (
        row,
        TALK | {"tools": '[{"name": "\\ud83d"}]'},
        "bad tools: not valid JSON: '\\ud83d' is half",
    ),
    (row, b"[1, 2]", "not a JSON object: got list"),
    (row, {}, "missing field: chosen, rejected (the row has no field)"),
    (row, {"prompt": "a", "chosen": "b"}, "missing field: rejected (the row has prompt, chosen)"),
    (row, GOOD | {"chosen": None}, "missing field: chosen"),
    (row, GOOD | {"chosen": ""}, "empty response: chosen"),
    (row, GOOD | {"rejected": " \n"}, "empty response: rejected"),
    (row, GOOD | {"rejected": " 4"}, "chosen equals rejected"),
    (
        row,
        GOOD | {"chosen": 4},
        "wrong type: chosen: expected a string or a list of messages, got int",
    ),
    (row, GOOD | {"chosen": ANSWER}, "mixed forms: expected all strings or all message lists"),
    (row, TALK | {"chosen": [{"role": "bot", "content": "x"}]}, "bad message: chosen[0]: expected"),
    (row, TALK | {"chosen": ["x"]}, "bad message: chosen[0]"),
    (row, TALK | {"chosen": [{"role": "assistant", "content": None}]}, "bad message: chosen[0]"),
    (row, TALK | {"chosen": []}, "empty response: chosen"),
    (row, TALK | {"chosen": [{"role": "assistant", "content": " "}]}, "empty response: chosen"),
    (row, TALK | {"chosen": USER}, "bad turns: chosen must begin and end with an assistant"),
    (row, TALK | {"prompt": []}, "bad turns: prompt must end with a user, system or tool"),
    (
        row,
        TALK | {"prompt": USER + ANSWER},
        "bad turns: prompt must end with a user, system or tool",
    ),
    (row, TALK | {"rejected": ANSWER}, "chosen equals rejected"),
    (row, TALK | {"tools": "{"}, "bad tools: not valid JSON"),
    (row, TALK | {"tools": ["add"]}, "bad tools: expected a list of JSON objects, got ['add']"),
    (row, GOOD | {"tools": [{}]}, "bad tools: strings have no chat template to show tools"),
    (row, TALK | {"chosen": [{"role": "assistant", "tool_calls": 3}]}, "bad message: chosen[0]"),
    (
        row,
        {"chosen": "yes", "rejected": "no"},
        "no prompt: the row has chosen, rejected; name the column that holds it",
    ),
    (
        row,
        {"chosen": ANSWER, "rejected": USER},
        "no common prompt: without prompt, both must begin",
    ),
    (
        row,
        {"chosen": "a b", "rejected": ANSWER},
        "mixed forms: expected all strings or all message",
    ),
    (
        row,
        TALK | {"prompt": "hi"},
        "mixed forms: expected all strings or all message lists, but prompt",
    ),
]


@pytest.mark.parametrize(
    ("use", "given", "message"), BAD, ids=[f"{u.__name__}-{m[:40]}" for u, _, m in BAD]
)
def test_bad_input_is_named(use, given, message, tmp_path):
    with pytest.raises(InputError) as error:
        use(given, tmp_path)
    assert message in str(error.value)


@pytest.mark.parametrize("reference", ["precomputed", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_config_takes_the_combinations_that_the_loss_takes(
    loss_type, label_smoothing, reference
):
    chosen = {"loss_type": loss_type, "label_smoothing": label_smoothing}
    hidden, labels = torch.zeros(2, 1, 8), torch.zeros(2, 1, dtype=torch.int64)
    logps = None if reference == "none" else torch.zeros(2)
    try:
        fused_rpo_loss(hidden, hidden[:, 0], labels, logps, **chosen)
        takes = LOSSES[loss_type].reference == (reference != "none")
    except ValueError:
        takes = False
    with nullcontext() if takes else pytest.raises(InputError):
        fields(chosen | {"reference": reference}, None)


def test_skip_counts_bad_rows_by_reason(tmp_path):
    rows = [given for use, given, _ in BAD if use is row]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join(map(as_line, [GOOD, *rows, TALK])))
    kept, bad = read_rows(file, "skip")
    assert len(kept) == 2 and bad.reasons.total() == len(rows)
    assert bad.reasons["empty response"] == 4 and bad.reasons["not valid JSON"] == 4


def test_many_bad_rows_are_counted_not_listed(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"{}\n" * 20)
    with pytest.raises(InputError, match=r"20 unusable row(?s:.*)\.\.\. and 15 more"):
        read_rows(tmp_path / "rows.jsonl")
