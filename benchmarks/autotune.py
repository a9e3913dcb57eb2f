"""Times candidate tiles on this GPU: `python -m benchmarks.autotune --seconds 120`.

Writes every timing as JSON, and prints the winners as lines for `rpo_kernels/backends/tiles.py`. A
candidate that does not compile, does not fit or gives another result is recorded and left out. The
current tiles come first, and candidates take turns over kernels and shapes, so that whenever the
time is up all kernels have seen about as many. Beside them stand what they have to beat: dense
matmuls of the vendor, and the gathered products of the torch backend.

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
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.environment import describe
from benchmarks.inputs import calibrated
from benchmarks.timing import seconds

SHAPES = ((4096, 2048, 151936), (4096, 4096, 128256))
TOLERANCE = 0.003
SAME = 0.05  # relative difference of two results; tiles of `kept_weight` drop different entries
# (block_n, block_v, block_d, num_warps, num_stages, per_sm, tma)
MATMUL = [
    (256, 128, 64, 8, 3, 1, True), (128, 256, 64, 8, 4, 1, True), (128, 256, 64, 8, 3, 1, True),
    (128, 128, 64, 8, 4, 1, True), (128, 128, 64, 4, 3, 2, True), (128, 128, 128, 8, 3, 1, True),
    (256, 128, 64, 8, 4, 1, False), (128, 128, 64, 4, 3, 2, False),
]  # fmt: skip
ROWS = [
    (128, 64, 256, 8, 4), (256, 64, 128, 8, 3), (256, 32, 128, 8, 5), (128, 64, 128, 8, 3, 2),
    (128, 64, 128, 4, 3, 2), (128, 128, 128, 8, 3), (128, 64, 256, 8, 3), (256, 128, 128, 8, 2),
]  # fmt: skip
WEIGHT = [
    (64, 128, 256, 8, 3), (64, 256, 128, 8, 4), (64, 128, 128, 8, 3, 2), (64, 128, 128, 4, 3, 2),
    (128, 128, 128, 8, 3), (32, 128, 256, 8, 5), (64, 64, 256, 4, 4), (128, 128, 256, 8, 2),
]  # fmt: skip
SPANS = (16, 4)


class Case(NamedTuple):
    """Tensors of one shape; `values` (V, N) is a filled panel, `keep` (blocks, V) its choice."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    values: Tensor
    shift: Tensor
    keep: Tensor
    scaled: Tensor


class Trial(NamedTuple):
    """One candidate: `prepare` puts it into effect, ``run(case)`` returns a result to compare."""

    kernel: str
    tile: tuple | None
    span: int | None
    prepare: Callable[[], None]
    run: Callable[[Case], Tensor]


def make(shape: tuple[int, int, int], device: str) -> Case:
    """Hidden states and weights that look like a chat model's, and the entries worth keeping."""
    from rpo_kernels.backends import torch_backend
    from rpo_kernels.engines import skipping
    from rpo_kernels.engines.panel import fill_panel
    from rpo_kernels.rows import Rows
    from rpo_kernels.spec import Head, Transform

    n, width, vocab = shape
    hidden, targets, weight = calibrated(n, width, vocab, device)
    buffer = torch.empty(vocab * n, dtype=hidden.dtype, device=device)
    head = Head(weight, None, Transform(), hidden.dtype)
    panel = fill_panel(hidden, Rows(None, targets), head, torch_backend, 2**30, False, buffer)
    ones, blocks = torch.ones_like(panel.sums), skipping.split_rows([0, n])
    keep, *_ = skipping.choose_entries(
        panel.values, panel.sums, targets, ones, TOLERANCE, blocks, True
    )
    scaled = (hidden / panel.sums[:, None]).to(hidden.dtype)
    return Case(hidden, weight, targets, panel.values, panel.shift, keep, scaled)


