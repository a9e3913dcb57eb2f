"""The real-model experiment: its questions, its rule, a reduced run, the report."""

import json

import pytest

from benchmarks.experiments import arithmetic, displacement
from benchmarks.experiments.displacement import METHODS, SFT_ALONE, Experiment
from benchmarks.experiments.displacement_report import curves, report
from tests.trainer.tiny import save_tiny
from trainer.evaluation.models import Source


def test_questions_differ_and_a_longer_list_only_appends():
    asked = arithmetic.questions(300, seed=3)
    assert len({q.text for q in asked}) == 300
    assert arithmetic.questions(50, seed=3) == asked[:50]
    assert arithmetic.questions(50, seed=4) != asked[:50]
    for question in asked:
        assert eval(question.equation) == question.result >= 0
        chosen, rejected = (
            arithmetic.demonstrations([question], seed=0)[0][k][0]["content"]
            for k in ("chosen", "rejected")
        )
        assert arithmetic.is_right(chosen, question.result) is True
        assert arithmetic.is_right(rejected, question.result) is False


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("53 - 22 = 31.", True),
        ("It is 31, not 30.", False),
        ("31", True),
        ("1,031", False),
        ("-31", False),
        ("I do not know.", None),
    ],
)
def test_rule(answer, verdict):
    assert arithmetic.is_right(answer, 31) is verdict


def test_pairs_need_a_right_and_a_wrong_answer():
    asked = arithmetic.questions(3, seed=0)
    right = [f"{q.result}." for q in asked]
    drawn = [[right[0], "0.5"], [right[1], right[1]], [None, "no number", right[2]]]
    (row,) = arithmetic.pairs(asked, drawn, seed=0)
    assert row["chosen"] == [{"role": "assistant", "content": right[0]}]
    assert row["rejected"] == [{"role": "assistant", "content": "0.5"}]


def test_a_new_style_keeps_the_result():
    row = arithmetic.questions(1, seed=0)[0].pair("7 * 6 = 42.", "7 * 6 = 48.")
    other = arithmetic.restyled(row)
    assert other["chosen"] == [{"role": "assistant", "content": "The answer is 42."}]
    assert (other["prompt"], other["rejected"]) == (row["prompt"], row["rejected"])


def test_sft_alone_is_supervised_fine_tuning(tmp_path):
    """Its updates are those of the SFT term: the rejected responses make no difference."""
    rows = arithmetic.demonstrations(arithmetic.questions(8, seed=0), seed=0)
    ends = []
    for name in ("a", "b"):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        run = experiment(tmp_path / name, tmp_path, train_file=str(file), eval_file=str(file))
        found = run.train(tmp_path / name / "run", **run.base, **METHODS["SFT"], **run.written)
        ends.append(found[-1]["eval/logps/chosen"])
        for row in rows:  # other rejected responses for the second run
            row["rejected"][0]["content"] = "something else"
    assert ends[0] == pytest.approx(ends[1], rel=1e-3)
    assert SFT_ALONE == METHODS["SFT"]["eta"]


def experiment(folder, models, **written):
    """One with a tiny model."""
    if not (models / "tiny").exists():
        save_tiny(models / "tiny")
    made = Experiment(
        str(folder), max_steps=3, max_length=1024, learning_rate=1e-3, per_device_train_batch_size=2
    )
    made.base = {"model_name_or_path": str(models / "tiny")}
    made.written |= written
    return made


def test_reduced_run(tmp_path, monkeypatch):
    """Two methods from one SFT start; what is finished is read, not repeated."""
    made = experiment(tmp_path / "out", tmp_path)
    results = [made.one("written", method, 0) for method in ("DPO", "RPO, sum")]
    starts = [row["rows"][0] for row in results]
    assert starts[0]["eval/logps/chosen"] == starts[1]["eval/logps/chosen"]
    assert all(row["rows"][0]["eval/rewards/margins"] == 0 for row in results)
    ends = [curves(row["rows"])["chosen"][1][-1] for row in results]
    assert ends[1] > ends[0]
    monkeypatch.setattr(made, "train", lambda *args, **fields: pytest.fail("repeated"))
    assert made.one("written", "DPO", 0) == results[0]

    text = report(results, tmp_path)
    assert "RPO, sum" in text
    kept = json.loads((tmp_path / "displacement.json").read_text())
    assert [found["chosen"] for found in kept["summary"]] == pytest.approx(ends, abs=1e-3)
    assert (tmp_path / "displacement.png").stat().st_size > 10_000


def test_a_model_without_right_answers_is_reported(tmp_path, monkeypatch):
    save_tiny(tmp_path / "tiny")
    monkeypatch.setattr(displacement, "QUESTIONS", 4)
    with pytest.raises(RuntimeError, match="no question"):
        displacement.sample_pairs(Source(str(tmp_path / "tiny")), 2)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["displacement", "--output_dir", str(tmp_path / "file")])
    with pytest.raises(SystemExit):
        displacement.main()
    assert "error: output_dir: cannot make" in capsys.readouterr().err
