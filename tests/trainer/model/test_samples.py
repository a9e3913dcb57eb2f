"""Samples at evaluations: the model's own greedy answers, without a trace in the run."""

import json

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from tests.trainer.tiny import (
    record,
    save_tiny,
    tiny_config,
    tiny_llama,
    tiny_model,
    tiny_policy,
    tiny_split,
    tiny_tokenizer,
    write_jsonl,
)
from trainer import run
from trainer.config.recipe import parse_config
from trainer.data.steps import plan_pass
from trainer.errors import InputError
from trainer.loop import run_step
from trainer.model.generate import first_prompts, take_samples
from trainer.model.head import fuse_head

TIMINGS = ("tokens_per_second", "step_seconds", "eval/seconds", "peak_memory_gb")


def greedy(model, prompt, count):
    """Answers one token at a time, by the model's own logits."""
    ids, ends = list(prompt), {1, 2}
    for _ in range(count):
        ids.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        ids[-1] = int(ids[-1])
        if ids[-1] in ends - {1}:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mistral"])
def test_samples_are_the_model_s_greedy_answers(kind):
    """Prompts of unequal length in one batch, beyond a window of 16 tokens, packed attention on."""
    wanted, split, tokenizer = tiny_model(kind), tiny_split(8), tiny_tokenizer()
    policy, accelerator = tiny_policy(tiny_model(kind))
    config = tiny_config(
        sample_prompts=3, max_new_tokens=12, per_device_eval_batch_size=2, eval_split_ratio=0.5
    )
    samples = take_samples(policy, tokenizer, split, config, accelerator)
    prompts = list(first_prompts(split.pairs, 3))
    assert len({len(prompt) for prompt in prompts}) > 1 and min(map(len, prompts)) > 16
    for prompt, row in zip(prompts, samples, strict=True):
        answer = tokenizer.decode(greedy(wanted, prompt, 12), skip_special_tokens=True)
        assert row["answer"] == answer.strip() and row["prompt"] == tokenizer.decode(list(prompt))
    assert samples[0]["chosen"] == record(0)["chosen"][0]["content"]
    assert "count from 0" in samples[0]["prompt"]


def test_prompts_are_different_and_as_many_as_there_are():
    pairs = tiny_split(2).pairs
    assert len(first_prompts([*pairs, *pairs], 4)) == 2 and len(first_prompts(pairs, 1)) == 1


def test_compiled_layers_answer_uncompiled(monkeypatch):
    policy, accelerator = tiny_policy()
    for layer in policy.language_model.model.layers:
        layer.compile(backend=lambda *_: pytest.fail("compiled"))
    config = tiny_config(sample_prompts=1, max_new_tokens=2, eval_split_ratio=0.5)
    take_samples(policy, tiny_tokenizer(), tiny_split(2), config, accelerator)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    words = {
        "model_name_or_path": save_tiny(folder / "model"),
        "train_file": write_jsonl(folder / "train.jsonl", [record(i) for i in range(12)]),
        "eval_file": write_jsonl(folder / "eval.jsonl", [record(i) for i in range(12, 18)]),
        "max_steps": 3,
        "eval_steps": 2,
        "learning_rate": 3e-3,
        "cpu_threads": torch.get_num_threads(),
    }
    return [word for field, value in words.items() for word in (f"--{field}", str(value))]


def test_a_run_with_samples_is_the_run_without_bit_for_bit(tiny, tmp_path):
    """Adapters with dropout: every step depends on the state of the random numbers."""
    tiny = [*tiny, "--use_peft", "--lora_dropout", "0.5"]
    outcomes, states = [], []
    for count in (0, 2):
        folder = tmp_path / str(count)
        words = ["--output_dir", str(folder), "--sample_prompts", str(count)]
        rows = run.run(parse_config([*tiny, *words]))
        weights = load_file(folder / "model" / "adapter_model.safetensors")
        outcomes.append([{k: v for k, v in row.items() if k not in TIMINGS} for row in rows])
        states.append((weights, torch.get_rng_state()))
    assert outcomes[0] == outcomes[1]
    (without, before), (with_samples, after) = states
    assert all(torch.equal(without[name], with_samples[name]) for name in without | with_samples)
    assert torch.equal(before, after)
    assert not (tmp_path / "0" / "samples.jsonl").exists()


def test_samples_are_written_shown_and_in_the_card(tiny, tmp_path, capsys):
    folder = tmp_path / "out"
    words = ["--output_dir", str(folder), "--sample_prompts", "2", "--max_new_tokens", "5"]
    run.run(parse_config([*tiny, *words]))
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 0, 2, 2, 3, 3]
    assert list(rows[0]) == ["step", "prompt", "answer", "chosen"]
    assert rows[0]["prompt"] == rows[2]["prompt"] != rows[1]["prompt"]
    output = capsys.readouterr().out
    assert output.count("step 0, sample: ...") == output.count("step 3, sample: ...") == 2
    card = (folder / "model" / "README.md").read_text()
    section = card.split("## Samples\n")[1].split("## Recipe")[0]
    assert "step 0: " in section and "step 3: " in section and "step 2: " not in section
    start = json.loads((folder / "model" / "generation_config.json").read_text())
    assert start["bos_token_id"] == 1 and start["pad_token_id"] == 0


def test_samples_without_held_out_pairs_are_refused():
    with pytest.raises(InputError, match="sample_prompts: expected 0 without an evaluation set"):
        tiny_config(sample_prompts=2)


def test_training_goes_on_as_it_was():
    """Adapters' dropout off while answering, on again in the next step; gradients untouched."""
    lora = LoraConfig(lora_dropout=0.5, target_modules=["q_proj"])
    policy, _ = tiny_policy(get_peft_model(fuse_head(tiny_llama()), lora))
    accelerator, split = Accelerator(cpu=True), tiny_split(2)
    config = tiny_config(sample_prompts=1, max_new_tokens=2, eval_split_ratio=0.5)
    split.reference = lambda batch: torch.full((2 * len(batch.indices),), -20.0)
    step = plan_pass([0, 1], 2, 1, 1)[0]
    take_samples(policy, tiny_tokenizer(), split, config, accelerator)
    assert all(p.grad is None for p in policy.parameters())
    run_step(policy, split, step, accelerator, train=True)
    dropouts = [m for m in policy.modules() if isinstance(m, torch.nn.Dropout)]
    assert policy.training and dropouts and all(m.training for m in dropouts)
    assert not policy.language_model.training
