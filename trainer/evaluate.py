"""Evaluate trained models.

python -m trainer.evaluate score ... --output_dir DIR          rewards and KL on held-out pairs
python -m trainer.evaluate generate ... --output_dir DIR       answers of models to a prompt file
python -m trainer.evaluate judge ... --output_dir DIR          answers of models into judgments
python -m trainer.evaluate winrate FILE... --output_dir DIR    judgments into a table of win rates
python -m trainer.evaluate COMMAND --help                      every option
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, TypeVar

from trainer.config import options
from trainer.config.values import not_among
from trainer.data.columns import Columns
from trainer.errors import InputError
from trainer.evaluation.options import Generate, Judge, JudgeAnswers, Sampling, Score, WinRate

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Part = TypeVar("Part", bound="DataclassInstance")
PROG = "python -m trainer.evaluate"


def run_score(told: Score) -> None:
    """`score`."""
    from trainer.evaluation.models import chat_options
    from trainer.evaluation.score import score, to_text

    values = score(
        told.data, assignments("models", told.models), told.reference, told.output_dir,
        beta=told.beta, max_length=told.max_length, batch_size=told.batch_size,
        kl_prompts=told.kl_prompts, kl_tokens=told.kl_tokens, seed=told.seed,
        chat=chat_options(told.chat_template_kwargs, told.date),
        columns=Columns(
            told.prompt_column, told.chosen_column, told.rejected_column, told.implicit_prompt
        ),
    )  # fmt: skip
    print(f"{to_text(values)}\nwritten: {told.output_dir}/scores.json, scores.jsonl")


def run_generate(told: Generate) -> None:
    """`generate`."""
    from trainer.evaluation.generate import generate
    from trainer.evaluation.models import chat_options

    models = assignments("models", told.models)
    chat = chat_options(told.chat_template_kwargs, told.date)
    for path in generate(told.prompts, models, told.output_dir, part(told, Sampling), chat):
        print(f"written: {path}")


def run_judge(told: JudgeAnswers) -> None:
    """`judge`."""
    try:
        from trainer.evaluation.judge import judge, to_text
    except ImportError as error:
        raise InputError(f"{error}; run: pip install openai") from None

    report = judge(told.prompts, told.answers, told.output_dir, part(told, Judge))
    print(to_text(report, told.output_dir))


def run_winrate(told: WinRate) -> None:
    """`winrate`."""
    from trainer.evaluation.winrate import to_text, winrate

    rename = assignments("rename", told.rename)
    print(to_text(winrate(**asdict(told) | {"rename": rename})))
    print(f"written: {told.output_dir}/winrates.json, .csv, .png")


def part(told: object, kind: type[Part]) -> Part:
    """The fields of a command that are those of a smaller dataclass."""
    return kind(**{field.name: getattr(told, field.name) for field in fields(kind)})


def assignments(option: str, words: Iterable[str]) -> dict[str, str]:
    """`A=B` words as a dictionary, each `A` once."""
    assigned: dict[str, str] = {}
    for word in words:
        key, _, value = word.partition("=")
        if not key or not value:
            raise InputError(f"{option}: expected A=B, got {word!r}")
        if key in assigned:
            raise InputError(f"{option}: expected different names, got {key!r} twice")
        assigned[key] = value
    return assigned


COMMANDS: dict[str, tuple[type[Any], Callable[[Any], None]]] = {
    "score": (Score, run_score),
    "generate": (Generate, run_generate),
    "judge": (JudgeAnswers, run_judge),
    "winrate": (WinRate, run_winrate),
}


def main(argv: list[str] | None = None, prog: str = PROG) -> None:
    """Read the command line and run; what the user got wrong is one message, not a traceback."""
    name, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__.replace(PROG, prog).strip())
        return
    try:
        if name not in COMMANDS:
            raise InputError(f"command: {not_among(name, COMMANDS)}")
        kind, run = COMMANDS[name]
        positional = "files" if kind is WinRate else None
        parser = options.make_parser(
            kind, f"{prog} {name}", kind.__doc__ or "", positional=positional
        )
        run(options.build(kind, options.read(parser, kind, words)))
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C kills without a traceback
    main()
