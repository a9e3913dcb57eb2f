"""A whole session on a lent GPU in one command: `python -m benchmarks.session --output_dir DIR`.

Correctness first, then every shape, small ones first, one JSON file that is saved after each. The
work runs in a child process, so that no peer can end the session: where the child dies or hangs (an
illegal memory access takes the CUDA context with it), this driver records what it was doing, leaves
that implementation out of that problem (out of all, the second time) and starts another child,
which resumes from the file. `--smoke` runs the same code at toy size on the CPU.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.environment import ROOT, describe
from benchmarks.peers import IMPLEMENTATIONS
from benchmarks.run import RESULTS, SCHEMA, result_path, save

BUDGET_S = 510.0  # under nine minutes with start-up
HANG_S = 75.0  # longest first call (compilation, autotuning) before the child is ended
MARGIN_S = 10.0  # kept for ending a child and saving


def _ban(path: Path, device: str, why: str) -> str | None:
    """Note in the results what the dead child was doing; returns it, None if that is unknown."""
    marker = path.with_suffix(".doing")
    if not marker.exists():
        return None
    found = json.loads(marker.read_text())
    name = found["doing"].removeprefix("memory of ")
    if path.exists():
        document = json.loads(path.read_text())
    else:
        document = {"schema": SCHEMA, "case": "gpu", "smoke": device == "cpu", **describe(device)}
        document |= {"settings": {}, "banned": {}, "runs": []}
    banned = document["banned"]
    if name not in IMPLEMENTATIONS:  # inputs or bare matmuls: nothing to leave out
        return None
    again = any(name in names for names in banned.values())
    banned.setdefault("all" if again else str(found["run"]), {})[name] = why
    save(document, path)
    marker.unlink()
    return name


def drive(words: list[str], path: Path, device: str, budget_s: float, tries: int = 8) -> bool:
    """Run children until one finishes or time is up; True if all problems were measured."""
    end = time.monotonic() + budget_s
    for _ in range(tries):
        left = end - time.monotonic() - MARGIN_S
        if left < 2 * MARGIN_S:
            break
        child = subprocess.Popen([*words, "--budget_s", f"{left - MARGIN_S:.0f}"], cwd=ROOT)
        try:
            status = child.wait(timeout=left)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
            print("the session's time is up", flush=True)
            break
        if status == 0:
            return True
        what = _ban(path, device, f"the process ended with status {status} while running it")
        print(f"child ended with status {status} during {what}", flush=True)
        if what is None:
            break
    return False


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    parser.add_argument("--budget_s", type=float, default=BUDGET_S, help="seconds for everything")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    parser.add_argument("--only", nargs="+", choices=list(IMPLEMENTATIONS), help="implementations")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, on the CPU")
    a = parser.parse_args(arguments)
    device = "cpu" if a.smoke else "cuda"
    path = result_path(a.output_dir, "gpu", device, a.smoke).resolve()
    words = [sys.executable, "-m", "benchmarks.run", "gpu", "--output", str(path)]
    words += ["--rounds", str(a.rounds), "--cap_s", "20", "--hang_s", str(HANG_S)]
    words += ["--smoke", "--no_memory"] if a.smoke else []
    words += ["--only", *a.only] if a.only else []
    done = drive(words, path, device, a.budget_s)
    path.with_suffix(".doing").unlink(missing_ok=True)
    print(path if path.exists() else "nothing was measured", "" if done else "(incomplete)")
    return 0 if path.exists() else 1


if __name__ == "__main__":
    raise SystemExit(main())
