"""Prompts to answer: one line each, in the trainer's format or in FastChat's.

    {"question_id": 1, "prompt": [{"role": "user", "content": "2 + 2?"}]}     or a plain string
    {"question_id": 81, "turns": ["First user message.", "Second one."]}      MT-Bench's questions

Other fields are ignored, so a file of preference pairs is a prompt file as well; a prompt that
it repeats is taken once. Without `question_id` a line's number is its id.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from trainer.data.rows import REASONING, Message
from trainer.errors import InputError
from trainer.evaluation.records import read_jsonl

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Prompt:
    """What a model answers: a plain string or chat messages, then further turns of the user."""

    question: Hashable
    start: str | tuple[dict[str, str], ...]
    follow_ups: tuple[str, ...] = ()

    def text(self) -> str:
        """The start as a judge reads it."""
        if isinstance(self.start, str):
            return self.start
        if len(self.start) == 1:
            return self.start[0]["content"]
        return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in self.start)

    def messages(self, answers: list[str]) -> list[Message]:
        """The chat up to the user's message that follows `answers`."""
        assert not isinstance(self.start, str)
        messages: list[Message] = list(self.start)
        for answer, follow_up in zip(answers, self.follow_ups, strict=False):
            messages += [{"role": "assistant", "content": answer},
                         {"role": "user", "content": follow_up}]  # fmt: skip
        return messages


def read_prompts(name: str) -> list[Prompt]:
    """Read a prompt file.

    Raises:
        InputError: an unreadable line, neither `prompt` nor `turns`, or two different prompts of
            one `question_id`.
    """
    prompts: dict[Hashable, Prompt] = {}
    seen = set()
    for number, (place, row) in enumerate(read_jsonl(name), 1):
        question = row.get("question_id", number)
        prompt = _parse(place, question, row)
        content = (repr(prompt.start), prompt.follow_ups)
        if content in seen:
            continue
        seen.add(content)
        if question in prompts:
            raise InputError(f"{place}: another prompt has the question_id {question!r}, too")
        prompts[question] = prompt
    return list(prompts.values())


def _parse(place: str, question: Hashable, row: dict) -> Prompt:
    turns = row.get("turns")
    if isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns):
        return Prompt(question, ({"role": "user", "content": turns[0]},), tuple(turns[1:]))
    prompt = row.get("prompt")
    if isinstance(prompt, str) and prompt:
        return Prompt(question, prompt)
    if not isinstance(prompt, list) or not prompt:
        raise InputError(f"{place}: expected 'prompt' (text or messages) or 'turns' (texts)")
    messages = []
    for message in prompt:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES or not isinstance(message.get("content"), str):
            raise InputError(f"{place}: expected messages of role and content, got {message!r:.80}")
        said = {"role": role, "content": message["content"]}
        if thought := next((message[name] for name in REASONING if message.get(name)), None):
            said |= dict.fromkeys(REASONING, thought)  # as in training, whichever is read
        messages.append(said)
    if messages[-1]["role"] == "assistant":
        raise InputError(f"{place}: the prompt must end with a user or system message")
    return Prompt(question, tuple(messages))
