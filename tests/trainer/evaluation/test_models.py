"""`generate` and `score`: batches, resuming, turns; log-probs and KL against the model's logits."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.trainer.tiny import (
    EPS,
    logps_budgets,
    record,
    save_tiny,
    sides,
    tiny_llama,
    tiny_model,
    tiny_split,
    tiny_tokenizer,
    write_jsonl,
)
from trainer.errors import InputError
from trainer.evaluate import main
from trainer.evaluation.generate import Sampling, generate
from trainer.evaluation.prompts import read_prompts
from trainer.evaluation.score import draw_pairs, kl_estimate, score
from trainer.model.generate import first_prompts, sample

SCORE = {
    "beta": 0.5,
    "max_length": 256,
    "batch_size": 3,
    "kl_prompts": 2,
    "kl_tokens": 4,
    "seed": 0,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A reference, and a policy with other weights."""
    reference = tmp_path_factory.mktemp("reference")
    policy = tmp_path_factory.mktemp("policy")
    save_tiny(reference)
    save_tiny(policy)
    tiny_llama(seed=1).save_pretrained(policy)
    return str(reference), str(policy)


def own_logps(folder, pairs):
    """Response log-probs (B, 2) from the model's logits, in float64, and their budgets."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return (x.view(2, -1).T for x in logps_budgets(model, sides(pairs)))


def test_score_matches_the_models_own_logits(tmp_path, folders, capsys):
    reference, policy = folders
    file = write_jsonl(tmp_path / "pairs.jsonl", [record(k) for k in range(7)])
    result = score([file], {"same": reference, "other": policy}, reference, str(tmp_path), **SCORE)
    pairs = tiny_split(7).pairs
    (logps, off), (ref, ref_off) = own_logps(policy, pairs), own_logps(reference, pairs)
    rewards = 0.5 * (logps - ref)
    expected = {
        "rewards/accuracies": (
            (rewards[:, 0] > rewards[:, 1]).double().mean(),
            torch.tensor(7 * EPS),
        ),
        "rewards/margins": (
            (rewards[:, 0] - rewards[:, 1]).mean(),
            0.5 * (off + ref_off).sum(1).mean(),
        ),
        "logps/chosen": (logps[:, 0].mean(), off[:, 0].mean()),
        "logps/rejected": (logps[:, 1].mean(), off[:, 1].mean()),
        "ref_logps/chosen": (ref[:, 0].mean(), ref_off[:, 0].mean()),
    }
    for key, (value, budget) in expected.items():
        assert result["other"][key] == pytest.approx(value.item(), abs=budget.item()), key
    assert result["other"]["kl"] != 0 and result["other"]["kl_standard_error"] > 0
    same = result["same"]  # the reference itself: no reward, ties, no divergence
    assert (same["rewards/accuracies"], same["rewards/margins"], same["kl"]) == (0.5, 0, 0)
    assert json.loads((tmp_path / "scores.json").read_text()) == result
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").open()]
    assert len(lines) == 14 and lines[-1]["pair"].endswith("pairs.jsonl:7")
    assert ((torch.tensor(lines[-1]["logps"]).double() - logps[-1]).abs() <= off[-1]).all()


def test_kl_is_that_of_the_models(folders):
    """One token, many draws: the estimate meets the exact KL of the two distributions."""
    reference, policy = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in folders
    )
    prompt = next(iter(first_prompts(tiny_split(1).pairs, 1)))
    pairs = draw_pairs(policy, tiny_tokenizer(), [prompt] * 2000, 1, 1000, "policy")
    with torch.no_grad():
        p, q = (m(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
                for m in (policy, reference))  # fmt: skip
    tokens = torch.tensor([[s.ids[-1] for s in (pair.chosen, pair.rejected)] for pair in pairs])
    estimate = kl_estimate((p - q)[tokens].double())
    exact = (p.exp() * (p - q)).sum().item()
    assert estimate["kl"] == pytest.approx(exact, abs=4 * estimate["kl_standard_error"])
    assert 4 * estimate["kl_standard_error"] < 0.25 * exact


def test_batch_and_padding_do_not_change_greedy_answers():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    prompts = [list(ids) for ids in first_prompts(tiny_split(6).pairs, 6)]
    assert len({len(p) for p in prompts}) > 1
    options = {"max_new_tokens": 12, "temperature": 0.0}
    together = sample(model, tokenizer, prompts, **options)
    alone = [sample(model, tokenizer, [p], **options)[0] for p in prompts]
    assert together == alone
    model.generation_config.repetition_penalty = 5.0  # a model's own defaults change nothing
    assert sample(model, tokenizer, prompts, **options) == together


QUESTIONS = [
    {"question_id": "a", "turns": ["count from 1", "and on"]},
    {"question_id": "b", "prompt": "one two "},
    {"question_id": "c", "prompt": record(3)["prompt"]},
    {"question_id": "c2", "prompt": record(3)["prompt"]},  # the same again: taken once
    {"question_id": "d", "prompt": record(4)["prompt"]},
]


def test_generate_resumes_with_the_same_answers(tmp_path, folders):
    models = dict(zip(("ref", "rpo"), folders, strict=True))
    prompts = write_jsonl(tmp_path / "prompts.jsonl", QUESTIONS)
    sampling = Sampling(max_new_tokens=6, temperature=1.0, batch_size=2, seed=3)
    files = generate(prompts, models, str(tmp_path / "out"), sampling)
    assert [file.name for file in files] == ["ref.jsonl", "rpo.jsonl"]
    text = files[1].read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["question_id"] for row in rows] == ["a", "b", "c", "d"]
    assert [len(row["choices"][0]["turns"]) for row in rows] == [2, 1, 1, 1]
    assert rows[0]["model_id"] == "rpo" and files[0].read_text() != text

    lines = text.splitlines(keepends=True)
    files[1].write_text("".join(lines[:3]) + lines[3][:20])  # killed in the middle of a line
    generate(prompts, models, str(tmp_path / "out"), sampling)
    assert files[1].read_text() == text

    other = Sampling(max_new_tokens=6, temperature=1.0, batch_size=2, seed=4)
    with pytest.raises(InputError, match="ref.jsonl: holds answers of another model, prompts"):
        generate(prompts, models, str(tmp_path / "out"), other)
    tiny_llama(seed=2).save_pretrained(folders[1])  # trained again under the same path
    with pytest.raises(InputError, match="rpo.jsonl: holds answers of another model"):
        generate(prompts, models, str(tmp_path / "out"), sampling)


def test_a_prompt_s_thought_is_read_under_every_name(tmp_path):
    """As a pair's is, so that both are asked alike."""
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"prompt": [prompt[0], prompt[1] | {"thinking": "why"}, prompt[0]]}]
    (read,) = read_prompts(write_jsonl(tmp_path / "p.jsonl", rows))
    thought = {"reasoning_content": "why", "thinking": "why", "reasoning": "why"}
    assert read.start == (prompt[0], prompt[1] | thought, prompt[0])


