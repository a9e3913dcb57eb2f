"""One step of training: packing, the fused head, the loss, gradients however it is split."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from tests.support import assert_within_roundings
from tests.trainer.tiny import (
    EPS,
    as_split,
    assert_is_step,
    gradient,
    margin_budget,
    precomputed,
    relative,
    shifted_reference,
    tiny_config,
    tiny_llama,
    tiny_policy,
    tiny_split,
    tiny_tokenizer,
    true_step,
)
from trainer.data.batches import pack
from trainer.data.pairs import Pair, Sequence
from trainer.data.steps import (
    ATTENTION_TOKENS,
    Step,
    cost,
    first_visits,
    plan_pass,
    plan_training,
    regroup,
    spread,
)
from trainer.errors import InputError
from trainer.loop import METRICS, check_finite, evaluate, evaluation_step, named, run_step
from trainer.reference.modes import lookup
from trainer.run import plan

LN2 = math.log(2)


@pytest.mark.parametrize("reduction", ["sum", "sequence_mean", "token_mean"])
def test_gradients_do_not_depend_on_how_a_step_is_split(reduction):
    split = tiny_split(8)
    ref_logps = shifted_reference(8)
    split.reference = lookup(ref_logps)
    policy, accelerator = tiny_policy(sft_reduction=reduction, eta=0.5)
    order, config = list(range(8)), tiny_config(sft_reduction=reduction, eta=0.5)
    truth = true_step(policy.model, split.pairs, ref_logps, config)
    tokens = [pair.packed_tokens for pair in split.pairs]
    costs = [cost(pair) for pair in split.pairs]
    # 3 passes are uneven, 11 have some without any pair
    steps = [plan_pass(order, 8, 1, accumulation)[0] for accumulation in (1, 2, 3, 8, 11)]
    (four,) = plan_pass(order, 8, 1, 4)
    budgets = (max(tokens), 2 * max(tokens))
    steps += [regroup(steps[0], tokens, costs, budget, 1) for budget in budgets]
    for step in (*steps, spread(four, costs, 3)):
        policy.zero_grad()
        values = run_step(policy, split, step, accelerator, train=True)
        assert_is_step(values, gradient(policy), truth)

    policy.zero_grad()  # averaging each pass by its own counts is another gradient
    for i in order:
        batch, ref = pack(split.pairs, (i,)), ref_logps[i]
        own = policy(batch, ref, 1, split.pairs[i].chosen.trained_tokens)
        (own.loss / 8).backward()
    differs = relative(gradient(policy), truth.gradient)
    assert (differs > 1e-3) == (reduction == "token_mean")


@pytest.mark.parametrize("reduction", ["sum", "sequence_mean", "token_mean"])
def test_at_step_0_the_policy_is_the_reference(reduction):
    split = tiny_split(8)
    policy, accelerator = tiny_policy(sft_reduction=reduction)
    steps = plan_pass(list(range(8)), 4, 1, 2)
    split.reference = precomputed(policy, split, steps, accelerator)
    for step in steps:
        values = run_step(policy, split, step, accelerator, train=True)
        assert named(values)["rewards/margins"] == 0
        assert_within_roundings(values[1], LN2, 4)  # the loss of four equal pairs, added up
    before = evaluate(policy, split, evaluation_step(8, 3, 1), accelerator)
    budget = margin_budget(policy.model, split.pairs)  # other batches, other rounding
    assert abs(before["eval/loss/dpo"] - LN2) <= policy.options["beta"] / 2 * budget

    same = evaluation_step(8, 4, 1)
    split.reference = precomputed(policy, split, [same], accelerator)
    before = evaluate(policy, split, same, accelerator)
    assert before["eval/loss/dpo"] == pytest.approx(LN2, rel=8 * EPS)  # eight, added up
    assert (before["eval/rewards/accuracies"], before["eval/rewards/margins"]) == (0.5, 0.0)


def test_without_eta_it_is_plain_dpo():
    split = tiny_split(4)
    ref_logps = shifted_reference(4)
    split.reference = lookup(ref_logps)
    truth = true_step(tiny_llama(), split.pairs, ref_logps, tiny_config(eta=0.0))
    policy, accelerator = tiny_policy(eta=0.0)
    values = run_step(policy, split, Step((((0, 1, 2, 3),),)), accelerator, train=True)
    assert_is_step(values, gradient(policy), truth)


def test_reference_free_losses_need_no_reference():
    policy, accelerator = tiny_policy(loss_type="simpo", reference="none")
    step = Step((((0, 1),),))
    values = run_step(policy, as_split(tiny_split(2).pairs), step, accelerator, train=True)
    found, against = dict(zip(METRICS, values, strict=True)), "logps/chosen_delta"
    assert found.pop(against).isnan()  # against nothing
    assert all(value.isfinite() for value in found.values())
    assert set(named(values)) == {*METRICS} - {against, "loss/aux", "grad/skipped"}


def test_what_a_tolerance_left_out_is_told():
    """The share that the head certifies, a mean over pairs however the step is split."""
    policy, accelerator = tiny_policy(loss_type="simpo", reference="none", grad_tolerance=0.5)
    split, shares = as_split(tiny_split(4).pairs), []
    for passes in ((0, 1), (2, 3)):
        step = Step(((passes,),))
        shares.append(named(run_step(policy, split, step, accelerator, train=True)))
    whole = named(run_step(policy, split, Step((((0, 1),), ((2, 3),))), accelerator, train=True))
    parts = [share.get("grad/skipped", 0.0) for share in shares]
    assert 0 < whole["grad/skipped"] <= 0.5
    assert whole["grad/skipped"] == pytest.approx(sum(parts) / 2, rel=4 * EPS)


def test_bfloat16_keeps_float32_weights_and_a_finite_loss():
    accelerator = Accelerator(cpu=True)
    policy, _ = tiny_policy()
    split = tiny_split(2)
    with torch.autocast("cpu", torch.bfloat16):
        step = Step((((0, 1),),))
        split.reference = precomputed(policy, split, [step], accelerator)
        values = run_step(policy, split, step, accelerator, train=True)
    assert named(values)["rewards/margins"] == 0
    assert_within_roundings(values[1], LN2, 2)  # the loss of two equal pairs, added up
    assert all(p.grad.dtype == torch.float32 for p in policy.parameters())


@pytest.mark.parametrize(("batch_size", "accumulation", "ranks"), [(8, 1, 1), (2, 4, 1), (2, 2, 2)])
def test_a_plan_gives_every_split_the_same_steps(batch_size, accumulation, ranks):
    def plan(**how):
        return plan_training(21, epochs=2.5, max_steps=-1, seed=7, **how)

    steps = plan(batch_size=batch_size, accumulation=accumulation, ranks=ranks)
    whole = plan(batch_size=8, accumulation=1, ranks=1)
    assert [step.indices for step in steps] == [step.indices for step in whole]
    assert [len(step.indices) for step in steps] == [8, 8, 5, 8, 8, 5, 8, 8]
    assert sorted(i for step in steps[:3] for i in step.indices) == list(range(21))
    assert steps[0].indices != steps[3].indices
    assert first_visits(steps) == steps[:3] and first_visits(steps[:2]) == steps[:2]
    assert all(len(indices) <= batch_size for s in steps for r in s.micro_batches for indices in r)


@pytest.mark.parametrize("ranks", [1, 3])
def test_micro_batches_by_tokens_hold_every_pair_once_within_the_budget(ranks):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(20, 200, (50,), generator=generator).tolist()
    (step,) = plan_pass(list(range(40)), 40, 1, 1)
    costs = [float(n) for n in tokens]
    cut = regroup(step, tokens, costs, 256, ranks)
    assert sorted(cut.indices) == list(range(40))
    sums = [[sum(tokens[i] for i in pairs) for pairs in row] for row in cut.micro_batches]
    assert max(map(max, sums)) <= 256
    loads = [sum(row[rank] for row in sums) for rank in range(ranks)]
    assert max(loads) - min(loads) <= max(tokens)
    fewest = -(-sum(tokens[:40]) // (256 * ranks))
    assert fewest <= len(cut.micro_batches) <= fewest + 2
    assert regroup(step, tokens, costs, 256, ranks) == cut


def efficiency(step, costs):
    """Work over ranks x the time of all rounds, in each of which all wait for the slowest."""
    rounds = [[sum(costs[i] for i in batch) for batch in row] for row in step.micro_batches]
    return sum(map(sum, rounds)) / (len(rounds[0]) * sum(map(max, rounds)))


@pytest.mark.parametrize("ranks", [1, 8, 64])
@pytest.mark.parametrize(("batch_size", "rounds", "missing"), [(4, 1, 0), (4, 3, 5), (1, 4, 3)])
def test_a_step_is_spread_by_cost_over_ranks_and_passes(ranks, batch_size, rounds, missing):
    """Lengths like UltraFeedback's; `missing` pairs fewer than there is room for."""
    generator = torch.Generator().manual_seed(ranks + batch_size)
    room = batch_size * rounds * ranks
    costs = torch.empty(room + 10).log_normal_(6.4, 0.6, generator=generator).tolist()
    order = torch.randperm(room + 10, generator=generator)[: max(1, room - missing)].tolist()
    (step,) = plan_pass(order, room, ranks, rounds)
    even = spread(step, costs, batch_size)
    assert sorted(even.indices) == sorted(step.indices)
    assert [len(row) for row in even.micro_batches] == [ranks] * rounds
    batches = [batch for row in even.micro_batches for batch in row]
    assert max(map(len, batches)) <= batch_size
    places = {i: place for place, i in enumerate(order)}
    assert all(list(batch) == sorted(batch, key=places.get) for batch in batches)
    before, now = (
        (efficiency(s, costs), max(sum(costs[i] for i in b) for r in s.micro_batches for b in r))
        for s in (step, even)
    )
    assert now[0] > before[0] if ranks > 1 else now[0] == pytest.approx(1)
    assert now[1] <= before[1]  # memory follows the largest pass
    assert spread(step, costs, batch_size) == even


