"""pytest-benchmark versions of the main kernels: `pytest benchmarks/` (--benchmark-compare).

Every result is checked against float64 before it is timed; FLOP and bytes stand in the extra info.
"""

from __future__ import annotations

import functools
import inspect

import pytest
import torch

from benchmarks.inputs import Problem, calibrated_problem
from benchmarks.peers import IMPLEMENTATIONS, Implementation, Unavailable, gradients, rpo_loss
from benchmarks.truth import Truth, verdict
from rpo_kernels import linear_logprobs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH, VOCAB = (2048, 65536) if DEVICE == "cuda" else (576, 16384)
NAMES = ("materialized_kept", "stream", "recompute", "auto_skip")


@functools.cache
def problem_and_truth(dtype: torch.dtype) -> tuple[Problem, Truth]:
    problem = calibrated_problem(2, 256, WIDTH, VOCAB, 0.75, DEVICE).to(dtype)
    return problem, Truth(problem)


def by_logprobs(p: Problem, beta: float) -> torch.Tensor:
    """The loss from `linear_logprobs` and three lines of PyTorch."""
    return rpo_loss(linear_logprobs(p.hidden, p.weight, p.labels).sum(1), p.ref_logps, beta)


def run(benchmark, implementation: Implementation, dtype: torch.dtype, frozen: bool) -> None:
    problem, truth = problem_and_truth(dtype)
    try:
        result = gradients(implementation, problem, frozen)
    except Unavailable as error:
        pytest.skip(str(error))
    errors = truth.errors(implementation, *result)
    assert verdict(implementation, dtype, errors) is None, errors
    tokens = int((problem.labels >= 0).sum())
    size = problem.weight.element_size()
    benchmark.extra_info |= {
        "errors": errors,
        "flop_needed": (2 if frozen else 3) * 2 * tokens * VOCAB * WIDTH,
        "input_bytes": (problem.hidden.numel() + problem.weight.numel()) * size,
        "device": DEVICE,
    }

    def call() -> None:
        gradients(implementation, problem, frozen)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("frozen", [False, True], ids=["full", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_rpo_loss(benchmark, name, dtype, frozen):
    run(benchmark, IMPLEMENTATIONS[name], dtype, frozen)


@pytest.mark.parametrize("tolerance", [0.0, 1e-3], ids=["exact", "skip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_linear_logprobs(benchmark, dtype, tolerance):
    if tolerance and "grad_tolerance" not in inspect.signature(linear_logprobs).parameters:
        pytest.skip("linear_logprobs has no grad_tolerance yet")
    call = functools.partial(_skipping, tolerance=tolerance) if tolerance else by_logprobs
    run(benchmark, Implementation("linear_logprobs", call, tolerance=tolerance), dtype, False)


def _skipping(p: Problem, beta: float, tolerance: float) -> torch.Tensor:
    logps = linear_logprobs(p.hidden, p.weight, p.labels, grad_tolerance=tolerance)
    return rpo_loss(logps.sum(1), p.ref_logps, beta)
