"""The memory contract: the workspace, and beyond it inputs, gradients and documented accumulators.

Three instruments, each shown to fail on a planted N x V allocation:

    every tensor   a `TorchDispatchMode` inside the engines' plain functions (from outside it cannot
                   see into a custom operator) records every new storage: the largest, and the most
                   bytes alive at once
    the process    peak resident memory of forward and backward in a process of its own
    CUDA           the allocator's peak, where there is a GPU

In each, N x V is at least eight times what is allowed. The accumulators are those that the
docstrings document. recompute: dH in float32, (N, D), in half precision; with `grad_tolerance` the
mask of what is kept, a byte per block and vocabulary entry. stream: dW in float32, (V, D), where
the weight is half precision and several products are summed; where a pair is longer than the
workspace two more (V, D) in float32, and its rows, (n, D), if hidden is half precision.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rpo_kernels import fused_preference_loss, fused_rpo_loss, linear_logprobs
from rpo_kernels.backends import torch_backend
from rpo_kernels.engines import recompute, streaming
from rpo_kernels.engines.panel import capacity
from rpo_kernels.engines.skipping import BLOCK
from rpo_kernels.spec import Head
from tests.support import ROOT, one_thread

MIB = 2**20
ENGINES = (
    (recompute, "forward"),
    (recompute, "backward"),
    (recompute, "forward_skipping"),
    (recompute, "backward_skipping"),
    (streaming, "loss_and_grads"),
)


class Allocations(TorchDispatchMode):
    """Every storage that appears while it is on: sizes, and the peak of what is alive together."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.inputs: set[int] = set()
        self.sizes: dict[int, str] = {}
        self.peak = 0
        self.active = False

    def given(self, tensors: object) -> None:
        """Do not count these."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Head):
                self.given([tensor.weight, tensor.bias])
            elif isinstance(tensor, torch.Tensor):
                self.inputs.add(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        before = {x.untyped_storage()._cdata for x in tensors}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self.inputs | before:
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.sizes.setdefault(
                    storage.nbytes(), f"{tuple(tensor.shape)} {tensor.dtype} by {func}"
                )
        self.alive = {key: item for key, item in self.alive.items() if not item[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


@contextmanager
def watched_engines() -> Iterator[list[Allocations]]:
    """Run every engine function that is called under an `Allocations` of its own."""
    seen: list[Allocations] = []

    def wrap(original: Callable) -> Callable:
        @functools.wraps(original)
        def inner(*args, **options):
            if seen and seen[-1].active:  # an engine that calls itself
                return original(*args, **options)
            watch = Allocations()
            watch.given([args, options])
            seen.append(watch)
            watch.active = True
            with watch:
                out = original(*args, **options)
            watch.active = False
            return out

        return inner

    with mock.patch.multiple(recompute, **{n: wrap(getattr(m, n)) for m, n in ENGINES[:4]}):
        with mock.patch.object(streaming, "loss_and_grads", wrap(streaming.loss_and_grads)):
            yield seen


class Case(NamedTuple):
    """One call: sequences of `length` positions each, the first of which is ignored."""

    strategy: str
    dtype: torch.dtype
    sequences: int
    length: int
    workspace: int = 16
    width: int = 32
    vocab: int = 32768
    autocast: bool = False
    frozen: bool = False
    softcap: float | None = 30.0
    tolerance: float = 0.0

    @property
    def rows(self) -> int:
        """N."""
        return self.sequences * (self.length - 1)

    @property
    def compute(self) -> torch.dtype:
        """The dtype of the matmuls."""
        return torch.bfloat16 if self.autocast else self.dtype

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        make = torch.Generator().manual_seed(0)
        shape = (self.sequences, self.length)
        hidden = torch.randn(*shape, self.width, generator=make).to(self.dtype)
        weight = torch.randn(self.vocab, self.width, generator=make).to(self.dtype) * 0.3
        labels = torch.randint(self.vocab, shape, generator=make)
        labels[:, 0] = -100
        return hidden.requires_grad_(), weight.requires_grad_(not self.frozen), labels

    def run(self) -> None:
        """Forward and backward."""
        hidden, weight, labels = self.inputs()
        options = {"max_workspace_mb": self.workspace, "logit_softcap": self.softcap}
        options |= {"grad_tolerance": self.tolerance}
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            if self.strategy == "logprobs":
                loss = linear_logprobs(hidden, weight, labels, **options).mean()
            else:
                loss = fused_rpo_loss(
                    hidden, weight, labels, None, strategy=self.strategy, **options
                ).loss
        loss.backward()

    def gradients(self) -> int:
        """Bytes of the gradients of hidden and weight."""
        rows = self.sequences * self.length * self.width
        return (rows + (0 if self.frozen else self.vocab * self.width)) * self.dtype.itemsize

    def accumulators(self) -> list[int]:
        """Bytes of each accumulator that the docstrings document."""
        half = self.dtype.itemsize < 4
        if self.strategy != "stream":
            found = [self.rows * self.width * 4] if half or self.autocast else []
            if self.tolerance:  # "a float32 accumulator for half-precision weights", the mask
                blocks = self.sequences * self.length // BLOCK + self.sequences + 1
                found += [self.vocab * self.width * 4] * half + [blocks * self.vocab]
            return found
        pair = 2 * self.rows // self.sequences
        room = capacity(self.vocab, self.width, self.compute.itemsize, self.workspace * MIB)
        split = pair > room
        found = [] if self.frozen else [self.vocab * self.width * 4] * (2 * split + half)
        return found + ([pair * self.width * 4] if split and half else [])


FP32, BF16 = torch.float32, torch.bfloat16
CASES = {
    "recompute fp32": Case("recompute", FP32, 4, 275),
    "recompute bf16": Case("recompute", BF16, 4, 550),
    "recompute frozen fp32": Case("recompute", FP32, 4, 275, frozen=True),
    "recompute skipping": Case("recompute", FP32, 4, 800, 12, 32, 8192, tolerance=0.01),
    "stream skipping": Case("stream", FP32, 80, 40, 12, 32, 8192, tolerance=0.01),
    "logprobs fp32": Case("logprobs", FP32, 4, 275),
    "logprobs bf16": Case("logprobs", BF16, 4, 550, softcap=None),
    "stream pair by pair fp32": Case("stream", FP32, 28, 41),
    "stream pair by pair bf16": Case("stream", BF16, 28, 81),
    "stream grouped fp32": Case("stream", FP32, 80, 14),
    "stream grouped bf16": Case("stream", BF16, 160, 14),
    "stream split fp32": Case("stream", FP32, 2, 550),
    "stream split bf16": Case("stream", BF16, 2, 1100),
    "wide recompute fp32": Case("recompute", FP32, 4, 2000, 8, 1024, 2304),
    "wide recompute bf16": Case("recompute", BF16, 4, 4000, 8, 512, 2304),
    "wide logprobs fp32": Case("logprobs", FP32, 4, 2000, 8, 1024, 2304),
    "wide recompute skipping": Case("recompute", FP32, 4, 2000, 64, 1024, 18432, tolerance=0.01),
    "wide stream split fp32": Case("stream", FP32, 2, 4000, 8, 1024, 2304),
    "wide stream split frozen bf16": Case("stream", BF16, 2, 6000, 8, 512, 4096, frozen=True),
    "short recompute skipping": Case("recompute", FP32, 512, 9, 12, 32, 8192, tolerance=0.01),
    "short recompute skipping bf16": Case("recompute", BF16, 512, 9, 8, 32, 8192, tolerance=0.01),
    "stream frozen fp32": Case("stream", FP32, 2, 550, frozen=True),
    "stream frozen bf16": Case("stream", BF16, 28, 81, frozen=True),
    "autocast recompute": Case("recompute", FP32, 4, 290, 8, 160, autocast=True),
    "autocast logprobs": Case("logprobs", FP32, 4, 290, 8, 160, autocast=True),
    "autocast stream": Case("stream", FP32, 40, 29, 8, 160, autocast=True),
    "autocast stream split": Case("stream", FP32, 2, 580, 8, 160, autocast=True),
    "autocast stream frozen": Case("stream", FP32, 40, 29, 8, 160, autocast=True, frozen=True),
    "small recompute fp32": Case("recompute", FP32, 4, 75, 1, 32, 8192),
    "small recompute bf16": Case("recompute", BF16, 4, 150, 1, 32, 8192),
    "small stream fp32": Case("stream", FP32, 40, 8, 1, 32, 8192),
    "small stream bf16": Case("stream", BF16, 80, 8, 1, 32, 8192),
}


@functools.cache
def measured(name: str) -> tuple[Allocations, ...]:
    """What the engines of a case allocated."""
    with one_thread(), watched_engines() as seen:
        CASES[name].run()
    return tuple(seen)


def check_largest(case: Case, watch: Allocations) -> None:
    """No tensor larger than the workspace, but for gradients and accumulators."""
    allowed = {case.sequences * case.length * case.width * case.dtype.itemsize}
    if not case.frozen:
        allowed.add(case.vocab * case.width * case.dtype.itemsize)
    allowed |= set(case.accumulators())
    for size, what in watch.sizes.items():
        assert size <= case.workspace * MIB or size in allowed, (
            f"{what}: {size / MIB:.2f} MiB, workspace {case.workspace} MiB"
        )


def check_total(case: Case, watch: Allocations) -> None:
    """All that is alive at once: workspace, gradients, accumulators."""
    allowed = case.workspace * MIB + case.gradients() + sum(case.accumulators())
    assert watch.peak <= allowed, (
        f"{watch.peak / MIB:.2f} MiB alive at once, allowed {allowed / MIB:.2f} MiB "
        f"(workspace {case.workspace})"
    )


@pytest.mark.parametrize("name", CASES)
def test_no_tensor_is_larger_than_the_workspace(name):
    case = CASES[name]
    assert case.rows * case.vocab * case.compute.itemsize >= 8 * case.workspace * MIB
    assert len(measured(name)) == (1 if case.strategy == "stream" else 2)
    for watch in measured(name):
        assert watch.sizes
        check_largest(case, watch)


@pytest.mark.parametrize("name", CASES)
def test_what_is_alive_at_once_fits(name):
    case = CASES[name]
    for watch in measured(name):
        assert watch.peak > 0
        check_total(case, watch)


def planting(name: str, plant: Callable) -> Callable:
    """The backend's function `name`, with what ``plant(hidden, weight)`` returns kept alive."""
    original = getattr(torch_backend, name)

    def planted(hidden, weight, *rest, **options):
        kept = plant(hidden, weight)
        out = original(hidden, weight, *rest, **options)
        del kept
        return out

    return planted


