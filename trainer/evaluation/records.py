"""JSON lines, read and appended: a file that a killed run left behind can be continued."""

from __future__ import annotations

import json
from pathlib import Path

from trainer.data.rows import parse_json
from trainer.errors import InputError
from trainer.paths import find_file


def read_jsonl(name: str, *fields: str) -> list[tuple[str, dict]]:
    """Every line of a file, with its place.

    Args:
        name: path, from the working directory or the repository.
        fields: keys that every line must have.

    Returns:
        (`file:line`, object) for every line that is not blank.

    Raises:
        InputError: no such file, no line, a line that is no JSON object, a missing key, or a
            `question_id` that is neither number nor string.
    """
    path, rows = find_file(name), []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        place = f"{name}:{number}"
        try:
            row = parse_json(line)
        except ValueError as error:
            raise InputError(f"{place}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{place}: expected a JSON object, got {type(row).__name__}")
        missing = [field for field in fields if field not in row]
        if missing:
            has = ", ".join(row) or "nothing"
            raise InputError(f"{place}: no field {', '.join(missing)} (the line has {has})")
        question = row.get("question_id", number)
        if not isinstance(question, int | float | str):
            raise InputError(
                f"{place}: expected a number or string as question_id, got {question!r}"
            )
        rows.append((place, row))
    if not rows:
        raise InputError(f"{name}: the file is empty")
    return rows


class JsonlLog:
    """A file that grows line by line, and whose lines survive a kill.

    `rows` are those that are there; a torn last line, which a kill may leave, is cut off.
    """

    def __init__(self, path: Path) -> None:
        """Read what is there, and open the file to append to it."""
        content = path.read_bytes() if path.exists() else b""
        whole = content.rfind(b"\n") + 1
        try:
            self.rows = [json.loads(line) for line in content[:whole].splitlines()]
            if not all(isinstance(row, dict) for row in self.rows):
                raise ValueError("a line is no JSON object")
        except ValueError as error:
            raise InputError(f"{path}: damaged ({error}); remove it to start anew") from None
        self.file = path.open("ab")
        self.file.truncate(whole)

    def append(self, rows: list[dict]) -> None:
        """Write rows, in one piece."""
        self.file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        self.file.flush()

    def __enter__(self) -> JsonlLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


def write_json(path: Path, value: object) -> None:
    """Write `value` so that a human can read it, replacing the file in one go."""
    replace_text(path, json.dumps(value, indent=2) + "\n")


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write JSON lines, replacing the file in one go."""
    replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def replace_text(path: Path, text: str) -> None:
    """Replace a file in one go: a killed run leaves the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
