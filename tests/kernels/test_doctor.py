"""`python -m rpo_kernels.doctor`: what it finds, what it keeps, and bad news with its remedy."""

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rpo_kernels import tuning
from rpo_kernels.backends import torch_backend
from rpo_kernels.doctor import accuracy, candidates, cli, environment, examine
from tests.support import ROOT, one_thread

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--hidden_size", "24", "--vocab_size", "300", "--tokens", "40"]
CHECK = [*TINY, "--seconds", "0"]
FAST = tuning.Blocks(2**18, 512)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(tuning.FOLDER, str(tmp_path / "tuned"))
    tuning.forget()
    with one_thread():
        yield tmp_path / "tuned"
    tuning.forget()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_all_is_well(dtype, capsys):
    assert cli.main([*CHECK, "--dtype", dtype]) == 0
    out = capsys.readouterr().out
    for word in (tuning.cpu_name(), torch.__version__, "torch: tiles of", "(default)", dtype):
        assert word in out
    for name in (*accuracy.KERNELS, *accuracy.ONCE, "strategy stream", "strategy recompute"):
        assert name in out
    assert out.endswith("all is well\n") and "WRONG" not in out


def last_column(tensor):
    """Wrong in one entry of the last row or column only."""
    tensor.view(-1)[-1] += 1 + tensor.view(-1)[-1].abs()
    return tensor


def wrong_sums(*args, **more):
    shift, sums, target = ORIGINAL["lse_and_target"](*args, **more)
    return shift, last_column(sums), target


def wrong_panel(*args, out, **more):
    ORIGINAL["exp_panel"](*args, out=out, **more)
    out[-1, -1] += 0.125


def unwritten_panel(*args, out, **more):
    low = out[-1, -1].clone()
    ORIGINAL["exp_panel"](*args, out=out, **more)
    out[-1, -1] = low


def wrong_logits(*args):
    return last_column(ORIGINAL["target_logits"](*args))


def wrong_places(panel, targets, v0, values):
    ORIGINAL["put_targets_"](panel, targets, v0 + 1, values)


def wrong_finish(panel, *args):
    found = ORIGINAL["finish_panel"](panel, *args)
    panel[7, 3] += 1
    return found


def wrong_products(panel, size, keep, *args, **more):
    ORIGINAL["kept_products"](panel, size, keep.roll(1, 1), *args, **more)


def wrong_tail(*args):
    pairs, coef = ORIGINAL["tail"](*args)
    return pairs, coef.neg()


def wrong_scale(tensor, factor):
    tensor[:-1].mul_(factor)


PLANTED = {
    "lse_and_target": wrong_sums,
    "exp_panel": wrong_panel,
    "target_logits": wrong_logits,
    "put_targets_": wrong_places,
    "finish_panel": wrong_finish,
    "kept_products": wrong_products,
    "tail": wrong_tail,
    "scale_": wrong_scale,
}
ORIGINAL = {name: getattr(torch_backend, name) for name in PLANTED}


@pytest.mark.parametrize("name", PLANTED)
def test_a_wrong_kernel_is_bad_news(name, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch_backend, name, PLANTED[name])
    report = tmp_path / "report.json"
    assert cli.main([*CHECK, "--json", str(report)]) == 1
    out, err = capsys.readouterr()
    assert any("WRONG" in line and name in line for line in out.splitlines())
    assert f"{name}: wrong" in err and "all is well" not in out
    found = json.loads(report.read_text())
    assert found["errors"] and {x["name"] for x in found["accuracy"] if not x["right"]} >= {name}


def test_an_entry_that_nobody_wrote_is_bad_news(monkeypatch):
    monkeypatch.setattr(torch_backend, "exp_panel", unwritten_panel)
    problem = accuracy.make_problem("torch", CPU, torch.float32)
    assert accuracy.panel(torch_backend, problem) == math.inf


def test_a_kernel_that_cannot_be_launched_is_bad_news_and_the_others_go_on(monkeypatch, capsys):
    def spilled(*args, **more):
        raise RuntimeError("out of resource: shared memory, Required: 300000, limit: 232448")

    monkeypatch.setattr(torch_backend, "exp_panel", spilled)
    assert cli.main(TINY) == 1
    out, err = capsys.readouterr()
    assert "exp_panel: RuntimeError: out of resource" in err and "does not fit this GPU" in err
    assert "scale_" in out and "three bare matmuls" not in out  # nothing wrong is timed


