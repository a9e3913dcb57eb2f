"""What a value of `RunConfig` may be: its type, its range, what it goes together with.

A problem is a message that names the field, what was expected, what came, what to do.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import json
import math
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

EVALUATION_SET = "eval_file, dataset_test_split or eval_split_ratio"
TRACKERS = ("tensorboard", "wandb", "trackio")
FILLED = ("model_name_or_path", "output_dir", "lora_target_modules", "prompt_column",
          "chosen_column", "rejected_column")  # may not be empty  # fmt: skip

# Losses by their papers' names, which resemble those of other losses here.
PAPERS_NAMES = {"dpo": "sigmoid", "rpo": "sigmoid (with eta, its SFT term)",
                "cdpo": "sigmoid (with label_smoothing)"}  # fmt: skip

# What the chat template is given by its caller, not as a variable.
OF_THE_CALLER = ("conversation", "messages", "tools", "chat_template", "add_generation_prompt",
                 "continue_final_message", "tokenize", "tokenizer_kwargs", "return_dict",
                 "return_tensors", "return_assistant_tokens_mask", "padding", "truncation",
                 "max_length", "sanitize_control_tokens")  # fmt: skip


def _is_day(text: str) -> bool:
    try:
        day = datetime.date.fromisoformat(text)
        return day.isoformat() == text and day.year >= 1000  # %Y writes earlier ones in less digits
    except ValueError:
        return False


# What numbers may be, in words and as a test, and which fields hold such; null passes.
RANGES: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    ("an integer >= 0", lambda x: x >= 0, (
        "cpu_threads", "eval_steps", "sample_prompts", "save_steps")),
    ("an integer >= 1", lambda x: x >= 1, (
        "lora_r", "per_device_train_batch_size", "gradient_accumulation_steps",
        "per_device_eval_batch_size", "ddp_timeout", "logging_steps", "max_new_tokens")),
    ("null or an integer >= 1", lambda x: x >= 1, (
        "max_prompt_length", "save_total_limit", "early_stopping_patience")),
    ("-1 or an integer >= 1", lambda x: x == -1 or x >= 1, ("max_steps",)),
    ("an integer >= 8", lambda x: x >= 8, ("max_length",)),
    ("null or an integer >= 8", lambda x: x >= 8, ("max_tokens_per_batch",)),
    ("an integer in [0, 2^32)", lambda x: 0 <= x < 2**32, ("seed",)),
    ("a number >= 0", lambda x: 0 <= x < math.inf, ("eta", "weight_decay", "max_grad_norm")),
    ("a number > 0", lambda x: 0 < x < math.inf, (
        "beta", "lora_alpha", "num_train_epochs", "learning_rate", "adam_epsilon")),
    ("null or a number > 0", lambda x: 0 < x < math.inf, ("max_workspace_mb",)),
    ("a number in [0, 1)", lambda x: 0 <= x < 1, (
        "eval_split_ratio", "grad_tolerance", "lora_dropout", "min_lr_rate", "adam_beta1",
        "adam_beta2")),
    ("a number in [0, 1]", lambda x: 0 <= x <= 1, ("warmup_ratio",)),
    ("a number in [0, 0.5)", lambda x: 0 <= x < 0.5, ("label_smoothing",)),
)  # fmt: skip


def problems(config: Any) -> Iterator[str]:
    """What is wrong with the values of a config, all of the right type, and their combinations."""
    for expected, holds, names in RANGES:
        for name in names:
            value = getattr(config, name)
            if value is not None and not holds(value):
                yield f"{name}: expected {expected}, got {value}"
    for name in FILLED:
        if not getattr(config, name):
            yield f"{name}: expected a value, got an empty one"
    yield from _data_problems(config)
    yield from _model_problems(config)
    yield from _optimizer_problems(config)
    yield from _evaluation_problems(config)
    yield from _output_problems(config)
    yield from _loss_problems(config)


def _data_problems(c: Any) -> Iterator[str]:
    if not all(0 < weight < math.inf for weight in c.train_weights):
        yield f"train_weights: expected numbers > 0, got {c.train_weights}"
    if c.chat_template_kwargs and {*c.chat_template_kwargs} & {*OF_THE_CALLER}:
        yield (
            "chat_template_kwargs: expected variables of the template, none of "
            f"{', '.join(OF_THE_CALLER)}, got {c.chat_template_kwargs}"
        )
    if c.date is not None and not _is_day(c.date):
        yield f"date: expected null or a day as 2026-11-26, got {c.date}"
    if not (c.train_file or c.dataset_name):
        yield "train_file: expected training data, got none; give train_file or dataset_name"
    if c.dataset_config is not None and not c.dataset_name:
        yield f"dataset_config: {c.dataset_config!r} is of no data set; give dataset_name"
    if c.dataset_test_split is not None and not c.dataset_name:
        yield (
            f"dataset_test_split: {c.dataset_test_split!r} is of no data set; give dataset_name, "
            "or eval_file for files"
        )
    if len(c.train_weights) not in (0, len(c.train_file) + len(c.dataset_name)):
        yield (
            "train_weights: expected one weight per train_file and dataset_name, got "
            f"{c.train_weights}"
        )
    if c.eval_split_ratio > 0 and (c.eval_file or c.dataset_test_split):
        yield (
            "eval_split_ratio: expected 0 where eval_file or dataset_test_split holds the "
            f"evaluation's pairs, got {c.eval_split_ratio}"
        )
    if (c.max_prompt_length or 0) >= c.max_length:
        yield (
            f"max_prompt_length: expected less than max_length ({c.max_length}), so that "
            f"responses keep some tokens; got {c.max_prompt_length}"
        )


def _model_problems(c: Any) -> Iterator[str]:
    if c.reference in ("adapter", "none") and c.ref_model_name_or_path is not None:
        yield (
            f"ref_model_name_or_path: expected null with reference {c.reference}, got "
            f"{c.ref_model_name_or_path}"
        )
    if c.reference == "adapter" and not c.use_peft:
        yield "reference: expected precomputed or online where use_peft is false, got adapter"
    if not c.use_peft and _given(c, "lora_"):
        yield "use_peft: expected true where a lora_ field is given, got false"
    if "all-linear" in c.lora_target_modules and len(c.lora_target_modules) > 1:
        yield (
            f"lora_target_modules: expected names, or all-linear alone, got {c.lora_target_modules}"
        )
    if c.load_in_4bit and not c.use_peft:
        yield "load_in_4bit: expected false without use_peft, as 4-bit weights cannot be trained"
    if c.load_in_4bit and c.gguf_file is not None:
        yield "load_in_4bit: expected false with gguf_file, whose weights are dequantized"
    if c.dtype in ("float32", "float16") and c.model_dtype != "float32":
        yield f"model_dtype: expected float32 with dtype {c.dtype}, got {c.model_dtype}"


def _optimizer_problems(c: Any) -> Iterator[str]:
    if "adamw" not in c.optim and _given(c, "adam_"):
        yield (
            "optim: expected adamw_torch or adamw_8bit where an adam_ field is given, got "
            f"{c.optim}"
        )
    if c.lr_scheduler_type == "constant" and c.warmup_ratio > 0 and _given(c, "warmup_ratio"):
        yield (
            "lr_scheduler_type: expected constant_with_warmup where warmup_ratio is given, got "
            "constant"
        )
    if c.min_lr_rate > 0 and c.lr_scheduler_type != "cosine":
        yield (
            f"min_lr_rate: expected 0 with lr_scheduler_type {c.lr_scheduler_type}, as only "
            f"cosine ends there, got {c.min_lr_rate}"
        )


def _evaluation_problems(c: Any) -> Iterator[str]:
    held_out = c.eval_file or c.dataset_test_split or c.eval_split_ratio
    if c.sample_prompts > 0 and not held_out:
        yield (
            f"sample_prompts: expected 0 without an evaluation set, got {c.sample_prompts}; "
            f"give {EVALUATION_SET}"
        )
    if c.metric_for_best_model is not None and not held_out:
        yield (
            "metric_for_best_model: expected null without an evaluation set, got "
            f"{c.metric_for_best_model}; give {EVALUATION_SET}"
        )
    if c.metric_for_best_model is not None and c.eval_steps == 0:
        yield (
            "eval_steps: expected an integer >= 1 with metric_for_best_model, which compares "
            "evaluations during training, got 0"
        )
    if c.early_stopping_patience is not None and c.metric_for_best_model is None:
        yield (
            "early_stopping_patience: expected null without metric_for_best_model, got "
            f"{c.early_stopping_patience}; say which metric has to improve"
        )


def _output_problems(c: Any) -> Iterator[str]:
    if len({*c.report_to}) != len(c.report_to) or not {*c.report_to} <= {*TRACKERS}:
        yield f"report_to: expected some of {', '.join(TRACKERS)}, got {c.report_to}"
    if c.resume_from_checkpoint is not None and c.overwrite_output_dir:
        yield (
            "resume_from_checkpoint: expected null with overwrite_output_dir, which removes the "
            "run to resume; drop one of the two"
        )
    if c.push_to_hub and not c.hub_model_id:
        yield "hub_model_id: expected a repository to push to, got null"


def _given(config: Any, prefix: str) -> bool:
    """Whether any field of that prefix is not at its default."""
    fields = [f for f in dataclasses.fields(config) if f.name.startswith(prefix)]
    return any(getattr(config, f.name) != f.default for f in fields)


def _loss_problems(config: Any) -> Iterator[str]:
    """What the loss does not define; its coefficients are the kernels' to judge, once, here."""
    # not above: it imports torch, for which the evaluator's judge would wait
    from rpo_kernels.checks import check_loss, check_run
    from rpo_kernels.losses import LOSSES

    name, reference = config.loss_type, config.reference
    if name not in LOSSES:
        yield f"loss_type: {not_among(name, LOSSES, PAPERS_NAMES.get(name.lower()))}"
        return
    free = ", ".join(name for name, loss in LOSSES.items() if not loss.reference)
    if LOSSES[name].reference and reference == "none":
        yield (
            f"reference: {name} compares with a reference model, got none; use precomputed, or a "
            f"reference-free loss_type ({free})"
        )
    if not LOSSES[name].reference and reference != "none":
        yield f"reference: expected none, as {name} is reference-free, got {reference}"
    try:
        check_loss(
            name, config.beta, config.eta, config.label_smoothing, config.sft_reduction,
            config.scale_eta_by_beta, config.simpo_gamma,
        )  # fmt: skip
        check_run(config.backend, config.max_workspace_mb)
    except ValueError as error:
        yield str(error)


