"""The steps of a visit: what is here, is it right, how fast is it, what is fastest.

Every step prints what it finds and leaves it in ``Visit.record`` for the JSON file; bad news goes
to ``Visit.errors``, each with its remedy.

N response tokens, D hidden size, V vocabulary; U = 2 N V D FLOP, one bare matmul
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from rpo_kernels import fused_rpo_loss, tuning
from rpo_kernels.backends import Backend, choose_backend, torch_backend
from rpo_kernels.doctor import accuracy, candidates, environment
from rpo_kernels.doctor.timing import interleave, matmuls
from rpo_kernels.engines.panel import capacity
from rpo_kernels.strategy import choose_settings, resolve_strategy

STRATEGIES = ("stream", "recompute")
ROUNDS = 5
TILES = {"now": "as it runs now", "fastest": "with the fastest tiles"}
WORD = 60  # characters of a label
REASON = 300  # characters of an error that are printed


class Shape(NamedTuple):
    """What is timed: N tokens of one pair, the head (V, D)."""

    tokens: int
    width: int
    vocab: int


class Visit:
    """One run of the doctor on `device` and `dtype`."""

    def __init__(self, device: torch.device, dtype: torch.dtype, shape: Shape, seconds: float):
        self.device, self.dtype, self.shape, self.seconds = device, dtype, shape, seconds
        self.errors: list[str] = []
        self.record: dict = {"errors": self.errors}

    def fail(self, message: str) -> None:
        """Note bad news with its remedy."""
        self.errors.append(message)
        print(f"ERROR     {message}")

    def describe(self) -> None:
        """Device and versions."""
        device, versions = environment.device_record(self.device.type), environment.versions()
        self.record |= {"device": device, "versions": versions, "threads": torch.get_num_threads()}
        print(f"device    {device['name']}")
        if self.device.type == "cpu":
            print(f"          {torch.get_num_threads()} threads, {device['cores']} cores")
        else:
            print(
                f"          capability {device['capability']}, {device['multiprocessors']} "
                f"multiprocessors, {device['memory_bytes'] / 2**30:.0f} GiB, driver "
                f"{device['driver']}, CUDA {device['cuda']}"
            )
        found = ", ".join(f"{name} {version or '-'}" for name, version in versions.items())
        print(f"versions  {found}")

    def choose(self, asked: str) -> tuple[str, Backend] | None:
        """The backend that runs, and its tiles; None where it cannot."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        if self.device.type == "cuda" and asked != "torch":
            problem = environment.compiler_problem()
            if problem:
                self.fail(problem)
                return None
        try:
            backend = choose_backend(asked, like)
            name = "torch" if backend is torch_backend else "triton"
            own = candidates.current(name, self.device, self.dtype)
        except (RuntimeError, ValueError) as error:
            self.fail(str(error))
            return None
        path = tuning.file_of(self.device)
        kind: type = type(own)
        read = tuning.saved(path, tuning.device_name(self.device), self.dtype, kind) == own
        source = str(path) if read else "default"
        print(f"backend   {name}: {candidates.label_of(own)} ({source})")
        self.record |= {"backend": name, "choice": own._asdict(), "choice_from": source}
        return name, backend

    def check(self, name: str, backend: Backend) -> bool:
        """Every kernel against float64; True if all are right."""
        kind, found = str(self.dtype).removeprefix("torch."), []
        print(f"\n{f'against float64, {kind}':{WORD}}largest error / its limit")
        for finding in accuracy.findings(name, backend, self.device, self.dtype):
            found.append(finding._asdict() | {"right": finding.right})
            print(
                f"  {finding.name:{WORD}}{finding.share:6.2f}  {'' if finding.right else 'WRONG'}"
            )
            if finding.error:
                remedy = environment.remedy(finding.error)
                self.fail(f"{finding.name}: {finding.error[:REASON]}; {remedy}")
            elif not finding.right:
                self.fail(
                    f"{finding.name}: wrong, an error of {finding.share:.3g} times what rounding "
                    "explains; pass another backend= until it is solved, and report it with --json"
                )
        self.record["accuracy"] = found
        return not self.errors

    def time(self, name: str, backend: Backend) -> tuning.Kernels | tuning.Blocks | None:
        """Every candidate, then whole calls with the current choice and the fastest; returns the
        latter, None where nothing is faster.
        """
        try:
            return self._time(name, backend)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}"
            self.fail(f"times: {reason[:REASON]}; {environment.remedy(reason)}")
            return None

    def _time(self, name: str, backend: Backend) -> tuning.Kernels | tuning.Blocks | None:
        (n, width, vocab), begun = self.shape, time.monotonic()
        rows, auto = self.plan(name)
        case = candidates.random_case(rows, width, vocab, self.dtype, self.device)
        bare = self.floor(rows)
        rate = 6 * rows * width * vocab / bare / 1e12
        print(
            f"\n{f'{n} tokens, hidden size {width}, vocabulary {vocab}':{WORD + 2}}three bare "
            f"matmuls: {bare * n / rows:.3g} s, {rate:.3g} TFLOP/s"
        )
        self.record |= {"shape": self.shape._asdict(), "auto": auto}
        self.record["bare_matmuls"] = {"rows": rows, "seconds": bare}
        found, half = [], begun + self.seconds / 2
        todo = candidates.trials(name, self.device, self.dtype, rows)
        for timing in candidates.sweep(name, backend, todo, case, half, rounds=3):
            found.append(timing)
            self.say(timing, bare / 3)
        if len(todo) > len(found):
            print(f"  {len(todo) - len(found)} more: no time; raise --seconds to time them")
        self.record["candidates"] = [timing.record() for timing in found]
        own = candidates.current(name, self.device, self.dtype)
        best = candidates.fastest(found) or own
        runs = self.compare(name, backend, case, own, best, begun + self.seconds)
        self.record["runs"] = runs
        return self.verdict(runs, own, best, bare * n / rows)

    def plan(self, name: str) -> tuple[int, str]:
        """Rows that the workspace holds at a time, at most N, and the strategy of "auto"."""
        n, width, vocab = self.shape
        hidden, weight = (
            torch.empty(size, width, dtype=self.dtype, device=self.device, requires_grad=True)
            for size in (n, vocab)
        )
        settings = choose_settings(
            hidden, weight, None, ignore_index=-100, logit_scale=1.0, logit_softcap=None,
            validate=True, grad_tolerance=0.0, max_workspace_mb=None, strategy="auto", backend=name,
        )  # fmt: skip
        room = capacity(vocab, width, self.dtype.itemsize, settings.max_bytes)
        return max(1, min(n, room)), resolve_strategy(settings, weight, n, 2).strategy

    def say(self, timing: candidates.Timing, unit: float) -> None:
        """One line of a candidate."""
        label = f"{timing.trial.part}: {timing.trial.label}"
        if timing.error:
            print(f"  {label:{WORD}}not taken: {timing.error[:REASON]}")
        else:
            print(f"  {label:{WORD}}{timing.median / unit:6.2f} of one of them")

    def floor(self, rows: int) -> float:
        """Seconds of the three bare matmuls of `rows` rows: on a CPU tile by tile, in its cache."""
        calls = matmuls(rows, *self.shape[1:], self.dtype, self.device.type)
        kind = "tiled" if self.device.type == "cpu" else "whole"
        calls = {name: call for name, call in calls.items() if name.startswith(kind)}
        for call in calls.values():
            call()
        samples = interleave(calls, 3, self.device.type, raise_)
        return sum(statistics.median(times) for times in samples.values())

    def compare(
        self,
        name: str,
        backend: Backend,
        case: candidates.Case,
        own: tuning.Kernels | tuning.Blocks,
        best: tuning.Kernels | tuning.Blocks,
        deadline: float,
    ) -> dict[str, list[float]]:
        """Seconds of whole calls and of both parts, in interleaved rounds: with each choice."""
        calls: dict[str, Callable[[], object]] = {}
        for word, choice in zip(TILES, (own, best), strict=True):
            if word == "fastest" and best == own:
                continue
            for strategy in STRATEGIES:
                calls[f"{strategy}, {word}"] = under(
                    choice, whole(case, self.shape, name, strategy)
                )
            calls[f"parts, {word}"] = under(choice, parts(backend, case))
        for call in calls.values():
            if self.device.type != "cpu":
                call()  # compiles
        first = interleave(calls, 1, self.device.type, raise_)
        more = interleave(calls, ROUNDS - 1, self.device.type, raise_, deadline)
        return {key: times + more.get(key, []) for key, times in first.items()}

    def verdict(
        self,
        runs: dict[str, list[float]],
        own: tuning.Kernels | tuning.Blocks,
        best: tuning.Kernels | tuning.Blocks,
        bare: float,
    ) -> tuning.Kernels | tuning.Blocks | None:
        """Print whole calls as ratios to the bare matmuls; `best` if it is faster beyond the
        spread of what runs now.
        """
        for key, times in runs.items():
            if not key.startswith("parts"):
                strategy, word = key.split(", ")
                auto = ' ("auto")' * (strategy == self.record["auto"])
                label = f"fused_rpo_loss, {strategy}{auto}, {TILES[word]}"
                middle, low, high = (f(times) / bare for f in (statistics.median, min, max))
                print(f"  {label:{WORD}}{middle:6.2f} of all three ({low:.2f} to {high:.2f})")
        gain = best != own and (statistics.median(runs["parts, fastest"]) < min(runs["parts, now"]))
        if gain:
            print(f"fastest   {candidates.label_of(best)}")
        else:
            print("fastest   what runs now, within the spread of its times")
        self.record["fastest"] = (best if gain else own)._asdict()
        return best if gain else None