@pytest.mark.parametrize(
    "error, wanted",
    {
        "OutOfMemoryError: CUDA out of memory": "fewer --tokens",
        "OutOfResources: out of resource: shared memory": "does not fit",
        "RuntimeError: PTX was compiled with an unsupported toolchain": "driver is too old",
        "RuntimeError: Failed to find C compiler": "apt-get install gcc",
        "ValueError: anything": "report it with --json",
    }.items(),
)
def test_each_error_has_its_remedy(error, wanted):
    assert wanted in environment.remedy(error)


def test_times_and_a_report(tmp_path, capsys):
    report = tmp_path / "report.json"
    assert cli.main([*TINY, "--seconds", "2", "--json", str(report)]) == 0
    out, found = capsys.readouterr().out, json.loads(report.read_text())
    assert "three bare matmuls" in out and "of all three" in out and str(report) in out
    assert {"device", "versions", "backend", "choice", "accuracy", "candidates", "runs"} <= set(
        found
    )
    assert found["shape"] == {"tokens": 40, "width": 24, "vocab": 300} and not found["errors"]
    own = torch_backend.tile_of(CPU, torch.float32)._asdict()
    assert [x["choice"] for x in found["candidates"][:2]] == [own, own]  # the current one first
    assert [x["part"] for x in found["candidates"][:2]] == list(candidates.PARTS)
    assert all(len(x["seconds"]) == 3 for x in found["candidates"])
    assert found["bare_matmuls"]["seconds"] > 0 and found["runs"]["stream, now"]


def fake_times(monkeypatch, best, seconds):
    """The sweep finds `best`, and whole calls and parts take `seconds` by whether it runs."""
    trials = [candidates.Trial(part, best, "best") for part in candidates.PARTS]
    timings = [candidates.Timing(trial, [1e-9]) for trial in trials]
    monkeypatch.setattr(candidates, "sweep", lambda *args, **more: iter(timings))
    times = {word: [x] * 5 for word, x in zip(("now", "fastest"), seconds, strict=True)}
    keys = (*examine.STRATEGIES, "parts")
    runs = {f"{key}, {word}": found for word, found in times.items() for key in keys}
    monkeypatch.setattr(examine.Visit, "compare", lambda *args: runs)


def test_what_is_faster_is_kept_and_runs_from_then_on(folder, monkeypatch, capsys, caplog):
    fake_times(monkeypatch, FAST, (2.0, 1.0))
    assert cli.main([*TINY, "--save"]) == 0
    (path,) = folder.iterdir()
    assert f"saved     {path}" in capsys.readouterr().out
    with caplog.at_level(logging.INFO, "rpo_kernels"):
        assert torch_backend.tile_of(CPU, torch.float32) == FAST
    assert str(path) in caplog.text
    saved = json.loads(path.read_text())["measured"]["float32"]
    assert saved["shape"]["vocab"] == 300 and saved["runs"]["parts, fastest"]
    assert cli.main(CHECK) == 0
    assert f"tiles of {2**18} logits, at most 512 rows ({path})" in capsys.readouterr().out


@pytest.mark.parametrize("seconds", [(1.0, 2.0), (1.0, 1.0)])
def test_what_is_not_faster_is_not_kept(folder, monkeypatch, capsys, seconds):
    fake_times(monkeypatch, FAST, seconds)
    assert cli.main([*TINY, "--save"]) == 0
    assert not folder.exists() and "saved     nothing" in capsys.readouterr().out


def test_without_save_nothing_is_written(folder, monkeypatch):
    fake_times(monkeypatch, FAST, (2.0, 1.0))
    assert cli.main(TINY) == 0 and not folder.exists()


def test_a_folder_that_cannot_be_written_is_bad_news(folder, monkeypatch, capsys):
    fake_times(monkeypatch, FAST, (2.0, 1.0))
    folder.write_text("a file")
    assert cli.main([*TINY, "--save"]) == 1
    err = capsys.readouterr().err
    assert "--save: " in err and tuning.FOLDER in err


def test_a_damaged_file_is_named_and_the_defaults_run(folder, capsys, caplog):
    path = tuning.save(CPU, torch.float32, FAST, {})
    path.write_text("{")
    assert cli.main(CHECK) == 0
    assert str(path) in caplog.text and "(default)" in capsys.readouterr().out


