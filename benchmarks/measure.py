"""Check, then time, then weigh: everything that happens to one problem."""

from __future__ import annotations

import faulthandler
import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import memory
from benchmarks.cases import Spec, build
from benchmarks.inputs import IGNORE, Problem, statistics
from benchmarks.peers import IMPLEMENTATIONS, Implementation, Unavailable, gradients, held_bytes
from benchmarks.truth import Truth, relative, verdict, within_budget
from rpo_kernels.doctor import timing

REASON = 400  # characters of an error message that are recorded


@dataclass
class Settings:
    """How long and how carefully."""

    rounds: int = 7
    memory: bool = True
    """Measure peak memory (CPU: one fresh process per implementation)."""
    cap_s: float = 120.0
    """An implementation whose warm call takes longer is recorded as too slow and left out of the
    rounds.
    """
    hang_s: float | None = None
    """Kill this process if one implementation's check takes longer; the session's driver carries
    on without it.
    """
    deadline: float = float("inf")
    """Of `time.monotonic`: no new implementation after it, and no new round."""


@functools.lru_cache(maxsize=1)
def _prepared(data: Spec, sample: int | None, checked: bool) -> tuple[Problem, Truth | None]:
    problem = build(data)
    return problem, Truth(problem, sample) if checked else None


def _free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _reason(error: Exception) -> tuple[str, str]:
    """Status and reason of an exception; ends the process where the device cannot be used any
    more.
    """
    if isinstance(error, Unavailable):
        return "unavailable", str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "out of memory", str(error)[:REASON]
    if isinstance(error, ImportError):
        return "unavailable", f"import fails: {error}"[:REASON]
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as lost:  # the context is gone: only a new process helps
            print(f"the device is lost: {lost}", flush=True)
            os._exit(3)
    return "failed", f"{type(error).__name__}: {error}"[:REASON]


def _check(
    implementation: Implementation,
    problem: Problem,
    truth: Truth | None,
    spec: Spec,
    s: Settings,
    plain: dict | None,
) -> dict:
    """First call: errors against float64 and the verdict. Second call: the warm time, against the
    cap. `plain`: errors of materialized logits.
    """
    held = held_bytes(implementation, problem.labels, len(problem.weight))
    free = _free_bytes(spec.device)
    if held > free:
        need = f"its logits and their gradient take about {held / 2**30:.0f} GiB in float32"
        return {"status": "too large", "reason": f"{need}, {free / 2**30:.0f} GiB are free"}
    start = time.perf_counter()
    loss, dh, dw = gradients(implementation, problem, spec.frozen)
    timing.synchronize(spec.device)
    entry = {
        "first_call_s": time.perf_counter() - start,
        "status": "ok",
        "loss": float(loss.detach()),
    }
    if hasattr(loss, "certificate"):
        entry["certificate"] = float(loss.certificate)
    if truth is not None:
        entry["errors"] = truth.errors(implementation, loss, dh, dw)
        if implementation.exact:
            whole = gradients(IMPLEMENTATIONS[implementation.exact], problem, spec.frozen)[1]
            entry["skipping_error"] = relative(dh, whole.double())
        wrong = verdict(implementation, problem.hidden.dtype, entry["errors"], plain)
        if wrong:
            return entry | {"status": "wrong", "reason": wrong}
    del loss, dh, dw
    if spec.timed:
        call = lambda: gradients(implementation, problem, spec.frozen)  # noqa: E731
        entry["warm_s"] = timing.seconds(call, spec.device)
        if entry["warm_s"] > s.cap_s:
            reason = f"{entry['warm_s']:.1f} s a call, the cap is {s.cap_s:.0f} s"
            return entry | {"status": "too slow", "reason": reason}
    return entry


def _unit_seconds(samples: dict[str, list[float]], frozen: bool) -> dict[str, dict]:
    """Sum over the bare matmuls the loss needs (two with a frozen head) of their medians, and 1U
    of it.
    """
    wanted = ("logits", "dh") if frozen else ("logits", "dh", "dw")
    found = {}
    for kind in ("whole", "tiled"):
        parts = {part: samples.get(f"{kind} {part}") for part in wanted}
        if all(parts.values()):
            each = {part: timing.summary(values) for part, values in parts.items()}
            total = sum(part["median"] for part in each.values())
            found[kind] = {"seconds": total, "unit_seconds": total / len(wanted), "parts": each}
    return found


