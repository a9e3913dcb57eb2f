"""`linear_logprobs`: values and gradients against float64, within the plain budget (`support`).

Memory that `torch.empty` returns is poisoned with NaN throughout.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rpo_kernels import fused_preference_loss, linear_logprobs, ops, oracle
from rpo_kernels.spec import ACCUMULATOR
from tests.support import (
    FLOATS,
    IGNORE,
    Problem,
    assert_close_bits,
    assert_within_bounds,
    assert_within_plain_budget,
    assert_within_roundings,
    differentiate,
    double,
    exact_logprobs,
    examples,
    one_thread,
    plain_logprobs,
    poisoned_memory,
    relative_error,
    rounding_bounds,
    tokens,
    workspace_for,
)


@pytest.fixture(autouse=True, scope="module")
def poison():
    with poisoned_memory(), one_thread():
        yield


def call(function, **options):
    """``function`` as a function of a problem."""
    return lambda p: function(p.hidden, p.weight, p.labels, bias=p.bias, **options)


def upstream_for(problem: Problem, seed: int = 0):
    make = torch.Generator().manual_seed(seed)
    return torch.randn(problem.labels.shape, generator=make, dtype=torch.float64).float().double()


def three_ways(problem: Problem, ours: dict | None = None, **options):
    """Ours, the plain same-dtype expression and the truth, with one random upstream gradient."""
    upstream = upstream_for(problem)
    return (
        differentiate(call(linear_logprobs, **options, **(ours or {})), problem, upstream),
        differentiate(call(plain_logprobs, **options), problem, upstream),
        differentiate(call(oracle.linear_logprobs, **options), double(problem), upstream),
    )


def assert_within_budget(problem: Problem, found, plain, truth, **options):
    """The plain budget; float64, which has no truth above it, against the rounding bounds."""
    if problem.hidden.dtype == torch.float64:
        bounds = rounding_bounds(problem, upstream_for(problem), **options)
        assert_within_bounds(found, truth, bounds)
    else:
        assert_within_plain_budget(found, plain, truth)


def test_poison_works():
    assert torch.empty(7).isnan().all() and torch.zeros(2).new_empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(3, dtype=torch.bfloat16)).isnan().all()


TRANSFORMS = [
    pytest.param({}, id="plain"),
    pytest.param({"logit_scale": 0.4}, id="scale"),
    pytest.param({"logit_softcap": 5.0}, id="softcap"),
    pytest.param({"logit_scale": 1.7, "logit_softcap": 5.0}, id="scale+softcap"),
]


@pytest.mark.parametrize("options", TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bias_softcap_and_scale(dtype, bias, options):
    problem = tokens(1, (3, 37), 129, 1031, dtype, bias=bias)
    found, plain, truth = three_ways(problem, **options)
    assert found["out"].dtype == ACCUMULATOR[dtype]
    assert found["hidden"].dtype == found["weight"].dtype == dtype
    assert_within_budget(problem, found, plain, truth, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_real_vocabulary(dtype):
    """The sizes of GPT-2's head: V = 50,257, and D = 1,000."""
    problem = tokens(2, (61,), 1000, 50257, dtype, spread=3)
    assert_within_plain_budget(*three_ways(problem))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "vocab"), [(131, 576, 4099), (333, 63, 11003), (17, 961, 7), (2049, 96, 257)]
)
def test_ragged_sizes(rows, width, vocab, dtype):
    problem = tokens(2, (rows,), width, vocab, dtype, spread=3)
    assert_within_budget(problem, *three_ways(problem))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("workspace", [1e-6, 0.05, 1, 6])
def test_a_tiny_workspace_changes_rounding_only(dtype, workspace):
    problem = tokens(3, (67,), 64, 2003, dtype, bias=True)
    if workspace < 0.01:  # one row and one vocabulary entry at a time
        problem = tokens(3, (19,), 64, 601, dtype, bias=True)
    found, plain, truth = three_ways(problem, {"max_workspace_mb": workspace}, logit_softcap=20.0)
    assert_within_plain_budget(found, plain, truth)
    large = differentiate(call(linear_logprobs, logit_softcap=20.0), problem, upstream_for(problem))
    assert_within_plain_budget(large, plain, truth)


