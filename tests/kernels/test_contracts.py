"""What every path promises: determinism, gradients, real operators, autocast, no silent change."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from rpo_kernels import fused_preference_loss, fused_rpo_loss, linear_logprobs, ops, oracle
from rpo_kernels.engines import recompute, streaming
from rpo_kernels.strategy import default_workspace_mb
from tests.support import (
    FLOATS,
    ROOT,
    Problem,
    assert_close_bits,
    assert_within_plain_budget,
    differentiate,
    double,
    exact_logprobs,
    loss_budget,
    one_thread,
    pairs,
    plain_logprobs,
    plain_rpo_loss,
    tokens,
    workspace_for,
)

STRATEGIES = ("recompute", "stream")
OPTIONS = {"logit_scale": 0.9, "logit_softcap": 8.0}
OPERATORS = ("linear_logprobs", "linear_logprobs_backward", "preference_loss", "sequence_sums")


@pytest.fixture(autouse=True)
def threads(request):
    """One thread, except where threads are what is tested."""
    if "bit_identical" in request.node.name:
        yield
    else:
        with one_thread():
            yield


def leaves_of(problem: Problem) -> list[torch.Tensor]:
    found = (problem.hidden, problem.weight, problem.bias)
    return [x.clone().requires_grad_() for x in found if x is not None]


def logprobs(**options):
    return lambda p: linear_logprobs(p.hidden, p.weight, p.labels, bias=p.bias, **options)


def rpo(**options):
    return lambda p: (
        fused_rpo_loss(p.hidden, p.weight, p.labels, p.ref_logps, bias=p.bias, **options).loss
    )


# determinism


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rows", [10000, 20], ids=["whole", "split"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_reruns_of_the_loss_are_bit_identical(dtype, rows, strategy):
    """With all threads, on fresh memory, and with other work in between."""
    problem = pairs(1, count=3, length=31, width=96, vocab=2003, dtype=dtype, bias=True)
    workspace = workspace_for(rows, problem)
    function = rpo(strategy=strategy, max_workspace_mb=workspace, eta=0.1, **OPTIONS)
    first = differentiate(function, problem)
    torch.randn(77777, 3).sum()
    assert_close_bits(differentiate(function, problem), first)


@pytest.mark.parametrize("workspace", [None, 0.5], ids=["whole", "panels"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_reruns_of_logprobs_are_bit_identical(dtype, workspace):
    problem = tokens(2, (131,), 96, 3001, dtype, bias=True)
    function = logprobs(max_workspace_mb=workspace, **OPTIONS)
    first = differentiate(function, problem)
    torch.randn(77777, 3).sum()
    assert_close_bits(differentiate(function, problem), first)


# gradients


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["", "softcap+scale"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_gradcheck_of_logprobs(bias, options):
    problem = tokens(3, (7,), 4, 9, torch.float64, bias=bias, ignored=0.3)
    leaves = leaves_of(problem)

    def function(hidden, weight, bias=None):
        return linear_logprobs(hidden, weight, problem.labels, bias=bias, **options)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("bias", "options"), [(False, {}), (True, OPTIONS)], ids=["plain", "bias+softcap+scale"]
)
@pytest.mark.parametrize("rows", [100, 3], ids=["whole", "split"])
def test_gradcheck_of_the_loss(rows, bias, options, strategy):
    problem = pairs(4, count=2, length=5, width=4, vocab=9, dtype=torch.float64, bias=bias)
    leaves = leaves_of(problem)
    run = {"strategy": strategy, "max_workspace_mb": workspace_for(rows, problem)}

    def function(hidden, weight, bias=None):
        return fused_rpo_loss(
            hidden, weight, problem.labels, problem.ref_logps, bias=bias, eta=0.5, **options, **run
        ).loss

    assert torch.autograd.gradcheck(function, leaves)


# operators


def recorded(monkeypatch, function, problem) -> dict[str, list[tuple]]:
    """The arguments that each operator gets from ``function(problem)`` and its backward."""
    calls: dict[str, list[tuple]] = {}
    with monkeypatch.context() as patch:
        for name in OPERATORS:
            original = getattr(ops, name)

            def spy(*args, name=name, original=original):
                detached = [
                    x.detach().clone().requires_grad_(x.requires_grad)
                    if isinstance(x, torch.Tensor)
                    else x
                    for x in args
                ]
                calls.setdefault(name, []).append(tuple(detached))
                return original(*args)

            patch.setattr(ops, name, spy)
        differentiate(function, problem)
    return calls


def custom(strategy):
    return lambda p: fused_preference_loss(
        p.hidden, p.weight, p.labels, lambda logps, *_: logps[1] - logps[0], strategy=strategy
    )[0]


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tolerance", [0.0, 0.01])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("linear_logprobs", "logprobs"),
        ("linear_logprobs_backward", "logprobs"),
        ("sequence_sums", "custom"),
        ("preference_loss", "recompute"),
        ("preference_loss", "stream"),
        ("linear_logprobs_backward", "recompute"),
    ],
)
def test_opcheck(name, kind, tolerance, dtype, bias, monkeypatch):
    """`torch.library.opcheck` on the very arguments that the public functions pass."""
    problem = pairs(5, count=2, length=7, width=8, vocab=19, dtype=dtype, bias=bias)
    function = {
        "logprobs": logprobs(grad_tolerance=tolerance),
        "custom": custom("recompute"),
        "recompute": rpo(strategy="recompute", grad_tolerance=tolerance),
        "stream": rpo(strategy="stream", grad_tolerance=tolerance),
    }[kind]
    args = recorded(monkeypatch, function, problem)[name][0]
    if name.endswith("backward"):  # runs without grad mode, on whatever requires gradients
        args = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in args)
    found = torch.library.opcheck(getattr(ops, name), args)
    assert set(found.values()) == {"SUCCESS"} and len(found) >= 4


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("kind", ["logprobs", "recompute", "stream", "auto"])
def test_compiled_fullgraph_equals_eager(kind, dynamic):
    """Forward and backward, for two shapes."""
    function = logprobs() if kind == "logprobs" else rpo(strategy=kind, eta=0.1)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (7, 11):
        problem = pairs(6, count=2, length=length, width=8, vocab=19, bias=True)
        assert_close_bits(differentiate(compiled, problem), differentiate(function, problem))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compiled_with_counts_that_change_every_step(strategy):
    """Fullgraph, as a compiled training step calls it: new global counts, new coefficients."""
    problem = pairs(6, count=2, length=7, width=8, vocab=19)

    def function(p, tokens, pairs_of_step, beta):
        return rpo(
            strategy=strategy, num_chosen_tokens=tokens, num_pairs=pairs_of_step, beta=beta,
            sft_reduction="token_mean",
        )(p)  # fmt: skip

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for counts in ((10, 2, 0.1), (13, 5, 0.2), (17.0, 7.0, 0.3), (19.0, 8.0, 0.4)):
        found = differentiate(lambda p, c=counts: compiled(p, *c), problem)
        assert_close_bits(found, differentiate(lambda p, c=counts: function(p, *c), problem))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compiled_fields_equal_eager(strategy):
    """The whole output, packed, without gradient."""
    problem = pairs(7, count=2, length=7, width=8, vocab=19)
    flat = problem.hidden.flatten(0, 1), problem.weight, problem.labels.flatten()
    ends = torch.arange(5, dtype=torch.int32) * 7

    def function(hidden, weight, labels, refs):
        return fused_rpo_loss(hidden, weight, labels, refs, cu_seqlens=ends, strategy=strategy)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager, found = function(*flat, problem.ref_logps), compiled(*flat, problem.ref_logps)
    assert type(found) is type(eager)
    for one, two in zip(found, eager, strict=True):
        assert torch.equal(one, two)


# autocast


def under_autocast(function):
    def inner(p: Problem):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return function(p)

    return inner


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["logprobs", *STRATEGIES])
@pytest.mark.parametrize("panels", [False, True], ids=["whole", "panels"])
def test_autocast_is_the_bfloat16_computation(kind, hidden_dtype, panels):
    """float32 weights under bf16 autocast: the bf16 computation, with float32 gradients.

    Not to the bit: sums may be split where the cast panels end. The sequences' sums come as close
    to the truth as those of bf16 operands do, and no closer.
    """
    half = pairs(8, count=3, dtype=torch.bfloat16)
    run = {"max_workspace_mb": workspace_for(9, half)} if panels else {}
    function = logprobs(**run) if kind == "logprobs" else rpo(strategy=kind, eta=0.1, **run)
    wide = half._replace(hidden=half.hidden.to(hidden_dtype), weight=half.weight.float())
    found = differentiate(under_autocast(function), wide)
    assert found["out"].dtype == found["weight"].dtype == torch.float32
    assert found["hidden"].dtype == hidden_dtype

    def other(function, p):
        if kind == "logprobs":
            return differentiate(lambda p: function(p.hidden, p.weight, p.labels), p)
        return differentiate(lambda p: function(*p[:3], p.ref_logps, eta=0.1), p)

    plain = other(plain_logprobs if kind == "logprobs" else plain_rpo_loss, half)
    truth = other(oracle.linear_logprobs if kind == "logprobs" else oracle.rpo_loss, double(half))
    rounded = found | {name: found[name].bfloat16() for name in ("hidden", "weight")}
    if kind != "logprobs":
        gap = abs(rounded.pop("out") - truth.pop("out"))
        assert gap <= loss_budget(half, eta=0.1)
        del plain["out"]
    assert_within_plain_budget(rounded, plain, truth)

    def sums(p):
        if kind == "logprobs":
            return function(p).sum(1)
        return torch.cat(fused_rpo_loss(*p[:3], p.ref_logps, strategy=kind, **run)[3:5])

    cast, own, exact = under_autocast(sums)(wide), sums(half), exact_logprobs(half).sum(1)
    assert_within_plain_budget({"sums": cast}, {"sums": own}, {"sums": exact})
    assert_within_plain_budget({"sums": own}, {"sums": cast}, {"sums": exact})


def test_without_autocast_dtypes_must_agree():
    problem = pairs(9)
    with pytest.raises(TypeError, match="weight: expected hidden's dtype torch.bfloat16"):
        linear_logprobs(problem.hidden.bfloat16(), problem.weight, problem.labels)


def test_autocast_leaves_float64_alone():
    problem = pairs(10, dtype=torch.float64)
    assert_close_bits(differentiate(under_autocast(rpo()), problem), differentiate(rpo(), problem))


# an explicit request runs or raises


def engines_used(monkeypatch, function, problem) -> set[str]:
    """Which engines a call and its backward enter."""
    used = set()
    with monkeypatch.context() as patch:
        for module, name in (
            (streaming, "loss_and_grads"),
            (recompute, "forward"),
            (recompute, "backward"),
        ):
            original = getattr(module, name)

            def spy(*args, label=name, original=original, **options):
                used.add(label)
                return original(*args, **options)

            patch.setattr(module, name, spy)
        differentiate(function, problem)
    return used


STREAM, RECOMPUTE = {"loss_and_grads"}, {"forward", "backward"}


@pytest.mark.parametrize("make", [rpo, lambda **o: custom(o["strategy"])], ids=["rpo", "custom"])
def test_an_explicit_strategy_is_the_one_that_runs(make, monkeypatch):
    problem = pairs(11)
    assert engines_used(monkeypatch, make(strategy="stream"), problem) == STREAM
    assert engines_used(monkeypatch, make(strategy="recompute"), problem) == RECOMPUTE


def test_the_rule_of_auto(monkeypatch):
    """As `fused_rpo_loss` documents it."""

    class Entered(Exception):
        pass

    def enter(*args, **options):
        raise Entered("stream" if len(args) > 6 else "recompute")

    monkeypatch.setattr(streaming, "loss_and_grads", enter)
    monkeypatch.setattr(recompute, "forward", enter)

    def used(frozen="", dtype=torch.float32, rows=None, length=30, width=8, vocab=701):
        hidden = torch.zeros(6, length, width, dtype=dtype)
        weight = torch.zeros(vocab, width, dtype=dtype)
        problem = Problem(hidden, weight, torch.zeros(6, length, dtype=torch.int64), None)
        run = {} if rows is None else {"max_workspace_mb": workspace_for(rows, problem)}
        with pytest.raises(Entered) as entered:
            differentiate(rpo(strategy="auto", **run), problem, frozen=frozen)
        return str(entered.value)

    assert used() == "stream"
    assert used(dtype=torch.bfloat16) == "stream"
    assert used(frozen="hidden weight") == "stream"  # the same bits with and without gradients
    assert used(dtype=torch.float16) == "recompute"
    assert used(rows=180) == "stream" and used(rows=100) == "recompute"  # of 180 rows
    assert used(rows=240, length=70) == "recompute"  # fewer than 256 rows fit
    assert used(rows=300, length=70) == "stream"  # 420 rows at 300 a panel, small accumulators
    assert used(rows=300, length=70, frozen="weight") == "stream"
    assert used(rows=300, length=70, dtype=torch.bfloat16) == "recompute"  # rounds each product
    assert used(rows=300, length=70, dtype=torch.bfloat16, frozen="weight") == "stream"
    # two accumulators, 8 V D bytes, beyond four workspaces
    assert used(rows=257, length=70, width=1200, vocab=20000) == "recompute"
    assert used(rows=257, length=70, width=1200, vocab=20000, frozen="weight") == "stream"


def test_stream_without_room_raises():
    problem = pairs(13)
    with pytest.raises(ValueError, match="max_workspace_mb: strategy='stream' expected room"):
        rpo(strategy="stream", max_workspace_mb=1e-3)(problem)
    rpo(strategy="auto", max_workspace_mb=1e-3)(problem)


def run_python(code: str, **environment) -> str:
    """Run `code` in a fresh interpreter; return what it prints."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env, timeout=120
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


