"""Does it fit in memory, and what does it cost.

    python -m rpo_kernels.plan --config config.json --pairs 1 --length 32768

Memory comes from the same functions that the engines size their buffers with; peers' memory from
what their code allocates (their versions stand in the `bench` extra). Work is counted in U =
2 N V D FLOP, one pass of the head over the N response tokens. Time is an estimate from a results
file of `benchmarks/run.py`: the seconds per FLOP of each implementation measured there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch

from rpo_kernels.engines.panel import capacity

GIB = 2**30
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
    """What one strategy takes: work in U, and bytes beyond inputs and gradients."""

    name: str
    units: float
    extra: float


def streaming(shape: Shape) -> Cost:
    """3U (frozen 2U): a panel, and accumulators where a pair or the batch exceeds it."""
    room = capacity(shape.vocab, shape.width, shape.itemsize, shape.max_bytes)
    parameters, half = shape.vocab * shape.width, shape.itemsize < 4
    extra = min(shape.rows, room) * (
        shape.vocab * shape.itemsize + shape.width * (2 * shape.itemsize + 16)
    )
    if not shape.frozen and shape.rows > room:
        if 2 * shape.response > room:
            extra += 8 * parameters
        extra += 4 * parameters if half else 0
    return Cost("stream", 2 if shape.frozen else 3, extra)


def recompute(shape: Shape) -> Cost:
    """4U (frozen 3U): at most the workspace, and hidden's gradient in float32 where it is half
    precision.
    """
    panel = shape.rows * 4096 * shape.itemsize  # GPUs take larger panels if the workspace allows
    accumulator = shape.rows * shape.width * 4 if shape.itemsize < 4 else 0
    return Cost("recompute", 3 if shape.frozen else 4, min(panel, shape.max_bytes) + accumulator)


def peers(shape: Shape) -> list[Cost]:
    """Materialized logits; Liger's DPO, which holds one pair's logits in float32; TRL's chunked
    head.
    """
    positions = 2 * shape.pairs * shape.length
    units = (2 if shape.frozen else 3) * positions / max(shape.rows, 1)
    logits = positions * shape.vocab
    hidden = positions * shape.width * 4
    weight = 0 if shape.frozen else shape.vocab * shape.width * 4
    return [
        Cost("materialized logits", units, logits * (2 * shape.itemsize + 4)),
        Cost("Liger fused DPO", units, 2 * shape.length * shape.vocab * (shape.itemsize + 8)),
        Cost("TRL chunked head", 3 if shape.frozen else 4, 256 * 2**20 + hidden + weight),
    ]


def measured(path: Path | None) -> tuple[dict[str, float], str]:
    """Seconds per FLOP of the head's matmuls from a results file: ``{implementation: seconds / U}``
    and its device.
    """
    if path is None:
        return {}, ""
    record = json.loads(path.read_text())
    return record.get("seconds_per_flop", {}), record.get("device", {}).get("name", str(path))


def read_config(path: str) -> tuple[int, int]:
    """``(hidden size, vocabulary size)`` of a model folder or config.json."""
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    config = json.loads(file.read_text())
    config = config.get("text_config", config)
    try:
        return config.get("hidden_size", config.get("n_embd")) or 0, config["vocab_size"]
    except KeyError as missing:
        raise SystemExit(f"{file}: expected a model config with {missing}") from None


def report(shape: Shape, device_gib: float | None, rates: dict[str, float], device: str) -> str:
    """The table as text."""
    weight = shape.vocab * shape.width * shape.itemsize
    hidden = 2 * shape.pairs * shape.length * shape.width * shape.itemsize
    inputs = weight * (1 if shape.frozen else 2) + 2 * hidden
    lines = [
        f"head {shape.width} x {shape.vocab}, {shape.pairs} pairs of 2 x {shape.length} positions, "
        f"{shape.rows} response tokens",
        f"1 U = {shape.unit / 1e12:.3g} TFLOP; inputs and gradients {inputs / GIB:.2f} GiB",
        "",
        f"{'':24}{'U':>6}{'extra GiB':>12}{'total GiB':>12}{'fits':>6}{'seconds':>10}",
    ]
    for cost in [streaming(shape), recompute(shape), *peers(shape)]:
        total = (inputs + cost.extra) / GIB
        fits = "" if device_gib is None else ("yes" if total <= device_gib else "no")
        rate = rates.get(cost.name)
        time = "" if rate is None else f"{rate * shape.unit:.3g}"
        lines.append(
            f"{cost.name:24}{cost.units:6.2f}{cost.extra / GIB:12.2f}{total:12.2f}"
            f"{fits:>6}{time:>10}"
        )
    if device:
        lines += ["", f"seconds: scaled from measurements on {device}"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(prog="python -m rpo_kernels.plan", description=__doc__)
    parser.add_argument("--config", help="config.json or model folder")
    parser.add_argument("--hidden_size", type=int)
    parser.add_argument("--vocab_size", type=int)
    parser.add_argument("--pairs", type=int, default=1, help="pairs of one call")
    parser.add_argument("--length", type=int, default=4096, help="positions of a sequence")
    parser.add_argument("--response", type=int, help="response tokens of a sequence; default all")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--frozen", action="store_true", help="the head gets no gradient (LoRA)")
    parser.add_argument("--max_workspace_mb", type=float, default=1024)
    parser.add_argument("--device_gib", type=float, help="memory left for the head: does it fit?")
    parser.add_argument("--results", type=Path, help="results JSON to scale times from")
    args = parser.parse_args(argv)
    width, vocab = read_config(args.config) if args.config else (args.hidden_size, args.vocab_size)
    if not width or not vocab:
        parser.error("expected --config, or --hidden_size and --vocab_size")
    for name in ("pairs", "length"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    response = args.length if args.response is None else args.response
    if not 0 < response <= args.length:
        parser.error(f"--response: expected 1 to {args.length} (--length), got {response}")
    itemsize, budget = DTYPES[args.dtype].itemsize, int(args.max_workspace_mb * 2**20)
    shape = Shape(args.pairs, args.length, response, width, vocab, itemsize, args.frozen, budget)
    print(report(shape, args.device_gib, *measured(args.results)))


if __name__ == "__main__":
    main()
