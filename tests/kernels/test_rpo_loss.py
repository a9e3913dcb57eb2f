"""`fused_rpo_loss`: loss and gradients against float64 for every loss, reduction and strategy.

Memory that `torch.empty` returns is poisoned with NaN throughout.
"""

from __future__ import annotations

import math

import pytest
import torch

from rpo_kernels import RPOOutput, fused_rpo_loss, linear_logprobs, oracle
from rpo_kernels.engines import panel, recompute, skipping, streaming
from rpo_kernels.losses import LOSSES, SFT_REDUCTIONS
from tests.support import (
    IGNORE,
    Problem,
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
LN2 = math.log(2)


@pytest.fixture(autouse=True, scope="module")
def poison():
    with poisoned_memory(), one_thread():
        yield


def call(function, **options):
    """``function`` as a function of a problem that returns the loss."""

    def loss(p: Problem):
        found = function(p.hidden, p.weight, p.labels, p.ref_logps, bias=p.bias, **options)
        return found.loss if isinstance(found, RPOOutput) else found

    return loss


def run(problem: Problem, **options):
    """Our loss and its gradients."""
    return differentiate(call(fused_rpo_loss, **options), problem)


def truth_of(problem: Problem, **options):
    return differentiate(call(oracle.rpo_loss, **options), double(problem))


def check(problem: Problem, ours: dict, **options) -> None:
    """Loss and gradients within their budgets."""
    found, truth = run(problem, **options, **ours), truth_of(problem, **options)
    assert_within_budgets(found, truth, problem, **options)


def assert_within_budgets(found: dict, truth: dict, problem: Problem, **options) -> None:
    """Loss within `loss_budget`, gradients within the plain budget; float64 by roundings alone."""
    if problem.hidden.dtype == torch.float64:
        heads = {k: options[k] for k in ("logit_scale", "logit_softcap") if k in options}
        rest = {k: v for k, v in options.items() if k not in heads}
        bounds = loss_bounds(problem, lambda x: loss_of_logps(x, problem, **rest), **heads)
        assert_within_bounds(found, truth, bounds)
        return
    plain = differentiate(call(plain_rpo_loss, **options), problem)
    gap, budget = abs(found["out"].double() - truth["out"]).item(), loss_budget(problem, **options)
    assert gap <= budget, f"off by {gap:.3e}, budget {budget:.3e}"
    grads = [{name: x[name] for name in x if name != "out"} for x in (found, plain, truth)]
    assert_within_plain_budget(*grads)


def field_and_budget(name: str, problem: Problem, **options) -> tuple[float, float]:
    """An output field's true value, of log-probs in float64, and its `value_budget`."""
    kind, beta = options.get("loss_type", "sigmoid"), options.get("beta", 0.1)
    counts = (problem.labels != IGNORE).sum(1) if LOSSES[kind].mean else 1

    def value(logps, refs=None):
        own = double(problem)._replace(ref_logps=refs)
        dpo = loss_of_logps(logps, own, **options | {"eta": 0.0})
        if name == "dpo_loss":
            return dpo
        if name == "sft_loss":
            weighted = {"eta": 1.0, "scale_eta_by_beta": False}
            return loss_of_logps(logps, own, **options | weighted) - dpo
        ratio = (logps.sum(1) if refs is None else logps.sum(1) - refs) / counts
        chosen, rejected = (beta * ratio).chunk(2)
        return (chosen - rejected).mean()

    exact, errors = exact_logprobs(problem), token_budgets(problem)
    refs = () if problem.ref_logps is None else (problem.ref_logps.double(),)
    return value(exact, *refs).item(), value_budget(value, errors, exact, *refs)


def assert_fields(out: dict, problem: Problem, **options) -> None:
    """`dpo_loss`, `sft_loss` and `margin` within their budgets."""
    for name in ("dpo_loss", "sft_loss", "margin"):
        truth, budget = field_and_budget(name, problem, **options)
        assert abs(out[name].item() - truth) <= budget, name


def options_for(name: str) -> dict:
    """Options with which the loss is defined and its margins neither vanish nor saturate."""
    options = {"loss_type": name, "beta": 0.1, "eta": 0.2}
    if LOSSES[name].smoothing:
        options["label_smoothing"] = 0.1
    if name == "simpo":
        options |= {"beta": 2.0, "simpo_gamma": 0.7}
    return options


def problem_for(name: str, dtype=torch.float32, **shape) -> Problem:
    return pairs(len(name), dtype=dtype, reference_model=LOSSES[name].reference, **shape)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", SFT_REDUCTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_reduction_and_strategy(name, reduction, dtype, strategy):
    problem = problem_for(name, dtype, bias=True)
    check(problem, {"strategy": strategy}, sft_reduction=reduction, **options_for(name))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    "options",
    [{}, {"logit_scale": 0.4}, {"logit_softcap": 5.0}, {"logit_scale": 1.7, "logit_softcap": 5.0}],
    ids=["", "scale", "softcap", "scale+softcap"],
)
def test_bias_softcap_and_scale(options, bias, dtype, strategy):
    check(pairs(1, dtype=dtype, bias=bias), {"strategy": strategy}, eta=0.1, **options)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("count", "length", "width", "vocab"),
    [(1, 97, 1000, 4099), (2, 33, 577, 10007), (7, 11, 33, 513), (1, 5, 64, 3)],
)
def test_ragged_sizes(count, length, width, vocab, dtype, strategy):
    check(pairs(2, count, length, width, vocab, dtype), {"strategy": strategy})


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_float64_is_exact(strategy):
    problem = pairs(3, dtype=torch.float64, bias=True)
    check(problem, {"strategy": strategy}, logit_softcap=9.0, eta=0.1)
    assert run(problem, strategy=strategy)["out"].dtype == torch.float64


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_packed_equals_padded(strategy):
    problem = pairs(4, bias=True)
    packed, ends = pack(problem)
    padded = run(problem, strategy=strategy)
    for offsets in (ends, ends.long()):
        found = run(packed, strategy=strategy, cu_seqlens=offsets)
        assert torch.equal(found["weight"], padded["weight"])
        assert torch.equal(found["out"], padded["out"])
        kept = padded["hidden"][problem.labels != IGNORE]
        assert torch.equal(found["hidden"][packed.labels != IGNORE], kept)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_reference_model_is_a_reference_of_zero(strategy):
    problem = pairs(5)
    zero = problem._replace(ref_logps=torch.zeros(6))
    none = problem._replace(ref_logps=None)
    assert_close_bits(run(none, strategy=strategy), run(zero, strategy=strategy))
    check(none, {"strategy": strategy}, beta=0.02)


