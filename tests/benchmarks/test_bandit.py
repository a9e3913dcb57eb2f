"""The controlled experiment, reduced: the claim, the maximin problem, the report."""

import json
import runpy
import sys
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("scipy", reason="pip install 'rpo-kernels[eval]'")

from benchmarks.experiments import bandit
from benchmarks.experiments.bandit_report import (
    by_setting,
    claim,
    report,
)
from benchmarks.experiments.bandit_world import (
    Setting,
    draw_pairs,
    grid,
    train,
    true_reward,
)
from benchmarks.experiments.maximin import (
    duality_gap,
    random_instance,
    rpo_policy,
    saddle_point,
    worst_reward,
)


@pytest.mark.parametrize("seed", range(3))
def test_rpo_solves_the_maximin_problem(seed):
    """The policy found without duality is the RPO minimizer, and that is a saddle point."""
    instance = random_instance(seed)
    rpo = rpo_policy(instance)
    direct, reward = saddle_point(instance)
    assert (direct.exp() - rpo.exp()).abs().max() < 1e-5
    value, _ = worst_reward(instance, direct)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):  # it is the best against the worst reward: no policy near it does better
        shift = 0.05 * torch.randn(len(direct), generator=generator, dtype=torch.float64)
        assert worst_reward(instance, (direct + shift).log_softmax(0))[0] < value
    assert abs(duality_gap(instance, rpo)) < 1e-9
    dpo = rpo_policy(type(instance)(**vars(instance) | {"eta": 0.0}))
    assert (direct.exp() - dpo.exp()).abs().max() > 1e-2  # the SFT term is what makes it so
    assert duality_gap(instance, dpo) > 1e-4


CELL = [Setting(0.1, eta, 0.6) for eta in (0.0, 0.3, 1.0, 3.0)]


@pytest.fixture(scope="module")
def outcome():
    return train(CELL, list(range(12)), steps=400)


def test_dpo_drifts_and_rpo_does_not(outcome):
    """Partial coverage, 12 seeds: the claim of the experiment, on eta = 1 for every seed."""
    rewards = outcome.true_reward.view(4, 12)
    uncovered = outcome.uncovered.view(4, 12)
    gap = outcome.implicit_gap.view(4, 12)
    dpo, rpo = 0, 2
    assert (rewards[rpo] > rewards[dpo]).sum() >= 10  # sign test: p = 0.019
    assert rewards[rpo].mean() > rewards[dpo].mean() + 0.5
    assert uncovered[dpo].mean() > 0.5 > 0.2 > uncovered[rpo].mean()
    assert gap[dpo].mean() > 0  # it believes its own responses better than the chosen ones
    chosen = outcome.chosen_logp.view(4, 12, -1)
    assert (chosen[rpo, :, -1] > chosen[dpo, :, -1]).all()


def test_every_model_trains_alone(outcome):
    """Training together changes nothing: one model on its own ends where it did among 48."""
    alone = train(CELL[2:3], [7], steps=400)
    assert (alone.log_policy[0] - outcome.log_policy[2 * 12 + 7]).abs().max() < 1e-2


def test_start_is_the_reference():
    start = train(CELL[:1], [0], steps=0)
    assert torch.allclose(start.log_policy.exp(), torch.full((1, 100), 0.01))


def test_pairs_are_of_the_covered_part_and_mostly_right():
    chosen, rejected = draw_pairs(0.4, 0)
    assert grid()[torch.cat([chosen, rejected])].max() < 0.4 and (chosen != rejected).all()
    reward = true_reward()
    right = reward[chosen] - reward[rejected]
    assert 0.6 < (right > 0).float().mean() < 0.95  # labels are drawn, not ranked


def test_report(tmp_path, outcome):
    settings = CELL + [Setting(0.1, eta, 1.0) for eta in (0.0, 1.0)]
    seeds = list(range(6))
    text = report(settings, seeds, train(settings, seeds, steps=40), tmp_path)
    assert "best eta" in text
    written = json.loads((tmp_path / "bandit.json").read_text())
    assert len(written["settings"]) == 6 and len(written["claims"]) == 2
    for name in ("bandit.png", "bandit_sweep.png"):
        assert (tmp_path / name).stat().st_size > 10_000


def test_command(tmp_path, monkeypatch, capsys):
    """The whole sweep as the command runs it, cut short."""
    words = ["bandit", "--seeds", "6", "--steps", "3", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it is imported already
        runpy.run_module("benchmarks.experiments.bandit", run_name="__main__")
    assert "Bonferroni" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "bandit.json").read_text())["settings"]) == 90


def test_a_folder_that_cannot_be_made_is_an_error_before_training(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(bandit, "train", None)
    monkeypatch.setattr(sys, "argv", ["bandit", "--output_dir", str(tmp_path / "file")])
    with pytest.raises(SystemExit):
        bandit.main()
    assert "error: output_dir: cannot make" in capsys.readouterr().err


def test_eta_is_chosen_on_other_seeds_than_those_tested(outcome):
    """Rewards made up: the first four of 12 seeds prefer eta 3, the others eta 1."""
    values = by_setting(CELL, list(range(12)), outcome)
    rewards = np.zeros((4, 12))
    rewards[3, :4], rewards[2, 4:], rewards[3, 4:] = 1, 5, np.arange(8) - 20
    made = claim(CELL, values | {"true_reward": rewards}, 0.1, 0.6)
    assert made["best_eta"] == 3.0 and made["test_seeds"] == 8
    assert made["rpo_higher_on"] == 0 and made["p_value"] > 0.99