PLANTED = [
    ("recompute fp32", "lse_and_target", 0),
    ("recompute fp32", "exp_panel", 1),
    ("recompute bf16", "exp_panel", 1),
    ("stream pair by pair fp32", "exp_panel", 0),
    ("stream grouped bf16", "exp_panel", 0),
    ("stream split fp32", "lse_and_target", 0),
    ("autocast recompute", "exp_panel", 1),
    ("autocast stream", "exp_panel", 0),
]


@pytest.mark.parametrize(("name", "function", "pass_"), PLANTED)
def test_the_checks_fail_on_planted_logits(name, function, pass_, monkeypatch):
    """An N x V tensor, in half precision where the case computes in that."""
    case = CASES[name]

    def plant(*_):
        return torch.empty(case.rows, case.vocab, dtype=case.compute)

    monkeypatch.setattr(torch_backend, function, planting(function, plant))
    with one_thread(), watched_engines() as seen:
        case.run()
    for check in (check_largest, check_total):
        with pytest.raises(AssertionError, match="MiB"):
            check(case, seen[pass_])


@pytest.mark.parametrize(("name", "function", "pass_"), PLANTED[1::2])
def test_the_total_fails_on_logits_in_small_pieces(name, function, pass_, monkeypatch):
    """N x V as a list of tensors that each fit: only the total notices."""
    case = CASES[name]
    piece = case.workspace * MIB // 16
    pieces = case.rows * case.vocab * case.compute.itemsize // piece

    def plant(*_):
        return [torch.empty(piece, dtype=torch.uint8) for _ in range(pieces)]

    monkeypatch.setattr(torch_backend, function, planting(function, plant))
    with one_thread(), watched_engines() as seen:
        case.run()
    with pytest.raises(AssertionError, match="alive at once"):
        check_total(case, seen[pass_])