SHAPES = st.tuples(st.integers(0, 9), st.integers(1, 40), st.integers(1, 300))


@examples(90)
@given(
    SHAPES,
    st.sampled_from(FLOATS),
    st.booleans(),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([None, 1e-6, 0.01]),
    st.sampled_from([{}, {"logit_scale": 0.5}, {"logit_softcap": 3.0}]),
    st.integers(0, 99),
)
def test_any_shape(shape, dtype, bias, ignored, workspace, options, seed):
    rows, width, vocab = shape
    problem = tokens(seed, (rows,), width, vocab, dtype, bias=bias, ignored=ignored)
    found, _, truth = three_ways(problem, {"max_workspace_mb": workspace}, **options)
    bounds = rounding_bounds(problem, upstream_for(problem), **options)
    assert_within_bounds(found, truth, bounds)


@examples(60)
@given(st.data())
def test_any_labels(data):
    """Repeated targets, both ends of the vocabulary, any ignore_index."""
    vocab = data.draw(st.integers(2, 12))
    ignore = data.draw(st.sampled_from([-100, -1, 12, 2**40, -(2**62)]))
    label = st.one_of(st.just(ignore), st.sampled_from([0, vocab - 1]), st.integers(0, vocab - 1))
    labels = torch.tensor(data.draw(st.lists(label, max_size=10)), dtype=torch.int64)
    problem = tokens(4, labels.shape, 8, vocab, torch.float64)
    problem = problem._replace(labels=labels)
    upstream = upstream_for(problem)
    found = differentiate(call(linear_logprobs, ignore_index=ignore), problem, upstream)
    masked = problem._replace(labels=torch.where(labels == ignore, IGNORE, labels))
    truth = differentiate(call(oracle.linear_logprobs), masked, upstream)
    assert_within_bounds(found, truth, rounding_bounds(masked, upstream))
    assert (found["out"][labels == ignore] == 0).all()


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 4), (1, 2, 3, 2), (3, 0), (0, 4)])
def test_any_leading_shape(shape):
    problem = tokens(5, shape, 16, 33, torch.float64, ignored=0.2)
    upstream = upstream_for(problem)
    found = differentiate(call(linear_logprobs), problem, upstream)
    truth = differentiate(call(oracle.linear_logprobs), problem, upstream)
    assert found["out"].shape == shape and found["hidden"].shape == (*shape, 16)
    assert_within_bounds(found, truth, rounding_bounds(problem, upstream))


@pytest.mark.parametrize("layout", ["transposed", "shifted", "strided", "expanded"])
def test_non_contiguous_hidden(layout):
    base = tokens(6, (4, 9), 16, 33).hidden.requires_grad_()
    hidden = {
        "transposed": lambda: base.transpose(0, 1),
        "shifted": lambda: base[:, :-1],
        "strided": lambda: base[:, :, ::2],
        "expanded": lambda: base[:1].expand(3, -1, -1),
    }[layout]()
    assert not hidden.is_contiguous()
    weight = tokens(6, (1,), hidden.shape[-1], 33).weight
    labels = torch.randint(33, hidden.shape[:-1])
    out = linear_logprobs(hidden, weight, labels)
    (grad,) = torch.autograd.grad(out.sum(), base)
    dense = linear_logprobs(hidden.contiguous(), weight, labels)
    (want,) = torch.autograd.grad(dense.sum(), base)
    assert torch.equal(out, dense) and torch.equal(grad, want)


