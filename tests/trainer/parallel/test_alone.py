"""Models that cannot be packed, on two ranks, in a whole run, and when they answer."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator

from tests.support import ROOT
from tests.trainer.model.architectures import tiny
from tests.trainer.parallel.alone_worker import HOW, MODELS, results
from tests.trainer.tiny import record, relative, tiny_model, tiny_tokenizer, write_jsonl
from trainer import run
from trainer.config.recipe import parse_config
from trainer.errors import InputError
from trainer.model.generate import pads_exactly, sample

LFM2 = MODELS["lfm2"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two processes computed."""
    file = tmp_path_factory.mktemp("alone") / "results.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += [
        "--master_port",
        str(30500 + os.getpid() % 1000),
        "-m",
        "tests.trainer.parallel.alone_worker",
        file,
    ]
    paths = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, env=os.environ | paths, timeout=300,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(file)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", MODELS)
def test_two_ranks_give_the_step_of_one(kind, how, found):
    wanted = results(kind, "one", Accelerator(cpu=True))
    for (values, gradient), (expected, whole) in zip(found[kind, how], wanted, strict=True):
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)
        assert relative(gradient, whole) < 1e-5


def words(folder, kind, *more, **fields):
    tiny(kind, **fields).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "empty.yaml").write_text("cpu_threads: 1\n")
    file = write_jsonl(folder / "train.jsonl", [record(i) for i in range(9)])
    paths = ["--model_name_or_path", folder / "model", "--train_file", file]
    paths += ["--config", folder / "empty.yaml", "--output_dir", folder / "out"]
    return parse_config([*map(str, paths), *more])


def test_a_whole_run_says_why_it_does_not_pack(tmp_path, capsys):
    held_out = ["--eval_split_ratio", "0.3", "--sample_prompts", "2", "--max_new_tokens", "3"]
    again = ["--gradient_checkpointing", "true", "--max_tokens_per_batch", "100"]
    threads = torch.get_num_threads()
    rows = run.run(words(tmp_path, "lfm2", *held_out, *again, **LFM2))
    torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    assert "packing: no, as Lfm2ForCausalLM does not treat packed sequences as it does" in shown
    assert rows[0]["eval/loss/dpo"] == pytest.approx(0.6931472, abs=1e-6)
    assert math.isfinite(rows[1]["loss"])
    samples = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in samples][:2] == [0, 0]


REFUSED = [
    ("prophetnet", {}, [], "ProphetNetForCausalLM: its logits are not softcap"),
    ("bloom", {}, ["--packing", "true"], "packing: BloomForCausalLM has layers that do"),
]


@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
@pytest.mark.parametrize(("kind", "fields", "more", "message"), REFUSED, ids=lambda x: str(x)[:9])
def test_what_the_config_tells_is_refused_before_data_are_read(
    kind, fields, more, message, dry, tmp_path, monkeypatch
):
    config, threads = words(tmp_path, kind, *more, *dry, **fields), torch.get_num_threads()
    monkeypatch.setattr(run, "read_data", lambda *_: pytest.fail("data were read"))
    with pytest.raises(InputError, match=f"^{message}"):
        run.run(config)
    torch.set_num_threads(threads)


DRY = [
    ("llama", {}, [], "packing: measured when the weights are loaded"),
    ("bloom", {}, [], "packing: no, as BloomForCausalLM has layers that do not tell"),
    ("llama", {}, ["--packing", "false"], "packing: no, as packing is false"),
]


@pytest.mark.parametrize(("kind", "fields", "more", "message"), DRY, ids=lambda x: str(x)[:9])
def test_a_dry_run_says_what_is_known_of_packing(kind, fields, more, message, tmp_path, capsys):
    threads = torch.get_num_threads()
    run.run(words(tmp_path, kind, "--dry_run", *more, **fields))
    torch.set_num_threads(threads)
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "fields", "exact"), [
    ("llama", {}, True), ("gpt2", {}, True), ("bloom", {"n_head": 4}, True),
    ("rwkv", {"attention_hidden_size": 32, "context_length": 64}, False),
])  # fmt: skip
def test_prompts_are_padded_where_that_changes_no_answer(kind, fields, exact):
    model, tokenizer = tiny_model(kind, **fields), tiny_tokenizer()
    assert pads_exactly(model) == exact
    prompts, how = [[5, 6, 7], [*range(40, 52)]], {"max_new_tokens": 6, "temperature": 0.0}
    alone = [sample(model, tokenizer, [prompt], **how)[0] for prompt in prompts]
    assert sample(model, tokenizer, prompts, padded=pads_exactly(model), **how) == alone