def test_a_pair_costs_its_packed_tokens_and_its_attention():
    """At ATTENTION_TOKENS tokens attention is half of it; a common prefix is computed once."""
    ids = np.zeros(ATTENTION_TOKENS, np.int64)
    whole, half = Sequence(ids, ids), Sequence(ids[: len(ids) // 2], ids[: len(ids) // 2])
    assert cost(Pair(whole, whole)) == 4 * len(ids)
    assert cost(Pair(whole, half)) == (1 + 1 + 1 / 2 + 1 / 4) * len(ids)
    assert cost(Pair(whole, half, len(half.ids))) == 2 * len(ids)


def test_without_a_budget_ranks_get_like_costs_within_their_batch_size():
    split = tiny_split(12)
    costs = [cost(pair) for pair in split.pairs]
    fields = {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 2}
    config = tiny_config(**fields, max_steps=1, gradient_accumulation_steps=2)
    steps = plan(config, {"train": split, "eval": split}, 2)
    how = {"ranks": 2, "epochs": 1, "max_steps": 1, "seed": config.seed}
    plain = plan_training(12, batch_size=3, accumulation=2, **how)
    assert steps["train"] == [spread(plain[0], costs, 3)] != plain
    assert steps["eval"] == [spread(evaluation_step(12, 2, 2), costs, 2)]


def test_a_budget_below_the_longest_pair_is_refused():
    split = tiny_split(4)
    longest = max(pair.packed_tokens for pair in split.pairs)
    steps = plan(tiny_config(max_tokens_per_batch=longest), {"train": split, "eval": split}, 2)
    assert sorted(steps["train"][0].indices) == sorted(steps["eval"][0].indices) == [0, 1, 2, 3]
    assert all(len(pairs) <= 1 for row in steps["eval"][0].micro_batches for pairs in row)
    place = next(pair.source for pair in split.pairs if pair.packed_tokens == longest)
    message = f"max_tokens_per_batch: expected at least {longest}, .* longest pair .{place}.,"
    with pytest.raises(InputError, match=message):
        plan(tiny_config(max_tokens_per_batch=longest - 1), {"train": split}, 1)


def test_max_steps_overrides_epochs():
    how = {"batch_size": 2, "accumulation": 1, "ranks": 1, "seed": 0}
    assert len(plan_training(5, epochs=1, max_steps=7, **how)) == 7
    assert len(plan_training(5, epochs=0.5, max_steps=-1, **how)) == 2


def test_nan_stops_the_run():
    check_finite(3, 0.7, 1.0)
    for loss, norm in ((float("nan"), 1.0), (0.7, float("inf"))):
        with pytest.raises(FloatingPointError, match="step 3: loss .*lower learning_rate"):
            check_finite(3, loss, norm)


def test_pairs_whose_log_probs_are_not_finite_are_named():
    """Of a step whose loss is not finite; the weights stay as they are."""
    split, (policy, accelerator) = tiny_split(4), tiny_policy(tiny_llama(tied=False))
    split.reference = lookup(torch.zeros(4, 2))
    (mark,) = tiny_tokenizer()("!")["input_ids"]
    policy.language_model.get_input_embeddings().weight.data[mark] = torch.nan
    named = [pair.source for pair in split.pairs if mark in pair.chosen.ids]
    assert 0 < len(named) < 4
    step = plan_pass([0, 1, 2, 3], 4, 1, 2)[0]
    message = f"^loss nan, as log-probs are not finite: {', '.join(named)}; lower learning_rate"
    with pytest.raises(FloatingPointError, match=message):
        run_step(policy, split, step, accelerator, train=True)
    run_step(policy, split, step, accelerator, train=False)  # an evaluation says nan