def masked(problem: Problem, *sequences: int) -> Problem:
    labels = problem.labels.clone()
    labels[list(sequences)] = IGNORE
    return problem._replace(labels=labels)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("reduction", SFT_REDUCTIONS)
@pytest.mark.parametrize("which", [(1,), (4,), (1, 5)], ids=["chosen", "rejected", "both"])
def test_a_sequence_without_tokens(which, reduction, strategy):
    problem = masked(pairs(6), *which)
    check(problem, {"strategy": strategy}, sft_reduction=reduction)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", LOSSES)
def test_a_pair_without_tokens_contributes_nothing(name, strategy):
    """Not to the loss, not to a gradient, not to the margin, whatever its reference says."""
    options = options_for(name) | {"strategy": strategy, "num_pairs": 3}
    problem = masked(problem_for(name), 1, 4)
    keep = [0, 2, 3, 5]
    refs = None if problem.ref_logps is None else problem.ref_logps[keep]
    rest = Problem(problem.hidden[keep], problem.weight, problem.labels[keep], None, refs)
    found, want = run(problem, **options), run(rest, **options)
    assert (found["hidden"][[1, 4]] == 0).all()
    found["hidden"] = found["hidden"][keep]
    assert_close_bits(found, want)  # of the very same rows
    out = fused_rpo_loss(
        problem.hidden, problem.weight, problem.labels, problem.ref_logps, **options
    )
    less = fused_rpo_loss(rest.hidden, rest.weight, rest.labels, refs, **options)
    assert all(field.isfinite().all() for field in out)
    assert out.chosen_logps[1] == out.rejected_logps[1] == 0
    assert out.chosen_rewards[1] == out.rejected_rewards[1] == 0
    for field in ("dpo_loss", "sft_loss", "margin"):
        assert getattr(out, field) == getattr(less, field)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_pair_without_tokens_is_no_tie(strategy):
    """It "contributes 0 to everything", to accuracy too: what is not there is not half right."""
    problem = masked(pairs(6), 0, 3)
    options = {"strategy": strategy, "num_pairs": 3}
    out = fused_rpo_loss(*problem[:3], problem.ref_logps, **options)
    wins = (out.chosen_rewards[1:] > out.rejected_rewards[1:]).sum()
    assert_within_roundings(out.accuracy, wins.double() / 3, 3)  # a third, added up