def raise_(name: str, error: Exception) -> None:
    """What cannot be timed ends the visit."""
    raise error


def under(choice: tuning.Kernels | tuning.Blocks, call: Callable) -> Callable[[], object]:
    """`call` while `choice` is in effect."""

    def run() -> object:
        with tuning.trying(choice):
            return call()

    return run


def parts(backend: Backend, case: candidates.Case) -> Callable[[], object]:
    """The two matmul kernels, one after the other."""
    return lambda: [candidates.run(part, backend, case) for part in candidates.PARTS]


def whole(case: candidates.Case, shape: Shape, name: str, strategy: str) -> Callable[[], object]:
    """`fused_rpo_loss` and its gradients for one pair of `shape.tokens` tokens."""
    times = -(-shape.tokens // case.hidden.shape[0])
    hidden = case.hidden.repeat(times, 1)[: shape.tokens].requires_grad_()
    weight = case.weight.detach().requires_grad_()
    labels = case.targets.repeat(times)[: shape.tokens]
    middle = shape.tokens // 2
    edges = torch.tensor([0, middle, shape.tokens], device=hidden.device)
    refs = torch.zeros(2, device=hidden.device)

    def run() -> object:
        out = fused_rpo_loss(
            hidden, weight, labels, refs, cu_seqlens=edges, backend=name, strategy=strategy
        )
        return torch.autograd.grad(out.loss, (hidden, weight))

    return run
