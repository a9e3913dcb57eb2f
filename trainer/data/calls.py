"""Arguments of tool calls: data have them as objects or as JSON text, and so want templates."""

from __future__ import annotations

import json
from collections.abc import Callable

from trainer.data.rows import Message


def with_arguments(
    messages: list[Message], form: Callable[[object], object]
) -> tuple[list[Message], list[object]]:
    """The messages with the arguments of their calls in another form, and these arguments."""
    changed, arguments = [], []
    for message in messages:
        calls = []
        for call in message.get("tool_calls") or ():
            function = call.get("function", call) if isinstance(call, dict) else None
            if isinstance(function, dict) and "arguments" in function:
                function = function | {"arguments": form(function["arguments"])}
                arguments.append(function["arguments"])
                call = call | {"function": function} if "function" in call else function
            calls.append(call)
        changed.append(message | {"tool_calls": calls} if calls else message)
    return changed, arguments


def as_object(arguments: object) -> object:
    """Arguments as the object that JSON text holds, if it does."""
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments


def as_text(arguments: object) -> object:
    """Arguments as JSON text."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
