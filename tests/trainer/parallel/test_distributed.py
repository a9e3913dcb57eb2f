"""Several CPU processes give one process's loss, gradients and metrics: DDP, FSDP2, ZeRO-3."""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from tests.support import ROOT, assert_within_plain_budget
from tests.trainer.parallel.distributed_worker import (
    DESCENT,
    HALF,
    LORA,
    MIXED,
    MODES,
    RANKS,
    STEPS,
    gradients,
    half_gradients,
)
from tests.trainer.tiny import (
    record,
    save_tiny,
    tiny_config,
    tiny_llama,
    tiny_tokenizer,
    write_jsonl,
)
from trainer import run
from trainer.config.recipe import parse_config
from trainer.errors import InputError
from trainer.parallel import fsdp2, request
from trainer.parallel.ways import WAYS

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
    tiny_llama(tied=False).save_pretrained(folder / "untied")
    tiny_tokenizer().save_pretrained(folder / "untied")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    words = ["--config", str(folder / "tiny.yaml")]
    command = [sys.executable, "-m", "tests.trainer.parallel.distributed_worker"]
    paths = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
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
    modes = MODES["fsdp2" if "ddp" in results else "zero3"]
    for mode in modes:
        found = results[mode][step]
        torch.testing.assert_close(found["metrics"], wanted["metrics"], rtol=1e-5, atol=1e-6)
        for name, value in wanted.items():
            assert (found[name] - value).norm() <= 1e-5 * value.norm(), (mode, name)


def read(folder, name="metrics"):
    lines = (folder / f"{name}.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in TIMINGS} for x in lines]


def test_a_sharded_run_is_the_run_of_one_process(launched, tmp_path):
    folder, words = launched
    one_process(tmp_path / "one", words)
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
    one_process(tmp_path / "one", words, *DESCENT)
    for two, one in zip(read(folder / "sgd"), read(tmp_path / "one"), strict=True):
        assert two == pytest.approx(one, rel=1e-5, abs=1e-5)
    names = [path / "model" / "model.safetensors" for path in (tmp_path / "one", folder / "sgd")]
    wanted, found = map(load_file, names)
    for name, value in wanted.items():
        assert (found[name] - value).norm() <= 1e-5 * value.norm(), name


def one_process(folder, words, *more):
    """The same run in this process: its output folder."""
    threads = torch.get_num_threads()
    AcceleratorState._reset_state(reset_partial_state=True)
    out = ["--output_dir", str(folder), "--per_device_train_batch_size", "8"]
    run.run(parse_config([*words, *more, *out]))
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)
    return folder


needs_fsdp2 = pytest.mark.parametrize("launched", ["fsdp2"], indirect=True)


