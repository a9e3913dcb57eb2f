"""Win rates from judgments: counting, intervals, length control, formats, bad input."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest

from tests.trainer.tiny import write_jsonl
from trainer.errors import InputError
from trainer.evaluate import main
from trainer.evaluation.judgments import Comparison
from trainer.evaluation.winrate import controlled_rate, describe, question_draws, winrate
from trainer.paths import ROOT

OPTIONS = {"answers": [], "rename": {}, "samples": 200, "seed": 0}


def judged(question, g1, g2, turn=1, a="old", b="new"):
    return {"question_id": question, "turn": turn, "model_1": a, "model_2": b,
            "g1_winner": g1, "g2_winner": g2}  # fmt: skip


PAIRWISE = [
    judged(1, "model_2", "model_2"),
    judged(2, "model_2", "model_2"),
    judged(2, "model_1", "model_1", turn=2),
    judged(3, "tie", "tie"),
    judged(4, "model_1", "model_2"),  # the orders disagree: a tie
    judged(5, "tie", "model_1"),  # so do these
    judged(6, "error", "model_2"),  # left out, counted
    judged(1, "model_1", "model_1", a="new", b="third"),
]


def single(question, model, score):
    return {"question_id": question, "turn": 1, "model": model, "score": score}


def count(tmp_path, rows, **options):
    file = write_jsonl(tmp_path / "judgments.jsonl", rows)
    return winrate([file], str(tmp_path / "out"), **(OPTIONS | options))


def test_pairwise_counts(tmp_path):
    """By hand: new against old has 2 wins, 1 loss, 3 ties; old and third never met."""
    result = count(tmp_path, PAIRWISE)
    written = json.loads((tmp_path / "out" / "winrates.json").read_text())
    assert written == result
    assert written["models"] == ["new", "old", "third"]
    assert written["matrix"]["new"]["old"] == pytest.approx(100 * 3.5 / 6)
    assert written["matrix"]["old"]["new"] == pytest.approx(100 * 2.5 / 6)
    assert written["matrix"]["new"]["third"] == 100
    assert written["matrix"]["old"]["third"] is None
    assert written["matrix"]["old"]["old"] == 50
    assert (written["malformed"], written["disagreements"]) == (1, 2)
    assert (tmp_path / "out" / "winrates.png").stat().st_size > 1000
    with (tmp_path / "out" / "winrates.csv").open() as lines:
        rows = {(row["a"], row["b"]): row for row in csv.DictReader(lines)}
    assert [rows["new", "old"][k] for k in ("wins", "ties", "losses")] == ["2", "3", "1"]


def test_single_scores(tmp_path):
    rows = [single(1, "a", 8), single(1, "b", 6), single(2, "a", 5), single(2, "b", 5),
            single(3, "a", -1), single(3, "b", 9)]  # fmt: skip
    result = count(tmp_path, rows)
    assert result["matrix"]["a"]["b"] == 75
    assert result["malformed"] == 1
    assert result["mean_scores"] == {"a": 6.5, "b": pytest.approx(20 / 3)}


def test_interval_resamples_questions():
    """Both turns of a question are drawn together: twice the data, but no narrower interval."""
    points = np.random.default_rng(0).integers(0, 2, 200).astype(float)
    once = [Comparison(q, 1, "a", "b", p) for q, p in enumerate(points)]
    twice = once + [Comparison(q, 2, "a", "b", p) for q, p in enumerate(points)]
    values = [describe(rows, question_draws(rows, 2000, 0)) for rows in (once, twice)]
    assert values[0]["win_rate_low"] == values[1]["win_rate_low"]
    half = 1.96 * 100 * points.std() / np.sqrt(len(points))
    assert values[0]["win_rate_high"] - values[0]["win_rate"] == pytest.approx(half, rel=0.1)


def test_length_control_recovers_the_rate_at_equal_length():
    """Comparisons drawn from the model itself, the better model's answers mostly longer."""
    random = np.random.default_rng(0)
    theta, phi, gaps = 0.5, 1.5, random.normal(300, 400, 4000)
    p = 1 / (1 + np.exp(-theta - phi * np.tanh(gaps / gaps.std())))
    wins = random.random(4000) < p
    rows = [Comparison(q, 1, "a", "b", float(win)) for q, win in enumerate(wins)]
    rate, low, high = controlled_rate(rows, gaps, question_draws(rows, 200, 0))
    truth = 100 / (1 + np.exp(-theta))
    assert low < truth < high and high - low < 10
    assert 100 * wins.mean() > high  # the plain rate is inflated by length
    swapped = [Comparison(c.question, 1, "b", "a", 1 - c.points) for c in rows]
    back, _, _ = controlled_rate(swapped, -gaps, question_draws(rows, 200, 0))
    assert back == pytest.approx(100 - rate)


