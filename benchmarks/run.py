"""Benchmarks from the command line: `python -m benchmarks.run CASE [--smoke]`, a case of `cases`.

Checks every implementation against float64, times forward + backward in interleaved rounds,
measures peak memory, and writes one JSON file to benchmarks/results/, saved after every problem.
`--smoke` runs the same code at toy size on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.cases import CASES, Spec, names_of, specs_of
from benchmarks.environment import ROOT, describe, source
from benchmarks.measure import Settings, measure
from benchmarks.peers import IMPLEMENTATIONS, Implementation

RESULTS = ROOT / "benchmarks" / "results"
SCHEMA = 1


def save(document: dict, path: Path) -> None:
    """Write through a temporary file, so that a kill leaves the previous state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(part, path)


def result_path(folder: Path, case: str, device: str, smoke: bool) -> Path:
    """``<device>-<date>-<case>.json``."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    return folder / f"{slug}-{stamp}-{case}{'-smoke' if smoke else ''}.json"


def line_of(run: dict) -> str:
    """A problem's results in a few words."""
    spec, rows = run["spec"], []
    for name, entry in run["results"].items():
        if "seconds" in entry:
            rows.append(f"{name} {entry['seconds']['median']:.3f}")
    bare = ", ".join(f"{k} matmuls {v['seconds']:.3f}" for k, v in run.get("matmuls", {}).items())
    head = "frozen" if spec["frozen"] else "full"
    shape = f"{run['tokens']} x {run['width']} x {run['vocab']}"
    return f"{spec['inputs']} {spec['dtype']} {head} {shape}: {', '.join(rows)} s; {bare} s"


def run_case(
    case: str,
    specs: list[Spec],
    implementations: dict[str, Implementation],
    settings: Settings,
    path: Path,
    *,
    smoke: bool = False,
    budget_s: float | None = None,
) -> dict:
    """Measure the problems one after the other and save after each; problems that `path` already
    holds are kept. Each says of which commit it is: a later run may add to the file.

    With `budget_s` each problem gets a share of the seconds left, by its size. What is running
    stands in ``<path>.doing``.
    """
    device = specs[0].device
    document = json.loads(path.read_text()) if path.exists() else None
    if document is None:
        document = {"schema": SCHEMA, "case": case, "smoke": smoke, **describe(device)}
        document |= {"settings": {"rounds": settings.rounds}, "banned": {}, "runs": []}
    marker = path.with_suffix(".doing")
    path.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + (budget_s or float("inf"))
    measured = [run["spec"] for run in document["runs"]]
    for at, spec in enumerate(specs):
        if spec.record() in measured:
            continue
        names = names_of(case, spec, list(implementations))
        print(f"{case} {at + 1}/{len(specs)}: {spec}", flush=True)
        if budget_s:
            sizes = [_seconds_wanted(s) for s in specs[at:]]
            left = end - time.monotonic()
            settings.deadline = time.monotonic() + left * sizes[0] / sum(sizes)
        run = measure(
            spec,
            {name: implementations[name] for name in names},
            settings,
            document["banned"].get(str(at), {}) | document["banned"].get("all", {}),
            doing=lambda what, at=at: marker.write_text(json.dumps({"run": at, "doing": what})),
        )
        document["runs"].append(run | source())
        save(document, path)
        print(line_of(run), flush=True)
    marker.unlink(missing_ok=True)
    document["load_at_end"] = os.getloadavg()[0]
    save(document, path)
    return document


def _seconds_wanted(spec: Spec) -> float:
    """Share of a session: a fixed part (imports, compilation) and one that grows with the work."""
    tokens = 2 * spec.pairs * spec.length
    return 15 + 1.2e-12 * tokens * (spec.width or 576) * (spec.vocab or 49152)


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("case", choices=tuple(CASES))
    parser.add_argument("--smoke", action="store_true", help="toy sizes, CPU, two rounds")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda for gpu, else cpu")
    parser.add_argument("--dtypes", nargs="+", help="float32 bfloat16; gpu: bfloat16")
    parser.add_argument("--only", nargs="+", choices=list(IMPLEMENTATIONS), help="implementations")
    parser.add_argument("--rounds", type=int, help="timed rounds, default 7, scaling and gpu 5")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--length", type=int, help="positions a sequence, for a quick trial")
    parser.add_argument("--max_tokens", type=int, help="leave larger problems out")
    parser.add_argument("--cap_s", type=float, default=120, help="longest warm call that is timed")
    parser.add_argument("--no_memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, help="file to write, or to add to")
    parser.add_argument("--budget_s", type=float, help="seconds for everything")
    parser.add_argument("--hang_s", type=float, help="exit when one check takes longer")
    a = parser.parse_args(arguments)
    device = "cpu" if a.smoke else a.device or ("cuda" if a.case == "gpu" else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device here; --smoke runs the same code on the CPU")
    if device == "cpu":
        torch.set_num_threads(a.threads)
    dtypes = a.dtypes or (["bfloat16"] if a.case == "gpu" else ["float32", "bfloat16"])
    rounds = a.rounds or (2 if a.smoke else 7 if a.case in ("table", "tolerance") else 5)
    settings = Settings(rounds, not a.no_memory, a.cap_s, a.hang_s)
    chosen = {name: IMPLEMENTATIONS[name] for name in a.only or IMPLEMENTATIONS}
    path = a.output or result_path(a.output_dir, a.case, device, a.smoke)
    specs = specs_of(a.case, dtypes, device, a.smoke)
    if a.length:
        specs = list(dict.fromkeys(replace(s, length=a.length) for s in specs))
    if a.max_tokens:
        specs = [s for s in specs if 2 * s.pairs * s.length <= a.max_tokens]
    run_case(a.case, specs, chosen, settings, path, smoke=a.smoke, budget_s=a.budget_s)
    print(path)
    return path


if __name__ == "__main__":
    main()
