"""The public functions on the Triton backend: engines and kernels together, against float64.

Without a GPU the kernels are interpreted.
"""

from __future__ import annotations

import functools

import pytest
import torch

from rpo_kernels import fused_preference_loss, fused_rpo_loss, linear_logprobs, oracle
from tests.support import (
    IGNORE,
    Problem,
    assert_within_plain_budget,
    differentiate,
    double,
    exact_logprobs,
    loss_budget,
    one_thread,
    pack,
    pairs,
    plain_logprobs,
    plain_rpo_loss,
    relative_error,
    token_budgets,
    tokens,
    value_budget,
    workspace_for,
)

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LOGITS = [{}, {"logit_scale": 0.7}, {"logit_scale": 1.3, "logit_softcap": 20.0}]
on_triton = {"backend": "triton"}


@pytest.fixture(autouse=True, scope="module")
def threads():
    with one_thread():
        yield


def on_device(problem: Problem) -> Problem:
    return Problem(*(x if x is None else x.to(DEVICE) for x in problem))


def logprobs(function, **options):
    return lambda p: function(p.hidden, p.weight, p.labels, bias=p.bias, **options)


def rpo(function, **options):
    def inner(p):
        out = function(p.hidden, p.weight, p.labels, p.ref_logps, bias=p.bias, eta=0.5, **options)
        return out.loss if hasattr(out, "loss") else out

    return inner


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("options", LOGITS, ids=["", "scale", "softcap"])
def test_logprobs(dtype, bias, options):
    problem = on_device(tokens(31, (70,), 40, 333, dtype, bias=bias))
    upstream = torch.randn(70, dtype=torch.float64, device=DEVICE)
    found = differentiate(logprobs(linear_logprobs, **on_triton, **options), problem, upstream)
    plain = differentiate(logprobs(plain_logprobs, **options), problem, upstream)
    exact = logprobs(oracle.linear_logprobs, **options)
    assert_within_plain_budget(found, plain, differentiate(exact, double(problem), upstream))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", ["stream", "recompute"])
@pytest.mark.parametrize("room", [12, 1000], ids=["split", "whole"])
def test_loss(dtype, strategy, room):
    """Pairs that fit the workspace, and pairs that are split."""
    problem = pairs(32, 3, 29, 40, 333, dtype, bias=True)
    room = workspace_for(room, problem)
    problem = on_device(problem)
    ours = rpo(fused_rpo_loss, strategy=strategy, max_workspace_mb=room, **on_triton)
    found, plain = differentiate(ours, problem), differentiate(rpo(plain_rpo_loss), problem)
    truth = differentiate(rpo(oracle.rpo_loss), double(problem))
    gap = abs(found.pop("out").double() - truth.pop("out"))
    assert gap <= loss_budget(problem, eta=0.5)
    del plain["out"]
    assert_within_plain_budget(found, plain, truth)


@pytest.mark.parametrize("strategy", ["stream", "recompute"])
@pytest.mark.parametrize("tolerance", [0.0, 0.02])
def test_strided_vectors(strategy, tolerance):
    """Kernels see vectors as the caller cut them from larger tensors: labels, bias, references."""
    problem, ends = pack(pairs(33, 2, 40, 24, 333, bias=True))
    problem, ends = on_device(problem), ends.to(DEVICE)
    spaced = [torch.stack([x, x.flip(0)], 1)[:, 0] for x in (*problem[2:], ends)]
    assert all(not x.is_contiguous() for x in spaced)

    def call(p, labels, bias, refs, edges):
        run = functools.partial(fused_rpo_loss, strategy=strategy, cu_seqlens=edges, **on_triton)
        out = run(p.hidden, p.weight, labels, refs, bias=bias, grad_tolerance=tolerance)
        return out.loss

    dense = differentiate(lambda p: call(p, *problem[2:], ends), problem)
    cut = differentiate(
        lambda p: call(
            p,
            *spaced,
        ),
        problem,
    )
    for name in ("out", "hidden", "weight"):
        assert torch.equal(dense[name], cut[name]), name


@pytest.mark.parametrize("strategy", ["stream", "recompute"])
@pytest.mark.parametrize("tolerance", [0.0, 0.01])
def test_a_custom_loss_on_either_backend(strategy, tolerance):
    problem = on_device(pairs(34, 3, 29, 40, 333, spread=4.0))
    counts = (problem.labels != IGNORE).sum(1)

    def losses(sums, counts):
        return (sums[1] / counts[1] - sums[0] / counts[0]).exp()

    def call(p, backend):
        return fused_preference_loss(
            p.hidden, p.weight, p.labels, lambda s, n, i: losses(s, n),
            strategy=strategy, backend=backend, grad_tolerance=tolerance,
        )[0]  # fmt: skip

    def of_logps(logps):
        return losses(logps.sum(1).view(2, -1), counts.view(2, -1)).mean()

    def by(function):
        return lambda p: of_logps(function(p.hidden, p.weight, p.labels))

    plain = differentiate(by(plain_logprobs), problem)
    truth = differentiate(by(oracle.linear_logprobs), double(problem))
    exact = exact_logprobs(problem).requires_grad_()
    (slope,) = torch.autograd.grad(of_logps(exact), exact)
    mass = tolerance * 2 * slope.abs().sum()  # |onehot - P|_1 <= 2
    eps = torch.finfo(torch.float32).eps
    for backend in ("triton", "torch"):
        found = differentiate(functools.partial(call, backend=backend), problem)
        gap = abs(found["out"].double() - truth["out"])
        assert gap <= value_budget(of_logps, token_budgets(problem), exact)
        for name, factor in (("hidden", problem.weight), ("weight", problem.hidden)):
            own = relative_error(plain[name], truth[name])
            left_out = mass * factor.double().norm(dim=-1).max() / truth[name].norm()
            assert relative_error(found[name], truth[name]) <= 2 * own + eps + left_out, name