@pytest.mark.parametrize("strategy", [*STRATEGIES, "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", SFT_REDUCTIONS)
def test_all_ignored_is_zero(reduction, dtype, strategy):
    problem = masked(pairs(7, dtype=dtype, bias=True), *range(6))
    found = run(problem, strategy=strategy, sft_reduction=reduction)
    assert set(found) == {"out", "hidden", "weight", "bias"}
    assert all((tensor == 0).all() for tensor in found.values())


@pytest.mark.parametrize("strategy", [*STRATEGIES, "auto"])
@pytest.mark.parametrize("layout", ["padded", "packed", "no positions"])
def test_no_pairs_is_zero_and_differentiable(layout, strategy):
    """B = 0, as a rank without pairs passes it, with the step's global counts."""
    problem = pairs(8, bias=True)
    options = {"strategy": strategy, "num_pairs": 4, "num_chosen_tokens": 9, "eta": 1.0}
    if layout == "padded":
        problem = problem._replace(
            hidden=problem.hidden[:0], labels=problem.labels[:0], ref_logps=torch.zeros(0)
        )
    elif layout == "packed":
        problem = problem._replace(
            hidden=problem.hidden[0, :0], labels=problem.labels[0, :0], ref_logps=torch.zeros(0)
        )
        options["cu_seqlens"] = torch.zeros(1, dtype=torch.int32)
    else:
        problem = problem._replace(hidden=problem.hidden[:, :0], labels=problem.labels[:, :0])
    for reduction in SFT_REDUCTIONS:
        found = run(problem, sft_reduction=reduction, **options)
        assert found["out"].shape == () and set(found) == {"out", "hidden", "weight", "bias"}
        assert all((tensor == 0).all() for tensor in found.values())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("reduction", SFT_REDUCTIONS)
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "simpo"])
def test_micro_batches_add_up_to_the_step(name, reduction, strategy):
    """With global counts: loss, terms, accuracy, margin and gradients are sums over the parts."""
    problem = problem_for(name, torch.float64, count=5, length=13)
    options = options_for(name) | {"sft_reduction": reduction}
    tokens = int((problem.labels[:5] != IGNORE).sum())
    fields = ("loss", "dpo_loss", "sft_loss", "margin", "accuracy")

    def step(index: list[int], **counts):
        rows = [*index, *(5 + i for i in index)]
        refs = None if problem.ref_logps is None else problem.ref_logps[rows]
        hidden = problem.hidden[rows].requires_grad_()
        weight = problem.weight.clone().requires_grad_()
        out = fused_rpo_loss(
            hidden, weight, problem.labels[rows], refs, strategy=strategy, **options, **counts
        )
        out.loss.backward()
        grads = torch.zeros_like(problem.hidden)
        grads[rows] = hidden.grad
        values = torch.stack([getattr(out, field).detach() for field in fields])
        return {"values": values, "hidden": grads, "weight": weight.grad}

    whole = step([0, 1, 2, 3, 4])
    parts = [
        step(index, num_pairs=5, num_chosen_tokens=tokens) for index in ([0], [1, 2], [], [3, 4])
    ]
    total = {key: sum(part[key] for part in parts) for key in whole}
    truth, accuracy = truth_of(problem, **options), whole["values"][-1]
    for found in (whole, total):
        values = dict(zip(fields, found.pop("values"), strict=True))
        found["out"] = values.pop("loss")
        assert_within_budgets(found, truth, problem, **options)
        assert_within_roundings(values.pop("accuracy"), accuracy, 5)  # of five pairs
        assert_fields(values, problem, **options)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_step_zero_is_exactly_ln2(strategy):
    """Policy and reference see the same batch through the package itself: m = 0 bit for bit."""
    problem = pairs(9, reference_model=False)
    first = fused_rpo_loss(problem.hidden, problem.weight, problem.labels, None, strategy=strategy)
    refs = torch.cat([first.chosen_logps, first.rejected_logps])
    out = fused_rpo_loss(
        problem.hidden, problem.weight, problem.labels, refs, eta=0.0, strategy=strategy
    )
    assert out.loss.item() == out.dpo_loss.item() == torch.tensor(LN2).item()
    assert out.accuracy == 0.5 and out.margin == 0
    sums = linear_logprobs(problem.hidden, problem.weight, problem.labels).sum(1)
    near = fused_rpo_loss(
        problem.hidden, problem.weight, problem.labels, sums, eta=0.0, strategy=strategy
    )
    _, budget = field_and_budget("dpo_loss", problem._replace(ref_logps=sums))
    assert abs(near.loss.item() - LN2) <= 2 * budget  # of the policy's sums and of the reference's


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_eta_it_is_dpo(strategy):
    """Rafailov et al. 2023, written out: -log sigmoid(beta (difference of log-ratios))."""
    problem, options = pairs(10, dtype=torch.float64), {"eta": 0.0, "beta": 0.3}
    out = fused_rpo_loss(*problem[:3], problem.ref_logps, strategy=strategy, **options)
    ratio = exact_logprobs(problem).sum(1) - problem.ref_logps
    margins = 0.3 * (ratio[:3] - ratio[3:])
    budget = loss_budget(problem, **options)
    assert abs(out.loss - torch.log1p(torch.exp(-margins)).mean()) <= budget
    assert out.loss == out.dpo_loss
    assert_fields(out._asdict(), problem, **options)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("scaled", [None, True, False])
