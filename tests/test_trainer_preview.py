"""`--dry_run`: what it prints, and that nothing else happens."""

import re
import sys

import pytest
import torch
from trainer_tiny import record, save_tiny, tiny_split, tiny_tokenizer, write_jsonl

from trainer import run
from trainer.preview import histogram, marked, memory_plan, steps_plan
from trainer.recipe import parse_config


def test_trained_tokens_are_marked():
    sequence = tiny_split(1).pairs[0].chosen
    assert marked(sequence, tiny_tokenizer()) == (
        "<|im_start|>user\ncount from 0<|im_end|>\n<|im_start|>assistant\n⟦01<|im_end|>⟧"
    )


def test_the_histogram_counts_every_sequence():
    split = tiny_split(20)
    lines = histogram(split).splitlines()
    rows = [re.fullmatch(r" +(\d+) to (\d+) +(\d+) (#*)", line) for line in lines[:-1]]
    assert all(rows) and sum(int(row[3]) for row in rows) == 40
    lengths = sorted(len(s.ids) for pair in split.pairs for s in (pair.chosen, pair.rejected))
    assert (int(rows[0][1]), int(rows[-1][2])) == (lengths[0], lengths[-1])
    low, high = int(rows[1][1]), int(rows[1][2])
    assert int(rows[1][3]) == sum(low <= length <= high for length in lengths)


@pytest.fixture
def words(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", [record(i) for i in range(22)])
    words = ["--model_name_or_path", save_tiny(tmp_path / "model"), "--train_file", train]
    words += ["--output_dir", str(tmp_path / "out"), "--eval_split_ratio", "0.1"]
    return [*words, "--gradient_accumulation_steps", "2", "--dry_run"]


def test_a_dry_run_prints_and_ends(words, tmp_path, monkeypatch, capsys):
    """Without weights to load, and beside a finished run that a real one would not replace."""
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["trainer/run.py", *words])
    threads = torch.get_num_threads()
    run.main()  # returns, so the exit code is 0
    torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "sample 1, chosen" in out and "sample 2, rejected" in out
    assert re.search(r"train +pairs 20, .*truncated_pairs 0, .*dropped \{\}", out)
    assert re.search(r"eval +pairs 2,", out) and "tokens of a training sequence" in out
    assert re.search(r"3 steps of 8 pairs, 1.00 epochs\n  1 process.*, 2 pass", out)
    # 259 x 32 embeddings, tied; per layer 3,072 + 6,144 of matrices and 64 of norms; a last norm
    assert f"{(259 * 32 + 2 * (3072 + 6144 + 64) + 32) / 1e6:.1f} M parameters" in out
    assert re.search(r"head, at most \d+ trained tokens in a pass, vocabulary 259", out)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.jsonl"]


def test_adapters_leave_the_weights_without_gradients(words):
    split, config = tiny_split(8), parse_config([*words, "--use_peft"])
    plan = run.plan(config, {"train": split}, ranks=1)["train"]
    text = memory_plan(config, config.model_name_or_path, split, plan)
    assert "GiB (float32), gradients and state of adamw_torch for the adapters only" in text


def test_the_largest_step_and_pass_are_counted(words):
    split = tiny_split(22)
    config = parse_config(words)
    plan = run.plan(config, {"train": split}, ranks=1)["train"]
    tokens = [sum(split.pairs[i].tokens for i in step.indices) for step in plan]
    passes = [
        sum(split.pairs[i].packed_tokens for i in batch)
        for step in plan
        for ranks in step.micro_batches
        for batch in ranks
    ]
    text = steps_plan(split, plan)
    assert f"{max(tokens)} at most" in text and f"process: {max(passes)} packed tokens" in text