def test_the_largest_fails_on_a_cast_of_the_whole_weight(monkeypatch):
    """Autocast: W in bfloat16 is larger than the workspace and no gradient's size."""
    case = CASES["autocast recompute"]
    assert case.vocab * case.width * 2 > case.workspace * MIB

    def whole(self, size=None):
        cast = self.weight.to(self.dtype)
        for v0 in range(0, cast.shape[0], size or cast.shape[0]):
            yield v0, cast[v0 : v0 + (size or cast.shape[0])], None

    monkeypatch.setattr(Head, "panels", whole)
    with one_thread(), watched_engines() as seen:
        case.run()
    for watch in seen:
        with pytest.raises(AssertionError, match="MiB"):
            check_largest(case, watch)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("function", ["rpo", "custom"])
def test_a_streamed_backward_copies_no_gradient(function, again):
    """Forward made them; backward multiplies them where they are, or, if the graph is kept for
    another pass, makes one copy.
    """
    case = CASES["stream pair by pair fp32"]
    hidden, weight, labels = case.inputs()
    if function == "rpo":
        loss = fused_rpo_loss(hidden, weight, labels, None, strategy="stream").loss
    else:
        loss, _ = fused_preference_loss(
            hidden, weight, labels, lambda s, n, i: s[1] - s[0], strategy="stream"
        )
    watch = Allocations()
    watch.given([hidden, weight, labels])
    with watch:
        loss.backward(retain_graph=again)
    if again:
        assert 0 < watch.peak <= case.gradients() + 1024
    else:
        assert watch.peak <= 1024


