"""Preference rows, checked one by one before any model is loaded.

A row holds `prompt`, `chosen` and `rejected`, or columns that stand for them (`Columns`), either
all strings or all lists of chat messages {role, content}:

    {"prompt": [{"role": "user", "content": "2 + 2?"}],
     "chosen": [{"role": "assistant", "content": "4."}],
     "rejected": [{"role": "assistant", "content": "5."}]}

The prompt may also be implicit: the messages that chosen and rejected begin with or, if asked for,
their common words. A message may be written {from, value}, and alone instead of in a list.
Responses may span several turns (assistant, user or tool, assistant, ...). `tools` holds what the
chat template is told of tools. Other fields are ignored. A row that cannot be used is reported with
its place; `on_bad_row` says whether that stops the run.
"""

from __future__ import annotations

import json
import os.path
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from trainer.data.columns import Columns, holds, pick
from trainer.errors import InputError

RESPONSES = ("chosen", "rejected")
ROLES = ("system", "user", "assistant", "tool")
MESSAGE_FIELDS = ("role", "content", "tool_calls", "tool_call_id", "name")
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a message's thought
SPEAKERS = {  # ShareGPT's names of roles
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "model": "assistant", "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip
# How a message list begins that was written as text, as JSON or by Python.
LISTED = re.compile(r"""\s*\[\s*\{\s*["'](?:role|from|content|value)["']\s*:""")
SHOWN = 5  # bad rows spelled out in an error; the rest are counted

Message = dict[str, Any]
"""Role and content, and the others of `MESSAGE_FIELDS` and `REASONING` that it has."""
Text = str | list[Message]


class BadRow(Exception):
    """A row that cannot be used: a `reason` to count by, and the `detail` of this row."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class NoCommonPrompt(Exception):
    """Responses that begin with nothing in common."""


@dataclass(frozen=True, slots=True)
class Row:
    """One preference: prompt, preferred response, other response, and where it comes from."""

    prompt: Text
    chosen: Text
    rejected: Text
    source: str
    """`file:line`, or `dataset[split]:row`."""
    tools: list[dict] | None = None
    """JSON schemas of the tools, for the chat template."""

    @property
    def strings(self) -> tuple[str, str, str] | None:
        """Prompt, chosen and rejected, if they are strings; None if they are messages."""
        prompt, chosen, rejected = self.prompt, self.chosen, self.rejected
        if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
            return prompt, chosen, rejected
        return None

    @property
    def messages(self) -> tuple[list[Message], list[Message], list[Message]]:
        """Prompt, chosen and rejected, which must not be strings."""
        prompt, chosen, rejected = self.prompt, self.chosen, self.rejected
        assert isinstance(prompt, list) and isinstance(chosen, list) and isinstance(rejected, list)
        return prompt, chosen, rejected


@dataclass
class BadRows:
    """What was wrong with the rows `of` a split, the policy (`error` or `skip`), and what to do."""

    policy: str
    remedy: str = "fix them, or leave them out with --on_bad_row skip"
    of: str = "given data"
    problems: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    absent: set[str] | None = None
    """Columns, of several that make up the prompt, that no row read so far has."""

    def add(self, source: str, problem: BadRow) -> None:
        """Note the row at `source`."""
        self.problems.append(f"{source}: {problem}")
        self.reasons[problem.reason] += 1

    def settle(self, kept: int, dropped: Counter[str] | None = None) -> None:
        """Raise `InputError` if a row is bad and the policy is `error`, or if no row is left.

        Args:
            kept: number of rows left.
            dropped: rows left out for other reasons than being bad, by reason.
        """
        if self.problems and self.policy == "error":
            shown = "\n  ".join(self.problems[:SHOWN])
            rest = len(self.problems) - SHOWN
            more = f"\n  ... and {rest} more" if rest > 0 else ""
            raise InputError(
                f"{len(self.problems)} unusable row(s):\n  {shown}{more}\n{self.remedy}"
            )
        if kept and self.absent:
            raise InputError(
                f"prompt_column: no row of the {self.of} has {', '.join(sorted(self.absent))}; "
                "correct the name, or leave it out"
            )
        if kept == 0:
            reasons = self.reasons + (dropped or Counter())
            why = f" ({dict(reasons)})" if reasons else ""
            first = f"; the first: {self.problems[0]}" if self.problems else ""
            raise InputError(f"no usable preference pair in the {self.of}{why}{first}")


def parse_json(text: bytes | str) -> Any:
    """JSON of whole characters, which a tokenizer takes.

    Raises:
        ValueError: not JSON, not UTF-8, or a string with half of a surrogate pair, which JSON's
            escapes can write.
    """
    value = json.loads(text)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"{half!r} is half of a surrogate pair, no character") from None
    return value


def parse_record(record: bytes | dict) -> dict:
    """The fields of one line of JSON, or of one record.

    Raises:
        BadRow: not JSON, not an object, or cells that belong to no column.
    """
    if isinstance(record, bytes):
        try:
            record = parse_json(record)
        except ValueError as error:
            raise BadRow("not valid JSON", str(error)) from None
    if not isinstance(record, dict):
        raise BadRow("not a JSON object", f"got {type(record).__name__}")
    if None in record:
        raise BadRow(
            "more cells than columns",
            f"the first without one is {record[None][0]!r:.80}; quote cells that hold commas",
        )
    return record


def check_record(record: bytes | dict, source: str, columns: Columns | None = None) -> Row:
    """Turn one line of JSON, or one record, into a `Row`.

    Raises:
        BadRow: not JSON, a field missing or of the wrong form, no common prompt, turns out of
            order, an empty response, or chosen equal to rejected.
    """
    columns, record = columns or Columns(), parse_record(record)
    given = {name: pick(record, getattr(columns, name)) for name in RESPONSES}
    missing = [name for name in RESPONSES if given[name] is None]
    if missing:
        names = ", ".join(getattr(columns, name) for name in missing)
        other = " and ".join(f"--{name}_column" for name in missing)
        raise BadRow("missing field", f"{names} ({_has(record)}); name another column by {other}")
    chosen, rejected = (_check_text(name, given[name]) for name in RESPONSES)
    if chosen == rejected:
        raise BadRow("chosen equals rejected", "")
    prompt = _read_prompt(record, columns)
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        if "prompt" in record and columns.prompt == Columns.prompt and not columns.implicit:
            raise BadRow("no prompt", f"prompt is null; {_has(record)}")
        if not columns.implicit:
            raise BadRow(
                "no prompt",
                f"{_has(record)}; name the column that holds it, as {columns.remedy(record)}, or "
                "give --implicit_prompt true where both responses begin with it",
            )
    _check_no_list(prompt, chosen, rejected)
    implicit = prompt is None
    try:
        prompt, chosen, rejected = _split_prompt(prompt, chosen, rejected)
    except NoCommonPrompt as problem:
        detail = f"{problem} ({_has(record)}; or name its column, as {columns.remedy(record)})"
        raise BadRow("no common prompt", detail) from None
    if isinstance(prompt, list):
        assert isinstance(chosen, list) and isinstance(rejected, list)  # by _split_prompt
        if implicit and "NAME" not in columns.remedy(record) and not _asks(prompt):
            detail = f"nobody asks in the messages, and {_has(record)}"
            raise BadRow("no prompt", f"{detail}; name its column, as {columns.remedy(record)}")
        _check_turns(prompt, chosen, rejected)
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        _check_not_empty(name, text)
    return Row(prompt, chosen, rejected, source, _check_tools(record.get("tools"), prompt))


def _asks(prompt: list[Message]) -> bool:
    return any(message["role"] in ("user", "tool") for message in prompt)


def _has(record: dict) -> str:
    return f"the row has {', '.join(map(str, record)) or 'no field'}"


def _read_prompt(record: dict, columns: Columns) -> Text | None:
    """The prompt of one column or of several; None where the default one is missing."""
    given = {name: pick(record, name) for name in columns.prompt}
    texts = [_check_text(name, value) for name, value in given.items() if value is not None]
    if len(columns.prompt) > 1:
        texts = [text for text in texts if text]
    if not texts:
        if columns.prompt == Columns.prompt or columns.implicit:
            return None
        absent = [name for name in columns.prompt if not holds(record, name)]
        if not absent:
            raise BadRow("no prompt", f"{', '.join(columns.prompt)}: null or empty")
        names = ", ".join(absent)
        raise BadRow("missing field", f"{names} ({_has(record)}); correct --prompt_column")
    *first, last = texts
    begin = [text for text in first if isinstance(text, str)]
    if len(begin) < len(first):
        raise BadRow("mixed forms", f"expected strings before the last of {', '.join(given)}")
    if isinstance(last, str):
        return "\n".join([*begin, last])
    return [{"role": "system", "content": "\n".join(begin)}, *last] if begin else last


def _check_text(name: str, text: object) -> Text:
    """A string as it is, or a message list reduced to the fields that templates know."""
    if isinstance(text, str):
        return text
    if isinstance(text, dict):
        text = [text]
    if not isinstance(text, list):
        raise BadRow(
            "wrong type",
            f"{name}: expected a string or a list of messages, got {type(text).__name__}",
        )
    return [_check_message(f"{name}[{i}]", message) for i, message in enumerate(text)]


def _check_message(place: str, message: object) -> Message:
    known = message if isinstance(message, dict) else {}
    if "from" in known and known.get("role") is None:
        speaker = str(known["from"])
        known = known | {"role": SPEAKERS.get(speaker, speaker), "content": known.get("value")}
    calls = known.get("tool_calls")
    content = known.get("content")
    speaks = isinstance(content, str) or (content is None and calls)
    if known.get("role") not in ROLES or not speaks or not isinstance(calls, list | None):
        raise BadRow(
            "bad message",
            f"{place}: expected role in {', '.join(ROLES)} and a string content "
            f"(or a list of tool_calls; or from and value), got {message!r:.80}",
        )
    kept = {k: known[k] for k in MESSAGE_FIELDS if known.get(k)} | {"content": content or ""}
    kept |= _check_thought(place, known)
    return kept if not calls else kept | {"tool_calls": _without_nulls(calls)}


def _check_thought(place: str, message: Message) -> Message:
    """A message's thought under every name by which a template may read it."""
    given = {name: message[name] for name in REASONING if message.get(name)}
    if not given:
        return {}
    if len({*map(str, given.values())}) > 1 or not all(isinstance(t, str) for t in given.values()):
        raise BadRow("bad message", f"{place}: expected one string as {' or '.join(given)}")
    return dict.fromkeys(REASONING, next(iter(given.values())))


def _without_nulls(value: Any) -> Any:
    """Nested JSON without the nulls by which tables fill fields that other rows have."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _check_tools(tools: object, prompt: Text) -> list[dict] | None:
    """The `tools` column: a list of JSON objects, or the same as JSON text."""
    if isinstance(tools, str):
        try:
            tools = parse_json(tools) if tools.strip() else None
        except ValueError as error:
            raise BadRow("bad tools", f"not valid JSON: {error}") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("bad tools", f"expected a list of JSON objects, got {tools!r:.80}")
    if isinstance(prompt, str):
        raise BadRow("bad tools", "strings have no chat template to show tools; use messages")
    return _without_nulls(tools)


def _split_prompt(prompt: Text | None, chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Prompt and responses in one form; an implicit prompt is taken off what both begin with.

    Message lists that begin with the prompt's own messages hold an implicit prompt, whether or
    not a `prompt` beside them says it again as a string.
    """
    forms = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    repeated = isinstance(prompt, str) and isinstance(chosen, list) and isinstance(rejected, list)
    if prompt is not None and not repeated:
        if len({type(text) for text in forms.values()}) > 1:
            raise _mixed_forms(forms)
        return prompt, chosen, rejected
    if isinstance(chosen, str) and isinstance(rejected, str):
        size = len(os.path.commonprefix([chosen, rejected]))
        while size and not (
            chosen[size : size + 1].isspace() and rejected[size : size + 1].isspace()
        ):
            size -= 1
        size = len(chosen[:size].rstrip())  # white space belongs to the response
        if not size:
            raise NoCommonPrompt("without prompt, both must begin with the same words")
        return chosen[:size], chosen[size:], rejected[size:]
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise _mixed_forms(forms)
    size = 0
    while size < min(len(chosen), len(rejected)) and chosen[size] == rejected[size]:
        size += 1
    while size and chosen[size - 1]["role"] == "assistant":
        size -= 1
    shared = chosen[:size]
    if repeated and not any(message["content"] == prompt for message in shared):
        raise _mixed_forms(forms)
    if not size:
        raise NoCommonPrompt("without prompt, both must begin with the same messages")
    return shared, chosen[size:], rejected[size:]


def _mixed_forms(texts: dict[str, Text | None]) -> BadRow:
    forms = ", ".join(
        f"{name} is a {'string' if isinstance(text, str) else 'list'}"
        for name, text in texts.items()
        if text is not None
    )
    return BadRow("mixed forms", f"expected all strings or all message lists, but {forms}")


def _check_no_list(prompt: Text | None, *responses: Text) -> None:
    """Strings are trained on as they are, so message lists must be lists."""
    listed = [isinstance(t, str) and bool(LISTED.match(t)) for t in (prompt, *responses)]
    if listed[0] or all(listed[1:]):
        raise BadRow(
            "messages as text",
            "expected a list of messages, got a string that writes one; store it as a list, in "
            "JSONL or Parquet (as by json.loads)",
        )


def _check_turns(prompt: list[Message], *responses: list[Message]) -> None:
    if not prompt or prompt[-1]["role"] == "assistant":
        raise BadRow("bad turns", "prompt must end with a user, system or tool message")
    for name, messages in zip(RESPONSES, responses, strict=True):
        roles = [message["role"] for message in messages]
        if roles and (roles[0] != "assistant" or roles[-1] != "assistant"):
            raise BadRow(
                "bad turns",
                f"{name} must begin and end with an assistant message, got {', '.join(roles)}",
            )


def _check_not_empty(name: str, text: Text) -> None:
    if isinstance(text, str):
        said: list[object] = [text.strip()]
    else:
        own = [message for message in text if message["role"] == "assistant"]
        said = [message["content"].strip() or message.get("tool_calls") for message in own]
    if not said or not all(said):
        raise BadRow("empty response", name)