@pytest.mark.parametrize("reduction", SFT_REDUCTIONS)
def test_the_sft_term_and_its_weight(reduction, scaled, strategy):
    """README's table, written out: w = eta * beta for sums by default, eta for means."""
    problem, (beta, eta) = pairs(11, dtype=torch.float64), (0.3, 0.7)
    options = {"beta": beta, "eta": eta, "sft_reduction": reduction, "scale_eta_by_beta": scaled}
    out = fused_rpo_loss(*problem[:3], problem.ref_logps, strategy=strategy, **options)
    chosen, counts = exact_logprobs(problem)[:3].sum(1), (problem.labels[:3] != IGNORE).sum(1)
    sft = {
        "sum": -chosen.mean(),
        "sequence_mean": -(chosen / counts).mean(),
        "token_mean": -chosen.sum() / counts.sum(),
    }[reduction]
    weight = eta * beta if scaled or (scaled is None and reduction == "sum") else eta
    budgets = [field_and_budget(name, problem, **options)[1] for name in ("sft_loss", "dpo_loss")]
    assert abs(out.sft_loss - sft) <= budgets[0]
    assert abs(out.loss - (out.dpo_loss + weight * sft)) <= weight * budgets[0] + budgets[1]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("factor", [3.0, -0.25, 0.0])
def test_upstream_gradient_scales(factor, strategy):
    problem = pairs(12, bias=True)

    def scaled(function, *, wide=False, **options):
        own = double(problem) if wide else problem
        return differentiate(lambda p: factor * call(function, **options)(p), own)

    found, plain = scaled(fused_rpo_loss, strategy=strategy), scaled(plain_rpo_loss)
    truth = scaled(oracle.rpo_loss, wide=True)
    gap = abs(found.pop("out").double() - truth.pop("out"))
    assert gap <= abs(factor) * loss_budget(problem)
    del plain["out"]
    assert_within_plain_budget(found, plain, truth)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_loss_amid_a_larger_graph(strategy):
    """Hidden comes from a layer and the loss is added to another: gradients flow through both."""
    problem = pairs(13, dtype=torch.float64)
    layer = torch.eye(72, dtype=torch.float64).requires_grad_()
    weight = problem.weight.clone().requires_grad_()
    total = (
        call(fused_rpo_loss, strategy=strategy)(
            problem._replace(hidden=problem.hidden @ layer, weight=weight)
        )
        + 2 * (weight**2).sum()
    )
    total.backward()

    truth = truth_of(problem)
    bounds = loss_bounds(problem, lambda x: loss_of_logps(x, problem))
    flat, eps = problem.hidden.flatten(0, 1), torch.finfo(torch.float64).eps
    grads = truth["hidden"].flatten(0, 1)
    off = bounds["hidden"].flatten(0, 1) + (len(flat) + 72) * eps * grads.abs()
    extra = 4 * problem.weight
    assert_within_bounds(
        {"layer": layer.grad, "weight": weight.grad},
        {"layer": flat.T @ grads, "weight": truth["weight"] + extra},
        {"layer": flat.abs().T @ off, "weight": bounds["weight"] + 4 * eps * extra.abs()},
    )


def test_accuracy_counts_ties_half():
    """Three pairs: one won, one lost, one tied."""
    problem = pairs(14, reference_model=False)
    hidden, labels = problem.hidden.clone(), problem.labels.clone()
    labels[5] = labels[2]
    hidden[[2, 5]] = 0.0  # every logit is 0, whatever the order of a matmul's sums
    first = fused_rpo_loss(hidden, problem.weight, labels, None)
    sums = torch.cat([first.chosen_logps, first.rejected_logps])
    refs = sums - torch.tensor([5.0, 0, 0, 0, 5, 0])
    refs[5] = refs[2]
    for strategy in STRATEGIES:
        out = fused_rpo_loss(hidden, problem.weight, labels, refs, strategy=strategy, eta=0.0)
        assert out.accuracy == 0.5
        assert (out.chosen_rewards > out.rejected_rewards).tolist() == [True, False, False]
        assert out.chosen_rewards[2] == out.rejected_rewards[2]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_certain_responses_tie(strategy):
    """A vocabulary of one: every log-prob is 0, which is a tie where there are tokens."""
    labels = torch.zeros(4, 3, dtype=torch.long)
    labels[[1, 3]] = IGNORE
    out = fused_rpo_loss(
        torch.ones(4, 3, 1), torch.ones(1, 1), labels, torch.zeros(4), strategy=strategy
    )
    assert out.accuracy == 0.25 and (out.chosen_logps == 0).all()