def trials(key: tuple[str, str], smoke: bool) -> list[Trial]:
    """All candidates in the order in which they run."""
    from rpo_kernels.backends import tiles, torch_backend, triton_sparse
    from rpo_kernels.backends import triton_backend as backend
    from rpo_kernels.engines.matmul import matmul_into
    from rpo_kernels.engines.skipping import BLOCK
    from rpo_kernels.spec import Transform

    config, span, plain = tiles.CONFIGS[key], tiles.SPAN, Transform()

    def use(tile: tiles.Tile | None, blocks: int = span) -> Callable[[], None]:
        def prepare() -> None:
            tiles.CONFIGS[key] = config if tile is None else config._replace(tile=tile)
            tiles.SPAN = blocks

        return prepare

    def lse(c: Case) -> Tensor:
        return backend.lse_and_target(c.hidden, c.weight, None, c.targets, plain, 2**28)[0]

    def fill(how: Callable, tile: tiles.Tile | None) -> Callable[[Case], Tensor]:
        def run(c: Case) -> Tensor:
            out, sums = torch.empty_like(c.values), torch.zeros_like(c.shift)
            how(c.hidden, c.weight, None, c.shift, c.targets, 0, plain, out, sums, None, tile)
            return sums

        return run

    def rows(c: Case) -> Tensor:
        return torch.empty(c.hidden.shape, device=c.hidden.device)

    def total(c: Case) -> Tensor:
        return torch.zeros(c.weight.shape, device=c.weight.device)

    def kept_rows(tile: tiles.Tile) -> Callable[[Case], Tensor]:
        def run(c: Case) -> Tensor:
            out = rows(c)
            triton_sparse.launch_rows(c.values, BLOCK, c.keep, c.weight, out, tile)
            return out

        return run

    def kept_weight(tile: tiles.Tile) -> Callable[[Case], Tensor]:
        def run(c: Case) -> Tensor:
            out = total(c)
            triton_sparse.launch_weight(
                c.values, BLOCK, c.keep, c.scaled, out, 1.0, tile, tiles.SPAN
            )
            return out

        return run

    def gathered(c: Case, out_rows: Tensor | None, out_weight: Tensor | None) -> Tensor:
        torch_backend.kept_products(
            c.values, BLOCK, c.keep, c.weight, c.scaled, c.shift, out_rows, out_weight, None, 1.0
        )
        return out_rows if out_weight is None else out_weight

    def dense(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
        matmul_into(out, a, b, accumulate=False)
        return out

    own = config.tile, *tiles.KEPT[key]
    given = [[(32, 32, 32, 4, 1)]] * 3 if smoke else [MATMUL, ROWS, WEIGHT]
    lists = [[t, *(tiles.Tile(*x) for x in more)] for t, more in zip(own, given, strict=True)]
    found = {
        "exp_panel_matmul": [Trial("exp_panel_matmul", None, None, use(None),
                                   fill(backend.exp_panel_matmul, None))],
        "rows dense": [Trial("rows dense", None, None, use(None),
                             lambda c: dense(rows(c), c.values.t(), c.weight))],
        "rows gathered": [Trial("rows gathered", None, None, use(None),
                                lambda c: gathered(c, rows(c), None))],
        "weight dense": [Trial("weight dense", None, None, use(None),
                               lambda c: dense(total(c), c.values, c.scaled))],
        "weight gathered": [Trial("weight gathered", None, None, use(None),
                                  lambda c: gathered(c, None, total(c)))],
        "lse_partials": [Trial("lse_partials", t, None, use(t), lse) for t in lists[0]],
        "exp_fused": [Trial("exp_fused", t, None, use(None), fill(backend.exp_panel_fused, t))
                      for t in lists[0]],
        "kept_rows": [Trial("kept_rows", t, None, use(None), kept_rows(t)) for t in lists[1]],
        "kept_weight": [Trial("kept_weight", t, s, use(None, s), kept_weight(t))
                        for t, s in [(lists[2][0], s) for s in (span, *SPANS)]
                        + [(t, span) for t in lists[2][1:]]],
    }  # fmt: skip
    longest = max(len(found) for found in found.values())
    return [group[turn] for turn in range(longest) for group in found.values() if turn < len(group)]


def measure(trial: Trial, case: Case, truth: Tensor | None, device: str, rounds: int) -> dict:
    """Milliseconds, and the difference from `truth` (a previous result), or what went wrong."""
    try:
        trial.prepare()
        start = time.monotonic()
        result = trial.run(case)
        if device == "cuda":
            torch.cuda.synchronize()
        first = time.monotonic() - start
        other = 0.0 if truth is None else ((result - truth).norm() / truth.norm()).item()
        del result
        found = [1e3 * seconds(lambda: trial.run(case), device) for _ in range(rounds)]
        same = math.isfinite(other) and other < SAME
        return {
            "ms": statistics.median(found), "min": min(found), "max": max(found),
            "difference": other, "first_s": first,
        } | ({} if same else {"error": "another result"})  # fmt: skip
    except Exception as error:  # does not compile, does not fit
        return {"error": f"{type(error).__name__}: {error}"[:300]}


FAMILIES = {"lse_partials": "lse", "exp_fused": "exp", "exp_panel_matmul": "exp"}


def sweep(key, shapes, device: str, deadline: float, smoke: bool) -> list[dict]:
    """Every candidate on every shape until `deadline` (of `time.monotonic`)."""
    cases = {shape: make(shape, device) for shape in shapes}
    truths: dict[tuple, Tensor] = {}
    timings: list[dict] = []
    everything = trials(key, smoke)
    for trial in everything:
        for shape, case in cases.items():
            if time.monotonic() > deadline:
                everything[0].prepare()
                return timings
            group = FAMILIES.get(trial.kernel, trial.kernel.split()[0].removeprefix("kept_"))
            kept = "dense" not in trial.kernel
            truth = truths.get((shape, group)) if kept else None
            if truth is None and kept:
                trial.prepare()
                try:
                    truths[shape, group] = truth = trial.run(case)
                except Exception:
                    truth = None
            entry = measure(trial, case, truth, device, 1 if smoke else 5)
            record = {"kernel": trial.kernel, "shape": shape, "tile": trial.tile}
            timings.append(record | {"span": trial.span} | entry)
            print(trial.kernel, shape, trial.tile and tuple(trial.tile), trial.span,
                  entry.get("error") or f"{entry['ms']:.3f} ms", flush=True)  # fmt: skip
    everything[0].prepare()
    return timings


def winners(timings: list[dict], shapes, key: tuple[str, str]) -> dict:
    """For each kernel the candidate with the least geometric mean over all shapes."""
    times: dict[tuple, dict] = {}
    for entry in timings:
        if "error" not in entry:
            name = entry["kernel"], entry["tile"] and tuple(entry["tile"]), entry["span"]
            times.setdefault(name, {})[tuple(entry["shape"])] = entry["ms"]
    means = {
        name: math.exp(statistics.fmean(math.log(ms) for ms in found.values()))
        for name, found in times.items()
        if len(found) == len(shapes)
    }
    best = {}
    for kernel in dict.fromkeys(name[0] for name in means):
        name = min((name for name in means if name[0] == kernel), key=means.__getitem__)
        best[kernel] = {"tile": name[1], "span": name[2], "mean_ms": means[name]}
    lines = []
    both = {
        tile: means["lse_partials", tile, None] + means["exp_fused", tile, None]
        for kernel, tile, _ in means
        if kernel == "lse_partials" and ("exp_fused", tile, None) in means
    }
    if both and "exp_panel_matmul" in best:
        fused = min(both, key=both.__getitem__)
        alone = best["lse_partials"]
        panel = alone["mean_ms"] + best["exp_panel_matmul"]["mean_ms"]
        how, tile = ("fused", fused) if both[fused] <= panel else ("panel", alone["tile"])
        lines.append(f'CONFIGS  {key}: Config(Tile{tile}, "{how}"),')
    if "kept_rows" in best and "kept_weight" in best:
        pair = best["kept_rows"]["tile"], best["kept_weight"]["tile"]
        lines += [f"KEPT     {key}: (Tile{pair[0]}, Tile{pair[1]}),",
                  f"SPAN = {best['kept_weight']['span']}"]  # fmt: skip
    return {"best": best, "tiles.py": lines}


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

    device = "cpu" if a.smoke else "cuda"
    shapes = ((70, 64, 300),) if a.smoke else SHAPES
    key = tiles.of_device(torch.device(device))[0], "half"
    timings = sweep(key, shapes, device, start + a.seconds, a.smoke)
    document = {"key": key, "smoke": a.smoke, "tolerance": TOLERANCE, **describe(device)}
    document |= {"timings": timings, "winners": winners(timings, shapes, key)}
    a.output_dir.mkdir(parents=True, exist_ok=True)
    path = a.output_dir / f"{'smoke-' if a.smoke else ''}autotune-{key[0]}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(*document["winners"]["tiles.py"], path, sep="\n")
    return path


if __name__ == "__main__":
    main()
