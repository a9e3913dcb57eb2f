"""Peak resident memory of one implementation in a fresh process: `python -m benchmarks.memory
'{"spec": ..., "name": ...}'`.

The call runs once before (imports, compilation, thread pools), then free memory goes back to the
system, the kernel's high-water mark is reset, and the call runs again: the mark minus the size
before is what one step adds. Prints one JSON object.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.cases import Spec, build
from benchmarks.environment import ROOT
from benchmarks.peers import IMPLEMENTATIONS, Implementation, gradients


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _high_water() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _trim() -> None:
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError:
        pass


def _sampled(call: Callable[[], object]) -> int:
    """Peak resident size during the call, by a thread that looks every millisecond."""
    peak, done = [_resident()], threading.Event()

    def look() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], _resident())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        call()
    finally:
        done.set()
        thread.join()
    return peak[0]


def peak_bytes(call: Callable[[], object], device: str) -> dict:
    """Peak memory of one call over what was held before it. Run it in a process of its own on
    CPU, after a warm-up.
    """
    _trim()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return {"peak": torch.cuda.max_memory_allocated() - before, "method": "allocator"}
    before = _resident()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        call()
        return {"peak": max(0, _high_water() - before), "method": "rss"}
    except OSError:
        return {"peak": max(0, _sampled(call) - before), "method": "rss, sampled every ms"}


def gradient_bytes(problem, frozen: bool) -> int:
    """Size of dH and dW, which every implementation has to return."""
    tensors = [problem.hidden] if frozen else [problem.hidden, problem.weight]
    return sum(t.numel() * t.element_size() for t in tensors)


def peak(implementation: Implementation, problem, frozen: bool, device: str) -> dict:
    """``peak`` over what was held before the call, ``beyond`` inputs and gradients, in bytes."""
    found = peak_bytes(lambda: gradients(implementation, problem, frozen), device)
    return found | {"beyond": max(0, found["peak"] - gradient_bytes(problem, frozen))}


def in_subprocess(spec: Spec, name: str, threads: int, limit_s: float = 600) -> dict:
    """Run this module in a fresh process; a failure comes back as ``{"error": ...}``."""
    task = json.dumps({"spec": spec.record(), "name": name, "threads": threads})
    words = [sys.executable, "-m", "benchmarks.memory", task]
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {limit_s:.0f} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"exit status {done.returncode}: {last[:300]}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    task = json.loads(sys.argv[1])
    spec = Spec(**task["spec"])
    torch.set_num_threads(task["threads"])
    problem = build(spec)
    implementation = IMPLEMENTATIONS[task["name"]]
    gradients(implementation, problem, spec.frozen)
    print(json.dumps(peak(implementation, problem, spec.frozen, spec.device)))


if __name__ == "__main__":
    main()