@needs_fsdp2
def test_sharded_adapters_are_those_of_one_process(launched, tmp_path):
    """With a trained copy of lm_head, and the frozen weights, gathered as well, as reference."""
    folder, words = launched
    words = [*words, "--model_name_or_path", str(folder / "untied")]
    one = one_process(tmp_path / "one", words, *LORA, *DESCENT)
    for ours, theirs in zip(read(folder / "lora-a"), read(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    assert sorted(p.name for p in (folder / "lora-a" / "model").iterdir()) == sorted(
        p.name for p in (one / "model").iterdir()
    )
    wanted, found = (load_adapters(path) for path in (one, folder / "lora-a"))
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        assert (found[name] - value).norm() <= 1e-5 * value.norm(), name
    base = AutoModelForCausalLM.from_pretrained(folder / "untied")
    before = base.lm_head.weight.clone()
    adapted = PeftModel.from_pretrained(base, folder / "lora-a" / "model").merge_and_unload()
    assert not torch.equal(adapted.lm_head.weight, before)


def load_adapters(folder):
    return load_file(folder / "model" / "adapter_model.safetensors")


@needs_fsdp2
def test_sharded_adapters_go_on_from_their_checkpoint_bit_for_bit(launched):
    whole, resumed = launched[0] / "lora-a", launched[0] / "lora-b"
    assert read(resumed) == read(whole)
    a, b = load_adapters(whole), load_adapters(resumed)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@needs_fsdp2
def test_adapters_beside_bfloat16_weights_are_trained_in_float32(launched, tmp_path):
    """Sharded and not, a step's rounding errors are those of bfloat16."""
    folder, words = launched
    words = [*words, "--model_name_or_path", str(folder / "untied")]
    exact = [word.replace("bfloat16", "float32") for word in MIXED]
    truth, plain = (
        {
            k: v.float()
            for k, v in load_adapters(one_process(tmp_path / k, words, *more, *DESCENT)).items()
        }
        for k, more in (("truth", exact), ("plain", MIXED))
    )
    found = load_adapters(folder / "mixed")
    assert all(value.dtype == torch.float32 for value in found.values())
    moved = [name for name in found if "lora_B" in name]  # from zero
    assert_within_plain_budget(
        *({"lora_B": torch.cat([x[n].flatten() for n in moved])} for x in (found, plain, truth))
    )


@needs_fsdp2
@pytest.mark.parametrize("kind", HALF)
def test_in_bfloat16_no_whole_weight_outlives_its_layer(launched, kind):
    """And loss and gradient are as near float32's as those of one process under autocast."""
    found = dict(torch.load(launched[0] / "results.pt")["half"][kind])
    assert found.pop("kept") == 0
    truth, plain = (
        half_gradients(kind, Accelerator(cpu=True), dtype) for dtype in ("float32", "bfloat16")
    )
    found["gradient"], plain["gradient"] = (x["gradient"].bfloat16() for x in (found, plain))
    assert_within_plain_budget(found, plain, truth)


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
    monkeypatch.setenv(request.REQUESTS[how], "true")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(InputError, match=f"{how} is asked for, but this is a single process"):
        request.requested_sharding(tiny_config())
    with pytest.raises(InputError, match=f"load_in_4bit: expected false with {how}, which would"):
        request.requested_sharding(tiny_config(use_peft=True, load_in_4bit=True))
    for optim in ("adamw_8bit", "adafactor"):
        with pytest.raises(InputError, match=f"optim: expected adamw_torch or sgd with {how}"):
            request.requested_sharding(tiny_config(optim=optim))
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=message):
        request.requested_sharding(tiny_config())
    with pytest.raises(InputError, match="weight is not sharded"):
        fsdp2.check_sharded(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("sharding", "liger", "device"),
    [
        (None, False, "meta"),
        ("zero3", False, "meta"),
        ("fsdp2", False, "cpu"),
        ("fsdp2", True, "meta"),
    ],
)
def test_a_model_that_is_sharded_is_checked_before_it_is_on_a_device(sharding, liger, device):
    accelerator = SimpleNamespace(device=torch.device("meta"))
    config = tiny_config(use_liger_kernel=liger)
    assert WAYS[sharding].check_device(config, accelerator) == torch.device(device)


def test_two_ways_to_shard_are_refused(monkeypatch):
    for variable in request.REQUESTS.values():
        monkeypatch.setenv(variable, "true")
    with pytest.raises(InputError, match="expected one way to shard, got fsdp2 and zero3: ACC"):
        request.requested_sharding(tiny_config())


def test_a_unit_that_trains_two_types_is_refused(monkeypatch):
    unit = nn.Module()
    unit.inner = nn.Linear(2, 2).bfloat16()
    unit.other = nn.Linear(2, 2, bias=False)
    monkeypatch.setattr(fsdp2, "DTensor", nn.Parameter)  # as if sharded
    monkeypatch.setattr(fsdp2, "FSDPModule", nn.Module)
    fsdp2.check_sharded(unit)  # units of their own

    class Whole(nn.Module):
        pass

    monkeypatch.setattr(fsdp2, "FSDPModule", Whole)
    unit.__class__ = Whole
    with pytest.raises(InputError, match="model_dtype: .* Whole trains inner.bias of torch.bfloat"):
        fsdp2.check_sharded(unit)
    unit.inner.requires_grad_(False)
    fsdp2.check_sharded(unit)


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
        monkeypatch.setenv(request.REQUESTS[how], "true")
    else:
        monkeypatch.setenv(f"ACCELERATE_{variable}", neutral)
        assert request.requested_sharding(tiny_config()) is None
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    with pytest.raises(InputError, match=f"^accelerate's {message}; set it in its file"):
        request.requested_sharding(tiny_config())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_dtype": "bfloat16", "dtype": "bfloat16"}, "model_dtype: expected float32 with Z"),
        ({"torch_compile": True}, "torch_compile: expected false with ZeRO-3"),
        ({"use_peft": True}, "use_peft: expected false with ZeRO-3; use .*fsdp2.yaml or ddp.yaml"),
        ({}, "zero3 is asked for, but DeepSpeed is not installed; run: pip install deepspeed"),
    ],
)
def test_what_zero3_cannot_do_is_refused(monkeypatch, fields, message):
    monkeypatch.setenv(request.REQUESTS["zero3"], "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=message):
        request.requested_sharding(tiny_config(**fields))


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
    assert request.requested_sharding(tiny_config()) == how
    assert not {*request.REQUESTS.values()} & os.environ.keys()


def test_the_config_for_cpus_is_one_process():
    config = load_config_from_file(str(ROOT / "trainer" / "accelerate" / "cpu.yaml"))
    assert (config.num_processes, config.use_cpu, config.distributed_type) == (1, True, "NO")