def test_non_contiguous_labels_and_strided_weight():
    problem = tokens(7, (6, 5), 24, 50)
    wide = torch.cat([problem.weight, problem.weight], 1)[:, :24]
    assert not wide.is_contiguous()
    labels = problem.labels.t().contiguous().t()
    strided = problem._replace(weight=wide, labels=labels)
    upstream = upstream_for(problem)
    given = differentiate(
        lambda p: linear_logprobs(p.hidden, wide, labels), strided, upstream, frozen="weight"
    )
    dense = differentiate(call(linear_logprobs), problem, upstream, frozen="weight")
    assert_close_bits(given, dense)
    leaf = wide.detach().requires_grad_()
    (grad,) = torch.autograd.grad(linear_logprobs(problem.hidden, leaf, labels).sum(), leaf)
    ones = torch.ones(labels.shape)
    plain = differentiate(call(plain_logprobs), problem, ones)["weight"]
    truth = differentiate(call(oracle.linear_logprobs), double(problem), ones)["weight"]
    assert_within_plain_budget({"weight": grad}, {"weight": plain}, {"weight": truth})


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("empty", ["no rows", "all ignored"])
def test_no_row_at_all_is_zero_and_differentiable(empty, dtype):
    problem = tokens(8, (0 if empty == "no rows" else 5,), 16, 33, dtype, bias=True, ignored=1.0)
    found = differentiate(call(linear_logprobs), problem)
    assert set(found) == {"out", "hidden", "weight", "bias"}
    for tensor in found.values():
        assert (tensor == 0).all()


def test_ignored_rows_cost_nothing(monkeypatch):
    """They are dropped before the first matmul: the backend never sees more than the kept rows."""
    from rpo_kernels.backends import torch_backend

    seen = []
    for name in ("lse_and_target", "exp_panel"):
        original = getattr(torch_backend, name)

        def spy(hidden, *rest, original=original, **options):
            seen.append(hidden.shape[0])
            return original(hidden, *rest, **options)

        monkeypatch.setattr(torch_backend, name, spy)
    problem = tokens(9, (400,), 16, 33, ignored=0.9)
    kept = int((problem.labels != IGNORE).sum())
    differentiate(call(linear_logprobs), problem)
    assert seen and max(seen) == kept < 80
    seen.clear()
    differentiate(call(linear_logprobs), problem._replace(labels=torch.full((400,), IGNORE)))
    assert sum(seen) == 0


def test_int32_targets():
    problem = tokens(10, (30,), 16, 33)
    small = problem._replace(labels=problem.labels.int())
    assert_close_bits(
        differentiate(call(linear_logprobs), small), differentiate(call(linear_logprobs), problem)
    )


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "hidden weight", "hidden bias"])
def test_frozen_inputs_skip_their_gradient_and_change_no_other(frozen):
    problem = tokens(11, (50,), 16, 130, bias=True)
    whole = differentiate(call(linear_logprobs), problem)
    part = differentiate(call(linear_logprobs), problem, frozen=frozen)
    assert set(part) == set(whole) - set(frozen.split())
    assert_close_bits(part, {name: whole[name] for name in part})


def test_all_frozen_or_no_grad_gives_a_leaf():
    problem = tokens(11, (50,), 16, 130, bias=True)
    assert not differentiate(call(linear_logprobs), problem, frozen="hidden weight bias")[
        "out"
    ].requires_grad
    weight = problem.weight.clone().requires_grad_()
    with torch.no_grad():
        out = linear_logprobs(problem.hidden, weight, problem.labels)
    assert not out.requires_grad