# the process

PROCESS = """
import sys, torch
from rpo_kernels import fused_rpo_loss, linear_logprobs
from rpo_kernels.backends import torch_backend

kind, dtype, rows, pairs, width, vocab, workspace, plant = sys.argv[1:]
rows, pairs, width, vocab, workspace = map(int, (rows, pairs, width, vocab, workspace))

def peak(reset=False):
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

def inputs(rows, pairs, vocab):
    torch.manual_seed(0)
    hidden = torch.randn(2 * pairs, rows // 2 // pairs, width).to(getattr(torch, dtype))
    weight = (torch.randn(vocab, width) * 0.3).to(getattr(torch, dtype))
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(vocab, hidden.shape[:2])

def call(hidden, weight, labels, workspace):
    if kind == "logprobs":
        loss = linear_logprobs(hidden, weight, labels, max_workspace_mb=workspace).mean()
    elif kind == "plain":
        loss = torch.nn.functional.linear(hidden, weight).log_softmax(-1).mean()
    else:
        loss = fused_rpo_loss(
            hidden, weight, labels, None, strategy=kind, max_workspace_mb=workspace
        ).loss
    loss.backward()

call(*inputs(64, 2, 300), 64)  # whatever is allocated once
if plant == "plant":
    for name in ("lse_and_target", "exp_panel"):
        def planted(*args, original=getattr(torch_backend, name), once=[], **options):
            logits = None if once else torch.ones(rows, vocab)
            once.append(True)
            return original(*args, **options)
        setattr(torch_backend, name, planted)
given = inputs(rows, pairs, vocab)
before = peak(reset=True)
call(*given, workspace)
print(peak() - before)
"""
ROWS, WIDTH, VOCAB, WORKSPACE, SLACK = 4608, 128, 16384, 16, 4


