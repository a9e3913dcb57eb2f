"""Killed, stopped and resumed runs: the same numbers to the last bit, or a refusal."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from tests.support import ROOT
from tests.trainer.tiny import assert_same_run, nudged, record, save_tiny, tiny_llama, write_jsonl
from trainer import run
from trainer.config.recipe import parse_config
from trainer.errors import InputError
from trainer.output import RunLog
from trainer.stop import Stopped, StopSignal

TIMINGS = ("tokens_per_second", "step_seconds", "eval/seconds", "peak_memory_gb")
STEPS = 30


@pytest.fixture(scope="module", autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Arguments for 30 steps of 8 pairs or less, rows that span two steps, evaluations."""
    folder = tmp_path_factory.mktemp("tiny")
    recipe = {
        "model_name_or_path": save_tiny(folder / "model"),
        "train_file": write_jsonl(folder / "train.jsonl", [record(i) for i in range(22)]),
        "eval_file": write_jsonl(folder / "eval.jsonl", [record(i) for i in range(22, 31)]),
        "per_device_train_batch_size": 8,
        "max_steps": STEPS,
        "learning_rate": 3e-3,
        "cpu_threads": 1,
        "eval_steps": 5,
        "logging_steps": 2,
        "save_steps": 3,
        "save_total_limit": 2,
        "sample_prompts": 2,
        "max_new_tokens": 6,
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    return ["--config", str(folder / "tiny.yaml"), "--ref_cache_dir", str(folder / "cache")]


def outcome(folder):
    """The metrics without timing fields, the samples, and the final weights."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(x).items() if k not in TIMINGS} for x in lines]
    samples = [json.loads(x) for x in (folder / "samples.jsonl").read_text().splitlines()]
    return rows, samples, load_file(folder / "model" / "model.safetensors")


def same(a, b):
    ours, theirs = a[2], b[2]
    return a[:2] == b[:2] and all(torch.equal(ours[k], theirs[k]) for k in ours | theirs)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    run.run(parse_config([*tiny, "--output_dir", str(folder)]))
    return folder


def resume(tiny, folder, where="auto", *words):
    where = ["--output_dir", str(folder), "--resume_from_checkpoint", str(where)]
    return run.run(parse_config([*tiny, *where, *words]))


def test_only_the_newest_checkpoints_stay(whole):
    assert sorted(path.name for path in whole.glob("*checkpoint*")) == [
        "checkpoint-27", "checkpoint-30",
    ]  # fmt: skip


def test_a_killed_run_goes_on_bit_for_bit(tiny, whole, tmp_path):
    folder, rows = tmp_path / "out", random.Random().randint(5, 12)
    words = [*tiny, "--output_dir", str(folder), "--resume_from_checkpoint", "auto"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "trainer/run.py", *words], cwd=ROOT, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < rows:
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (folder / "model").exists()

    (folder / ".checkpoint-99").mkdir()  # a kill while writing leaves this
    (folder / ".checkpoint-99" / "rank-0.pt").write_bytes(b"half")
    resume(tiny, folder)
    assert same(outcome(folder), outcome(whole)), f"killed after {rows} rows"
    assert not list(folder.glob(".checkpoint-*"))


@pytest.mark.parametrize(
    ("number", "step", "name"),
    [
        (signal.SIGTERM, 4, "loss"),
        (signal.SIGINT, 4, "loss"),
        (signal.SIGTERM, STEPS, "loss"),
        (signal.SIGTERM, STEPS, "eval/loss"),
    ],
)
def test_a_signal_saves_and_stops(tiny, whole, tmp_path, monkeypatch, number, step, name):
    """After a step, before its evaluation; and after the last evaluation, before the model."""

    def write_and_send(self, row, write=RunLog.write):
        write(self, row)
        if row["step"] == step and name in row:
            os.kill(os.getpid(), number)

    words = [*tiny, "--output_dir", str(tmp_path / "out"), "--save_steps", "0"]
    monkeypatch.setattr(RunLog, "write", write_and_send)
    before = signal.getsignal(number)
    monkeypatch.setattr(sys, "argv", ["trainer/run.py", *words])
    with pytest.raises(SystemExit) as stop:
        run.main()
    monkeypatch.undo()
    assert stop.value.code == 128 + number and signal.getsignal(number) is before
    assert [p.name for p in (tmp_path / "out").glob("*checkpoint*")] == [f"checkpoint-{step}"]
    last = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["step"] == step and name in json.loads(last)
    assert not (tmp_path / "out" / "model").exists()
    if number == signal.SIGTERM:
        resume(tiny, tmp_path / "out")
        assert same(outcome(tmp_path / "out"), outcome(whole))


def test_sigterm_to_accelerate_launch_reaches_the_trainer(tiny, tmp_path):
    """The launcher dies of it at once; its trainer saves, and keeps others out of the folder."""
    folder = tmp_path / "out"
    words = [*tiny, "--output_dir", str(folder), "--save_steps", "0", "--max_steps", "100000"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", "trainer/run.py", *words], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 4:
        assert launcher.poll() is None, launcher.stdout.read()
        time.sleep(0.002)
    with pytest.raises(InputError, match=r"output_dir: another process is writing to .*out; wait"):
        run.run(parse_config([*words, "--resume_from_checkpoint", "auto"]))
    launcher.terminate()
    output, _ = launcher.communicate(timeout=100)  # until the trainer closes its end, too
    assert launcher.returncode == -signal.SIGTERM
    (checkpoint,) = folder.glob("*checkpoint*")
    assert f"SIGTERM: stopped; all is saved in {checkpoint}" in output


def test_a_signal_lets_the_model_be_saved(tiny, tmp_path, monkeypatch):
    def send_and_save(*args, save=run.save_model):
        os.kill(os.getpid(), signal.SIGTERM)
        save(*args)

    monkeypatch.setattr(run, "save_model", send_and_save)
    run.run(parse_config([*tiny, "--output_dir", str(tmp_path / "out"), "--max_steps", "1"]))
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()


def test_ctrl_c_before_the_first_step_is_no_traceback(tiny, tmp_path):
    words = [*tiny, "--output_dir", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "trainer/run.py", *words], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while not (tmp_path / "out" / ".lock").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGINT and "Traceback" not in output


def test_only_the_second_ctrl_c_kills():
    outside = signal.getsignal(signal.SIGINT)
    with StopSignal(Accelerator(cpu=True)) as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            assert signal.getsignal(number) != outside
            os.kill(os.getpid(), number)
        assert stop.received() == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) == outside


def test_damaged_checkpoints_are_named_and_left_out(tiny, tmp_path, capsys):
    folder = tmp_path / "out"
    words = ["--max_steps", "6", "--eval_steps", "0", "--save_total_limit", "3"]
    run.run(parse_config([*tiny, *words, "--save_steps", "2", "--output_dir", str(folder)]))
    wanted = load_file(folder / "model" / "model.safetensors")
    weights = folder / "checkpoint-6" / "weights" / "__0_0.distcp"
    os.truncate(weights, 1000)
    (folder / "checkpoint-4" / "rank-0.pt").unlink()
    with pytest.raises(InputError, match=r"^resume_from_checkpoint: .*rank-0.pt is missing; give"):
        resume(tiny, folder, folder / "checkpoint-4", *words)
    resume(tiny, folder, "auto", *words)
    said = capsys.readouterr().out
    assert f"warning: {weights} is damaged: expected" in said and "resumes after step 2 of" in said
    found = load_file(folder / "model" / "model.safetensors")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    for progress in folder.glob("*/progress.json"):
        os.truncate(progress, 100)
    with pytest.raises(InputError, match="progress.json is missing or damaged; give another check"):
        resume(tiny, folder, "auto", *words)


def test_the_limit_spares_what_was_just_saved(tiny, tmp_path):
    """The run resumes from an older checkpoint beside a later one."""
    folder = tmp_path / "out"
    words = ["--max_steps", "4", "--eval_steps", "0"]
    run.run(parse_config([*tiny, *words, "--save_steps", "2", "--output_dir", str(folder)]))
    words += ["--save_steps", "3", "--save_total_limit", "1"]
    resume(tiny, folder, folder / "checkpoint-2", *words)
    assert [path.name for path in folder.glob("*checkpoint*")] == ["checkpoint-3"]


def test_a_checkpoint_goes_on_in_another_folder_and_another_split(tiny, whole, tmp_path):
    """Micro-batches and the files' places are free; the numbers are the same up to rounding."""
    split = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    rows = resume(tiny, tmp_path / "out", whole / "checkpoint-27", *split)
    source, runs = yaml.safe_load(Path(tiny[1]).read_text())["model_name_or_path"], [rows]
    for seed in range(2):
        words = ["--model_name_or_path", nudged(source, tmp_path / f"model{seed}", seed)]
        words += ["--output_dir", str(tmp_path / f"nudged{seed}"), "--save_steps", "0"]
        runs.append(run.run(parse_config([*tiny, *words])))
    rows, *reruns = ([{k: r[k] for k in r if k not in TIMINGS} for r in x] for x in runs)
    assert_same_run(rows, reruns, outcome(whole)[0])


REFUSED = [
    (["--learning_rate", "1e-4"], r"learning_rate: .*checkpoint-30 was written with 0.003, got 0"),
    (["--max_steps", "40"], "max_steps: .* was written with 30, got 40; set it back"),
    (["--per_device_train_batch_size", "4"], "per_device_train_batch_size .* processes: .*written"),
    (["--max_length", "64"], "max_length: "),
    (["--train_file", "{eval}"], "train_file: .* was written with [0-9a-f]{16}, got"),
    (
        ["--sample_prompts", "0", "--eval_file"],
        "eval_file: .* was written with [0-9a-f]{16}, got None; set it back",
    ),
    (["nowhere"], "resume_from_checkpoint: expected auto or a folder"),
    (["--overwrite_output_dir", "true"], "resume_from_checkpoint: expected null with overwrite"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=lambda x: str(x)[:30])
def test_a_change_that_alters_the_run_is_refused(tiny, whole, words, message):
    before = outcome(whole)
    recipe = yaml.safe_load(Path(tiny[1]).read_text())
    words = [word.format(eval=recipe["eval_file"]) for word in words]
    words += ["--eval_file", recipe["eval_file"]] if "--train_file" in words else []
    where, words = (words[0], []) if words == ["nowhere"] else ("auto", words)
    with pytest.raises(InputError, match=message):
        resume(tiny, whole, where, *words)
    assert same(outcome(whole), before)


@pytest.mark.parametrize("name", ["model_name_or_path", "ref_model_name_or_path"])
def test_other_weights_in_the_same_folder_are_refused(tiny, tmp_path, name):
    words = ["--max_steps", "2", "--save_steps", "2"]
    for field in ("model_name_or_path", "ref_model_name_or_path"):
        words += [f"--{field}", save_tiny(tmp_path / field)]
    run.run(parse_config([*tiny, *words, "--output_dir", str(tmp_path / "out")]))
    tiny_llama(seed=1).save_pretrained(tmp_path / name)
    with pytest.raises(InputError, match=f"^weights of {name}: .* was written with [0-9a-f]+, got"):
        resume(tiny, tmp_path / "out", "auto", *words)
    assert (tmp_path / "out" / "model").exists()


def test_replacing_a_run_removes_its_checkpoints(tiny, whole, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    (folder / "checkpoint-99").mkdir(parents=True)
    words = [*tiny, "--output_dir", str(folder), "--overwrite_output_dir", "true"]
    run.run(parse_config([*words, "--max_steps", "1"]))
    assert not list(folder.glob("*checkpoint*"))


def test_stopped_says_where_to_go_on():
    assert str(Stopped(signal.SIGTERM, Path("out/checkpoint-4"))) == (
        "SIGTERM: stopped; all is saved in out/checkpoint-4"
    )


def test_adapters_go_on_bit_for_bit_without_the_frozen_layers(tiny, tmp_path):
    words = [*tiny, "--use_peft", "true", "--max_steps", "4", "--eval_steps", "0"]
    run.run(parse_config([*words, "--output_dir", str(tmp_path / "a")]))
    where = ["--resume_from_checkpoint", str(tmp_path / "a" / "checkpoint-3")]
    run.run(parse_config([*words, "--output_dir", str(tmp_path / "b"), *where]))
    a, b = (load_file(tmp_path / x / "model" / "adapter_model.safetensors") for x in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    names = FileSystemReader(tmp_path / "a" / "checkpoint-3" / "weights").read_metadata()
    weights = [name for name in names.state_dict_metadata if name.startswith("model.")]
    layers = [name for name in weights if ".layers." in name]
    assert layers and all("lora_" in name for name in layers)


def test_dropout_is_drawn_by_pass_so_its_run_keeps_its_split(tiny, tmp_path):
    words = [*tiny, "--use_peft", "true", "--max_steps", "2", "--save_steps", "1"]
    words += ["--lora_dropout", "0.5"]
    run.run(parse_config([*words, "--output_dir", str(tmp_path / "a")]))
    split = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    where = tmp_path / "b", tmp_path / "a" / "checkpoint-1"
    with pytest.raises(InputError, match=r"processes \(lora_dropout draws .*written"):
        resume(words, *where, *split)
    resume(words, *where)
    a, b = (load_file(tmp_path / x / "model" / "adapter_model.safetensors") for x in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
