"""What is built works elsewhere: the wheel on one's own files, the source distribution's tests."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.support import ROOT
from tests.trainer.tiny import record, save_tiny, write_jsonl

TREES = ("rpo_kernels", "trainer", "tests", "benchmarks", ".ci")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The repository's files without what was built in it."""
    folder = tmp_path_factory.mktemp("source") / "rpo"
    for name in TREES:
        ignored = shutil.ignore_patterns("__pycache__", ".venv", "*.doing")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    how = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(out), str(source)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *how], check=True)
    [file] = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def rpo(wheel, tmp_path_factory):
    """``rpo(*words)`` runs the installed command in a folder outside the repository."""
    site = tmp_path_factory.mktemp("site")
    how = ["--no-deps", "--quiet", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "install", *how], check=True)
    work = tmp_path_factory.mktemp("work")
    (work / "trainer.py").write_text("raise SystemExit('the wrong trainer')\n")
    environment = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}

    def run(*words, given=""):
        command = [str(site / "bin" / "rpo"), *map(str, words)]
        done = subprocess.run(
            command, cwd=work, env=environment, input=given, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run.work, run.site = work, site
    return run


def test_the_wheel_holds_code_recipes_and_licence_and_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    [info] = [top for top in tops if top.endswith(".dist-info")]
    assert tops == {"rpo_kernels", "trainer", info}
    needed = ("trainer/recipes/smollm2-cpu.yaml", "trainer/recipes/demo_train.jsonl",
              "trainer/accelerate/fsdp2.yaml", "trainer/FIELDS.md", "rpo_kernels/py.typed",
              f"{info}/licenses/LICENSE")  # fmt: skip
    assert {*needed} <= {*names}
    licence = zipfile.ZipFile(wheel).read(f"{info}/licenses/LICENSE").decode()
    assert "END OF TERMS AND CONDITIONS" in licence and len(licence) > 11_000


def test_the_description_leads_nowhere_that_an_index_has_not(wheel):
    [name] = [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("METADATA")]
    metadata = zipfile.ZipFile(wheel).read(name).decode()
    body = metadata.split("\n\n", 1)[1]
    assert body.startswith("# rpo_kernels") and "fused_rpo_loss" in body
    assert not re.findall(r"\]\((?!https?:|#)[^)]+\)", body)


def test_the_sdist_s_tests_run(source, tmp_path):
    """It holds every test, and what those of the repository's own files read."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", tmp_path],
        cwd=source, check=True, capture_output=True,
    )  # fmt: skip
    [file] = tmp_path.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        archive.extractall(tmp_path, filter="data")
    [folder] = (path for path in tmp_path.iterdir() if path.is_dir())

    def pytest_in(*words):
        environment = os.environ | {"PYTHONPATH": str(folder)}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    here = {path.relative_to(ROOT) for path in ROOT.glob("tests/**/*.py")}
    assert {path.relative_to(folder) for path in folder.glob("tests/**/*.py")} == here
    ran = pytest_in("tests/kernels/test_losses.py", "tests/test_readme.py")
    assert ran.returncode == 0, ran.stdout[-2000:]


def own_data(work):
    """Three files as people have them, in three formats, and the words that read each."""
    chats = write_jsonl(work / "chats.jsonl", [record(i) for i in range(12)])
    texts = [{"question": f"{i}+1=", "good": f" {i + 1}", "bad": f" {i + 2}"} for i in range(8)]
    with (work / "texts.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, texts[0])
        writer.writeheader()
        writer.writerows(texts)
    alpaca = [
        {"instruction": "Add one.", "input": str(i), "output": [f" {i + 1}", f" {i + 2}"]}
        for i in range(8)
    ]
    pq.write_table(pa.Table.from_pylist(alpaca), work / "alpaca.parquet")
    yield "chats", ["--train-file", chats, "--eval-split-ratio", "0.2"]
    yield "texts", ["--train_file", "texts.csv", "--prompt_column", "question", "--chosen_column",
                    "good", "--rejected_column", "bad"]  # fmt: skip
    yield "alpaca", ["--train_file", "alpaca.parquet", "--prompt_column", "instruction", "input",
                     "--chosen_column", "output.0", "--rejected_column", "output.1"]  # fmt: skip


def test_a_user_s_path_from_three_formats_to_a_conversation(rpo):
    model = save_tiny(rpo.work / "base")
    assert "rpo train" in rpo("--help")
    for name, words in own_data(rpo.work):
        said = rpo("train", "--model_name_or_path", model, *words, "--max_steps", 2,
                   "--output_dir", name, "--cpu_threads", 1)  # fmt: skip
        assert f"rpo chat {name}/model" in said and "step 2/2" in said
        assert (
            yaml.safe_load((rpo.work / name / "config.yaml").read_text())["learning_rate"] == 1e-6
        )
    assert "before" in rpo("train", "--config", "chats/config.yaml", "--output_dir", "again")
    rpo("evaluate", "score", "--data", "chats.jsonl", "--models", "tuned=chats/model",
        "--reference", model, "--output_dir", "scores", "--kl_prompts", 0)  # fmt: skip
    assert "tuned" in json.loads((rpo.work / "scores" / "scores.json").read_text())
    said = rpo("chat", "chats/model", model, "--max_new_tokens", 4, given="count from 1\n")
    assert "[chats/model]" in said and f"[{model}]" in said
    assert "stream" in rpo("plan", "--hidden_size", 64, "--vocab_size", 1000)


def test_the_installed_packages_are_the_wheel_s(rpo):
    code = "import rpo_kernels, trainer.cli; print(rpo_kernels.__file__, trainer.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(rpo.work).parent, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(rpo.site)}, stdout=subprocess.PIPE,
    ).stdout.split()  # fmt: skip
    assert all(Path(path).is_relative_to(rpo.site) for path in found)