@pytest.mark.parametrize("strategy", [*STRATEGIES, "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_output_fields(dtype, strategy):
    problem = pairs(15, dtype=dtype)
    hidden, weight = problem.hidden.requires_grad_(), problem.weight.requires_grad_()
    out = fused_rpo_loss(hidden, weight, problem.labels, problem.ref_logps, strategy=strategy)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, field in out._asdict().items():
        assert field.dtype == wide and field.device == hidden.device, name
        assert field.shape == ((3,) if name.startswith(("chosen", "rejected")) else ()), name
        assert field.requires_grad == (name == "loss"), name
    logps, rewards = (torch.cat(out[k : k + 2]).double() for k in (3, 5))
    terms = torch.stack([out.dpo_loss, 0.1 * 0.005 * out.sft_loss]).double()
    refs = problem.ref_logps.double()
    # a product and a sum; a difference and a product; a sum of three, each a difference
    assert_within_roundings(out.loss.detach(), terms.sum(), 3, terms.abs().sum())
    both = torch.cat([out.chosen_rewards, out.rejected_rewards])
    assert_within_roundings(both, 0.1 * (logps - refs), 2, 0.1 * (logps.abs() + refs.abs()))
    margin = (rewards[:3] - rewards[3:]).mean()
    assert_within_roundings(out.margin, margin, 4, rewards.abs().mean() * 2)


@pytest.mark.parametrize("name", ["ipo", "simpo", "orpo"])
def test_rewards_are_what_the_loss_compares(name):
    """beta times the log-ratio per token for losses on means."""
    problem, options = problem_for(name, torch.float64), options_for(name)
    out = fused_rpo_loss(*problem[:3], problem.ref_logps, **options)
    exact, counts = exact_logprobs(problem), (problem.labels != IGNORE).sum(1)
    refs = torch.zeros(6) if problem.ref_logps is None else problem.ref_logps
    errors = token_budgets(problem)
    logps, rewards = (torch.cat(out[k : k + 2]) for k in (3, 5))
    for k, count in enumerate(counts.tolist()):
        for value, weight, ref in ((logps, 1, 0 * refs), (rewards, options["beta"] / count, refs)):

            def one(logp, ref, weight=weight):
                return weight * (logp.sum() - ref)

            budget = value_budget(one, errors[k], exact[k], ref[k])
            assert abs(value[k] - one(exact[k], ref[k])) <= budget


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].reference])
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_saturated_pairs_are_finite(shift, name, strategy):
    """Margins of +-1e3 (beta = 0.1): loss and gradients finite, and equal to the truth."""
    problem = problem_for(name)
    refs = problem.ref_logps.clone()
    refs[:3] -= shift
    problem = problem._replace(ref_logps=refs)
    options = options_for(name)
    found, truth = run(problem, strategy=strategy, **options), truth_of(problem, **options)
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert_within_budgets(found, truth, problem, **options)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tolerance", [0.0, 0.01])
@pytest.mark.parametrize("rows", [2000, 400], ids=["together", "pair by pair"])
def test_pairs_that_are_won_have_no_gradient(rows, tolerance, dtype, strategy):
    """Coefficients that are exactly 0, of all pairs and of one group: zeros there, not NaN."""
    shape = {"count": 3, "length": 160, "width": 32, "vocab": 1031}
    problem = pairs(29, dtype=dtype, bias=True, **shape)
    won = torch.tensor([1e5, 1e5, 1e5, 0, 0, 0])
    options = {"strategy": strategy, "loss_type": "hinge", "eta": 0.0, "grad_tolerance": tolerance}
    options["max_workspace_mb"] = workspace_for(rows, problem)
    found = run(problem._replace(ref_logps=problem.ref_logps - won), **options)
    assert all((tensor == 0).all() for tensor in found.values())
    some = problem._replace(ref_logps=problem.ref_logps - won * torch.tensor([1.0, 0, 0, 0, 0, 0]))
    found = run(some, **options)
    assert all(tensor.isfinite().all() and (tensor != 0).any() for tensor in found.values())
    assert (found["hidden"][[0, 3]] == 0).all()


def pieces(problem: Problem, monkeypatch, **options) -> list[int]:
    """Chunks of every group that a streaming call makes."""
    seen, original = [], streaming.group_pairs

    def spy(*args):
        groups = original(*args)
        seen.extend(len(group.chunks) for group in groups)
        return groups

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "group_pairs", spy)
        run(problem, strategy="stream", **options)
    return seen


LAYOUTS = [
    pytest.param(1000, [1], id="one group"),
    pytest.param(96, [1] * 3, id="grouped"),
    pytest.param(48, [1] * 5, id="pair by pair"),
    pytest.param(10, None, id="split"),
    pytest.param(1, None, id="row by row"),
]


