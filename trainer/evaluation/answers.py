"""Answers of a model, in FastChat's format: one line per question, with the text of every turn.

{"question_id": 81, "model_id": "rpo", "choices": [{"index": 0, "turns": ["Answer."]}]}
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from trainer.errors import InputError
from trainer.evaluation.records import read_jsonl

Answers = dict[str, dict[Hashable, list[str]]]  # model -> question -> an answer per turn


def read_answers(files: Sequence[str]) -> Answers:
    """Read answer files, of one model or of several.

    Raises:
        InputError: an unreadable line, or two answers of one model to one question.
    """
    answers: Answers = {}
    for name in files:
        for place, row in read_jsonl(name, "question_id", "model_id", "choices"):
            try:
                turns = row["choices"][0]["turns"]
            except (IndexError, KeyError, TypeError):
                turns = None
            if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
                raise InputError(f'{place}: expected "choices": [{{"turns": [text, ...]}}]')
            if not isinstance(row["model_id"], str):
                raise InputError(f"{place}: expected a name as model_id, got {row['model_id']!r}")
            of_model = answers.setdefault(row["model_id"], {})
            if row["question_id"] in of_model:
                raise InputError(f"{place}: a second answer of {row['model_id']} to this question")
            of_model[row["question_id"]] = turns
    return answers
