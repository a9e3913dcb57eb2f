"""The benchmark harness itself, at toy size: its gate, its file, its survival of failures, its
report.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import (
    end_to_end,
    memory,
    plots,
    report,
    run,
    session,
    targets,
    truth,
)
from benchmarks.cases import Spec, build, specs_of
from benchmarks.measure import Settings
from benchmarks.peers import (
    IMPLEMENTATIONS,
    Implementation,
    Unavailable,
    gradients,
    materialized,
)
from rpo_kernels.engines import skipping

TINY = Spec("calibrated", pairs=2, length=16, width=32, vocab=96)
SOUND = ("materialized", "auto", "recompute", "auto_skip")


def _wrong_gradient(p, beta):
    loss = materialized(p, beta)
    return loss + 0.05 * (p.weight.square().sum() - p.weight.detach().square().sum())


def _broken(p, beta):
    raise RuntimeError("planted failure")


def _absent(p, beta):
    raise Unavailable("not on this device")


PLANTED = {
    "wrong_loss": Implementation("wrong loss", lambda p, beta: 1.05 * materialized(p, beta)),
    "wrong_gradient": Implementation("wrong gradient", _wrong_gradient),
    "nan": Implementation("NaN", lambda p, beta: materialized(p, beta) * float("nan")),
    "broken": Implementation("broken", _broken),
    "absent": Implementation("absent", _absent),
}


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """A results file of two sizes and a frozen head, with sound and planted implementations."""
    path = tmp_path_factory.mktemp("results") / "cpu-tiny-table.json"
    sizes = [TINY, replace(TINY, frozen=True), replace(TINY, length=32)]
    chosen = {name: IMPLEMENTATIONS[name] for name in SOUND} | PLANTED
    with pytest.MonkeyPatch.context() as patch:  # toy sizes keep much: skip all the same
        patch.setattr(skipping, "break_even", lambda *call: 1.0)
        found = run.run_case("table", sizes, chosen, Settings(rounds=3, memory=False), path)
    assert json.loads(path.read_text()) == json.loads(json.dumps(found))
    return found | {"file": path.name, "path": path}


def test_file_states_where_figures_come_from(document):
    assert document["schema"] == run.SCHEMA and document["case"] == "table"
    assert document["device"]["kind"] == "cpu" and document["device"]["name"]
    assert document["versions"]["torch"] == torch.__version__
    assert len(document["source_sha256"]) == 16 and document["threads"] >= 1


def test_sound_implementations_are_timed_with_their_errors(document):
    full, frozen, _ = document["runs"]
    assert full["flop_per_unit"] == 2 * full["tokens"] * 96 * 32
    assert full["tokens"] == 48 and full["rows"] == 64
    for name in SOUND:
        entry, limit = full["results"][name], 1e-2 if name == "auto_skip" else 1e-4
        assert entry["status"] == "ok" and entry["errors"]["dw"] < limit
        seconds = entry["seconds"]
        assert seconds["rounds"] == 3 == len(seconds["samples"])
        assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
    assert frozen["results"]["auto"]["errors"]["dw"] is None
    for kind in ("whole", "tiled"):
        assert list(full["matmuls"][kind]["parts"]) == ["logits", "dh", "dw"]
        assert list(frozen["matmuls"][kind]["parts"]) == ["logits", "dh"]


@pytest.mark.parametrize("name", ["wrong_loss", "wrong_gradient", "nan"])
def test_wrong_results_are_caught_and_never_timed(document, name):
    entry = document["runs"][0]["results"][name]
    assert entry["status"] == "wrong" and "relative error" in entry["reason"]
    assert "seconds" not in entry


def test_skipping_is_measured_beside_its_certificate(document):
    entry = document["runs"][0]["results"]["auto_skip"]
    assert 0 < entry["certificate"] <= IMPLEMENTATIONS["auto_skip"].tolerance
    assert 0 < entry["skipping_error"] < 0.02 and entry["errors"]["dh"] < 0.02


def test_rounding_of_materialized_logits_is_the_measure():
    """One long pair in bf16: who is as far from float64 as the plain expression is not wrong."""
    auto, plain = IMPLEMENTATIONS["auto"], IMPLEMENTATIONS["materialized"]
    far = {"loss": 0.06, "dh": 0.19, "dw": None}
    for implementation, known, scale, sound in [
        (plain, None, 1, True),
        (plain, None, 3, False),
        (auto, None, 1, False),
        (auto, far, 1.9, True),
        (auto, far, 2.1, False),
        (auto, far, float("nan"), False),
        (auto, dict.fromkeys(far, float("inf")), 3, False),
    ]:
        errors = {key: value and scale * value for key, value in far.items()}
        found = truth.verdict(implementation, torch.bfloat16, errors, known)
        assert (found is None) == sound, (implementation.label, known, scale)
    assert truth.verdict(plain, torch.float32, far) is not None
    assert truth.verdict(auto, torch.float32, far, far) is not None


def test_failures_are_recorded_with_their_reason(document):
    results = document["runs"][0]["results"]
    assert results["broken"]["status"] == "failed"
    assert "planted failure" in results["broken"]["reason"]
    assert results["absent"]["status"] == "unavailable"
    assert results["absent"]["reason"] == "not on this device"


def test_sampled_truth_is_the_complete_one():
    problem = build(TINY)
    whole, some = truth.Truth(problem), truth.Truth(problem, sample=8)
    loss, dh, dw = whole.solve("cached", 0.1)
    loss_some, dh_some, dw_some = some.solve("cached", 0.1)
    torch.testing.assert_close(loss_some, loss)
    torch.testing.assert_close(dh_some, dh[some.rows])
    torch.testing.assert_close(dw_some, dw[some.entries])
    hidden, weight = problem.hidden.double(), problem.weight.double()
    exact = problem._replace(hidden=hidden, weight=weight)
    errors = whole.errors(IMPLEMENTATIONS["materialized"], *gradients(
        IMPLEMENTATIONS["materialized"], exact, frozen=False
    ))  # fmt: skip
    assert max(errors.values()) < 1e-6


def test_reference_kinds_of_the_loss():
    problem = build(TINY)
    found = truth.Truth(problem)
    own = found.solve("own", 0.1)[0]
    sums = found.logps.view(problem.labels.shape).sum(1)
    sft = -0.1 * 0.005 * sums[:2].mean()
    torch.testing.assert_close(own, sft + torch.tensor(2.0, dtype=torch.float64).log())


def test_command_line_smoke(tmp_path):
    threads = torch.get_num_threads()
    try:
        words = ["gpu", "--smoke", "--no_memory", "--only", "auto", "auto_skip"]
        path = run.main([*words, "--output_dir", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    found = json.loads(path.read_text())
    assert found["smoke"] and len(found["runs"]) == len(specs_of("gpu", ["bfloat16"], "cpu", True))
    assert not path.with_suffix(".doing").exists()
    assert report.load(tmp_path) == {} and len(report.load(tmp_path, smoke=True)) == 1


def test_memory_of_a_fresh_process_sees_the_logits():
    spec = Spec("calibrated", pairs=2, length=256, width=32, vocab=16384)
    found = memory.in_subprocess(spec, "materialized", 1)
    logits = 4 * 256 * 16384 * 4
    assert found["beyond"] > logits, found


def test_memory_failure_is_reported():
    assert "error" in memory.in_subprocess(TINY, "materialized", 1, limit_s=0.01)


def test_session_survives_a_dying_child(tmp_path):
    """A child that dies while running a peer is replaced; the peer is left out and the file says
    so.
    """
    path = tmp_path / "gpu.json"
    program = f"""
