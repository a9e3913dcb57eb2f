"""Does it fit in memory, and what does it cost.

    python -m rpo_kernels.plan --config Qwen/Qwen3-1.7B --pairs 1 --length 32768 --device_gib 40

Memory comes from the same functions that the engines size their buffers with; peers' memory from
what their code allocates (their versions stand in the `bench` extra). Work is counted in U =
2 N V D FLOP, one pass of the head over the N response tokens. Time is scaled, by work, from the
problem of the nearest size in a results file of `benchmarks/run.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch

from rpo_kernels.engines.panel import capacity, row_bytes
from rpo_kernels.spec import Settings
from rpo_kernels.strategy import default_workspace_mb, why_recompute

GIB = 2**30
WORKSPACE_MB = 4096.0  # of a GPU with 80 GiB, where none is here
LEAST_MB = 64  # smaller workspaces are not proposed
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Shape(NamedTuple):
    """One call of the loss: B pairs, 2B sequences of `length` positions, `response` of them counted
    each.
    """

    pairs: int
    length: int
    response: int
    width: int
    vocab: int
    itemsize: int
    frozen: bool
    max_bytes: int

    @property
    def rows(self) -> int:
        """N, response tokens of the call."""
        return 2 * self.pairs * self.response

    @property
    def unit(self) -> float:
        """1 U in FLOP."""
        return 2.0 * self.rows * self.vocab * self.width


class Cost(NamedTuple):
    """What one strategy takes: work in U, and bytes beyond inputs and gradients.

    `key` is its name in results files.
    """

    name: str
    key: str
    units: float
    extra: float


def streaming(shape: Shape) -> Cost:
    """3U (frozen 2U): a panel, and accumulators where a pair or the batch exceeds it; in half
    precision one for the hidden states of such a pair too.
    """
    room = capacity(shape.vocab, shape.width, shape.itemsize, shape.max_bytes)
    pair = 2 * shape.response
    together = room if pair > room else room // pair * pair  # whole pairs, or a part of one
    if not room:
        return Cost("stream", "stream", 2 if shape.frozen else 3, math.inf)  # an error
    extra = min(shape.rows, together) * row_bytes(shape.vocab, shape.width, shape.itemsize)
    parameters = shape.vocab * shape.width
    if pair > room and shape.itemsize < 4:
        extra += 4 * pair * shape.width
    if not shape.frozen and shape.rows > together:
        extra += 8 * parameters if pair > room else 0
        extra += 4 * parameters if shape.itemsize < 4 else 0
    return Cost("stream", "stream", 2 if shape.frozen else 3, extra)


def recompute(shape: Shape) -> Cost:
    """4U (frozen 3U): at most the workspace, and hidden's gradient in float32 where it is half
    precision.
    """
    panel = min(shape.rows * shape.vocab * shape.itemsize, shape.max_bytes)
    accumulator = shape.rows * shape.width * 4 if shape.itemsize < 4 else 0
    return Cost("recompute", "recompute", 3 if shape.frozen else 4, panel + accumulator)


def peers(shape: Shape) -> list[Cost]:
    """Materialized logits; Liger's DPO, which holds one pair's logits in float32; TRL's chunked
    head, as on a GPU.
    """
    positions = 2 * shape.pairs * shape.length
    units = (2 if shape.frozen else 3) * positions / max(shape.rows, 1)
    logits = positions * shape.vocab * (2 * shape.itemsize + 4)
    one_pair = 2 * shape.length * shape.vocab * (shape.itemsize + 8)
    gradients = positions * shape.width * 4 + (0 if shape.frozen else 4) * shape.vocab * shape.width
    return [
        Cost("materialized logits", "materialized", units, logits),
        Cost("Liger fused DPO", "liger_reference", units * 4 / 3, one_pair),  # and the reference
        Cost("TRL chunked head", "trl", 3 if shape.frozen else 4, 256 * 2**20 + gradients),
    ]


def auto(shape: Shape, dtype: torch.dtype) -> tuple[Cost, str]:
    """What ``strategy="auto"`` takes on a GPU, and why if it recomputes."""
    weight = torch.empty(shape.vocab, shape.width, dtype=dtype, device="meta")
    settings = Settings(
        ignore_index=-100, scale=1.0, softcap=None, dtype=dtype, validate=True, tolerance=0.0,
        max_bytes=shape.max_bytes, strategy="auto", backend="auto",
        needs=[True, not shape.frozen, False],
    )  # fmt: skip
    why = why_recompute(settings, weight, 2 * shape.pairs * shape.length)
    return recompute(shape) if why else streaming(shape), why


def input_bytes(shape: Shape) -> int:
    """Weight and hidden states, and their gradients."""
    weight = shape.vocab * shape.width * shape.itemsize
    hidden = 2 * shape.pairs * shape.length * shape.width * shape.itemsize
    return weight * (1 if shape.frozen else 2) + 2 * hidden


def remedies(shape: Shape) -> list[tuple[str, Shape]]:
    """What makes a call smaller, the least change first: a smaller workspace, then fewer pairs."""
    found, mib = [], 2**20
    budget = shape.max_bytes // 2
    while budget >= LEAST_MB * mib:
        found.append((f"--max_workspace_mb {budget / mib:g}", shape._replace(max_bytes=budget)))
        budget //= 2
    least = shape._replace(max_bytes=min(shape.max_bytes, LEAST_MB * mib))
    pairs = shape.pairs // 2
    while pairs:
        words = f"--max_workspace_mb {least.max_bytes / mib:g} and --pairs {pairs}, accumulated"
        found.append((words, least._replace(pairs=pairs)))
        pairs //= 2
    return found


def answer(shape: Shape, dtype: torch.dtype, device_gib: float | None) -> str:
    """Will it fit? In a sentence or two, with what would where it does not."""

    def total(of: Shape) -> float:
        return (input_bytes(of) + auto(of, dtype)[0].extra) / GIB

    _, why = auto(shape, dtype)
    verb = f"recomputes ({why})" if why else "streams"
    takes = f'strategy="auto" {verb} and takes {total(shape):.2f} GiB'
    if device_gib is None:
        return f"{takes}."
    if total(shape) <= device_gib:
        return f"It fits: {takes} of {device_gib:.4g}."
    no = f"It does not fit: {takes}, of {device_gib:.4g}."
    again = (input_bytes(shape) + recompute(shape).extra) / GIB
    if again <= device_gib:
        return f'{no} It would with strategy="recompute", a pass more: {again:.2f} GiB.'
    for words, smaller in remedies(shape):
        if total(smaller) <= device_gib:
            return f"{no} It would with {words}: {total(smaller):.2f} GiB."
    frozen = "" if shape.frozen else "train adapters on a frozen head (--frozen), or "
    return (
        f"{no} No workspace and no number of pairs changes that: {frozen}shorten sequences, or "
        "shard the model over several GPUs."
    )


def costs(shape: Shape) -> list[Cost]:
    """Both strategies, then the peers."""
    return [streaming(shape), recompute(shape), *peers(shape)]


def estimates(path: Path, shape: Shape, dtype: str) -> tuple[dict[str, float], str]:
    """Seconds of every implementation that a results file has a time of, and on what device.

    Raises:
        SystemExit: the file holds no problem of this dtype and kind of head.
    """
    try:
        document = json.loads(path.read_text())
        device = document["device"]["name"]
        runs = [
            run
            for run in document["runs"]
            if (run["spec"]["dtype"], run["spec"]["frozen"]) == (dtype, shape.frozen)
            and run["spec"]["timed"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"--results: {path}: not a results file: {error!r}") from None
    if not runs:
        head = "frozen" if shape.frozen else "trained"
        raise SystemExit(f"--results: {path} holds no {dtype} problem with a {head} head")
    run = min(runs, key=lambda run: abs(math.log(run["flop_per_unit"] / shape.unit)))
    pairs, response = run["spec"]["pairs"], run["tokens"] // (2 * run["spec"]["pairs"])
    then = shape._replace(
        pairs=pairs,
        length=run["spec"]["length"],
        response=response,
        width=run["width"],
        vocab=run["vocab"],
    )
    seconds = {}
    for past, now in zip(costs(then), costs(shape), strict=True):
        found = run["results"].get(past.key, {}).get("seconds")
        if found:
            work = now.units * shape.unit / (past.units * then.unit)
            seconds[now.key] = found["median"] * work
    return seconds, device


def from_hub(name: str) -> Path:
    """config.json of a model on the hub, and nothing else of it.

    Raises:
        SystemExit: it cannot be had.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise SystemExit(
            f"--config: {name} is no file or folder here; to look it up on the hub, run: "
            "pip install huggingface_hub"
        ) from None
    try:
        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # no network, no such model, gated: its message says which
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SystemExit(
            f"--config: {name} is no file or folder here, and the hub does not give its "
            f"config.json: {reason}; log in if it is gated (hf auth login), or pass --hidden_size "
            "and --vocab_size"
        ) from None