@pytest.mark.parametrize("frozen", ["", "weight", "hidden"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "chunks"), LAYOUTS)
def test_streaming_in_pieces(rows, chunks, dtype, frozen, monkeypatch):
    """However the pairs are grouped or split, the result is the truth within the budget."""
    problem = pairs(16, count=5, length=25, width=40, vocab=1031, dtype=dtype, bias=True)
    workspace = workspace_for(rows, problem)
    seen = pieces(problem, monkeypatch, max_workspace_mb=workspace)
    if chunks is None:
        assert max(seen) > 1
    else:
        assert seen == chunks
    options = {"eta": 0.1, "logit_softcap": 20.0}
    ours = call(fused_rpo_loss, strategy="stream", max_workspace_mb=workspace, **options)
    found = differentiate(ours, problem, frozen=frozen)
    plain = differentiate(call(plain_rpo_loss, **options), problem, frozen=frozen)
    truth = differentiate(call(oracle.rpo_loss, **options), double(problem), frozen=frozen)
    assert abs(found.pop("out").double() - truth.pop("out")) <= loss_budget(problem, **options)
    del plain["out"]
    assert_within_plain_budget(found, plain, truth)


@pytest.mark.parametrize("empty", [(0, 5), (2, 7), (4, 9), (1,), (6,), (0, 1, 5, 6)])
def test_split_pairs_beside_empty_ones(empty, monkeypatch):
    """Pairs and sides without tokens between pairs longer than the workspace."""
    problem = masked(pairs(17, count=5, length=25, width=40, vocab=1031), *empty)
    options = {"strategy": "stream", "max_workspace_mb": workspace_for(7, problem)}
    assert max(pieces(problem, monkeypatch, max_workspace_mb=options["max_workspace_mb"])) > 1
    check(problem, options, eta=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1000, 30, 7])
@pytest.mark.parametrize("jump", [30.0, 60.0, 80.0, 1000.0])
def test_overflow_fallback(jump, rows, dtype, monkeypatch):
    """Rows whose largest logit lies `jump` above zero, past the first 512 entries: swept again."""
    problem = pairs(18, count=3, length=17, width=64, vocab=1531, dtype=dtype)
    hidden, weight = problem.hidden.clone(), problem.weight.clone()
    hidden[:, ::3, 0] = 8.0
    hidden[:, 1::3, 0] = 0.0
    weight[:, 0] = 0.0
    weight[900, 0] = jump / 8
    problem = problem._replace(hidden=hidden, weight=weight)
    sweeps, original = [], streaming.loss_and_grads

    def spy(*args, **options):
        sweeps.append(options.get("exact", False))
        return original(*args, **options)

    monkeypatch.setattr(streaming, "loss_and_grads", spy)
    options = {"beta": 0.001}
    workspace = workspace_for(rows, problem)
    found = run(problem, strategy="stream", max_workspace_mb=workspace, **options)
    assert sweeps == ([False, True] if jump > 70 else [False])
    assert_within_budgets(found, truth_of(problem, **options), problem, **options)