import json, pathlib, os
path = pathlib.Path({str(path)!r})
if path.exists() and json.loads(path.read_text())["banned"]:
    raise SystemExit(0)
path.with_suffix(".doing").write_text(json.dumps({{"run": 0, "doing": "trl"}}))
os._exit(3)
"""
    assert session.drive([sys.executable, "-c", program], path, "cpu", budget_s=60)
    assert "status 3" in json.loads(path.read_text())["banned"]["0"]["trl"]


def test_session_ends_when_the_culprit_is_unknown(tmp_path):
    program = "raise SystemExit(1)"
    assert not session.drive([sys.executable, "-c", program], tmp_path / "x.json", "cpu", 60)


def test_report_says_what_the_file_says(document, tmp_path, capsys):
    folder = document["path"].parent
    (tmp_path / "benchmarks").mkdir()
    readme, short = tmp_path / "benchmarks" / "README.md", tmp_path / "README.md"
    for path in (readme, short):
        path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    words = ["--results", str(folder), "--root", str(tmp_path)]
    assert report.main([*words, "--check"]) == 1
    assert report.main(words) == 0 and "old" in readme.read_text()  # only --write writes
    assert report.main([*words, "--write"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert report.main([*words, "--check"]) == 0
    full = document["runs"][0]
    assert report.number(report.median(full, "auto")) in text
    assert (document["commit"] or "unknown")[:10] in text and document["file"] in text
    assert "wrong gradient: wrong" in text and "absent: unavailable (not on this device)" in text
    whole = short.read_text()
    assert whole.startswith("before\n") and whole.endswith("after\n") and "old" not in whole
    share = report.ratio(report.median(full, "auto"), report.median(full, "materialized"))
    assert report.number(share, 2) in whole and document["file"] in whole
    readme.write_text("no markers\n")
    assert report.main([*words, "--write"]) == 1 and readme.read_text() == "no markers\n"
    with pytest.raises(SystemExit):
        report.main([*words, "--write", "--smoke"])
    capsys.readouterr()
    targets.compare(report.load(folder))
    assert "float32 full auto / materialized" in capsys.readouterr().out


def test_plot_of_two_sizes(document, tmp_path):
    assert plots.draw(document | {"case": "gpu"}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_whole_steps_are_compared_and_reported(tmp_path):
    """Our trainer on the tiny model; a planted disagreement is named."""
    pytest.importorskip("gguf")
    name = "ours, prefix sharing"
    words = ["--smoke", "--dtypes", "float32", "--only", name, "--output_dir", str(tmp_path)]
    document = json.loads(end_to_end.main(words).read_text())
    run = document["runs"]["float32"][name]
    assert run["status"] == "ok", run
    assert len(run["losses"]) == len(run["seconds"]) == 3 and run["peak_bytes"] > 1e8
    other = run | {"losses": [1.01 * x for x in run["losses"]]}
    runs = {end_to_end.BASE: run.copy(), name: run.copy(), "ours, low memory": other}
    end_to_end.agreement({"float32": runs})
    lines = end_to_end.table(runs, "float32").splitlines()
    assert [line.endswith("DISAGREES") for line in lines] == [False, False, False, True]

    def drifting(by, first=0.0):
        """A run whose first loss is off by `first`, and the others by `by`."""
        head, *rest = run["losses"]
        return run | {"losses": [head * (1 + first), *(x * (1 + by) for x in rest)]}

    half = {
        end_to_end.BASE: drifting(0.01),
        name: drifting(-0.019),
        "ours, separate sequences": drifting(0.021),
        "ours, low memory": drifting(0.0, first=0.002),
    }
    end_to_end.agreement({"float32": runs, "bfloat16": half})
    lines = end_to_end.table(half, "bfloat16").splitlines()
    assert [line.endswith("DISAGREES") for line in lines] == [False, False, False, True, True]
    failed = {"TRL, reference online": {"status": "failed", "reason": "planted"}}
    document |= {"runs": {"float32": runs | failed}, "file": "x.json"}
    section = report.end_to_end_section(document)
    assert "| **ours, low memory, float32** |" in section and "| failed |" in section
