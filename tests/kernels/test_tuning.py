"""What `doctor --save` leaves is what later runs read; anything else is ignored by name."""

import json
import logging
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from rpo_kernels import tuning
from rpo_kernels.backends import tiles, torch_backend
from tests.support import ROOT

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")
CPU, F32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
GPU = torch.device("cuda", 0)
OWN = tuning.Blocks(4096, 32)
OWN_KERNELS = tuning.Kernels(
    tiles.Tile(64, 32, 16, 4, 3, 2, True),
    "panel",
    tiles.Tile(64, 32, 64, 4, 2),
    tiles.Tile(32, 64, 64, 4, 2),
    4,
    "gluon",
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(tuning.FOLDER, str(tmp_path / "tuned"))
    monkeypatch.setattr(tuning, "_gpu_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(tiles, "of_device", lambda device: ("sm_90", 132))
    tuning.forget()
    yield tmp_path / "tuned"
    tuning.forget()


def test_what_is_saved_runs(folder, caplog):
    hidden = torch.zeros(100, 8)
    assert torch_backend.tile_of(CPU, F32) == torch_backend.DEFAULT_BLOCKS
    path = tuning.save(CPU, F32, OWN, {"seconds": 1.0})
    assert path.parent == folder and " " not in path.name
    with caplog.at_level(logging.INFO, "rpo_kernels"):
        for _ in range(3):
            assert torch_backend._tile_shape(hidden, 2**30) == (128, 32)  # 4096 / 32
    assert [str(path) in line for line in caplog.messages] == [True]  # once
    assert torch_backend.tile_of(CPU, BF16).rows == torch_backend.DEFAULT_BLOCKS.rows
    assert [file.name for file in folder.iterdir()] == [path.name]  # no partial file is left


@needs_triton
def test_a_gpu_has_its_own_file_and_keeps_what_was_saved_for_other_dtypes():
    default = tuning.kernels(GPU, BF16)
    assert default.tile == tiles.CONFIGS["sm_90", "half"].tile and default.hopper == "gluon"
    path = tuning.save(GPU, BF16, OWN_KERNELS, {})
    assert path.name == "NVIDIA-H100-80GB-HBM3.json"
    other = tuning.default_kernels(GPU, F32)._replace(span=3)
    tuning.save(GPU, F32, other, {})
    assert tuning.kernels(GPU, BF16) == OWN_KERNELS and tuning.kernels(GPU, F32) == other


@needs_triton
def test_other_versions_are_not_kept_when_saving():
    path = tuning.save(GPU, F32, OWN_KERNELS, {})
    document = json.loads(path.read_text())
    document["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(document))
    tuning.save(GPU, BF16, OWN_KERNELS, {})
    assert list(json.loads(path.read_text())["choices"]) == ["bfloat16"]


@needs_triton
def test_a_trial_goes_first(monkeypatch):
    from rpo_kernels.backends import gluon_hopper

    tuning.save(CPU, F32, OWN, {})
    with tuning.trying(tuning.Blocks(2**10, 64)):
        assert torch_backend.tile_of(CPU, F32) == (2**10, 64)
    assert torch_backend.tile_of(CPU, F32) == OWN
    like = torch.empty(0, device="meta").bfloat16()
    with tuning.trying(OWN_KERNELS):
        assert gluon_hopper.wanted(like) and not gluon_hopper.wanted()
        monkeypatch.setenv(gluon_hopper.VARIABLE, "triton")
        assert gluon_hopper.wanted(like)


@needs_triton
def test_the_environment_goes_before_the_file(monkeypatch):
    from rpo_kernels.backends import gluon_hopper

    monkeypatch.setattr(tuning, "kernels", lambda device, dtype: OWN_KERNELS)
    like = torch.zeros(0)
    assert gluon_hopper.wanted(like)
    monkeypatch.setenv(gluon_hopper.VARIABLE, "triton")
    assert not gluon_hopper.wanted(like)


def change(**fields):
    return lambda document: document | fields


def entry(**fields):
    return lambda d: d | {"choices": {"bfloat16": d["choices"]["bfloat16"] | fields}}


BROKEN = {
    "empty": (lambda d: "", "not a tuning file"),
    "cut off": (lambda d: json.dumps(d)[:80], "not a tuning file"),
    "a list": (lambda d: [1], "not a tuning file"),
    "another format": (change(format=2), "expected format 1, got 2"),
    "another device": (change(device="NVIDIA A100"), "got NVIDIA A100"),
    "another torch": (lambda d: d | {"versions": d["versions"] | {"torch": "1.0"}}, "got 1.0"),
    "no Triton": (lambda d: d | {"versions": {**d["versions"], "triton": None}}, "triton"),
    "no choices": (change(choices=None), "not a tuning file"),
    "a field more": (entry(color=1), "got color"),
    "seven": (entry(tile=[64, 32]), "tile: expected 7 values"),
    "odd": (entry(tile=[63, 32, 16, 4, 3, 2, True]), "tile: expected a tile"),
    "no number": (entry(kept_rows=["64", 32, 16, 4, 3, 2, True]), "kept_rows: expected a tile"),
    "path": (entry(exp_path="both"), "exp_path: expected one of fused, panel, got 'both'"),
    "span": (entry(span=17), "span: expected a number from 1 to 16, got 17"),
    "hopper": (entry(hopper=None), "hopper: expected one of"),
}


@needs_triton
@pytest.mark.parametrize("how", BROKEN)
def test_a_damaged_or_foreign_file_is_ignored_by_name(how, caplog):
    path = tuning.save(GPU, BF16, OWN_KERNELS, {})
    spoil, message = BROKEN[how]
    text = spoil(json.loads(path.read_text()))
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    for _ in range(2):
        assert tuning.kernels(GPU, BF16) == tuning.default_kernels(GPU, BF16)
    (line,) = caplog.messages
    assert str(path) in line and message in line and "doctor --save" in line


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "64", None, 2**31])
def test_blocks_are_checked_too(value, caplog):
    path = tuning.save(CPU, F32, OWN, {})
    path.write_text(path.read_text().replace('"rows": 32', f'"rows": {json.dumps(value)}'))
    assert torch_backend.tile_of(CPU, F32).rows == torch_backend.DEFAULT_BLOCKS.rows
    assert "rows: expected a number from 1 to 2^30" in caplog.text


def test_where_files_are_kept(monkeypatch, tmp_path):
    monkeypatch.delenv(tuning.FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.file_of(CPU).parent == tmp_path / "rpo_kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert tuning.file_of(CPU).parent == tmp_path / "me/.cache/rpo_kernels"


def test_a_later_process_reads_the_file(folder):
    """The same results by other tiles: another order of sums, the same choice every time."""
    code = (
        "import torch; from rpo_kernels import linear_logprobs as f; torch.manual_seed(0);"
        "torch.set_num_threads(1);"
        "print(f(torch.randn(9, 64), torch.randn(700, 64), torch.arange(9)).tolist())"
    )

    def run():
        keep = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-c", code]
        done = subprocess.run(words, env=keep, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return done.stdout

    plain, threads = run(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tuning.save(CPU, F32, tuning.Blocks(64, 3), {})
    finally:
        torch.set_num_threads(threads)
    tuned = run()
    assert tuned == run() != plain