def test_length_control_of_equal_lengths_is_the_win_rate():
    rows = [Comparison(q, 1, "a", "b", (1, 1, 0.5, 0)[q % 4]) for q in range(40)]
    draws = question_draws(rows, 200, 0)
    rate, low, high = controlled_rate(rows, np.full(40, 7.0) * 0, draws)
    assert rate == pytest.approx(62.5, abs=1e-3)
    assert (low, high) == pytest.approx(
        [describe(rows, draws)[f"win_rate_{end}"] for end in ("low", "high")], abs=1e-2
    )
    always = [Comparison(q, 1, "a", "b", 1) for q in range(40)]
    assert controlled_rate(always, np.zeros(40), draws)[0] > 99.9


def answered(question, model, *turns):
    return {"question_id": question, "model_id": model, "choices": [{"index": 0, "turns": turns}]}


def test_length_control_from_files(tmp_path):
    rows = [judged(q, *["model_2" if q % 3 else "model_1"] * 2) for q in range(30)]
    texts = [answered(q, m, "x" * (40 if m == "new" else 10 + q)) for q in range(30)
             for m in ("old", "new")]  # fmt: skip
    files = [write_jsonl(tmp_path / "answers.jsonl", texts)]
    result = count(tmp_path, rows, answers=files, rename={"new": "RPO"})
    controlled = result["length_controlled"]
    assert 0 < controlled["RPO"]["old"] < 100
    assert controlled["RPO"]["old"] + controlled["old"]["RPO"] == pytest.approx(100)
    files = [write_jsonl(tmp_path / "answers.jsonl", texts[:-1])]
    with pytest.raises(InputError, match="new has none to question 29, turn 1"):
        count(tmp_path, rows, answers=files)
    files = [write_jsonl(tmp_path / "answers.jsonl", texts[::2])]
    with pytest.raises(InputError, match="no file holds the answers of new"):
        count(tmp_path, rows, answers=files)
    files = [write_jsonl(tmp_path / "answers.jsonl", [answered(1, None, "x")])]
    with pytest.raises(InputError, match="jsonl:1: expected a name as model_id, got None"):
        count(tmp_path, rows, answers=files)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([PAIRWISE[0], PAIRWISE[0]], "judgments.jsonl:2: the same judgment as .*:1"),
        ([PAIRWISE[0], single(1, "a", 3)], "cannot be counted together"),
        ([judged(1, "model_3", "tie")], "expected winners among"),
        ([judged(1, "tie", "tie", a="new")], "compared with itself"),
        ([judged(1, "error", "error")], "no two models were judged"),
        ([judged(1, ["tie"], "tie")], "expected winners among"),
        (
            [judged(1, "tie", "tie", a=["new"])],
            "expected the model's name as 'model_1', got .'new'",
        ),
        ([judged([1], "tie", "tie")], "expected a number or string as question_id, got .1"),
        ([judged(1, "tie", "tie", turn="1")], "jsonl:1: expected an integer as 'turn', got '1'"),
        ([single(1, "a", "good")], "expected a finite number as 'score'"),
        ([single(1, "a", float("nan"))], "expected a finite number as 'score', got nan"),
        ([{"model": "a", "score": 1}], "no field question_id"),
    ],
)
def test_bad_judgments(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        count(tmp_path, rows)


def test_command_line(tmp_path, capsys):
    file = write_jsonl(tmp_path / "judgments.jsonl", PAIRWISE)
    main(["winrate", file, "--output_dir", str(tmp_path / "out"), "--rename", "new=RPO"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "RPO > old 58.33" in shown and "malformed (left out): 1" in shown
    with pytest.raises(SystemExit, match="output_dir: cannot make or write to .*: Not a directory"):
        main(["winrate", file, "--output_dir", f"{file}/out"])
    with pytest.raises(SystemExit, match="no model is called nwe"):
        main(["winrate", file, "--output_dir", str(tmp_path / "out"), "--rename", "nwe=RPO"])


def test_module_evaluate_shadows_no_package(tmp_path):
    """run.py as a script: `import evaluate` must find the package of that name."""
    (tmp_path / "evaluate.py").write_text("FOUND = 'the package'")
    code = "import runpy, sys; sys.argv[1:] = []; sys.path[0] = sys.argv[0] = {folder!r}\n" \
           "runpy.run_path({folder!r} + '/run.py', run_name='imported')\n" \
           "import evaluate; print(evaluate.FOUND)"  # fmt: skip
    script = code.format(folder=str(ROOT / "trainer"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          env={"PYTHONPATH": str(tmp_path), "PATH": ""}, timeout=100)  # fmt: skip
    assert done.stdout == "the package\n", done.stderr
