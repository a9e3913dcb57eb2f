"""Several CPU processes give one process's loss, gradients and metrics: DDP, FSDP2, ZeRO-3."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from distributed_worker import DESCENT, RANKS, STEPS, gradients
from safetensors.torch import load_file
from torch import nn
from trainer_tiny import record, save_tiny, tiny_config, write_jsonl
from transformers import AutoModelForCausalLM

from trainer import distributed, run
from trainer.config import InputError
from trainer.recipe import parse_config

ROOT = Path(__file__).resolve().parent.parent
TIMINGS = ("tokens_per_second", "step_seconds", "eval/seconds", "peak_memory_gb")


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"
)
HOW = ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)]


@pytest.fixture(scope="module", params=HOW)
def launched(tmp_path_factory, request):
    """The folder in which the processes left their results, and the config they ran."""
    ranks = RANKS[request.param]
    folder = tmp_path_factory.mktemp("launched")
    recipe = {
        "model_name_or_path": save_tiny(folder / "model"),
        "train_file": write_jsonl(folder / "train.jsonl", [record(i) for i in range(13)]),
        "eval_file": write_jsonl(folder / "eval.jsonl", [record(i) for i in range(13, 18)]),
        "per_device_train_batch_size": 8 // ranks,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "cpu_threads": 1,
        "save_steps": 2,
        "sample_prompts": 3,
        "max_new_tokens": 6,
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    words = ["--config", str(folder / "tiny.yaml")]
    command = [sys.executable, "tests/distributed_worker.py"]
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(folder), request.param, *words], cwd=ROOT, env=os.environ | paths,
        timeout=300, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, words


@pytest.mark.parametrize("step", STEPS)
def test_a_step_on_several_processes_is_the_step_on_one(launched, step):
    wanted = gradients("one", Accelerator(cpu=True))[step]
    results = torch.load(launched[0] / "results.pt")
    assert len(results) == 2
    for mode, found in results.items():
        found = found[step]
        torch.testing.assert_close(found["metrics"], wanted["metrics"], rtol=1e-5, atol=1e-6)
        for name, value in wanted.items():
            assert (found[name] - value).norm() <= 1e-5 * value.norm(), (mode, name)


def read(folder, name="metrics"):
    lines = (folder / f"{name}.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in TIMINGS} for x in lines]


def test_a_sharded_run_is_the_run_of_one_process(launched, tmp_path):
    folder, words = launched
    threads = torch.get_num_threads()
    out = ["--output_dir", str(tmp_path / "one"), "--per_device_train_batch_size", "8"]
    run.run(parse_config([*words, *out]))
    torch.set_num_threads(threads)
    one, two = read(tmp_path / "one"), read(folder / "a")
    assert [row.keys() for row in two] == [row.keys() for row in one]
    assert two[0] == pytest.approx(one[0], rel=1e-5, abs=1e-5)
    assert two[1] == pytest.approx(one[1], rel=1e-5, abs=1e-5)  # AdamW's first steps are +-lr
    assert two[-1] == pytest.approx(one[-1], rel=1e-2, abs=1e-3)
    names = [path / "model" / "model.safetensors" for path in (tmp_path / "one", folder / "a")]
    wanted, found = map(load_file, names)
    assert wanted.keys() == found.keys()
    assert all(wanted[name].shape == found[name].shape for name in wanted)
    AutoModelForCausalLM.from_pretrained(folder / "a" / "model")
    one, two = (read(path, "samples") for path in (tmp_path / "one", folder / "a"))
    assert [row["step"] for row in two] == [0, 0, 0, 3, 3, 3] and two[:3] == one[:3]


def test_sharded_gradient_descent_is_that_of_one_process(launched, tmp_path):
    folder, words = launched
    threads = torch.get_num_threads()
    out = ["--output_dir", str(tmp_path / "one"), "--per_device_train_batch_size", "8"]
    run.run(parse_config([*words, *DESCENT, *out]))
    torch.set_num_threads(threads)
    for two, one in zip(read(folder / "sgd"), read(tmp_path / "one"), strict=True):
        assert two == pytest.approx(one, rel=1e-5, abs=1e-5)
    names = [path / "model" / "model.safetensors" for path in (tmp_path / "one", folder / "sgd")]
    wanted, found = map(load_file, names)
    for name, value in wanted.items():
        assert (found[name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.parametrize("kind", ["", "ddp-"])
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(launched, kind):
    """DDP's sums over ranks, too: their order would change after its first backward."""
    whole, resumed = (launched[0] / f"{kind}{name}" for name in "ab")
    if not whole.exists():
        pytest.skip("DDP runs beside FSDP2 only")
    assert read(resumed) == read(whole)
    assert read(resumed, "samples") == read(whole, "samples")
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a | b)