def describe_problem(problem: Problem, spec: Spec) -> dict:
    """Shapes, and the FLOP and bytes that the problem itself implies."""
    (vocab, width), size = problem.weight.shape, problem.weight.element_size()
    tokens = int((problem.labels != IGNORE).sum())
    inputs = (problem.hidden.numel() + problem.weight.numel()) * size
    return {
        "rows": problem.labels.numel(),
        "tokens": tokens,
        "width": width,
        "vocab": vocab,
        "flop_per_unit": 2 * tokens * vocab * width,
        "units_needed": 2 if spec.frozen else 3,
        "logits_bytes": tokens * vocab * size,
        "input_bytes": inputs,
        "gradient_bytes": memory.gradient_bytes(problem, spec.frozen),
        "statistics": statistics(problem),
    }


def measure(
    spec: Spec,
    implementations: dict[str, Implementation],
    settings: Settings,
    banned: dict[str, str] | None = None,
    doing: Callable[[str], None] = lambda name: None,
    say: Callable[[str], None] = print,
) -> dict:
    """One problem with every implementation. `banned` maps names to reasons; `doing` is told what
    runs now.
    """
    doing("inputs")
    problem, truth = _prepared(spec.data(), spec.sample, spec.checked)
    run = {"spec": spec.record(), **describe_problem(problem, spec)}
    results: dict[str, dict] = {}
    begun = time.monotonic()
    half = begun + 0.6 * (settings.deadline - begun)
    for name, implementation in implementations.items():
        entry = {"label": implementation.label, "ours": implementation.ours}
        entry |= {"units": implementation.units, "reference": implementation.reference}
        if banned and name in banned:
            entry |= {"status": "crashed", "reason": banned[name]}
        elif time.monotonic() > half:
            entry |= {"status": "no time", "reason": "the time for this shape was used up"}
        else:
            doing(name)
            if settings.hang_s:
                faulthandler.dump_traceback_later(settings.hang_s, exit=True)
            try:
                plain = results.get("materialized", {}).get("errors")
                entry |= _check(implementation, problem, truth, spec, settings, plain)
                if entry["status"] == "ok" and settings.memory and spec.device == "cuda":
                    entry["memory"] = memory.peak(implementation, problem, spec.frozen, "cuda")
            except Exception as error:
                entry["status"], entry["reason"] = _reason(error)
            faulthandler.cancel_dump_traceback_later()
        results[name] = entry
        say(f"  {name}: {entry['status']} {entry.get('reason') or entry.get('errors') or ''}")
    plain = results.get("materialized", {}).get("errors")
    for name, entry in results.items():
        if entry["status"] == "ok" and entry.get("errors"):
            dtype = problem.hidden.dtype
            entry["within_budget"] = within_budget(dtype, entry["errors"], plain)
        if spec.timed and implementations[name].ours and entry["status"] == "wrong":
            say(f"  {name} is WRONG and is not timed: {entry['reason']}")
    if spec.timed:
        _rounds(run, results, implementations, problem, spec, settings, doing)
    if settings.memory and spec.device == "cpu":
        for name, entry in results.items():
            if entry["status"] == "ok":
                doing(f"memory of {name}")
                entry["memory"] = memory.in_subprocess(spec, name, torch.get_num_threads())
    return run | {"results": results}


def _rounds(run, results, implementations, problem, spec, settings, doing) -> None:
    """Interleaved rounds of every sound implementation and of the bare matmuls; fills `run` and
    `results`.
    """

    def call(name: str) -> Callable[[], object]:
        return lambda: gradients(implementations[name], problem, spec.frozen)

    def failed(name: str, error: Exception) -> None:
        status, reason = _reason(error)
        results.setdefault(name, {"label": name})["status"] = status
        results[name]["reason"] = reason

    bare = timing.matmuls(
        run["tokens"], run["width"], run["vocab"], problem.hidden.dtype, spec.device
    )
    for work in bare.values():
        work()
    calls = {name: call(name) for name, entry in results.items() if entry["status"] == "ok"}
    found = timing.interleave(
        bare | calls, settings.rounds, spec.device, failed, settings.deadline, doing
    )
    run["matmuls"] = _unit_seconds(found, spec.frozen)
    for name in calls:
        if found.get(name):
            results[name]["seconds"] = timing.summary(found[name])
        elif results[name]["status"] == "ok":
            results[name] |= {"status": "no time", "reason": "no round before the deadline"}