def test_rows_without_upstream_gradient(monkeypatch):
    """Their gradient is exactly zero, they cost nothing in backward, and nobody else's changes."""
    from rpo_kernels.backends import torch_backend

    problem = tokens(12, (60,), 16, 130, torch.float64, ignored=0)
    upstream = upstream_for(problem)
    upstream[10:40] = 0
    seen, original = [], torch_backend.exp_panel

    def spy(hidden, *rest, **options):
        seen.append(hidden.shape[0])
        return original(hidden, *rest, **options)

    monkeypatch.setattr(torch_backend, "exp_panel", spy)
    found = differentiate(call(linear_logprobs), problem, upstream)
    assert max(seen) == 30
    truth = differentiate(call(oracle.linear_logprobs), problem, upstream)
    assert_within_bounds(found, truth, rounding_bounds(problem, upstream))
    assert (found["hidden"][10:40] == 0).all()
    nothing = differentiate(call(linear_logprobs), problem, torch.zeros(60))
    assert all((nothing[name] == 0).all() for name in ("hidden", "weight"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("power", [-30, -20, 20])
def test_tiny_and_huge_upstream_gradients(power, dtype):
    """A power of two upstream scales the gradients by exactly that, where the dtype holds them."""
    problem = tokens(13, (64,), 32, 130, dtype)
    upstream = upstream_for(problem) / 64
    one = differentiate(call(linear_logprobs), problem, upstream)
    scaled = differentiate(call(linear_logprobs), problem, upstream * 2.0**power)
    for name in ("hidden", "weight"):
        want = (one[name].double() * 2.0**power).to(dtype)
        tiny = torch.finfo(dtype).tiny
        normal = (want.abs() > 16 * tiny) & want.isfinite() & (one[name].abs() > 16 * tiny)
        assert torch.equal(scaled[name][normal], want[normal])
        assert not scaled[name].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_of_very_different_weight_keep_their_own_precision(dtype):
    """Upstream gradients over 12 orders of magnitude: dH of each row is as right as a row alone."""
    problem = tokens(14, (26,), 48, 511, dtype, ignored=0)
    upstream = 10.0 ** -torch.arange(26).double().div(2 if dtype != torch.float16 else 8)
    found = differentiate(call(linear_logprobs), problem, upstream)["hidden"]
    truth = differentiate(call(oracle.linear_logprobs), double(problem), upstream)["hidden"]
    errors = [relative_error(a, b) for a, b in zip(found, truth, strict=True)]
    ones = differentiate(call(plain_logprobs), problem)["hidden"]
    base = differentiate(call(oracle.linear_logprobs), double(problem))["hidden"]
    plain = [relative_error(a, b) for a, b in zip(ones, base, strict=True)]
    for error, own in zip(errors, plain, strict=True):
        assert error <= 2 * max(plain) + torch.finfo(dtype).eps, (error, own)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_row_only_affects_itself(bad):
    """The documented policy: bad logits give NaN for their row; nothing else notices."""
    problem = tokens(15, (20,), 16, 600, bias=True, ignored=0)
    spoiled = problem.hidden.clone()
    spoiled[7] = bad
    upstream = torch.ones(20)
    upstream[7] = 0  # what a caller who masks the row passes
    whole = differentiate(call(linear_logprobs), problem, upstream)
    found = differentiate(call(linear_logprobs), problem._replace(hidden=spoiled), upstream)
    others = torch.arange(20) != 7
    assert found["out"][7].isnan()
    assert torch.equal(found["out"][others], whole["out"][others])
    assert torch.equal(found["hidden"][others], whole["hidden"][others])
    assert torch.equal(found["weight"], whole["weight"])
    unmasked = differentiate(call(linear_logprobs), problem._replace(hidden=spoiled))
    assert unmasked["hidden"][7].isnan().any()
    assert unmasked["hidden"][others].isfinite().all()
    everywhere = differentiate(call(linear_logprobs), problem)
    assert torch.equal(unmasked["hidden"][others], everywhere["hidden"][others])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_keeps_its_block_whole(bad):
    """Skipping cannot judge a block with a NaN: all of it is kept, and its other rows are exact."""
    problem = tokens(18, (300,), 16, 600, ignored=0)
    others = [row for row in range(256) if row != 7]
    one = torch.ones(300)
    plain, truth = (
        differentiate(call(function), p, one)["hidden"][others]
        for function, p in (
            (plain_logprobs, problem),
            (oracle.linear_logprobs, double(problem)),
        )
    )
    problem.hidden[7] = bad
    problem.labels[7] = 3
    exact, found = (
        differentiate(call(linear_logprobs, grad_tolerance=tau), problem)["hidden"]
        for tau in (0.0, 0.01)
    )
    assert exact[7].isnan().any() and found[7].isnan().any()
    for rows in (exact[others], found[others]):
        assert_within_plain_budget({"hidden": rows}, {"hidden": plain}, {"hidden": truth})
    assert not torch.equal(found[256:], exact[256:]) and found[256:].isfinite().all()


def test_an_ignored_bad_row_affects_nothing():
    problem = tokens(16, (20,), 16, 33, ignored=0)
    problem.labels[7] = IGNORE
    clean = differentiate(call(linear_logprobs), problem)
    problem.hidden[7] = math.nan
    assert_close_bits(differentiate(call(linear_logprobs), problem), clean)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [1e3, 1e4])
def test_huge_logits_do_not_overflow(size, dtype):
    """Logits of +-1e4: finite everywhere, and right to the rounding of logits of that size."""
    problem = tokens(17, (40,), 64, 700, dtype, spread=size / 4)
    logits = problem.hidden.double() @ problem.weight.double().T
    assert logits.abs().max() > 0.9 * size
    found, _, truth = three_ways(problem)
    for tensor in found.values():
        assert tensor.isfinite().all()
    assert_within_bounds(found, truth, rounding_bounds(problem, upstream_for(problem)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [30, 100, 1e3, 1e4], ids=str)
def test_large_logits_within_the_plain_budget(size, dtype):
    """Probabilities must come from differences to the largest logit, not to a rounded lse."""
    assert_within_plain_budget(*three_ways(tokens(17, (40,), 64, 700, dtype, spread=size / 4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("push", [0.1, 0.15, 0.25], ids=["0.98", "0.999", "1-2e-7"])
def test_confident_rows(push, dtype):
    """Every target's probability near 1: log-probs near 0, and p - 1, keep their accuracy."""
    problem = tokens(18, (64,), 128, 1000, dtype, spread=128**0.5, ignored=0)
    hidden = problem.weight[problem.labels] * push + 0.1 * problem.hidden
    found, plain, truth = three_ways(problem._replace(hidden=hidden))
    assert truth["out"].mean() > -0.05
    assert_within_plain_budget(found, plain, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("push", "gain"), [(0, 1.5), (0.1, 10)], ids=["mixed", "confident"])
@pytest.mark.parametrize("tolerance", [0, 0.01])
def test_a_targets_logit_is_never_rounded(dtype, push, gain, tolerance):
    """CPUs round products to half precision; a row's own target is computed apart, in float32."""
    spread = 128**0.5 if push else 2.0
    problem = tokens(23, (400,), 128, 1000, dtype, spread=spread, ignored=0)
    if push:
        hidden = problem.weight[problem.labels] * push + 0.1 * problem.hidden
        problem = problem._replace(hidden=hidden)
    truth = exact_logprobs(problem)
    plain = relative_error(call(plain_logprobs)(problem), truth)
    found = call(linear_logprobs, grad_tolerance=tolerance)(problem)
    assert relative_error(found, truth) < plain / gain
    loss = fused_preference_loss(
        *(problem.hidden.view(4, 100, -1), problem.weight, problem.labels.view(4, 100)),
        lambda logps, counts, index: -logps.sum(0),
        strategy="stream",
        num_pairs=1,
    )[0]
    plain_sum = abs(call(plain_logprobs)(problem).double().sum() - truth.sum())
    assert abs(-loss - truth.sum()) < plain_sum


def test_float16_matmuls_do_not_overflow_where_the_gradient_fits():
    """A frequent target, a large channel: sum_i h_i passes 65,504, sum_i g h_i for g = 1/N not."""
    problem = tokens(19, (4096,), 16, 40, torch.float16, ignored=0)
    problem.hidden[:, 3] = 32.0
    problem.weight[:, 3] = 0.0
    problem.labels[:] = 5
    upstream = torch.full((4096,), 1 / 4096).double()
    found = differentiate(call(linear_logprobs), problem, upstream)
    plain = differentiate(call(plain_logprobs), problem, upstream)
    truth = differentiate(call(oracle.linear_logprobs), double(problem), upstream)
    assert plain["weight"].isfinite().all()
    assert_within_plain_budget(found, plain, truth)


@pytest.mark.parametrize("size", [400.0, 60000.0])
@pytest.mark.parametrize("way", ["logprobs", "stream", "split", "skip", "split skip", "recompute"])
def test_float16_sums_of_large_channels_do_not_overflow(size, way):
    """One channel of massive activations: dW fits, sum_i |h_i| does not."""
    problem = tokens(24, (4, 512), 32, 64, torch.float16, ignored=0)
    problem.hidden[..., 3] = size
    problem.weight[:, 3] = 0.0
    problem.labels[:2] = 5
    count = 2 * size  # then dW of entry 5 is near 500 there
    options = {"grad_tolerance": 1e-3} if "skip" in way else {}
    if "split" in way:
        options["max_workspace_mb"] = workspace_for(300, problem)

    def run(p, logps=linear_logprobs):
        if way == "logprobs" or logps is not linear_logprobs:
            return logps(p.hidden, p.weight, p.labels)[:2].sum() / count
        strategy = "recompute" if way == "recompute" else "stream"
        loss = fused_preference_loss(
            p.hidden, p.weight, p.labels, lambda s, n, i: s[0], num_pairs=count,
            strategy=strategy, **options,
        )  # fmt: skip
        return loss[0]

    found = differentiate(run, problem)
    truth = differentiate(functools.partial(run, logps=oracle.linear_logprobs), double(problem))
    plain = differentiate(functools.partial(run, logps=plain_logprobs), problem)
    assert 100 < truth["weight"].abs().max() < 60000
    # skipping leaves out that share of the L1 mass of dlogits, at most 2 a token that counts
    mass = options.get("grad_tolerance", 0) * 2 * 2 * 512 / count
    for name, factor in (("hidden", problem.weight), ("weight", problem.hidden)):
        error, own = (relative_error(x[name], truth[name]) for x in (found, plain))
        skipped = mass * factor.double().norm(dim=-1).max() / truth[name].norm()
        assert error <= 2 * own + torch.finfo(torch.float16).eps + skipped, name


def test_masked_vocabulary_entries():
    """A bias of -1e30 switches padded vocabulary entries off: they get no probability."""
    problem = tokens(20, (25,), 16, 700, ignored=0)
    problem = problem._replace(labels=problem.labels % 600, bias=torch.zeros(700))
    small = Problem(problem.hidden, problem.weight[:600], problem.labels, torch.zeros(600))
    plain = differentiate(call(plain_logprobs), small)
    truth = differentiate(call(oracle.linear_logprobs), double(small))
    off = problem.bias.clone()
    off[600:] = -1e30
    found = differentiate(call(linear_logprobs), problem._replace(bias=off))
    # at most what the panel's smallest probability, exp(-60), makes of them
    assert (found["weight"][600:].abs() <= math.exp(-60) * problem.hidden.abs().sum(0)).all()
    found["weight"], found["bias"] = found["weight"][:600], found["bias"][:600]
    assert_within_plain_budget(found, plain, truth)


def test_backward_uses_only_what_it_needs(monkeypatch):
    """One forward sweep, one backward sweep."""
    calls = []
    for name in ("linear_logprobs", "linear_logprobs_backward"):
        original = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda *args, o=original, n=name: (calls.append(n), o(*args))[1]
        )
    problem = tokens(21, (9,), 8, 20)
    hidden = problem.hidden.clone().requires_grad_()
    out = linear_logprobs(hidden, problem.weight, problem.labels)
    assert calls == ["linear_logprobs"]
    out.sum().backward()
    assert calls == ["linear_logprobs", "linear_logprobs_backward"]


def test_exact_logprobs_of_a_uniform_head():
    """Closed value: with zero hidden every token costs log V."""
    problem = tokens(22, (7,), 8, 50, ignored=0)
    out = linear_logprobs(torch.zeros_like(problem.hidden), problem.weight, problem.labels)
    # fifty ones are exact; then a logarithm, a change of base, a difference
    assert_within_roundings(out, torch.full((7,), -math.log(50), dtype=torch.float64), 3)
