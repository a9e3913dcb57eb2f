"""Evaluate trained models.

python -m trainer.evaluate winrate FILE... --output_dir DIR    judgments into a table of win rates
python -m trainer.evaluate COMMAND --help                      every option
"""

from __future__ import annotations

import argparse
import sys

from trainer.config import InputError


def run_winrate(args: argparse.Namespace) -> None:
    """`winrate`."""
    from trainer.evaluation.winrate import to_text, winrate

    options = vars(args) | {"rename": _assignments("rename", args.rename)}
    print(to_text(winrate(**options)))
    print(f"written: {args.output_dir}/winrates.json, .csv, .png")


def _assignments(option: str, words: list[str]) -> dict[str, str]:
    """`A=B` words as a dictionary."""
    pairs = [word.partition("=") for word in words]
    for word, (key, _, value) in zip(words, pairs, strict=True):
        if not key or not value:
            raise InputError(f"{option}: expected A=B, got {word!r}")
    return {key: value for key, _, value in pairs}


def _winrate_options(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("winrate", help="judgments into a table of win rates")
    parser.set_defaults(run=run_winrate)
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="judgments, pairwise or single-score (FastChat)")
    add("--output_dir", required=True, metavar="DIR", help="where winrates.json, .csv, .png go")
    add(
        "--answers",
        nargs="+",
        default=[],
        metavar="FILE",
        help="every model's answers (FastChat): adds length-controlled win rates",
    )
    add("--rename", nargs="+", default=[], metavar="MODEL=NAME", help="names to show")
    add("--samples", type=int, default=2000, help="bootstrap samples [2000]")
    add("--seed", type=int, default=0, help="of the bootstrap [0]")  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Read the command line and run; what the user got wrong is one message, not a traceback."""
    parser = argparse.ArgumentParser(prog="python -m trainer.evaluate", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _winrate_options(commands)
    args = parser.parse_args(argv)
    run = vars(args).pop("run")
    try:
        run(args)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
