"""A command line from a dataclass: a field is an option, its docstring the help.

Dashes may stand for underscores, an option is given once, and a name that no field has is an error
that says which field is meant.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import textwrap
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

from trainer.config import values
from trainer.errors import InputError

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")

# What other programs call a field, or what people write for it.
KNOWN_AS = {
    "learning_rate": ("lr", "peak_lr"),
    "per_device_train_batch_size": ("batch_size", "train_batch_size", "micro_batch_size", "bs"),
    "per_device_eval_batch_size": ("eval_batch_size",),
    "gradient_accumulation_steps": ("accumulation", "grad_accum", "accumulation_steps"),
    "num_train_epochs": ("epochs", "num_epochs", "train_epochs"),
    "max_steps": ("steps", "num_steps", "train_steps", "iterations"),
    "model_name_or_path": ("model", "model_name", "model_path", "model_id", "base_model"),
    "ref_model_name_or_path": ("ref_model", "reference_model"),
    "train_file": ("data", "train_data", "train", "train_files", "data_files"),
    "eval_file": ("eval_data", "test_file", "valid_file", "validation_file", "eval_files"),
    "dataset_name": ("dataset", "datasets"),
    "eta": ("rpo_alpha", "sft_weight", "sft_coef", "alpha"),
    "beta": ("kl_coef", "dpo_beta"),
    "loss_type": ("loss", "algorithm"),
    "simpo_gamma": ("gamma", "target_margin"),
    "dtype": ("bf16", "fp16", "precision", "mixed_precision", "torch_dtype"),
    "optim": ("optimizer",),
    "lr_scheduler_type": ("scheduler", "lr_scheduler"),
    "warmup_ratio": ("warmup", "warmup_steps"),
    "max_grad_norm": ("clip", "grad_clip", "gradient_clipping"),
    "max_length": ("max_seq_length", "max_seq_len", "seq_len", "max_len"),
    "use_peft": ("lora", "peft", "use_lora", "qlora"),
    "load_in_4bit": ("4bit", "quantize"),
    "eval_steps": ("eval_strategy", "evaluation_strategy", "eval_every", "eval_interval"),
    "save_steps": ("save_strategy", "save_every", "checkpoint_every"),
    "metric_for_best_model": ("load_best_model_at_end", "best_metric"),
    "early_stopping_patience": ("patience", "early_stopping"),
    "resume_from_checkpoint": ("resume", "checkpoint"),
    "output_dir": ("out", "output", "out_dir", "save_dir"),
    "report_to": ("log_with", "wandb", "tensorboard", "logger"),
    "max_workspace_mb": ("workspace", "workspace_mb"),
    "grad_tolerance": ("tolerance", "tau"),
    "use_liger_kernel": ("liger", "use_liger"),
    "gradient_checkpointing": ("checkpointing", "activation_checkpointing"),
}


class _Parser(argparse.ArgumentParser):
    """Ends with an `InputError` instead of a page of usage."""

    def error(self, message: str) -> typing.NoReturn:
        raise InputError(f"command line: {message}")


class _Once(argparse.Action):
    """Stores a value, once."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        if hasattr(namespace, self.dest):
            raise InputError(f"command line: {option_string} is given twice; keep one of them")
        setattr(namespace, self.dest, values)


def field_docs(kind: type) -> dict[str, str]:
    """Every field of a dataclass and the docstring beneath it, in order."""
    docs = {}
    for owner in reversed(kind.__mro__[:-1]):
        [defined] = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(defined, ast.ClassDef)
        for field, doc in zip(defined.body, defined.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr):
                assert isinstance(field.target, ast.Name) and isinstance(doc.value, ast.Constant)
                docs[field.target.id] = " ".join(str(doc.value.value).split())
    return {field.name: docs[field.name] for field in dataclasses.fields(kind)}