def process_peak(kind: str, dtype: str, pairs: int = 48, plant: str = "") -> float:
    """MiB that forward and backward add to the resident memory of a fresh process."""
    arguments = [kind, dtype, *map(str, (ROWS, pairs, WIDTH, VOCAB, WORKSPACE)), plant]
    found = subprocess.run(
        [sys.executable, "-c", PROCESS, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        # without this, glibc keeps freed blocks of up to 32 MiB for later
        env=os.environ
        | dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "65536")
        | {"OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stderr
    return int(found.stdout) / MIB


def process_allowed(dtype: str, kind: str) -> float:
    """MiB: workspace, gradients, accumulator; and 4 for pages and the matmuls' own buffers."""
    size = 4 if dtype == "float32" else 2
    gradients = (ROWS * WIDTH + VOCAB * WIDTH) * size / MIB
    half = {"stream": VOCAB * WIDTH * 4 / MIB}.get(kind, ROWS * WIDTH * 4 / MIB)
    return WORKSPACE + gradients + (half if size == 2 else 0) + SLACK


needs_proc = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="no /proc/self/clear_refs here"
)


@needs_proc
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("logprobs", "float32"),
        ("recompute", "float32"),
        ("recompute", "bfloat16"),
        ("stream", "float32"),
        ("stream", "bfloat16"),
    ],
)
def test_process_peak(kind, dtype):
    logits = ROWS * VOCAB * 4 / MIB
    allowed = process_allowed(dtype, kind)
    assert logits >= 8 * allowed
    assert process_peak(kind, dtype) <= allowed


@needs_proc
@pytest.mark.parametrize("kind", ["recompute", "stream"])
def test_process_peak_fails_on_planted_logits(kind):
    logits = ROWS * VOCAB * 4 / MIB
    assert process_peak(kind, "float32", plant="plant") > logits > process_allowed("float32", kind)


@needs_proc
def test_process_peak_sees_what_a_plain_head_takes():
    """The instrument itself: logits and log-softmax are there."""
    assert process_peak("plain", "float32") > 2 * ROWS * VOCAB * 4 / MIB


# CUDA


def cuda_peak(strategy: str, dtype: torch.dtype) -> float:
    """MiB above what was allocated before, by the allocator."""
    torch.manual_seed(0)
    hidden = torch.randn(48, 256, 256, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(65536, 256, device="cuda", dtype=dtype, requires_grad=True)
    labels = torch.randint(65536, (48, 256), device="cuda")
    run = {"strategy": strategy, "max_workspace_mb": 128}
    small = [x[:2, :8].detach() for x in (hidden, labels)]
    fused_rpo_loss(small[0], weight.detach(), small[1], None, **run)  # kernels compiled
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused_rpo_loss(hidden, weight, labels, None, **run).loss.backward()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def cuda_allowed(strategy: str, dtype: torch.dtype) -> float:
    """MiB: workspace, gradients, and in half precision the accumulator."""
    hidden, weight = 48 * 256 * 256, 65536 * 256
    acc = (weight if strategy == "stream" else hidden) * 4 if dtype.itemsize == 2 else 0
    return 128 + ((hidden + weight) * dtype.itemsize + acc) / MIB


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("strategy", ["recompute", "stream"])
def test_cuda_peak(strategy, dtype):
    allowed = cuda_allowed(strategy, dtype)
    assert 48 * 256 * 65536 * 4 / MIB >= 8 * allowed
    assert cuda_peak(strategy, dtype) <= allowed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("strategy", ["recompute", "stream"])
def test_cuda_peak_fails_on_planted_logits(strategy, monkeypatch):
    triton_backend = pytest.importorskip("rpo_kernels.backends.triton_backend")
    for name in ("lse_and_target", "exp_panel"):
        original = getattr(triton_backend, name)

        def planted(hidden, *rest, original=original, **options):
            logits = hidden.new_empty(48 * 256, 65536)
            out = original(hidden, *rest, **options)
            del logits
            return out

        monkeypatch.setattr(triton_backend, name, planted)
    assert cuda_peak(strategy, BF16) > cuda_allowed(strategy, BF16)
