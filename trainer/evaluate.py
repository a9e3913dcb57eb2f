"""Evaluate trained models.

python -m trainer.evaluate score ... --output_dir DIR          rewards and KL on held-out pairs
python -m trainer.evaluate generate ... --output_dir DIR       answers of models to a prompt file
python -m trainer.evaluate judge ... --output_dir DIR          answers of models into judgments
python -m trainer.evaluate winrate FILE... --output_dir DIR    judgments into a table of win rates
python -m trainer.evaluate COMMAND --help                      every option
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable

from trainer.config import InputError


def run_score(args: argparse.Namespace) -> None:
    """`score`."""
    from trainer.columns import Columns
    from trainer.evaluation.score import score, to_text

    options = _with_chat(vars(args)) | {"models": _assignments("models", args.models)}
    names = ("prompt_column", "chosen_column", "rejected_column", "implicit_prompt")
    prompt, *others = (options.pop(name) for name in names)
    print(to_text(score(columns=Columns(tuple(prompt), *others), **options)))
    print(f"written: {args.output_dir}/scores.json, scores.jsonl")


def run_generate(args: argparse.Namespace) -> None:
    """`generate`."""
    from trainer.evaluation.generate import Sampling, generate

    options = _with_chat(vars(args))
    models = _assignments("models", options.pop("models"))
    own = ("prompts", "output_dir", "logit_scale", "logit_softcap", "chat")
    own = {name: options.pop(name) for name in own}
    for path in generate(**own, models=models, sampling=Sampling(**options)):
        print(f"written: {path}")


def run_judge(args: argparse.Namespace) -> None:
    """`judge`."""
    try:
        from trainer.evaluation.judge import Judge, judge, to_text
    except ImportError as error:
        raise InputError(f"{error}; run: pip install openai") from None

    options = vars(args)
    files = {name: options.pop(name) for name in ("prompts", "answers", "output_dir")}
    options["price"] = options["price"] and tuple(options["price"])
    print(to_text(judge(**files, by=Judge(**options)), files["output_dir"]))


def run_winrate(args: argparse.Namespace) -> None:
    """`winrate`."""
    from trainer.evaluation.winrate import to_text, winrate

    options = vars(args) | {"rename": _assignments("rename", args.rename)}
    print(to_text(winrate(**options)))
    print(f"written: {args.output_dir}/winrates.json, .csv, .png")


def _with_chat(options: dict[str, object]) -> dict[str, object]:
    """The options, with what chat templates are told as one of them."""
    from trainer.evaluation.models import chat_options

    kwargs, date = (options.pop(name) for name in ("chat_template_kwargs", "date"))
    return options | {"chat": chat_options(kwargs, date)}


def _assignments(option: str, words: list[str]) -> dict[str, str]:
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


def _seed(word: str) -> int:
    if not word.isdecimal() or int(word) >= 2**32:
        raise argparse.ArgumentTypeError(f"expected an integer in [0, 2^32), got {word!r}")
    return int(word)


def _model_options(add: Callable) -> None:
    paths = "folders (of adapters, too) or hub ids, or package:NAME; /FILE.gguf may follow"
    add("--models", nargs="+", required=True, metavar="NAME=PATH", help=paths)
    add("--logit_scale", type=float, help="as in training, for an architecture that is not known")
    add("--logit_softcap", type=float, help="likewise")
    add("--chat_template_kwargs", metavar="JSON", help="variables of the template, as in training")
    add("--date", metavar="YYYY-MM-DD", help="day that chat templates are told [today]")


def _score_options(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("score", help="rewards and KL on held-out pairs")
    parser.set_defaults(run=run_score)
    add = parser.add_argument
    add("--data", nargs="+", required=True, metavar="FILE", help="preference pairs")
    add("--prompt_column", nargs="+", default=["prompt"], metavar="NAME", help="as in training")
    add("--chosen_column", default="chosen", metavar="NAME", help="likewise")
    add("--rejected_column", default="rejected", metavar="NAME", help="likewise")
    add("--implicit_prompt", action="store_true", help="likewise")
    _model_options(add)
    add("--reference", required=True, metavar="PATH", help="the model that training started from")
    add("--output_dir", required=True, metavar="DIR", help="where scores.json, .jsonl go")
    add("--beta", type=float, default=0.1, help="scales the rewards, as in training [0.1]")
    add("--max_length", type=int, default=1024, help="most tokens of a sequence [1024]")
    add("--batch_size", type=int, default=4, help="pairs in one forward pass [4]")
    add("--kl_prompts", type=int, default=32, help="prompts for the KL; 0 leaves it out [32]")
    add("--kl_tokens", type=int, default=128, help="length of its sampled answers [128]")
    add("--seed", type=_seed, default=0, help="of these samples [0]")


def _generate_options(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("generate", help="answers of models to a prompt file")
    parser.set_defaults(run=run_generate)
    add = parser.add_argument
    add("--prompts", required=True, metavar="FILE", help="prompts: the trainer's or FastChat's")
    _model_options(add)
    add("--output_dir", required=True, metavar="DIR", help="where NAME.jsonl go, or are continued")
    add("--max_new_tokens", type=int, default=1024, help="where an answer is cut [1024]")
    add("--temperature", type=float, default=0.0, help="0 is greedy [0]")
    add("--top_p", type=float, default=1.0, help="probability mass that is drawn from [1]")
    add("--seed", type=_seed, default=0, help="of the random draws [0]")
    add("--batch_size", type=int, default=8, help="prompts answered at once [8]")


def _judge_options(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("judge", help="answers into judgments, by an endpoint")
    parser.set_defaults(run=run_judge)
    add = parser.add_argument
    add("--prompts", required=True, metavar="FILE", help="the prompts that were answered")
    add(
        "--answers",
        nargs="+",
        required=True,
        metavar="FILE",
        help="answers of two or more models, as `generate` and FastChat write them",
    )
    add(
        "--output_dir",
        required=True,
        metavar="DIR",
        help="where judgments.jsonl, judge.json and cache.jsonl go; holds a killed run's state",
    )
    add("--base_url", required=True, metavar="URL", help="OpenAI-compatible endpoint, with /v1")
    add("--model", required=True, metavar="NAME", help="the judge's name at the endpoint")
    add("--max_tokens", type=int, default=1024, help="most tokens of a judgment [1024]")
    add("--concurrency", type=int, default=4, help="requests under way at once [4]")
    add("--max_retries", type=int, default=6, help="further attempts, with backoff [6]")
    add("--timeout", type=float, default=300.0, help="seconds to wait for a response [300]")
    add("--price", type=float, nargs=2, metavar=("IN", "OUT"),
        help="US dollars per million prompt and per million completion tokens")  # fmt: skip


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
    add("--seed", type=_seed, default=0, help="of the bootstrap [0]")  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Read the command line and run; what the user got wrong is one message, not a traceback."""
    parser = argparse.ArgumentParser(prog="python -m trainer.evaluate", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _score_options(commands)
    _generate_options(commands)
    _judge_options(commands)
    _winrate_options(commands)
    args = parser.parse_args(argv)
    run = vars(args).pop("run")
    try:
        run(args)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C kills without a traceback
    main()
