"""Data that does not fit the model: refused before training, with what to change."""

import pytest
import torch

from tests.trainer.tiny import record, tiny_model, tiny_split, tiny_tokenizer, write_jsonl
from trainer import run
from trainer.config.recipe import parse_config
from trainer.errors import InputError
from trainer.evaluation.generate import Sampling, generate
from trainer.evaluation.score import score
from trainer.model.fit import check_fit


def longrope(limit):
    """Phi-3's, which has other frequencies for sequences of more than `limit` tokens."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope |= {"rope_theta": 1e4, "original_max_position_embeddings": limit}
    return {"original_max_position_embeddings": limit, "rope_parameters": rope}


SCORE = {"beta": 0.1, "max_length": 512, "batch_size": 2, "kl_prompts": 1, "kl_tokens": 60}
SCORE |= {"seed": 0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
ASKED = ["--sample_prompts", "1", "--max_new_tokens", "40"]
REFUSED = [
    (
        "llama",
        {"vocab_size": 100},
        [],
        "model_name_or_path: .* gives the id 2.. and .* has 100 embeddings .*jsonl:.",
    ),
    (
        "gpt2",
        {"n_positions": 38},
        [],
        "max_length: expected at most 38, the positions of GPT2LMHe.* tokens .*jsonl:.",
    ),
    ("gpt2", {"n_positions": 64}, ASKED, "max_new_tokens: .* 64 positions, .* 3. tokens; expected"),
    (
        "phi3",
        longrope(38),
        ["--packing", "true"],
        r"packing: Phi3ForCausalLM has sequences on both sides of 38 tokens.*RoPE \(longrope\)",
    ),
    (
        "llama",
        {"max_position_embeddings": 32, "rope_parameters": DYNAMIC},
        [],
        r"max_length: expected at most 32, .* LlamaForCausalLM \(dynamic\) has other frequencies",
    ),
]


@pytest.mark.parametrize(("kind", "fields", "words", "message"), REFUSED, ids=lambda x: str(x)[:20])
def test_data_that_does_not_fit_is_refused_before_training(kind, fields, words, message, tmp_path):
    fields = fields | {"max_position_embeddings": fields.get("n_positions", 512)} | fields
    tiny_model(kind, **fields).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "empty.yaml").write_text("cpu_threads: 1\n")
    config = ["--config", tmp_path / "empty.yaml", "--model_name_or_path", tmp_path / "model"]
    for name in ("train", "eval"):
        file = write_jsonl(tmp_path / f"{name}.jsonl", [record(i) for i in range(9)])
        config += [f"--{name}_file", file]
    threads = torch.get_num_threads()
    with pytest.raises(InputError, match=f"^{message}"):
        run.run(parse_config([*map(str, config), "--output_dir", str(tmp_path / "out"), *words]))
    torch.set_num_threads(threads)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize("limit", [16, 256])
def test_one_set_of_frequencies_is_accepted(limit):
    check_fit(tiny_model("phi3", **longrope(limit)), tiny_split(9).pairs)


def test_evaluation_refuses_what_does_not_fit(tmp_path):
    """`score` before it computes, `generate` at the prompt that is too long."""
    tiny_model("gpt2", n_positions=64, max_position_embeddings=64).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    file, path = write_jsonl(tmp_path / "a.jsonl", [record(i) for i in range(9)]), str(tmp_path)
    with pytest.raises(InputError, match="max_new_tokens: GPT2LMHeadModel has 64 positions"):
        generate(str(file), {"m": f"{path}/m"}, f"{path}/out", Sampling(max_new_tokens=60))
    rows = [record(0) | {"chosen": [{"role": "assistant", "content": "yes " * 64}]}]
    long = write_jsonl(tmp_path / "b.jsonl", rows)
    with pytest.raises(InputError, match="max_length: expected at most 64, the positions of GPT2"):
        score([str(long)], {"m": f"{path}/m"}, f"{path}/m", f"{path}/out", **SCORE)
    with pytest.raises(InputError, match="kl_tokens: GPT2LMHeadModel has 64 positions"):
        score([str(file)], {"m": f"{path}/m"}, f"{path}/m", f"{path}/out", **SCORE)