def read_config(source: str) -> tuple[int, int]:
    """``(hidden size, vocabulary size)`` of a config.json, a model folder, or a model on the hub.

    Raises:
        SystemExit: there is none, or it does not tell.
    """
    file = Path(source)
    if not file.exists() and HUB_ID.fullmatch(source) and file.suffix != ".json":
        file = from_hub(source)
    file = file / "config.json" if file.is_dir() else file
    try:
        config = json.loads(file.read_text(encoding="utf-8-sig"))
        config = {**config, **(config.get("text_config") or {})}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise SystemExit(f"--config: {file}: not a model config: {error}") from None
    names = ("hidden_size", "n_embd", "d_model")
    width = next((config[name] for name in names if config.get(name)), None)
    vocab = config.get("vocab_size")
    if type(width) is not int or type(vocab) is not int or min(width, vocab) < 1:
        raise SystemExit(
            f"--config: {file}: expected vocab_size and one of {', '.join(names)}, numbers above "
            f"0, got {vocab!r} and {width!r}"
        )
    return width, vocab


def report(shape: Shape, device_gib: float | None, seconds: dict[str, float], device: str) -> str:
    """The table as text."""
    inputs = input_bytes(shape)
    lines = [
        f"head {shape.width} x {shape.vocab}, {shape.pairs} pairs of 2 x {shape.length} positions, "
        f"{shape.rows} response tokens",
        f"1 U = {shape.unit / 1e12:.3g} TFLOP; inputs and gradients {inputs / GIB:.2f} GiB",
        "",
        f"{'':24}{'U':>6}{'extra GiB':>12}{'total GiB':>12}{'fits':>6}{'seconds':>10}",
    ]
    for cost in costs(shape):
        total = (inputs + cost.extra) / GIB
        fits = "" if device_gib is None else ("yes" if total <= device_gib else "no")
        time = f"{seconds[cost.key]:.3g}" if cost.key in seconds else ""
        lines.append(
            f"{cost.name:24}{cost.units:6.2f}{cost.extra / GIB:12.2f}{total:12.2f}"
            f"{fits:>6}{time:>10}"
        )
    if device:
        lines += ["", f"seconds: scaled by work from measurements on {device}"]
    return "\n".join(lines)


