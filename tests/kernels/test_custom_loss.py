"""`fused_preference_loss`: a custom loss runs on both engines and under the compiler."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rpo_kernels import fused_preference_loss, oracle
from tests.support import (
    FLOATS,
    IGNORE,
    Problem,
    Result,
    assert_close_bits,
    assert_within_bounds,
    assert_within_plain_budget,
    assert_within_roundings,
    differentiate,
    double,
    exact_logprobs,
    loss_bounds,
    loss_budget,
    loss_of_logps,
    one_thread,
    pack,
    pairs,
    plain_rpo_loss,
    poisoned_memory,
    token_budgets,
    value_budget,
    workspace_for,
)

STRATEGIES = ("recompute", "stream")


@pytest.fixture(autouse=True, scope="module")
def quiet():
    with poisoned_memory(), one_thread():
        yield


def rpo(ref_logps, beta=0.1, weight=0.02):
    """The default loss of `fused_rpo_loss` as a user would write it."""

    def losses(logps, counts, index):
        ratios = logps - ref_logps.view(2, -1)[:, index]
        return -F.logsigmoid(beta * (ratios[0] - ratios[1])) - weight * logps[0]

    return losses


def mine(loss_fn, **options):
    """A function of a problem that returns the loss."""
    return lambda p: fused_preference_loss(
        p.hidden, p.weight, p.labels, loss_fn, bias=p.bias, **options
    )[0]


def assert_is_rpo(found: Result, problem: Problem) -> None:
    """The value and gradients of `rpo`, within the budgets of `fused_rpo_loss` with eta = 0.2."""
    options = {"eta": 0.2}

    def loss(function):
        return lambda p: function(*p[:3], p.ref_logps, bias=p.bias, **options)

    truth = differentiate(loss(oracle.rpo_loss), double(problem))
    if problem.hidden.dtype == torch.float64:
        bounds = loss_bounds(problem, lambda x: loss_of_logps(x, problem, **options))
        assert_within_bounds(found, truth, bounds)
        return
    if "out" in found:
        assert abs(found["out"].double() - truth["out"]) <= loss_budget(problem, **options)
    plain = differentiate(loss(plain_rpo_loss), problem)
    names = found.keys() - {"out"}
    assert_within_plain_budget(*({name: x[name] for name in names} for x in (found, plain, truth)))


@pytest.mark.parametrize("strategy", [*STRATEGIES, "auto"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [1000, 50, 9], ids=["whole", "grouped", "split"])
def test_a_users_rpo_is_rpo(rows, dtype, strategy):
    """Written in Python or built in: the same loss."""
    problem = pairs(1, count=4, dtype=dtype, bias=True)
    run = {"strategy": strategy, "max_workspace_mb": workspace_for(rows, problem)}
    assert_is_rpo(differentiate(mine(rpo(problem.ref_logps), **run), problem), problem)


@pytest.mark.parametrize("rows", [1000, 50, 9], ids=["whole", "grouped", "split"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_the_function_is_given(strategy, rows):
    """Summed log-probs, counts, and which pairs they are: every pair exactly once, in order."""
    problem = pairs(3, count=4, dtype=torch.float64)
    exact, errors = exact_logprobs(problem), token_budgets(problem)
    sums, off = exact.sum(1).view(2, -1), errors.sum(1).view(2, -1)
    counts = (problem.labels != IGNORE).sum(1).view(2, -1)
    seen = []

    def spy(logps, tokens, index):
        assert logps.shape == tokens.shape == (2, len(index)) and index.dtype == torch.int64
        assert logps.dtype == tokens.dtype == torch.float64
        assert ((logps.detach() - sums[:, index]).abs() <= off[:, index]).all()
        assert torch.equal(tokens, counts[:, index].double())
        seen.extend(index.tolist())
        return -logps[0] / tokens[0]

    run = {"strategy": strategy, "max_workspace_mb": workspace_for(rows, problem)}
    leaf = problem.hidden.clone().requires_grad_()
    loss, logps = fused_preference_loss(leaf, problem.weight, problem.labels, spy, **run)
    assert seen == [0, 1, 2, 3]
    assert ((logps - sums).abs() <= off).all()
    assert logps.shape == (2, 4) and not logps.requires_grad
    assert loss.shape == () and loss.requires_grad
    budget = value_budget(lambda x: (-x[:4].sum(1) / counts[0]).mean(), errors, exact)
    assert abs(loss.detach() - (-sums[0] / counts[0]).mean()) <= budget


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_num_pairs_layouts_and_upstream(strategy):
    problem = pairs(4, count=3, dtype=torch.float64)
    packed, ends = pack(problem)
    function, run = rpo(problem.ref_logps), {"strategy": strategy}
    whole = differentiate(mine(function, **run), problem)
    third = differentiate(lambda p: 3 * mine(function, num_pairs=9, **run)(p), problem)
    for found in (third, whole):
        assert_is_rpo(found, problem)
    flat = differentiate(mine(function, cu_seqlens=ends, **run), packed)
    assert torch.equal(flat["out"], whole["out"]) and torch.equal(flat["weight"], whole["weight"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_loss_of_chosen_responses_alone(strategy):
    """A function that ignores one input gives zero gradient there, not an error."""
    problem = pairs(5)
    found = differentiate(mine(lambda logps, *_: -logps[0], strategy=strategy), problem)
    assert (found["hidden"][3:] == 0).all() and (found["hidden"][:3] != 0).any()


@pytest.mark.parametrize("strategy", [*STRATEGIES, "auto"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, strategy):
    problem = pairs(7)
    trained = mine(rpo(problem.ref_logps), strategy=strategy)(
        problem._replace(hidden=problem.hidden.clone().requires_grad_())
    )
    with mode():
        loss = mine(rpo(problem.ref_logps), strategy=strategy)(problem)
    assert torch.equal(loss, trained.detach()) and not loss.requires_grad


def test_a_gradient_that_streaming_would_drop():
    """To a tensor that the function closes over: recomputed, and an error while streaming."""
    problem, beta = pairs(8), torch.tensor(0.1, requires_grad=True)
    scaled = 2 * beta
    mine(rpo(problem.ref_logps, scaled), strategy="recompute")(grown := leaves(problem)).backward()
    assert beta.grad != 0 and grown.weight.grad is not None
    for strategy in ("stream", "auto"):
        with pytest.raises(ValueError, match="loss_fn: expected no gradient to other tensors"):
            mine(rpo(problem.ref_logps, scaled), strategy=strategy)(leaves(problem))
        with pytest.raises(ValueError, match="loss_fn: expected losses that depend on logps"):
            mine(lambda logps, *_: logps[0].detach(), strategy=strategy)(leaves(problem))


def leaves(problem: Problem) -> Problem:
    """The problem with a trained weight."""
    return problem._replace(weight=problem.weight.clone().requires_grad_())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("tolerance", [0.1, 0.01])
def test_what_skipping_leaves_out(tolerance, strategy):
    """The weight is the identity, so that hidden's gradient is that of the logits: the L1 mass of
    what is missing there is at most the tolerance, with coefficients that differ by a factor of
    a thousand, the large ones where most entries are light.
    """
    vocab = 300
    make = torch.Generator().manual_seed(9)
    hidden = torch.randn(6, 70, vocab, generator=make, dtype=torch.float64)
    hidden *= torch.tensor([1.0, 9, 1, 1, 9, 1])[:, None, None]
    labels = torch.randint(vocab, (6, 70), generator=make)
    labels[:, 3::7] = IGNORE
    problem = Problem(hidden, torch.eye(vocab, dtype=torch.float64), labels, None)
    weights = torch.tensor([1.0, 1e-3, 0.5])

    def losses(logps, counts, index):
        return (logps[1] - 2 * logps[0]) * weights[index]

    exact = differentiate(mine(losses, strategy=strategy), problem)["hidden"]
    found = differentiate(mine(losses, strategy=strategy, grad_tolerance=tolerance), problem)
    missing = (found["hidden"] - exact).abs().sum() / exact.abs().sum()
    terms = exact.numel() + vocab  # in either sum
    assert 0 < missing <= tolerance * (1 + terms * torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_pairs(strategy):
    problem = pairs(6)
    empty = problem._replace(hidden=problem.hidden[:0], labels=problem.labels[:0])
    found = differentiate(mine(lambda logps, *_: -logps[0], strategy=strategy), empty)
    assert all((tensor == 0).all() for tensor in found.values())
    assert found["weight"].shape == problem.weight.shape


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda logps, *_: logps, r"\[2, 3\]"),
        (lambda logps, *_: logps.sum(), r"\[\]"),
        (lambda *_: 1.0, "float"),
        (lambda *_: None, "NoneType"),
    ],
    ids=["per sequence", "summed", "number", "nothing"],
)
def test_a_wrong_shape_is_named(function, got, strategy):
    problem = pairs(7)
    with pytest.raises(ValueError, match=rf"loss_fn: expected a tensor of shape \(3,\).*{got}"):
        mine(function, strategy=strategy)(
            problem._replace(hidden=problem.hidden.clone().requires_grad_())
        )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_second_derivatives_raise(strategy):
    problem = pairs(8)
    hidden = problem.hidden.clone().requires_grad_()
    weight = problem.weight.clone().requires_grad_()
    loss = mine(rpo(problem.ref_logps), strategy=strategy)(
        problem._replace(hidden=hidden, weight=weight)
    )
    with pytest.raises(RuntimeError, match="second derivatives|differentiate twice"):
        (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
        (grad.square().sum() + weight.sum()).backward()  # a penalty beside another term


def leaf_and_loss(seed, strategy):
    """Hidden states that take a gradient, and the loss of a function on them."""
    problem = pairs(seed)
    hidden = problem.hidden.clone().requires_grad_()
    return hidden, mine(rpo(problem.ref_logps), strategy=strategy)(problem._replace(hidden=hidden))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_backward_twice_gives_the_same_gradients(strategy):
    hidden, loss = leaf_and_loss(9, strategy)
    (once,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    kept = once.clone()
    once.zero_()
    (twice,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(kept, twice)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_loss_runs_outside_autocast(strategy):
    """Log-probs of hundreds of nats must not be rounded to bf16, by a matmul for instance."""
    problem, sign = pairs(13), torch.tensor([1.0, -1.0])

    def margins(logps, counts, index):
        assert not torch.is_autocast_enabled("cpu")
        return -(0.01 * (sign @ logps))

    with torch.autocast("cpu", torch.bfloat16):
        loss, logps = fused_preference_loss(
            problem.hidden, problem.weight, problem.labels, margins, strategy=strategy
        )
    assert loss.dtype == torch.float32
    want, size = -0.01 * (logps[0] - logps[1]).double().mean(), 0.01 * logps.abs().sum(0).mean()
    assert_within_roundings(loss, want, 6, size)  # of two products, a product, a mean of three


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_batched_upstream_gradients(strategy):
    hidden, loss = leaf_and_loss(14, strategy)
    upstream, problem = torch.tensor([[1.0], [3.0]]), pairs(14)
    (two,) = torch.autograd.grad(loss[None], hidden, upstream, is_grads_batched=True)
    for factor, grad in zip((1, 3), two, strict=True):
        assert_is_rpo({"hidden": grad / factor}, problem)


def test_compiled_it_recomputes_and_is_the_same_loss():
    """A Python function cannot be an operator's argument: "auto" recomputes, fullgraph."""
    problem = pairs(10)
    function = rpo(problem.ref_logps)
    torch.compiler.reset()
    compiled = torch.compile(mine(function), fullgraph=True, backend="aot_eager")
    assert_is_rpo(differentiate(compiled, problem), problem)


def test_compiled_an_explicit_stream_raises():
    """Fullgraph, the compiler wraps the ValueError; else it breaks the graph and streams."""
    problem = pairs(11)
    stream = mine(rpo(problem.ref_logps), strategy="stream")
    torch.compiler.reset()
    whole = torch.compile(stream, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="expected 'recompute' or 'auto' under torch.compile"):
        whole(problem._replace(hidden=problem.hidden.clone().requires_grad_()))
    torch.compiler.reset()
    broken = torch.compile(stream, backend="aot_eager")
    assert_close_bits(differentiate(broken, problem), differentiate(stream, problem))