def test_the_probe_is_where_the_tests_think_it_is():
    assert panel.PROBE == 512


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_backward_twice_gives_the_same_gradients(strategy):
    problem = pairs(19, bias=True)
    leaves = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight, problem.bias)]
    hidden, weight, bias = leaves
    loss = fused_rpo_loss(
        hidden, weight, problem.labels, problem.ref_logps, bias=bias, strategy=strategy
    ).loss
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [grad.clone() for grad in once]
    for grad in once:
        grad.zero_()  # whoever owns a gradient may write to it
    twice = torch.autograd.grad(2 * loss, leaves)
    for first, second in zip(kept, twice, strict=True):
        assert torch.equal(2 * first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_second_derivatives_raise(strategy):
    problem = pairs(20)
    hidden = problem.hidden.clone().requires_grad_()
    weight = problem.weight.clone().requires_grad_()
    out = fused_rpo_loss(hidden, weight, problem.labels, problem.ref_logps, strategy=strategy)
    with pytest.raises(RuntimeError, match="second derivatives"):
        (grad,) = torch.autograd.grad(out.loss, hidden, create_graph=True)
        torch.autograd.grad(grad.square().sum(), weight)


def test_second_derivatives_of_logprobs_raise():
    problem = pairs(20)
    hidden = problem.hidden.clone().requires_grad_()
    out = linear_logprobs(hidden, problem.weight, problem.labels)
    with pytest.raises(RuntimeError, match="second derivatives"):
        (grad,) = torch.autograd.grad(out.sum(), hidden, create_graph=True)
        grad.square().sum().backward()


def test_streamed_backward_needs_no_weight_and_recompute_notices_a_change():
    """Streaming: W may change before backward (FSDP frees it). Recompute: autograd reports it."""
    problem = pairs(21)
    want = run(problem, strategy="stream")

    def changed(strategy):
        weight = problem.weight.clone().requires_grad_()
        hidden = problem.hidden.clone().requires_grad_()
        loss = fused_rpo_loss(
            hidden, weight, problem.labels, problem.ref_logps, strategy=strategy
        ).loss
        with torch.no_grad():
            weight.zero_()
        loss.backward()
        return weight.grad

    assert torch.equal(changed("stream"), want["weight"])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        changed("recompute")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_frozen_inputs(strategy):
    problem = pairs(22, bias=True)
    whole = run(problem, strategy=strategy)
    for frozen in ("hidden", "weight", "bias", "hidden weight", "weight bias", "hidden bias"):
        part = differentiate(call(fused_rpo_loss, strategy=strategy), problem, frozen=frozen)
        assert set(part) == set(whole) - set(frozen.split())
        assert_close_bits(part, {name: whole[name] for name in part})
    with torch.no_grad():
        out = fused_rpo_loss(*problem[:3], problem.ref_logps, bias=problem.bias, strategy=strategy)
    assert not out.loss.requires_grad and torch.equal(out.loss, whole["out"])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("refs", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_reference_log_probs_of_another_dtype(refs, strategy):
    problem = pairs(23)
    given = problem._replace(ref_logps=problem.ref_logps.to(refs))
    same = problem._replace(ref_logps=problem.ref_logps.to(refs).float())
    assert_close_bits(run(given, strategy=strategy), run(same, strategy=strategy))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_bad_row_spoils_only_its_pair_and_the_loss(strategy):
    problem = pairs(24)
    hidden = problem.hidden.clone()
    row = int((problem.labels[1] != IGNORE).nonzero()[0])
    hidden[1, row] = math.nan
    found = run(problem._replace(hidden=hidden), strategy=strategy)
    plain, truth = differentiate(call(plain_rpo_loss), problem), truth_of(problem)
    out = fused_rpo_loss(
        hidden, problem.weight, problem.labels, problem.ref_logps, strategy=strategy
    )
    assert found["out"].isnan()
    assert out.chosen_logps.isnan().tolist() == [False, True, False]
    assert not out.rejected_logps.isnan().any()
    others = [{"hidden": x["hidden"][[0, 2, 3, 5]]} for x in (found, plain, truth)]
    assert_within_plain_budget(*others)  # a NaN sends its group to another sweep


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("ignore", [-1, 701, -(2**40)])
def test_ignore_index(ignore, strategy):
    problem = pairs(25)
    labels = torch.where(problem.labels == IGNORE, ignore, problem.labels)
    found = run(problem._replace(labels=labels), ignore_index=ignore, strategy=strategy)
    assert_close_bits(found, run(problem, strategy=strategy))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_int32_labels(strategy):
    problem = pairs(26)
    small = problem._replace(labels=problem.labels.int())
    assert_close_bits(run(small, strategy=strategy), run(problem, strategy=strategy))


@pytest.mark.parametrize(
    ("strategy", "rows"), [("recompute", 1000), ("stream", 1000), ("stream", 64)]
)
@pytest.mark.parametrize("tolerance", [0.3, 0.03, 0.001])
def test_the_certificate_of_skipping(tolerance, strategy, rows):
    """At most the tolerance is skipped, and the L1 error of dlogits is at most what is certified.

    dbias is the sum of dlogits over rows, so its L1 error is at most that of dlogits.
    """
    shape = {"count": 3, "length": 150, "width": 48, "vocab": 1501}
    problem = pairs(27, dtype=torch.float64, bias=True, spread=4.0, **shape)
    options = {"strategy": strategy, "max_workspace_mb": workspace_for(rows, problem)}
    leaves = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight, problem.bias)]
    hidden, weight, bias = leaves
    out = fused_rpo_loss(
        hidden, weight, problem.labels, problem.ref_logps, bias=bias, grad_tolerance=tolerance,
        **options,
    )  # fmt: skip
    out.loss.backward()
    exact = run(problem, **options)
    assert abs(out.loss.detach() - truth_of(problem)["out"]) <= loss_budget(problem)

    logps = exact_logprobs(problem).requires_grad_()
    (slope,) = torch.autograd.grad(loss_of_logps(logps, problem), logps)
    mass = (2 * slope.abs() * -torch.expm1(logps.detach())).sum()  # |onehot - P|_1 = 2 (1 - p)
    assert 0 < out.skipped <= tolerance
    error = (bias.grad - exact["bias"]).abs().sum()
    terms = int((problem.labels != IGNORE).sum()) + problem.weight.shape[0]  # in either sum
    assert 0 < error <= out.skipped * mass * (1 + terms * torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_a_tolerance_nothing_is_skipped(strategy):
    problem = pairs(28)
    assert fused_rpo_loss(*problem[:3], problem.ref_logps, strategy=strategy).skipped == 0


@pytest.mark.parametrize("rows", [1000, 64], ids=["together", "in parts"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("most", "skips"), [(0.0, False), (0.05, False), (1.0, True)])
def test_above_break_even_the_exact_path_runs(most, skips, strategy, rows, monkeypatch):
    monkeypatch.setattr(skipping, "break_even", lambda *call: most)
    problem = pairs(31, count=3, length=150, width=48, vocab=1501, bias=True, spread=2.0)
    if strategy == "recompute":
        rows = max(rows, 300)  # room for a block
    options = {"strategy": strategy, "max_workspace_mb": workspace_for(rows, problem)}
    exact = run(problem, **options)
    found = run(problem, grad_tolerance=1e-2, **options)
    leaves = [x.clone().requires_grad_() for x in problem[:2]]
    options |= {"bias": problem.bias, "grad_tolerance": 1e-2}
    out = fused_rpo_loss(*leaves, problem.labels, problem.ref_logps, **options)
    assert (out.skipped > 0) == skips
    if skips:
        assert any(not torch.equal(found[name], exact[name]) for name in exact)
    elif strategy == "stream":  # recomputing, the first panel's log-sum-exps come another way
        assert all(torch.equal(found[name], exact[name]) for name in exact)
    else:
        assert_within_budgets(found, truth_of(problem), problem)


def test_recomputing_few_rows_decide_in_vain(monkeypatch):
    """Of many rows, one block is filled to see that skipping would not pay."""
    monkeypatch.setattr(skipping, "break_even", lambda *call: 0.01)
    filled = []

    def fill(hidden, rows, *rest):
        filled.append(len(rows.targets))
        return panel.fill_panel(hidden, rows, *rest)

    monkeypatch.setattr(recompute, "fill_panel", fill)
    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([30, 700, 10, 900])  # a short sequence alone would decide too little
    hidden = torch.randn(int(lengths.sum()), 16, generator=g).requires_grad_()
    weight = torch.randn(500, 16, generator=g).requires_grad_()
    labels = torch.randint(500, (len(hidden),), generator=g)
    edges = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    options = {"cu_seqlens": edges, "strategy": "recompute", "grad_tolerance": 1e-3}
    out = fused_rpo_loss(hidden, weight, labels, torch.zeros(4), **options)
    assert out.skipped == 0
    assert filled == [30 + skipping.BLOCK]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_gradients_nothing_is_skipped(strategy):
    problem = pairs(32, spread=4.0)
    with torch.no_grad():
        out = fused_rpo_loss(*problem[:3], problem.ref_logps, strategy=strategy, grad_tolerance=0.3)
    assert out.skipped == 0


@pytest.mark.parametrize(("spread", "few"), [(6.0, True), (0.1, False)], ids=["peaked", "flat"])
def test_break_even_is_estimated_from_a_sample(spread, few):
    """The sample's answer agrees with the choice over all entries, well away from the limit."""
    g = torch.Generator().manual_seed(0)
    p = (torch.randn(8192, 300, generator=g) * spread).softmax(0)
    targets, ones = torch.arange(300), torch.ones(300)
    p[targets, torch.arange(300)] -= 1
    args = p, ones, targets, ones, 1e-2
    keep, _, _ = skipping.choose_entries(*args, skipping.split_rows([0, 300]), together=True)
    assert skipping.pays(*args, 0.5) == few == (keep.double().mean().item() <= 0.5)


# an H100: hidden size, vocabulary, tokens, products, share kept, and whether skipping was faster
MEASURED = [
    (4096, 128_256, 65_536, 2, 0.256, True), (4096, 128_256, 65_536, 1, 0.256, True),
    (4096, 128_256, 16_384, 2, 0.256, True), (4096, 128_256, 4096, 2, 0.256, False),
    (4096, 128_256, 4096, 1, 0.256, False), (2048, 151_936, 65_536, 2, 0.24, True),
    (2048, 151_936, 65_536, 1, 0.24, True), (2048, 151_936, 16_384, 1, 0.24, False),
    (2048, 151_936, 4096, 2, 0.24, False), (2048, 151_936, 4096, 1, 0.24, False),
]  # fmt: skip


@pytest.mark.parametrize(("width", "vocab", "rows", "products", "kept", "faster"), MEASURED)
def test_break_even_on_a_gpu_is_as_measured(width, vocab, rows, products, kept, faster):
    weight = torch.empty(vocab, width, device="meta")
    needs = [True, products == 2, True]
    assert (kept <= skipping.break_even(weight, torch.bfloat16, rows, needs)) == faster


def test_break_even_is_no_order_on_matrix_units(monkeypatch):
    """Half precision with AMX multiplies faster than anything can gather."""
    weight, needs = torch.empty(10, 4), [True, True, False]
    for units, most in ((True, 0.0), (False, skipping.CPU_BREAK_EVEN)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda units=units: units)
        assert skipping.break_even(weight, torch.bfloat16, 100, needs) == most
        assert skipping.break_even(weight, torch.float32, 100, needs) == skipping.CPU_BREAK_EVEN
