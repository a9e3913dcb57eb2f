"""What a value of `RunConfig` may be: its type, its range, what it goes together with.

A problem is a message that names the field, what was expected, what came, what to do.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import json
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

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


# What each field's value must be, in words and as a test; null passes where a field may be null.
RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "train_weights": ("numbers > 0", lambda x: all(0 < y < float("inf") for y in x)),
    "eval_split_ratio": ("a number in [0, 1)", lambda x: 0 <= x < 1),
    "max_length": ("an integer >= 8", lambda x: x >= 8),
    "max_prompt_length": ("null or an integer >= 1", lambda x: x >= 1),
    "chat_template_kwargs": (
        f"variables of the template, none of {', '.join(OF_THE_CALLER)}",
        lambda x: not {*x} & {*OF_THE_CALLER},
    ),
    "date": ("null or a day as 2026-11-26", _is_day),
    "beta": ("a number > 0", lambda x: 0 < x < float("inf")),
    "eta": ("a number >= 0", lambda x: 0 <= x < float("inf")),
    "label_smoothing": ("a number in [0, 0.5)", lambda x: 0 <= x < 0.5),
    "lora_r": ("an integer >= 1", lambda x: x >= 1),
    "lora_alpha": ("a number > 0", lambda x: 0 < x < float("inf")),
    "lora_dropout": ("a number in [0, 1)", lambda x: 0 <= x < 1),
    "max_steps": ("-1 or an integer >= 1", lambda x: x == -1 or x >= 1),
    "num_train_epochs": ("a number > 0", lambda x: 0 < x < float("inf")),
    "per_device_train_batch_size": ("an integer >= 1", lambda x: x >= 1),
    "gradient_accumulation_steps": ("an integer >= 1", lambda x: x >= 1),
    "max_tokens_per_batch": ("null or an integer >= 8", lambda x: x >= 8),
    "per_device_eval_batch_size": ("an integer >= 1", lambda x: x >= 1),
    "learning_rate": ("a number > 0", lambda x: 0 < x < float("inf")),
    "warmup_ratio": ("a number in [0, 1]", lambda x: 0 <= x <= 1),
    "min_lr_rate": ("a number in [0, 1)", lambda x: 0 <= x < 1),
    "adam_beta1": ("a number in [0, 1)", lambda x: 0 <= x < 1),
    "adam_beta2": ("a number in [0, 1)", lambda x: 0 <= x < 1),
    "adam_epsilon": ("a number > 0", lambda x: 0 < x < float("inf")),
    "weight_decay": ("a number >= 0", lambda x: 0 <= x < float("inf")),
    "max_grad_norm": ("a number >= 0", lambda x: 0 <= x < float("inf")),
    "seed": ("an integer in [0, 2^32)", lambda x: 0 <= x < 2**32),
    "max_workspace_mb": ("null or a number > 0", lambda x: 0 < x < float("inf")),
    "cpu_threads": ("an integer >= 0", lambda x: x >= 0),
    "ddp_timeout": ("an integer >= 1", lambda x: x >= 1),
    "logging_steps": ("an integer >= 1", lambda x: x >= 1),
    "eval_steps": ("an integer >= 0", lambda x: x >= 0),
    "sample_prompts": ("an integer >= 0", lambda x: x >= 0),
    "max_new_tokens": ("an integer >= 1", lambda x: x >= 1),
    "report_to": (
        f"some of {', '.join(TRACKERS)}",
        lambda x: len({*x}) == len(x) and {*x} <= {*TRACKERS},
    ),
    "save_steps": ("an integer >= 0", lambda x: x >= 0),
    "save_total_limit": ("null or an integer >= 1", lambda x: x >= 1),
}
# Combinations that make no sense, by what is said of them.
IMPOSSIBLE: dict[str, Callable[[Any], bool]] = {
    "train_file: expected training data, got none; give train_file or dataset_name": lambda c: (
        not (c.train_file or c.dataset_name)
    ),
    "dataset_config: {dataset_config!r} is of no data set; give dataset_name": lambda c: (
        c.dataset_config is not None and not c.dataset_name
    ),
    "dataset_test_split: {dataset_test_split!r} is of no data set; give dataset_name, or eval_file "
    "for files": lambda c: c.dataset_test_split is not None and not c.dataset_name,
    "train_weights: expected one weight per train_file and dataset_name, got {train_weights}": (
        lambda c: len(c.train_weights) not in (0, len(c.train_file) + len(c.dataset_name))
    ),
    "eval_split_ratio: expected 0 where eval_file or dataset_test_split holds the evaluation's "
    "pairs, got {eval_split_ratio}": lambda c: (
        c.eval_split_ratio > 0 and bool(c.eval_file or c.dataset_test_split)
    ),
    "sample_prompts: expected 0 without held-out pairs, got {sample_prompts}; give eval_file, "
    "dataset_test_split or eval_split_ratio": lambda c: (
        c.sample_prompts > 0 and not (c.eval_file or c.dataset_test_split or c.eval_split_ratio)
    ),
    "ref_model_name_or_path: expected null with reference {reference}, got "
    "{ref_model_name_or_path}": lambda c: (
        c.reference in ("adapter", "none") and c.ref_model_name_or_path is not None
    ),
    "reference: expected precomputed or online where use_peft is false, got adapter": lambda c: (
        c.reference == "adapter" and not c.use_peft
    ),
    "use_peft: expected true where a lora_ field is given, got false": lambda c: (
        not c.use_peft and _given(c, "lora_")
    ),
    "lora_target_modules: expected names, or all-linear alone, got {lora_target_modules}": (
        lambda c: "all-linear" in c.lora_target_modules and len(c.lora_target_modules) > 1
    ),
    "load_in_4bit: expected false without use_peft, as 4-bit weights cannot be trained": lambda c: (
        c.load_in_4bit and not c.use_peft
    ),
    "load_in_4bit: expected false with gguf_file, whose weights are dequantized": lambda c: (
        c.load_in_4bit and c.gguf_file is not None
    ),
    "optim: expected adamw_torch or adamw_8bit where an adam_ field is given, got {optim}": (
        lambda c: "adamw" not in c.optim and _given(c, "adam_")
    ),
    "lr_scheduler_type: expected constant_with_warmup where warmup_ratio is given, got constant": (
        lambda c: (
            c.lr_scheduler_type == "constant" and c.warmup_ratio > 0 and _given(c, "warmup_ratio")
        )
    ),
    "min_lr_rate: expected 0 with lr_scheduler_type {lr_scheduler_type}, as only cosine ends "
    "there, got {min_lr_rate}": lambda c: c.min_lr_rate > 0 and c.lr_scheduler_type != "cosine",
    "model_dtype: expected float32 with dtype {dtype}, got {model_dtype}": lambda c: (
        c.dtype != "bfloat16" and c.model_dtype != "float32"
    ),
    "resume_from_checkpoint: expected null with overwrite_output_dir, which removes the run to go "
    "on with; drop one of the two": lambda c: (
        c.resume_from_checkpoint is not None and c.overwrite_output_dir
    ),
    "hub_model_id: expected a repository to push to, got null": lambda c: (
        c.push_to_hub and not c.hub_model_id
    ),
    "max_prompt_length: expected less than max_length ({max_length}), so that responses keep some "
    "tokens; got {max_prompt_length}": lambda c: (c.max_prompt_length or 0) >= c.max_length,
}


def _given(config: Any, prefix: str) -> bool:
    """Whether any field of that prefix is not at its default."""
    fields = [f for f in dataclasses.fields(config) if f.name.startswith(prefix)]
    return any(getattr(config, f.name) != f.default for f in fields)


def problems(config: Any) -> Iterator[str]:
    """What is wrong with the values of a config, all of the right type, and their combinations."""
    for field, (expected, holds) in RANGES.items():
        value = getattr(config, field)
        if value is not None and not holds(value):
            yield f"{field}: expected {expected}, got {value}"
    for field in FILLED:
        if not getattr(config, field):
            yield f"{field}: expected a value, got an empty one"
    for message, holds in IMPOSSIBLE.items():
        if holds(config):
            yield message.format(**vars(config))
    yield from _loss_problems(config)


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
            config.scale_eta_by_beta, simpo_gamma=None,
        )  # fmt: skip
        check_run(config.backend, config.max_workspace_mb)
    except ValueError as error:
        yield str(error)


def not_among(value: object, choices: Iterable[str], meant: str | None = None) -> str:
    """What was expected, and what came instead, with the choice that is meant or resembles it."""
    near = [meant] if meant else difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"expected one of {', '.join(choices)}, got {value!r}{hint}"


def convert(value: object, kind: object) -> object:
    """`value` as a field's type, from YAML's types or the command line's (or `1e-5`'s) text.

    Raises:
        ValueError: what was expected, and what came.
    """
    if isinstance(kind, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("null", "none")):
            return None
        kind = typing.get_args(kind)[0]
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
