"""The best model by a metric of the evaluations, early stopping, and both in a resumed run."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.trainer.tiny import record, save_tiny, tiny_config, write_jsonl
from trainer import best, run
from trainer.config.recipe import parse_config
from trainer.errors import InputError

STEPS, EVERY = 20, 4


@pytest.fixture(scope="module", autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Arguments for 20 steps at a constant learning rate, an evaluation every four."""
    folder = tmp_path_factory.mktemp("best")
    held_out = [record(i) for i in range(22, 31)]
    turned = [r | {"chosen": r["rejected"], "rejected": r["chosen"]} for r in held_out]
    write_jsonl(folder / "reversed.jsonl", turned)
    recipe = {
        "model_name_or_path": save_tiny(folder / "model"),
        "train_file": write_jsonl(folder / "train.jsonl", [record(i) for i in range(12)]),
        "eval_file": write_jsonl(folder / "eval.jsonl", held_out),
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_steps": STEPS,
        "eval_steps": EVERY,
        "save_steps": 6,
        "cpu_threads": 1,
        "ref_cache_dir": str(folder / "cache"),
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    return ["--config", str(folder / "tiny.yaml")]


def start(tiny, folder, *words):
    run.run(parse_config([*tiny, "--output_dir", str(folder), *words]))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], load_file(folder / "model" / "model.safetensors")


def pairs(tiny, name):
    """Another evaluation set: `eval`, or `reversed`, which has its pairs the other way round."""
    return ["--eval_file", str(Path(tiny[1]).with_name(f"{name}.jsonl"))]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rows_of(metric, *values):
    start = {"step": 0, "eval/loss": 0.0, f"eval/{metric}": -9.0}
    named = [{"step": k, "eval/loss": 1.0, f"eval/{metric}": v} for k, v in enumerate(values, 1)]
    return [start, *named]


def test_losses_are_better_lower_and_the_others_higher():
    """The evaluation before training is none of a trained model; of equals the first is best."""
    assert best.best_row(rows_of("loss", 3.0, 1.0, 2.0, 1.0), "loss")["step"] == 2
    accuracies = rows_of("rewards/accuracies", 0.5, 0.7, 0.7)
    assert best.best_row(accuracies, "rewards/accuracies")["step"] == 2
    assert best.best_row([{"step": 1, "loss": 1.0}], "loss") is None


@pytest.mark.parametrize("patience, ends", [(1, True), (2, True), (3, False), (None, False)])
def test_patience_counts_evaluations_since_the_best(patience, ends):
    fields = {"metric_for_best_model": "loss", "eval_file": "e", "eval_steps": 1}
    config = tiny_config(**fields, early_stopping_patience=patience)
    assert best.out_of_patience(rows_of("loss", 3.0, 1.0, 2.0, 1.5), config) is ends
    assert not best.out_of_patience(rows_of("loss", 3.0), config)


@pytest.mark.parametrize("held_out, step", [("reversed", EVERY), ("eval", STEPS)])
def test_the_best_model_is_saved(tiny, tmp_path, held_out, step):
    """What training makes worse is best at its first evaluation, what it makes better at the last;
    the schedule is constant, so a run that ends there ends with that model."""
    words = [*pairs(tiny, held_out), "--metric_for_best_model", "rewards/margins"]
    rows, model = start(tiny, tmp_path / "a", *words)
    assert rows[-1]["step"] == STEPS
    assert equal(model, start(tiny, tmp_path / "b", "--max_steps", str(step))[1])
    assert not list((tmp_path / "a").glob("*best-*"))


def test_a_run_ends_when_nothing_improves(tiny, tmp_path, capfd):
    words = [*pairs(tiny, "reversed"), "--metric_for_best_model", "rewards/margins"]
    words += ["--early_stopping_patience", "2", "--logging_steps", "5"]
    rows, _ = start(tiny, tmp_path / "out", *words)
    assert [row["step"] for row in rows if "loss" in row] == [5, 10, 12]  # the last two as well
    said = capfd.readouterr().out
    assert "after step 12: rewards/margins has not improved in 2 evaluations" in said
    assert f"the best model is that of step {EVERY}" in said


@pytest.mark.parametrize("held_out", ["reversed", "eval"])
def test_a_killed_run_keeps_the_same_best_model(tiny, tmp_path, monkeypatch, held_out):
    """Killed after step 18, two evaluations behind its newest checkpoint."""
    words = [*pairs(tiny, held_out), "--metric_for_best_model", "rewards/margins"]
    words += ["--save_steps", "10"]
    whole = start(tiny, tmp_path / "whole", *words)

    def dies(rows, config, asked=best.out_of_patience):
        if rows[-1]["step"] == 18:
            raise KeyboardInterrupt
        return asked(rows, config)

    monkeypatch.setattr(best, "out_of_patience", dies)
    with pytest.raises(KeyboardInterrupt):
        start(tiny, tmp_path / "out", *words)
    waiting = {"reversed": {"best-4"}, "eval": {"best-8", "best-16"}}[held_out]
    assert {path.name for path in (tmp_path / "out").glob("*best*")} == waiting
    monkeypatch.undo()
    again = start(tiny, tmp_path / "out", *words, "--resume_from_checkpoint", "auto")
    assert [row["step"] for row in again[0]] == [row["step"] for row in whole[0]]
    assert equal(again[1], whole[1])


def test_a_best_model_that_is_gone_is_an_error(tiny, tmp_path):
    words = [*pairs(tiny, "reversed"), "--metric_for_best_model", "loss"]
    start(tiny, tmp_path / "out", *words)  # which removes it at its end
    there = ["--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-18")]
    with pytest.raises(InputError, match="best-4, the best model up to checkpoint-18, is gone"):
        start(tiny, tmp_path / "other", *words, *there)
