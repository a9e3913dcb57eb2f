"""One step of training: packing, the fused head, the loss, gradients however it is split."""

import math

import pytest
import torch
from accelerate import Accelerator
from trainer_tiny import (
    as_split,
    gradient,
    precomputed,
    relative,
    rpo_by_hand,
    shifted_reference,
    tiny_config,
    tiny_llama,
    tiny_policy,
    tiny_split,
)

from trainer.config import InputError
from trainer.loop import METRICS, check_finite, evaluate, evaluation_step, named, run_step
from trainer.packing import Step, first_visits, pack, plan_pass, plan_training, regroup
from trainer.reference import lookup
from trainer.run import plan

LN2 = math.log(2)


@pytest.mark.parametrize("reduction", ["sum", "sequence_mean", "token_mean"])
def test_gradients_do_not_depend_on_how_a_step_is_split(reduction):
    split = tiny_split(8)
    ref_logps = shifted_reference(8)
    split.reference = lookup(ref_logps)
    policy, accelerator = tiny_policy(sft_reduction=reduction, eta=0.5)
    order, results = list(range(8)), []
    for accumulation in (1, 2, 3, 8, 11):  # 3 is uneven, 11 has passes without any pair
        policy.zero_grad()
        (step,) = plan_pass(order, 8, 1, accumulation)
        values = run_step(policy, split, step, accelerator, train=True)
        results.append((values, gradient(policy)))
    tokens = [pair.packed_tokens for pair in split.pairs]
    for budget in (max(tokens), 2 * max(tokens)):
        policy.zero_grad()
        values = run_step(policy, split, regroup(step, tokens, budget, 1), accelerator, train=True)
        results.append((values, gradient(policy)))
    for values, grad in results[1:]:
        torch.testing.assert_close(values, results[0][0], rtol=1e-5, atol=1e-6)
        assert relative(grad, results[0][1]) < 1e-5

    policy.zero_grad()  # averaging each pass by its own counts is another gradient
    for i in order:
        batch, ref = pack(split.pairs, (i,)), ref_logps[i]
        own = policy(batch, ref, 1, split.pairs[i].chosen.trained_tokens)
        (own.loss / 8).backward()
    differs = relative(gradient(policy), results[0][1])
    assert (differs > 1e-3) == (reduction == "token_mean")


@pytest.mark.parametrize("reduction", ["sum", "sequence_mean", "token_mean"])
def test_at_step_0_the_policy_is_the_reference(reduction):
    split = tiny_split(8)
    policy, accelerator = tiny_policy(sft_reduction=reduction)
    steps = plan_pass(list(range(8)), 4, 1, 2)
    split.reference = precomputed(policy, split, steps, accelerator)
    for step in steps:
        values = run_step(policy, split, step, accelerator, train=True)
        assert values[1].item() == pytest.approx(LN2, abs=1e-6)
    before = evaluate(policy, split, evaluation_step(8, 3, 1), accelerator)
    assert before["eval/loss/dpo"] == pytest.approx(LN2, abs=1e-5)  # other batches, other rounding

    same = evaluation_step(8, 4, 1)
    split.reference = precomputed(policy, split, [same], accelerator)
    before = evaluate(policy, split, same, accelerator)
    assert before["eval/loss/dpo"] == pytest.approx(LN2, abs=1e-7)
    assert (before["eval/rewards/accuracies"], before["eval/rewards/margins"]) == (0.5, 0.0)


def test_without_eta_it_is_plain_dpo():
    split = tiny_split(4)
    ref_logps = shifted_reference(4)
    split.reference = lookup(ref_logps)
    model = tiny_llama()
    rpo_by_hand(model, split.pairs, ref_logps, tiny_config(eta=0.0)).backward()
    wanted = gradient(model)
    policy, accelerator = tiny_policy(eta=0.0)
    run_step(policy, split, Step((((0, 1, 2, 3),),)), accelerator, train=True)
    assert relative(gradient(policy), wanted) < 1e-5


def test_reference_free_losses_need_no_reference():
    policy, accelerator = tiny_policy(loss_type="simpo", reference="none")
    step = Step((((0, 1),),))
    values = run_step(policy, as_split(tiny_split(2).pairs), step, accelerator, train=True)
    assert METRICS[-1] == "logps/chosen_delta" and values[-1].isnan()  # against nothing
    assert values[:-1].isfinite().all() and set(named(values)) == set(METRICS[:-1])


def test_bfloat16_keeps_float32_weights_and_a_finite_loss():
    accelerator = Accelerator(cpu=True)
    policy, _ = tiny_policy()
    split = tiny_split(2)
    with torch.autocast("cpu", torch.bfloat16):
        step = Step((((0, 1),),))
        split.reference = precomputed(policy, split, [step], accelerator)
        values = run_step(policy, split, step, accelerator, train=True)
    assert values[1].item() == pytest.approx(LN2, abs=1e-2)
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
    cut = regroup(step, tokens, 256, ranks)
    assert sorted(cut.indices) == list(range(40))
    sums = [[sum(tokens[i] for i in pairs) for pairs in row] for row in cut.micro_batches]
    assert max(map(max, sums)) <= 256
    loads = [sum(row[rank] for row in sums) for rank in range(ranks)]
    assert max(loads) - min(loads) <= max(tokens)
    fewest = -(-sum(tokens[:40]) // (256 * ranks))
    assert fewest <= len(cut.micro_batches) <= fewest + 2
    assert regroup(step, tokens, 256, ranks) == cut


def test_a_budget_below_the_longest_pair_is_refused():
    split = tiny_split(4)
    longest = max(pair.packed_tokens for pair in split.pairs)
    steps = plan(tiny_config(max_tokens_per_batch=longest), {"train": split, "eval": split}, 2)
    assert sorted(steps["train"][0].indices) == sorted(steps["eval"][0].indices) == [0, 1, 2, 3]
    assert all(len(pairs) <= 1 for row in steps["eval"][0].micro_batches for pairs in row)
    with pytest.raises(InputError, match=f"max_tokens_per_batch: expected at least {longest}, the"):
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