@pytest.mark.parametrize(
    ("how", "variable", "value", "message"),
    [
        ("fsdp2", "FSDP_VERSION", "1", "fsdp_version: expected 2, got 1"),
        ("fsdp2", "FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params: expected false, got true"),
        ("zero3", "ACCELERATE_DEEPSPEED_ZERO_STAGE", "2", "zero_stage: expected 3, got 2"),
        ("zero3", "ACCELERATE_GRADIENT_CLIPPING", "1.0", "gradient_clipping: expected none, got 1"),
    ],
)
def test_sharding_that_is_asked_for_but_not_done_is_an_error(
    monkeypatch, how, variable, value, message
):
    monkeypatch.setenv(distributed.REQUESTS[how], "true")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(InputError, match=f"{how} is asked for, but this is a single process"):
        distributed.take_request(tiny_config())
    with pytest.raises(InputError, match=f"use_peft: expected false with {how}"):
        distributed.take_request(tiny_config(use_peft=True))
    for optim in ("adamw_8bit", "adafactor"):
        with pytest.raises(InputError, match=f"optim: expected adamw_torch or sgd with {how}"):
            distributed.take_request(tiny_config(optim=optim))
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=message):
        distributed.take_request(tiny_config())
    with pytest.raises(InputError, match="weight is not sharded"):
        distributed.check_sharded(nn.Linear(2, 2))


@pytest.mark.parametrize("how", [None, "zero3"])
@pytest.mark.parametrize(
    ("variable", "neutral", "value", "message"),
    [
        ("GRADIENT_ACCUMULATION_STEPS", "1", "4", "gradient_accumulation_steps: expected 1, got 4"),
        ("DYNAMO_BACKEND", "NO", "INDUCTOR", "dynamo_backend: expected no, got inductor"),
    ],
)
def test_what_accelerate_would_do_beside_the_recipe_is_refused(
    monkeypatch, how, variable, neutral, value, message
):
    if how:
        monkeypatch.setenv(distributed.REQUESTS[how], "true")
    else:
        monkeypatch.setenv(f"ACCELERATE_{variable}", neutral)
        assert distributed.take_request(tiny_config()) is None
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    with pytest.raises(InputError, match=f"^accelerate's {message}; set it in its file"):
        distributed.take_request(tiny_config())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_dtype": "bfloat16", "dtype": "bfloat16"}, "model_dtype: expected float32 with Z"),
        ({"torch_compile": True}, "torch_compile: expected false with ZeRO-3"),
        ({}, "zero3 is asked for, but DeepSpeed is not installed; run: pip install deepspeed"),
    ],
)
def test_what_zero3_cannot_do_is_refused(monkeypatch, fields, message):
    monkeypatch.setenv(distributed.REQUESTS["zero3"], "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=message):
        distributed.take_request(tiny_config(**fields))


@pytest.mark.parametrize(
    ("name", "how"),
    [("ddp", None), ("fsdp2", "fsdp2"), pytest.param("zero3", "zero3", marks=needs_deepspeed)],
)
def test_what_accelerate_makes_of_the_configs(monkeypatch, name, how):
    """The environment that `accelerate launch` would give the processes asks for what we run."""
    path = ROOT / "trainer" / "accelerate" / f"{name}.yaml"
    words = ["--config_file", str(path), "--main_process_port", "29500", "trainer/run.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert args.num_processes == 8 and not args.cpu
    args.deepspeed_fields_from_accelerate_config = ""  # not read here
    before = dict(os.environ)
    made = prepare_deepspeed_cmd_env(args)[1] if how == "zero3" else prepare_multi_gpu_env(args)
    environment = made | {"WORLD_SIZE": "8"}
    for variable in environment.keys() - before.keys():
        monkeypatch.setenv(variable, environment[variable])
    assert distributed.take_request(tiny_config()) == how
    assert not {*distributed.REQUESTS.values()} & os.environ.keys()


def test_the_config_for_cpus_is_one_process():
    config = load_config_from_file(str(ROOT / "trainer" / "accelerate" / "cpu.yaml"))
    assert (config.num_processes, config.use_cpu, config.distributed_type) == (1, True, "NO")