CALL = """
import torch
from rpo_kernels import fused_rpo_loss, linear_logprobs
hidden, weight = torch.randn(4, 3, 8), torch.randn(20, 8, requires_grad=True)
labels = torch.randint(20, (4, 3))
"""


def test_triton_on_cpu_raises_without_its_interpreter():
    code = (
        CALL
        + """
for call in (linear_logprobs, lambda *a, **k: fused_rpo_loss(*a, None, **k)):
    try:
        call(hidden, weight, labels, backend="triton")
    except RuntimeError as error:
        print("TRITON_INTERPRET" in str(error) and "backend='triton'" in str(error))
"""
    )
    assert run_python(code).split() == ["True", "True"]


def test_importing_the_package_imports_no_triton():
    """PyTorch itself does, the first time any custom operator is called; the package never."""
    code = (
        "import rpo_kernels, sys; print('triton' in sys.modules)"
        + CALL
        + """
fused_rpo_loss(hidden, weight, labels, None).loss.backward()
linear_logprobs(hidden, weight, labels).sum().backward()
print([name for name in sys.modules if name.startswith("rpo_kernels.backends.triton")])
"""
    )
    assert run_python(code).split() == ["False", "[]"]


def test_it_works_where_triton_cannot_be_imported():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        + CALL
        + """
for strategy in ("auto", "recompute", "stream"):
    fused_rpo_loss(hidden, weight, labels, None, strategy=strategy).loss.backward()
try:
    linear_logprobs(hidden, weight, labels, backend="triton")
except RuntimeError as error:
    print(weight.grad.isfinite().all().item(), "pip install triton" in str(error))
"""
    )
    assert run_python(code) == "True True"


def test_auto_on_cpu_is_the_torch_backend():
    """Even where Triton's interpreter is on: it is for tests, and slow."""
    problem = pairs(14)
    assert_close_bits(
        differentiate(rpo(backend="auto"), problem), differentiate(rpo(backend="torch"), problem)
    )


def test_the_default_workspace(monkeypatch):
    properties = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert default_workspace_mb(torch.device("cpu")) == 512
    assert default_workspace_mb(torch.device("cuda", 1)) == 4096
