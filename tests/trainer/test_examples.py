"""The examples run, at toy size, and the one that reads a run finds what is planted."""

import csv
import os
import subprocess
import sys

import pytest

from tests.support import ROOT
from tests.trainer.tiny import record, save_tiny, write_jsonl
from trainer.examples import custom_loss, what_went_wrong

FOLDER = ROOT / "trainer" / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("examples") / "model")


def test_from_a_csv_file_to_a_conversation(model, tmp_path):
    rows = [{"question": f"{i}+1=", "better": f" {i + 1}", "worse": f" {i}"} for i in range(10)]
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for name, module in (("rpo", "-m trainer.cli"), ("python", "")):  # as a venv's bin has them
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n')
        program.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    words = [model, str(tmp_path / "pairs.csv"), str(tmp_path / "out"), "--max_steps", "10"]
    done = subprocess.run(
        [str(FOLDER / "csv_to_chat.sh"), *words, "--learning_rate", "1e-3", "--cpu_threads", "1"],
        cwd=ROOT, env=environment, input="1+1=\n", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 10/10" in done.stdout and "the best model is that of step" in done.stdout


def test_rpo_in_trl(model, tmp_path):
    pytest.importorskip("trl")
    from trainer.examples import rpo_in_trl

    pairs = write_jsonl(tmp_path / "pairs.jsonl", [record(i) for i in range(6)])
    log = rpo_in_trl.main(model, pairs, str(tmp_path / "out"), steps=2)
    assert all("loss/sft" in row for row in log[:2])
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_custom_loss(model):
    losses = custom_loss.main(model, steps=5)
    assert losses[-1] < losses[0]


# Rows that show each finding, and one that shows none.
CONFIG = {"max_steps": 10, "early_stopping_patience": None, "max_grad_norm": 1.0, "eta": 0.005,
          "beta": 0.1, "learning_rate": 1e-6}  # fmt: skip


def rows(losses=(0.7, 0.6, 0.5), margins=(0.0, 0.1, 0.3), deltas=(0.0, 1.0, 2.0), last=10, **more):
    steps = [{"step": k, "loss": 0.5, "grad_norm": 0.5} | more for k in range(1, last + 1)]
    tests = [
        {"step": 5 * k, "eval/loss": loss, "eval/rewards/margins": margin,
         "eval/logps/chosen_delta": delta}
        for k, (loss, margin, delta) in enumerate(zip(losses, margins, deltas, strict=True))
    ]  # fmt: skip
    return [*steps, *tests]


@pytest.mark.parametrize(
    "found, wanted",
    [
        (rows(), []),
        (rows(last=7), ["it ends after step 7 of 10"]),
        (rows(skipped_steps=1), ["10 steps were skipped"]),
        (rows(grad_norm=50.0), ["every gradient is clipped"]),
        (rows(deltas=(0.0, -5.0, -20.0)), ["overoptimization: chosen answers lose 20.0 nats"]),
        (rows(losses=(0.7, 0.5, 0.8)), ["overfitting: the held-out loss was 0.5000 after step 5"]),
        (rows(margins=(0.0, 1e-5, 1e-5)), ["nothing learned: the held-out margin is 1.0e-05"]),
    ],
    ids=lambda x: x[0][:20] if x and isinstance(x[0], str) else "",
)
def test_what_went_wrong(found, wanted):
    texts = what_went_wrong.findings(found, CONFIG)
    assert len(texts) == len(wanted)
    assert all(text.startswith(begin) for text, begin in zip(texts, wanted, strict=True))