def test_a_candidate_that_is_wrong_is_not_timed():
    def wrong(hidden, weight, *args, **more):
        found = ORIGINAL["lse_and_target"](hidden, weight, *args, **more)
        return (
            found
            if torch_backend.tile_of(CPU, hidden.dtype) != FAST
            else (*found[:2], found[2] + 1)
        )

    backend = type("Backend", (), {**vars(torch_backend), "lse_and_target": staticmethod(wrong)})
    case = candidates.random_case(40, 24, 300, torch.float32, CPU)
    found = {}
    for choice in (tuning.Blocks(2**20, 1024), FAST):
        trial = candidates.Trial("lse_and_target", choice, "")
        found[choice] = candidates.measure("torch", backend, trial, case, 1)
    assert [bool(x.error) for x in found.values()] == [False, True]
    assert "what rounding explains" in found[FAST].error and not found[FAST].samples


def test_the_fastest_of_all_parts():
    a, b, c = (tuning.Blocks(2**20, rows) for rows in (1, 2, 3))
    times = {a: (1.0, 9.0), b: (4.0, 4.0), c: (0.5, math.nan)}
    timings = [
        candidates.Timing(candidates.Trial(part, choice, ""), [x], "" if x == x else "failed")
        for choice, both in times.items()
        for part, x in zip(candidates.PARTS, both, strict=True)
    ]
    assert candidates.fastest(timings) == b
    assert candidates.fastest(timings[:1]) is None


@pytest.mark.parametrize(
    "words, message",
    {
        "--hidden_size 8": "--hidden_size: expected together with --vocab_size",
        "--vocab_size 8": "--vocab_size: expected together with --hidden_size",
        "--config x --hidden_size 8 --vocab_size 9": "--config: expected without",
        "--hidden_size 0 --vocab_size 9": "--hidden_size: expected at least 1, got 0",
        "--tokens 1": "--tokens: expected at least 2, got 1",
        "--seconds -1": "--seconds: expected a number, 0 or above, got -1",
        "--seconds nan": "--seconds: expected a number",
        "--seconds 0 --save": "--save: expected --seconds above 0",
        "--json /nowhere/x.json": "--json: expected a file in a folder that exists",
        "--json .": "--json: expected a file",
        "--dtype int8": "--dtype",
        "--backend cuda": "--backend",
    }.items(),
)
def test_wrong_arguments_are_named(words, message, capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(words.split())
    assert raised.value.code == 2 and message in capsys.readouterr().err


def test_sizes_come_from_a_model_s_config(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 24, "vocab_size": 300}')
    args = cli.make_parser("doctor").parse_args(["--config", str(tmp_path), "--tokens", "8"])
    assert cli.shape_of(args, cli.CPU_SHAPE) == (8, 24, 300)
    nothing = cli.make_parser("doctor").parse_args([])
    assert cli.shape_of(nothing, cli.CPU_SHAPE) == cli.CPU_SHAPE


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys):
    assert cli.main(["--device", "cuda"]) == 1
    assert "pass --device cpu" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_torch_cannot_use(monkeypatch, tmp_path, capsys):
    assert environment.unusable_gpu() is None
    monkeypatch.setattr(environment, "NVIDIA", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cli.main(["--seconds", "0"]) == 1
    assert "built for CPUs only" in capsys.readouterr().err
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def old():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    monkeypatch.setattr(torch.cuda, "init", old)
    assert cli.main(["--seconds", "0"]) == 1
    err = capsys.readouterr().err
    assert "too old" in err and "update the driver" in err
    assert cli.main(CHECK) == 0  # --device cpu


def test_what_triton_lacks(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "neither gcc nor clang" in environment.compiler_problem()
    monkeypatch.setenv("CC", "nonesuch")
    assert "CC: expected a C compiler" in environment.compiler_problem()
    monkeypatch.setenv("CC", sys.executable)
    assert environment.compiler_problem() is None
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in environment.compiler_problem()


def test_triton_without_a_gpu_or_the_interpreter_is_bad_news(tmp_path):
    pytest.importorskip("triton")
    keep = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    words = [sys.executable, "-m", "rpo_kernels.doctor", *CHECK, "--backend", "triton"]
    done = subprocess.run(
        words, env=keep | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1 and "expected tensors on a GPU" in done.stderr, done.stderr


def test_the_module_runs(tmp_path):
    report = Path(tmp_path / "r.json")
    words = [sys.executable, "-m", "rpo_kernels.doctor", *CHECK, "--json", str(report)]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environ, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert json.loads(report.read_text())["versions"]["torch"] == torch.__version__