def test_follow_up_sees_the_first_answer(tmp_path):
    prompt = read_prompts(write_jsonl(tmp_path / "p.jsonl", QUESTIONS))[0]
    assert prompt.messages([]) == [{"role": "user", "content": "count from 1"}]
    assert prompt.messages(["1 2"])[1:] == [
        {"role": "assistant", "content": "1 2"},
        {"role": "user", "content": "and on"},
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "question_id": [1]}, "expected a number or string as question_id, got .1"),
        ({"prompt": "half \ud83d"}, r"p.jsonl:1: not valid JSON: '\\ud83d' is half of a surrogate"),
    ],
)
def test_bad_prompts(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        read_prompts(write_jsonl(tmp_path / "p.jsonl", [row]))


def test_any_architecture_is_evaluated(tmp_path):
    """One that no list names, and one that cannot be packed."""
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [record(k) for k in range(2)])
    for kind, fields in (("arcee", {}), ("lfm2", {"layer_types": ["conv", "full_attention"]})):
        folder = save_tiny(tmp_path / kind)
        tiny_model(kind, **fields).save_pretrained(folder)
        words = ["--models", f"m={folder}", "--output_dir", str(tmp_path / f"{kind}-out")]
        main(["generate", *words, "--prompts", pairs, "--max_new_tokens", "2"])
        main(["score", *words, "--data", pairs, "--reference", folder, "--kl_prompts", "1"])
        scores = json.loads((tmp_path / f"{kind}-out" / "scores.json").read_text())
        assert scores["m"]["kl"] == 0


def test_commands(tmp_path, folders, capsys):
    reference, _ = folders
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [record(k) for k in range(3)])
    out = ["--output_dir", str(tmp_path / "out")]
    main(["generate", "--prompts", pairs, "--models", f"ref={reference}", *out,
          "--max_new_tokens", "2"])  # fmt: skip
    assert len((tmp_path / "out" / "ref.jsonl").read_text().splitlines()) == 3
    main(["score", "--data", pairs, "--models", f"ref={reference}", "--reference", reference, *out,
          "--kl_prompts", "0"])  # fmt: skip
    shown = capsys.readouterr().out
    assert "rewards/accuracies" in shown and "kl" not in shown
    with pytest.raises(SystemExit, match="models: expected A=B"):
        main(["generate", "--prompts", pairs, "--models", reference, *out])
    with pytest.raises(SystemExit, match="top_p: expected a number in"):
        main(["generate", "--prompts", pairs, "--models", f"r={reference}", *out, "--top_p", "0"])
    for words, message in (
        (["--models", "a=x", "a=y"], "models: expected different names, got 'a' twice"),
        (
            ["--models", "a=x", "--temperature", "nan"],
            r"temperature: expected 0 .greedy. or a number >= 1e-06, got nan",
        ),
        (["--models", "a=x", "--temperature", "1e-40"], "temperature: expected 0 .*, got 1e-40"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["generate", "--prompts", pairs, *words, *out])
    with pytest.raises(SystemExit, match="beta: expected a finite number >= 1e-09, got inf"):
        main(["score", "--data", pairs, "--models", f"ref={reference}", "--reference", reference,
              *out, "--beta", "inf"])  # fmt: skip
    with pytest.raises(SystemExit, match=r"seed: expected an integer in \[0, 2\^32\), got 1000"):
        main(["generate", "--prompts", pairs, "--models", "a=x", *out, "--seed", str(10**18)])
    with pytest.raises(SystemExit, match="unknown key 'temprature'; did you mean 'temperature'"):
        main(["generate", "--prompts", pairs, "--models", "a=x", *out, "--temprature", "1"])
    with pytest.raises(SystemExit, match="prompts: no value; give it as --prompts"):
        main(["generate", "--models", "a=x", *out])
    with pytest.raises(SystemExit, match="--prompts is given twice"):
        main(["generate", "--prompts", pairs, "--prompts", pairs, "--models", "a=x", *out])
    with pytest.raises(SystemExit, match="got 'generat'; did you mean generate?"):
        main(["generat"])
    (tmp_path / "out" / "ref.jsonl").write_text("[1]\n")
    with pytest.raises(SystemExit, match="ref.jsonl: damaged .a line is no JSON object."):
        main(["generate", "--prompts", pairs, "--models", f"ref={reference}", *out])
    assert math.isfinite(json.loads((tmp_path / "out" / "scores.json").read_text())["ref"]["beta"])
