"""Preference rows from local files, checked one by one before any model is loaded.

A row holds `prompt`, `chosen` and `rejected`, either all strings or all lists of chat messages
{role, content}:

    {"prompt": [{"role": "user", "content": "2 + 2?"}],
     "chosen": [{"role": "assistant", "content": "4."}],
     "rejected": [{"role": "assistant", "content": "5."}]}

Responses may span several turns (assistant, user, assistant, ...). Other fields are ignored. A row
that cannot be used is reported with its file and line; `on_bad_row` says whether that stops the
run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from trainer.config import InputError, RunConfig, find_file

FIELDS = ("prompt", "chosen", "rejected")
ROLES = ("system", "user", "assistant")
SHOWN = 5  # bad rows spelled out in an error; the rest are counted

Text = str | list[dict[str, str]]


class BadRow(Exception):
    """A row that cannot be used: a `reason` to count by, and the `detail` of this row."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


@dataclass(frozen=True)
class Row:
    """One preference: prompt, preferred response, other response; `source` is `file:line`."""

    prompt: Text
    chosen: Text
    rejected: Text
    source: str


@dataclass
class BadRows:
    """What was wrong with the rows of a set of files, and the policy: `error` or `skip`."""

    policy: str
    problems: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, source: str, problem: BadRow) -> None:
        """Note the row at `source` (`file:line`)."""
        self.problems.append(f"{source}: {problem}")
        self.reasons[problem.reason] += 1

    def settle(self, kept: int) -> None:
        """Raise `InputError` if a row is bad and the policy is `error`, or if no row is left."""
        if self.problems and self.policy == "error":
            shown = "\n  ".join(self.problems[:SHOWN])
            more = (
                f"\n  ... and {len(self.problems) - SHOWN} more"
                if len(self.problems) > SHOWN
                else ""
            )
            raise InputError(
                f"{len(self.problems)} unusable row(s):\n  {shown}{more}\n"
                "fix them, or leave them out with --on_bad_row skip"
            )
        if kept == 0:
            why = f" ({dict(self.reasons)})" if self.reasons else ""
            raise InputError(f"no usable preference pair in the given files{why}")


def read_splits(config: RunConfig) -> dict[str, tuple[list[Row], BadRows]]:
    """The rows of `train_file` and, if there is one, `eval_file`, as `train` and `eval`."""
    splits = {}
    for name, files in (("train", config.train_file), ("eval", config.eval_file)):
        if files:
            bad = BadRows(config.on_bad_row)
            splits[name] = (read_rows(files, bad), bad)
    return splits


def read_rows(paths: tuple[str, ...], bad: BadRows) -> list[Row]:
    """Read and check every row of JSONL and Parquet files.

    Args:
        paths: files ending in .jsonl, .json (one object a line) or .parquet.
        bad: receives the rows that cannot be used; with its policy `error` they raise once all
            files are read.

    Raises:
        InputError: a missing or unreadable file, an unknown file type, no usable row, or bad rows
            under the policy `error`.
    """
    rows = []
    for name in paths:
        path = find_file(name)
        readers = {".jsonl": _jsonl_lines, ".json": _jsonl_lines, ".parquet": _parquet_records}
        reader = readers.get(path.suffix)
        if reader is None:
            raise InputError(
                f"{name}: expected a .jsonl or .parquet file, got {path.suffix or 'no suffix'}"
            )
        for number, record in reader(path):
            source = f"{name}:{number}"
            try:
                rows.append(check_record(record, source))
            except BadRow as problem:
                bad.add(source, problem)
    bad.settle(len(rows))
    return rows


def _jsonl_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, line


def _parquet_records(path: Path) -> Iterator[tuple[int, dict]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {error}") from None
    yield from enumerate(table.to_pylist(), 1)


def check_record(record: bytes | dict, source: str) -> Row:
    """Turn one line of JSON, or one Parquet record, into a `Row`.

    Raises:
        BadRow: not JSON, a field missing or of the wrong form, an empty response, or chosen equal
            to rejected.
    """
    if isinstance(record, bytes):
        try:
            record = json.loads(record)
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            raise BadRow("not valid JSON", str(error)) from None
    if not isinstance(record, dict):
        raise BadRow("not a JSON object", f"got {type(record).__name__}")
    missing = [name for name in FIELDS if record.get(name) is None]
    if missing:
        raise BadRow(
            "missing field",
            f"{', '.join(missing)} (the row has {', '.join(map(str, record)) or 'no field'})",
        )
    texts = {name: _check_text(name, record[name]) for name in FIELDS}
    if len({type(text) for text in texts.values()}) > 1:
        forms = ", ".join(
            f"{name} is a {'string' if isinstance(text, str) else 'list'}"
            for name, text in texts.items()
        )
        raise BadRow("mixed forms", f"expected all strings or all message lists, but {forms}")
    if isinstance(texts["prompt"], list):
        _check_turns(texts)
    for name in ("chosen", "rejected"):
        _check_not_empty(name, texts[name])
    if texts["chosen"] == texts["rejected"]:
        raise BadRow("chosen equals rejected", "")
    return Row(**texts, source=source)


def _check_text(name: str, text: object) -> Text:
    """A string as it is, or a message list reduced to role and content."""
    if isinstance(text, str):
        return text
    if not isinstance(text, list):
        raise BadRow(
            "wrong type",
            f"{name}: expected a string or a list of messages, got {type(text).__name__}",
        )
    messages = []
    for i, message in enumerate(text):
        role, content = (
            (message.get("role"), message.get("content"))
            if isinstance(message, dict)
            else (None, None)
        )
        if role not in ROLES or not isinstance(content, str):
            raise BadRow(
                "bad message",
                f"{name}[{i}]: expected role in {', '.join(ROLES)} and a string content, "
                f"got {message!r:.80}",
            )
        messages.append({"role": role, "content": content})
    return messages


def _check_turns(texts: dict[str, Text]) -> None:
    prompt = texts["prompt"]
    if not prompt or prompt[-1]["role"] == "assistant":
        raise BadRow("bad turns", "prompt must end with a user or system message")
    for name in ("chosen", "rejected"):
        roles = [message["role"] for message in texts[name]]
        if roles and (roles[0] != "assistant" or roles[-1] != "assistant"):
            raise BadRow(
                "bad turns",
                f"{name} must begin and end with an assistant message, got {', '.join(roles)}",
            )


def _check_not_empty(name: str, text: Text) -> None:
    parts = (
        [text]
        if isinstance(text, str)
        else [m["content"] for m in text if m["role"] == "assistant"]
    )
    if not parts or not all(part.strip() for part in parts):
        raise BadRow("empty response", name)