def main(argv: list[str] | None = None, prog: str = "python -m rpo_kernels.plan") -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--config", help="config.json, model folder, or a model's id on the hub")
    parser.add_argument("--hidden_size", type=int)
    parser.add_argument("--vocab_size", type=int)
    parser.add_argument("--pairs", type=int, default=1, help="pairs of one call")
    parser.add_argument("--length", type=int, default=4096, help="positions of a sequence")
    parser.add_argument("--response", type=int, help="response tokens of a sequence; default all")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--frozen", action="store_true", help="the head gets no gradient (LoRA)")
    parser.add_argument(
        "--max_workspace_mb",
        type=float,
        help="default a twentieth of this machine's GPU, else 4096, that of one with 80 GiB",
    )
    parser.add_argument(
        "--device_gib",
        type=float,
        help="memory left for the head: does it fit? default what this machine's GPU has free",
    )
    parser.add_argument("--results", type=Path, help="results JSON to scale times from")
    args = parser.parse_args(argv)
    sizes = (args.hidden_size, args.vocab_size)
    if (sizes != (None, None)) == bool(args.config) or (not args.config and None in sizes):
        parser.error("expected either --config, or --hidden_size and --vocab_size")
    for name in ("pairs", "length", "hidden_size", "vocab_size"):
        if (given := getattr(args, name)) is not None and given < 1:
            parser.error(f"--{name}: expected at least 1, got {given}")
    if torch.cuda.is_available():
        here = default_workspace_mb(torch.device("cuda"))
        free = torch.cuda.mem_get_info()[0] / GIB
    else:
        here, free = WORKSPACE_MB, None
    args.max_workspace_mb = here if args.max_workspace_mb is None else args.max_workspace_mb
    args.device_gib = free if args.device_gib is None else args.device_gib
    if not 0 < args.max_workspace_mb < math.inf:
        parser.error(f"--max_workspace_mb: expected a number above 0, got {args.max_workspace_mb}")
    if args.device_gib is not None and not 0 < args.device_gib < math.inf:
        parser.error(f"--device_gib: expected a number above 0, got {args.device_gib}")
    width, vocab = read_config(args.config) if args.config else sizes
    response = args.length if args.response is None else args.response
    if not 0 < response <= args.length:
        parser.error(f"--response: expected 1 to {args.length} (--length), got {response}")
    itemsize, budget = DTYPES[args.dtype].itemsize, int(args.max_workspace_mb * 2**20)
    shape = Shape(args.pairs, args.length, response, width, vocab, itemsize, args.frozen, budget)
    found = estimates(args.results, shape, args.dtype) if args.results else ({}, "")
    print(report(shape, args.device_gib, *found))
    print(f"\n{answer(shape, DTYPES[args.dtype], args.device_gib)}")


if __name__ == "__main__":
    main()
