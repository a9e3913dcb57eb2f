"""`--dry_run`: what it prints, and that nothing else happens."""

import re
import sys

import pytest
import torch
from transformers import AutoConfig

from tests.trainer.tiny import SIZES, record, save_tiny, tiny_split, tiny_tokenizer, write_jsonl
from trainer import run
from trainer.config.recipe import parse_config
from trainer.errors import InputError
from trainer.preview import histogram, marked, memory_plan, steps_plan


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
    assert re.search(r"train +20 pairs, [\d,]+ tokens of which [\d,]+ are trained on", out)
    assert re.search(r"eval +2 pairs,", out) and "tokens of a training sequence" in out
    assert re.search(r"3 steps of 8 pairs, 1.00 epochs\n  1 process.*, 2 pass", out)
    # 259 x 32 embeddings, tied; per layer 3,072 + 6,144 of matrices and 64 of norms; a last norm
    assert f"{(259 * 32 + 2 * (3072 + 6144 + 64) + 32) / 1e6:.1f} M parameters" in out
    assert re.search(r"head, at most \d+ trained tokens in a pass, vocabulary 259", out)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.jsonl"]


@pytest.fixture
def memory(words, tmp_path):
    """``memory(*words)`` is the memory plan of a wide untied model without weights."""
    wide = {"vocab_size": 4096, "hidden_size": 1024, "num_hidden_layers": 1}
    AutoConfig.for_model("llama", **SIZES | wide, tie_word_embeddings=False).save_pretrained(
        tmp_path / "wide"
    )

    small = ["--max_workspace_mb", "0.2"]

    def memory(*own):
        model = ["--model_name_or_path", str(tmp_path / "wide")]
        config = run.with_dtype(parse_config([*model, *words[2:], *small, *own]))
        split = tiny_split(8)
        plan = run.plan(config, {"train": split}, ranks=1)["train"]
        return memory_plan(config, config.model_name_or_path, split, plan)

    return memory


def test_memory_is_that_of_what_is_trained_and_of_what_stands_beside_it(memory):
    """GiB of weights, gradients, state: 11.7 M weights in all, 4.2 M in lm_head."""
    adapters = ["--use_peft", "--lora_target_modules", "q_proj", "--lora_r", "256"]
    adapter = (1024 + 1024) * 256
    whole = 2 * 4096 * 1024 + 1024 * (2 * 1024 + 2 * 512 + 3 * 64) + 3 * 1024
    for own, copy in ([], 0), (["--lora_modules_to_save", "lm_head"], 4096 * 1024):
        trained, gib = adapter + copy, 4 / 2**30
        text = memory(*adapters, *own)
        assert (
            f"{(whole + trained) / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained: weights "
            f"{(whole + trained) * gib:.2f} GiB (float32), gradients {trained * gib:.2f} GiB, "
            f"state of adamw_torch {2 * trained * gib:.2f} GiB\n  head"
        ) in text
    head = [line for line in memory(*adapters).splitlines() if "MiB streaming" in line]
    assert len(head) == 1 and head[0] not in text  # a head that is trained has a gradient
    beside = f"\n  reference: weights {whole * gib:.2f} GiB\n"
    assert beside in memory("--reference", "online")
    nowhere = ["--ref_model_name_or_path", "./nowhere"]
    with pytest.raises(InputError, match="^ref_model_name_or_path: no folder .*/nowhere"):
        memory("--reference", "online", *nowhere)
    with pytest.raises(InputError, match="lora_target_modules: no module is called q_projj"):
        memory("--use_peft", "--lora_target_modules", "q_projj")


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