def make_parser(
    kind: type,
    prog: str,
    description: str,
    *,
    first: Mapping[str, str] | None = None,
    shown: Mapping[str, str] | None = None,
    groups: Mapping[str, str] | None = None,
    choices: Mapping[str, Iterable[str]] | None = None,
    positional: str | None = None,
) -> argparse.ArgumentParser:
    """A parser whose options are the fields of a dataclass.

    Args:
        kind: the dataclass.
        prog: the command, as it is typed.
        description: what it does, above the options.
        first: further options before the fields, with their help.
        shown: what stands in brackets behind a field's help instead of its default.
        groups: titles by the first field of each group; none is one group.
        choices: of fields whose type does not list them.
        positional: the field that is given without its name, if any.
    """
    parser = _Parser(
        prog=prog,
        usage=f"{prog} [--FIELD VALUE ...]" if groups else None,
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, text in (first or {}).items():
        parser.add_argument(f"--{name}", metavar="FILE", help=text, action=_Once,
            default=argparse.SUPPRESS)  # fmt: skip
    docs, kinds = field_docs(kind), typing.get_type_hints(kind)
    group: argparse._ActionsContainer = parser
    for field in dataclasses.fields(kind):
        if groups and field.name in groups:
            group = parser.add_argument_group(groups[field.name])
        of_kind = (choices or {}).get(field.name)
        value = f" [{default(field)}]" if default(field) else ""
        value = (shown or {}).get(field.name, value)
        arity = _arity(kinds[field.name], of_kind)
        if field.name == positional:
            arity["metavar"] = field.name.upper()
        group.add_argument(
            field.name if field.name == positional else f"--{field.name}",
            help=(docs[field.name] + value).replace("%", "%%"),
            action=_Once,
            default=argparse.SUPPRESS,
            **arity,
        )
    return parser


def default(field: dataclasses.Field) -> str:
    """A field's default as the command line takes it, empty where there is none."""
    return "" if field.default is dataclasses.MISSING else spelled(field.default)


def spelled(value: object) -> str:
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        return " ".join(map(spelled, value)) or "none"
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _arity(kind: Any, choices: Iterable[str] | None) -> dict[str, Any]:
    """How many words an option of a type takes, and what the help calls them."""
    kind = values.without_null(kind)
    if typing.get_origin(kind) is tuple:
        inner, *more = typing.get_args(kind)
        return {"nargs": "*" if more == [...] else 1 + len(more), "metavar": _word(inner, choices)}
    if kind is bool:
        return {"nargs": "?", "const": "true", "metavar": "true|false"}
    return {"metavar": _word(kind, choices)}


def takes(kind: Any) -> str:
    """What a field of a type takes, in words."""
    null = " or null" if values.without_null(kind) is not kind else ""
    kind = values.without_null(kind)
    if typing.get_origin(kind) is tuple:
        return f"{takes(typing.get_args(kind)[0])}, any number of them"
    if typing.get_origin(kind) is Literal:
        return ", ".join(f"`{spelled(choice)}`" for choice in typing.get_args(kind)) + null
    words = {bool: "`true` or `false`", int: "integer", float: "number", str: "text"}
    return words.get(kind, "mapping") + null


def _word(kind: Any, choices: Iterable[str] | None) -> str:
    if typing.get_origin(kind) is Literal:
        choices = [spelled(choice) for choice in typing.get_args(kind)]
    if choices is not None:
        return f"{{{','.join(choices)}}}"
    return {int: "N", float: "X", str: "TEXT", dict: "JSON"}[typing.get_origin(kind) or kind]


def read(parser: argparse.ArgumentParser, kind: type, argv: list[str]) -> dict[str, Any]:
    """The options that are given, as text, by field.

    Raises:
        InputError: an unknown option, one that is given twice, or a missing value.
        SystemExit: after `--help`.
    """
    given, unknown = parser.parse_known_args(list(_underscored(argv)))
    for word in unknown:
        if not word.startswith("--"):
            raise InputError(f"command line: expected --field value, got {word!r}")
        check_keys([word[2:].partition("=")[0]], kind, "command line")
    return vars(given)


def _underscored(argv: Iterable[str]) -> Iterator[str]:
    """The words of a command line, options with underscores where they have dashes."""
    for word in argv:
        name, equals, value = word.partition("=")
        dashed = name.startswith("--") and len(name) > 2
        yield "--" + name[2:].replace("-", "_") + equals + value if dashed else word


def check_keys(keys: Iterable[object], kind: type, source: str) -> None:
    """Raise `InputError` for the first key that is no field, naming the field that is meant."""
    valid = [field.name for field in dataclasses.fields(kind)]
    for key in keys:
        if key in valid:
            continue
        meant = [name for name in valid if str(key).lower() in KNOWN_AS.get(name, ())]
        near = meant or difflib.get_close_matches(str(key), valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "--help lists all of them"
        raise InputError(f"{source}: unknown key {key!r}; {hint}")


def build(kind: type[Options], given: Mapping[str, object]) -> Options:
    """The dataclass of the values given, each converted to its field's type.

    Raises:
        InputError: a value is missing or of another type.
    """
    kinds, converted = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        if field.name in given:
            try:
                converted[field.name] = values.convert(given[field.name], kinds[field.name])
            except ValueError as error:
                raise InputError(f"{field.name}: {error}") from None
        elif field.default is dataclasses.MISSING:
            raise InputError(f"{field.name}: no value; give it as --{field.name}")
    return kind(**converted)