def not_among(value: object, choices: Iterable[str], meant: str | None = None) -> str:
    """What was expected, and what came instead, with the choice that is meant or resembles it."""
    near = [meant] if meant else difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"expected one of {', '.join(choices)}, got {value!r}{hint}"


def convert(value: object, kind: Any) -> object:
    """`value` as a field's type, from YAML's types or the command line's (or `1e-5`'s) text.

    Raises:
        ValueError: what was expected, and what came.
    """
    if without_null(kind) is not kind:
        if value is None or (isinstance(value, str) and value.lower() in ("null", "none")):
            return None
        kind = without_null(kind)
    if typing.get_origin(kind) is Literal:
        choices = {str(choice).lower(): choice for choice in typing.get_args(kind)}
        if str(value).lower() not in choices:
            raise ValueError(not_among(value, tuple(choices)))
        return choices[str(value).lower()]
    if typing.get_origin(kind) is tuple:
        values = value if isinstance(value, list | tuple) else [value]
        values = [] if list(values) in ([None], ["null"]) else values  # the latter a command line's
        return tuple(convert(v, typing.get_args(kind)[0]) for v in values)
    if typing.get_origin(kind) is dict:
        return _mapping(value)
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    try:
        return _scalar(value, kind)
    except (ValueError, KeyError):
        raise ValueError(f"expected {words[kind]}, got {value!r}") from None


def without_null(kind: Any) -> Any:
    """X where a type is `X | None`; any other type as it is."""
    return typing.get_args(kind)[0] if type(None) in typing.get_args(kind) else kind


def _mapping(value: object) -> dict[str, object]:
    """A mapping of plain values, from YAML's or from JSON text."""
    try:
        given = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        given = value
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise ValueError(
            f"""expected a mapping of names, as {{"enable_thinking": false}}, got {value!r}"""
        )
    return json.loads(json.dumps(given, default=str))  # a day is its text


def _scalar(value: object, kind: type) -> object:
    """`value` as `kind`; a `ValueError` or `KeyError` where it is none."""
    if kind is str and isinstance(value, datetime.date):  # YAML's type of 2026-11-26
        return value.isoformat()
    if isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
        return value
    if isinstance(value, str) and kind is bool:
        return {"true": True, "false": False}[value.lower()]
    if isinstance(value, bool) or kind in (bool, str) or not isinstance(value, int | float | str):
        raise ValueError
    if isinstance(value, float) and not value.is_integer():
        raise ValueError
    return kind(value)
