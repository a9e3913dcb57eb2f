"""Judgments in FastChat's two formats, as comparisons of two models.

Pairwise, one line per question, turn and pair of models, judged in both answer orders:

    {"question_id": 81, "turn": 1, "model_1": "dpo", "model_2": "rpo",
     "g1_winner": "model_2", "g2_winner": "tie"}

Single, one line per question, turn and model; two models are compared wherever both were scored:

    {"question_id": 81, "turn": 1, "model": "rpo", "score": 8}

A pairwise judgment is a win only where both orders name the same model, else a tie. This is
FastChat's rule and the paper's. What the judge did not answer in a readable way (winner `error`,
score -1) is counted as malformed and left out, as FastChat does.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import combinations

from trainer.errors import InputError
from trainer.evaluation.records import read_jsonl

WINNERS = ("model_1", "model_2", "tie", "error")


@dataclass(frozen=True)
class Comparison:
    """Model `a` against `b` on one turn of a question: 1 if `a` wins, 0.5 for a tie, else 0."""

    question: Hashable
    turn: int
    a: str
    b: str
    points: float


@dataclass
class Judgments:
    """What a set of files says."""

    comparisons: list[Comparison] = field(default_factory=list)
    malformed: int = 0
    """Judgments left out because the judge's answer could not be read."""
    disagreements: int = 0
    """Pairwise judgments whose two orders named different winners; they count as ties."""
    scores: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Every score of every model, single format only."""

    @property
    def models(self) -> list[str]:
        """Names of all models, sorted."""
        return sorted({name for c in self.comparisons for name in (c.a, c.b)})


def read_judgments(files: list[str], names: dict[str, str]) -> Judgments:
    """Read judgment files of one format.

    Args:
        files: JSONL files.
        names: other names for some models.

    Raises:
        InputError: an unreadable line or value, an unknown winner, the same comparison twice, both
            formats together, a name that is no model's, or nothing to compare.
    """
    rows = [row for name in files for row in read_jsonl(name, "question_id")]
    pairwise = {"g1_winner" in row for _, row in rows}
    if len(pairwise) > 1:
        raise InputError("pairwise and single-score judgments cannot be counted together")
    keys = ("model_1", "model_2") if pairwise.pop() else ("model",)
    unknown = set(names) - {_model(place, row, key, {}) for place, row in rows for key in keys}
    if unknown:
        raise InputError(f"rename: no model is called {', '.join(sorted(unknown))}")
    judgments = Judgments()
    first_place: dict[Hashable, str] = {}
    for place, row in rows:
        models = tuple(_model(place, row, key, names) for key in keys)
        turn, judge = row.get("turn", 1), str(row.get("judge"))
        if not isinstance(turn, int):
            raise InputError(f"{place}: expected an integer as 'turn', got {turn!r}")
        what = (row["question_id"], turn, frozenset(models), judge)
        if first_place.setdefault(what, place) != place:
            raise InputError(f"{place}: the same judgment as {first_place[what]}")
    read = _read_pairwise if len(keys) == 2 else _read_single
    read(judgments, rows, names)
    if not judgments.comparisons:
        raise InputError(f"{', '.join(files)}: no two models were judged on the same question")
    return judgments


def _model(place: str, row: dict, key: str, names: dict[str, str]) -> str:
    name = row.get(key)
    if not isinstance(name, str):
        raise InputError(f"{place}: expected the model's name as {key!r}, got {name!r}")
    return names.get(name, name)


def _read_pairwise(judgments: Judgments, rows: list, names: dict[str, str]) -> None:
    for place, row in rows:
        a, b = (_model(place, row, key, names) for key in ("model_1", "model_2"))
        if a == b:
            raise InputError(f"{place}: {a} is compared with itself")
        winners = [row.get(key) for key in ("g1_winner", "g2_winner")]
        if not all(winner in WINNERS for winner in winners):
            raise InputError(f"{place}: expected winners among {', '.join(WINNERS)}, got {winners}")
        if "error" in winners:
            judgments.malformed += 1
            continue
        judgments.disagreements += winners[0] != winners[1]
        agreed = winners[0] if winners[0] == winners[1] else "tie"
        points = {"model_1": 1.0, "model_2": 0.0, "tie": 0.5}[agreed]
        question, turn = row["question_id"], row.get("turn", 1)
        judgments.comparisons.append(Comparison(question, turn, a, b, points))


def _read_single(judgments: Judgments, rows: list, names: dict[str, str]) -> None:
    judged: dict[tuple, dict[str, float]] = defaultdict(dict)
    for place, row in rows:
        model, score = _model(place, row, "model", names), row.get("score")
        number = isinstance(score, int | float) and not isinstance(score, bool)
        if not number or not math.isfinite(score):
            raise InputError(f"{place}: expected a finite number as 'score', got {score!r}")
        if score < 0:
            judgments.malformed += 1
            continue
        judgments.scores[model].append(float(score))
        key = (row["question_id"], row.get("turn", 1), str(row.get("judge")))
        judged[key][model] = float(score)
    for (question, turn, _), scores in judged.items():
        for a, b in combinations(sorted(scores), 2):
            points = 0.5 + 0.5 * ((scores[a] > scores[b]) - (scores[a] < scores[b]))
            judgments.comparisons.append(Comparison(question, turn, a, b, points))
