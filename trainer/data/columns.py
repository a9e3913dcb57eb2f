"""Where a row's prompt, chosen and rejected are, in files that call them otherwise."""

from __future__ import annotations

from dataclasses import dataclass

# Columns that hold a prompt in other people's files, for the remedy of an error.
PROMPTS = ("instruction", "question", "query", "input", "conversations", "messages", "prompts",
           "user", "context", "problem", "text")  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """Which columns stand for prompt, chosen and rejected; `a.b` and `a.0` reach into column a."""

    prompt: tuple[str, ...] = ("prompt",)
    """Joined line by line, empty ones left out; strings before a message list are its system
    message."""
    chosen: str = "chosen"
    rejected: str = "rejected"
    implicit: bool = False
    """Whether two strings without a prompt are cut after the words that both begin with."""

    def read(self, name: str) -> bool:
        """Whether anything in the column `name` is used."""
        used = (*self.prompt, self.chosen, self.rejected, "tools")
        return any(name in (path, path.split(".")[0]) for path in used)

    def remedy(self, record: dict) -> str:
        """The mapping that a record without a prompt may need."""
        names = [str(name) for name in record]
        lower = {name.lower(): name for name in names}
        used = {path.split(".")[0] for path in (self.chosen, self.rejected)}
        free = [name for name in names if name not in used and name != "tools"]
        known = [lower[name] for name in ("prompt", *PROMPTS) if name in lower]
        guess = [name for name in known if name in free][:1] or ["NAME"]
        if guess[0].lower() == "instruction" and "input" in lower:
            guess.append(lower["input"])
        return f"--prompt_column {' '.join(guess)}"


def pick(record: dict, path: str) -> object:
    """The value of a column, or in it; None where there is none."""
    if path in record:
        return record[path]
    value: object = record
    for key in path.split("."):
        if isinstance(value, dict):
            value = value.get(key)
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            return None
    return value


def holds(record: dict, path: str) -> bool:
    """Whether a record has a column, be it null; of one that it reaches into, the first part."""
    return path in record or path.split(".")[0] in record
