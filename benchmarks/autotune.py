"""Times candidate tiles on this GPU: `python -m benchmarks.autotune --seconds 120`.

Writes every timing as JSON, and prints the winners as lines for `rpo_kernels/backends/tiles.py`.
What a candidate is, and how it is checked and timed, is `rpo_kernels.doctor.candidates`, which
chooses for one user's device and shape; here it chooses defaults, over two shapes and for the
skipping kernels too, on states that look like a chat model's. Beside them stand what they have to
beat: dense matmuls of the vendor, and the gathered products of the torch backend.

``--smoke`` interprets the kernels on a CPU at toy size.

Key: N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.environment import describe
from benchmarks.inputs import calibrated

SHAPES = ((4096, 2048, 151936), (4096, 4096, 128256))
DTYPE = torch.bfloat16


def to_beat(case, device: str, rounds: int) -> Iterator[dict]:
    """Times of the vendor's dense matmuls, and of the torch backend's gathered products."""
    from rpo_kernels.backends import torch_backend
    from rpo_kernels.doctor import candidates
    from rpo_kernels.doctor.timing import seconds
    from rpo_kernels.engines.panel import matmul_into

    rows = torch.empty(case.hidden.shape, device=device)
    weight = torch.empty(case.weight.shape, device=device)
    calls = {
        "rows dense": lambda: matmul_into(rows, case.values.t(), case.weight, accumulate=False),
        "weight dense": lambda: matmul_into(weight, case.values, case.hidden, accumulate=False),
        "rows gathered": lambda: candidates.run("kept rows", torch_backend, case),
        "weight gathered": lambda: candidates.run("kept weight", torch_backend, case),
    }
    for part, call in calls.items():
        call()
        yield {"part": part, "seconds": [seconds(call, device) for _ in range(rounds)]}


def sweep(shapes, device: torch.device, deadline: float, smoke: bool) -> tuple[list, list[dict]]:
    """Every candidate on every shape until `deadline` (of `time.monotonic`)."""
    from rpo_kernels.backends import triton_backend
    from rpo_kernels.doctor import candidates

    rounds, timings, records = 1 if smoke else 5, [], []
    trials = candidates.trials("triton", device, DTYPE, shapes[0][0])
    kept = candidates.kept_trials(device, DTYPE)
    todo = [trial for pair in zip_all(trials, kept) for trial in pair]
    for number, shape in enumerate(shapes):
        hidden, targets, weight = calibrated(*shape, device.type)
        case = candidates.make_case(hidden, weight, targets, kept=True)
        records += [{"shape": shape} | found for found in to_beat(case, device.type, rounds)]
        now = time.monotonic()
        until = now + (deadline - now) / (len(shapes) - number)
        for timing in candidates.sweep("triton", triton_backend, todo, case, until, rounds):
            timings.append((shape, timing))
            records.append({"shape": shape} | timing.record())
            result = timing.error[:300] or f"{1e3 * timing.median:.3f} ms"
            print(timing.trial.part, shape, timing.trial.label, result, flush=True)
    return timings, records


def zip_all(one: list, other: list) -> Iterator[list]:
    """Pairs of both lists, then what is left of the longer."""
    for turn in range(max(len(one), len(other))):
        yield [found[turn] for found in (one, other) if turn < len(found)]


def winners(timings: list, shapes, key: tuple[str, str]) -> dict:
    """For each part the candidate with the least geometric mean over all shapes."""
    from rpo_kernels.doctor import candidates

    times: dict = {}
    for shape, timing in timings:
        if not timing.error:
            times.setdefault(timing.trial, {})[shape] = timing.median
    means = [
        candidates.Timing(trial, [math.exp(statistics.fmean(map(math.log, found.values())))])
        for trial, found in times.items()
        if len(found) == len(shapes)
    ]
    best = {}
    for part in (*candidates.PARTS, *candidates.KEPT):
        if found := [timing for timing in means if timing.trial.part == part]:
            best[part] = min(found, key=lambda timing: timing.median)
    lines = []
    if choice := candidates.fastest(means):
        lines.append(f'CONFIGS  {key}: Config({choice.tile}, "{choice.exp_path}"),')
        if choice.hopper == "gluon":
            lines.append("with RPO_KERNELS_HOPPER=gluon, which is faster still")
    if all(part in best for part in candidates.KEPT):
        rows, weight = (best[part].trial.choice for part in candidates.KEPT)
        lines.append(f"KEPT     {key}: ({rows.kept_rows}, {weight.kept_weight}),")
        lines.append(f"SPAN = {weight.span}")
    return {"best": {part: found.record() for part, found in best.items()}, "tiles.py": lines}


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="for all timings")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--smoke", action="store_true", help="interpreted, toy size")
    a = parser.parse_args(arguments)
    start = time.monotonic()
    if a.smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton
    from rpo_kernels.backends import tiles

    device = torch.device("cpu" if a.smoke else "cuda")
    shapes = ((70, 64, 300),) if a.smoke else SHAPES
    key = tiles.of_device(device)[0], "half"
    timings, records = sweep(shapes, device, start + a.seconds, a.smoke)
    document = {"key": key, "smoke": a.smoke, **describe(device.type)}
    document |= {"timings": records, "winners": winners(timings, shapes, key)}
    a.output_dir.mkdir(parents=True, exist_ok=True)
    path = a.output_dir / f"{'smoke-' if a.smoke else ''}autotune-{key[0]}.json"
    path.write_text(json.dumps(document, indent=1, default=str) + "\n")
    print(*document["winners"]["tiles.py"], path, sep="\n")
    return path


if __name__ == "__main__":
    main()
