"""Is it right and fast on this machine? The command line.

    python -m rpo_kernels.doctor --hidden_size 2048 --vocab_size 151936 --tokens 4096 --save

In about a minute: device and versions, which backend and tiles run, every kernel against float64,
the time of each way to run as a ratio to the bare matmuls. ``--save`` keeps the fastest for later
runs (`rpo_kernels.tuning`). Exit status 0 means right, 1 bad news, with its remedy.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from rpo_kernels import tuning
from rpo_kernels.backends import BACKENDS
from rpo_kernels.doctor import environment
from rpo_kernels.doctor.examine import Shape, Visit
from rpo_kernels.plan import DTYPES, read_config

CPU_SHAPE = Shape(512, 576, 49152)  # SmolLM2's head
GPU_SHAPE = Shape(4096, 2048, 151936)  # Qwen3's


def make_parser(prog: str) -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="config.json or model folder, for the sizes of the head")
    parser.add_argument("--hidden_size", type=int)
    parser.add_argument("--vocab_size", type=int)
    parser.add_argument("--tokens", type=int, help="response tokens of a call")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="default bfloat16 on a GPU, float32 on a CPU"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="default the GPU, if there is one"
    )
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="for all timings; 0 checks, and times nothing"
    )
    parser.add_argument("--save", action="store_true", help="keep the fastest for later runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything found, for a report")
    return parser


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what cannot be meant, by name; exits with status 2."""
    if (args.hidden_size is None) != (args.vocab_size is None):
        given, other = ("hidden_size", "vocab_size")[:: 1 if args.vocab_size is None else -1]
        parser.error(f"--{given}: expected together with --{other}")
    if args.config and args.hidden_size is not None:
        parser.error("--config: expected without --hidden_size and --vocab_size, which it has")
    for name, least in {"hidden_size": 1, "vocab_size": 1, "tokens": 2}.items():
        if (given := getattr(args, name)) is not None and given < least:
            parser.error(f"--{name}: expected at least {least}, got {given}")
    if not 0 <= args.seconds < math.inf:
        parser.error(f"--seconds: expected a number, 0 or above, got {args.seconds}")
    if args.save and args.seconds == 0:
        parser.error("--save: expected --seconds above 0: without times nothing is the fastest")
    if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        parser.error(f"--json: expected a file in a folder that exists, got {args.json}")


def shape_of(args: argparse.Namespace, default: Shape) -> Shape:
    """N, D and V from the command line, `default` for what it leaves open."""
    sizes = default[1:] if args.hidden_size is None else (args.hidden_size, args.vocab_size)
    width, vocab = read_config(args.config) if args.config else sizes
    return Shape(args.tokens or default.tokens, width, vocab)


def save(visit: Visit, name: str, best: tuning.Kernels | tuning.Blocks | None) -> None:
    """Keep `best` for the device, if anything is better than what runs now."""
    if isinstance(best, tuning.Kernels) and visit.device.type == "cpu":
        return visit.fail("--save: expected a GPU for the triton backend; pass --backend torch")
    if best is None:
        print("saved     nothing: what runs now stays")
        return None
    how = {"date": visit.record["date"], "shape": visit.record["shape"]}
    how |= {"runs": visit.record["runs"], "bare_matmuls": visit.record["bare_matmuls"]}
    try:
        path = tuning.save(visit.device, visit.dtype, best, how)
    except OSError as error:
        return visit.fail(
            f"--save: {error}; set {tuning.FOLDER} to a folder that can be written, here and for "
            "the runs that read it"
        )
    visit.record["saved"] = str(path)
    print(f"saved     {path}; later runs read it (delete it to go back to the defaults)")


def examine(args: argparse.Namespace) -> Visit:
    """All steps, as far as they make sense after the ones before."""
    available = torch.cuda.is_available()
    device = torch.device(args.device or ("cuda" if available else "cpu"))
    dtype = DTYPES[args.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    default = GPU_SHAPE if device.type == "cuda" else CPU_SHAPE
    shape = shape_of(args, default)
    visit = Visit(device, dtype, shape, args.seconds)
    visit.record["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    visit.record["arguments"] = {key: str(value) for key, value in vars(args).items()}
    problem = None if args.device == "cpu" else environment.unusable_gpu()
    if problem or (device.type == "cuda" and not available):
        visit.record["versions"] = environment.versions()
        visit.fail(problem or "--device cuda: no GPU is here; pass --device cpu, or leave it out")
        return visit
    if device.type == "cuda":
        visit.device = device = torch.device("cuda", torch.cuda.current_device())
    visit.describe()
    chosen = visit.choose(args.backend)
    if chosen and visit.check(*chosen) and args.seconds > 0:
        best = visit.time(*chosen)
        if args.save and not visit.errors:
            save(visit, chosen[0], best)
    return visit


def main(argv: list[str] | None = None, prog: str = "python -m rpo_kernels.doctor") -> int:
    """Run the doctor; 0 if all is well, 1 for bad news. Wrong arguments exit with status 2."""
    parser = make_parser(prog)
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    visit = examine(args)
    if args.json:
        args.json.write_text(json.dumps(visit.record, indent=1, default=str) + "\n")
        print(f"report    {args.json}")
    if visit.errors:
        print(f"\n{len(visit.errors)} error(s):", *visit.errors, sep="\n  ", file=sys.stderr)
    else:
        print("all is well")
    return 1 if visit.errors else 0
