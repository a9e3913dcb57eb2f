"""Chat messages as text: what a model reads before it answers, and what it says then.

    inference   prompt(messages)   and tokens that the model draws, up to its end of turn
    training    prompt(messages)   and said(...), the same for an answer that is given

A chat template writes a conversation. What an assistant's message becomes is read off where that
message is the last one: the text after the prompt, up to and including the end of turn, without the
line breaks, footers or openings of another turn that may follow. Where a template writes a finished
turn otherwise than it asks for one, because its prompt opens a thought or its conversations leave
thoughts out, the thought is put where the prompt has the model say it; nothing is left out unsaid.

Templates may ask for the time. They are told the start of one day, the run's (`clock`).
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from trainer.data.calls import as_object, as_text, with_arguments
from trainer.data.clock import Clock, today
from trainer.data.rows import REASONING, BadRow, Message
from trainer.errors import InputError

REMEDY = "chat_template_path can name a template that does not"
# A tag of a thought, as <think>, [THINK] or <seed:think>, and how it is closed.
TAG = r"(?P<a>[<\[◁])(?P<name>[\w:]*(?:think|thought|reason)[\w:]*)(?P<b>[>\]▷])"
CLOSING = re.compile(TAG.replace(r"[<\[◁])", r"[<\[◁])/"), re.IGNORECASE)
BEGUN = re.compile(r"\s*" + TAG, re.IGNORECASE)
OPEN_END = re.compile(TAG + r"(?P<space>\s*)$", re.IGNORECASE)
CLOSED_END = re.compile(CLOSING.pattern + r"\s*$", re.IGNORECASE)
# Empty thoughts at the end of a prompt that are written otherwise: Cohere's, Gemma 4's.
EMPTY_END = re.compile(
    r"(<\|START_THINKING\|>\s*<\|END_THINKING\|>|<\|channel>thought\s*<channel\|>)\s*$"
)


@dataclass(frozen=True)
class ChatOptions:
    """What a chat template is told beside the messages."""

    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further variables, such as `enable_thinking`."""
    date: str | None = None
    """The day that its clock shows, as YYYY-MM-DD; None is today."""


class Chat:
    """A tokenizer's chat template, with the options of a run."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: ChatOptions) -> None:
        """Check the options against the template.

        Raises:
            InputError: a variable that the template does not read.
        """
        self.tokenizer, self.options = tokenizer, options
        self.clock = Clock(options.date or today())
        specials = special_tokens(tokenizer)
        self.special_ids, self.specials = set(specials), _pattern(specials.values())
        self.added = _pattern(str(t) for t in tokenizer.added_tokens_decoder.values())
        self._ending: tuple[str, str, str] | None = None
        template = tokenizer.chat_template or ""
        texts = template.values() if isinstance(template, dict) else [template]
        for name in options.kwargs:
            if template and not any(re.search(rf"\b{re.escape(name)}\b", text) for text in texts):
                raise InputError(
                    f"chat_template_kwargs: the chat template reads no variable {name!r}; "
                    "correct the name, or leave it out"
                )

    def prompt(self, messages: list[Message], tools: list[dict] | None = None) -> str:
        """What the model reads before it answers: the messages, and what opens its turn.

        Raises:
            BadRow: there is no template, or it refuses the messages.
        """
        return self._render(messages, tools, opened=True)

    def ids(self, text: str) -> list[int]:
        """Token ids of a rendered text, which brings its own BOS, if any."""
        return without_second_bos(
            self.tokenizer, self.tokenizer(text, add_special_tokens=False)["input_ids"]
        )

    def both(self, messages: list[Message]) -> tuple[str, str]:
        """The messages alone, and the prompt for an answer to them."""
        return self._render(messages, None, opened=False), self.prompt(messages)

    def said(
        self,
        prompt: str,
        before: list[Message],
        message: Message,
        tools: list[dict] | None = None,
    ) -> str:
        """What the model says after `prompt`, that of `before`, where `message` is its answer.

        Raises:
            BadRow: the template shows the message otherwise than the model could say it.
        """
        lead, thought, answer = _thought(message["content"])
        opened = OPEN_END.search(prompt)
        closed = CLOSED_END.search(prompt) or EMPTY_END.search(prompt)
        reasoning = str(message.get(REASONING[0], "")).strip()
        unclosed = not lead and BEGUN.match(answer)  # as of an answer that was cut off
        if thought and reasoning:
            if thought != reasoning:
                raise BadRow(
                    "two thoughts", f"one in {REASONING[0]} and another in content; leave one out"
                )
            message = {k: v for k, v in message.items() if k not in REASONING}
        if closed and (thought or reasoning or unclosed):
            raise BadRow(
                "the prompt closes the thought",
                "the message has one, but the chat template's prompt for an answer ends with an "
                "empty one; leave the thought out, or change chat_template_kwargs or the template "
                "(chat_template_path)",
            )
        if closed and lead:  # an empty one, which the prompt has already
            lead, message = "", message | {"content": answer}
        text = self._after(prompt, before, message, tools)
        if lead and (text is None or thought not in text or not CLOSING.search(text)):
            text = self._after(prompt, before, message | {"content": answer}, tools)
            text = None if text is None else lead + self._without_empty_thought(text)
        if text is not None and (closed or thought or unclosed):  # it is given, and not empty
            text = self._without_empty_thought(text)
        if text is None:
            raise BadRow(
                "prompt is no prefix",
                "the chat template rewrites what stands before the answer once it is given; "
                f"{REMEDY}",
            )
        for name, kept in ((REASONING[0], reasoning), ("its content", thought)):
            if kept not in text:
                raise BadRow(
                    "thought is not shown",
                    f"the chat template leaves the thought in {name} out; write it into content "
                    "as <think>...</think>, leave it out, or give a chat_template_path that shows "
                    "it",
                )
        body = answer[unclosed.end() :] if unclosed else answer
        if body.strip() not in text:
            raise BadRow(
                "content is not shown",
                "the chat template leaves a part of the content out, or rewrites it, as it may "
                "beside tool_calls or in a thought's tags of its own; leave that part out, write "
                "a thought as reasoning_content, or give another chat_template_path",
            )
        text = text if opened is None else _continued(text, opened, bool(unclosed))
        return self._ended(text, answered=not message.get("tool_calls"))

    def shows(self, text: str) -> bool:
        """Whether a text says anything beside special tokens, tags of thoughts and white space."""
        bare = re.sub(TAG, "", CLOSING.sub("", self.specials.sub("", text)), flags=re.IGNORECASE)
        return bool(bare.strip())

    def _render(self, messages: list[Message], tools: list[dict] | None, opened: bool) -> str:
        """The template's text; arguments of calls as objects or, if it wants that, as JSON text."""
        if not any(message.get("tool_calls") for message in messages):
            return self._apply(messages, tools, opened)
        objects, given = with_arguments(messages, as_object)
        try:
            text = self._apply(objects, tools, opened)
        except BadRow:  # a template that parses or joins them wants text, tried below
            pass
        else:
            if not any(repr(value) in text for value in given if value):
                return text  # JSON, and not how Python writes an object
        return self._apply(with_arguments(messages, as_text)[0], tools, opened)

    def _apply(self, messages: list[Message], tools: list[dict] | None, opened: bool) -> str:
        if self.tokenizer.chat_template is None:
            raise BadRow(
                "no chat template",
                "the tokenizer has none; use string rows, a chat model's tokenizer, or "
                "chat_template_path",
            )
        try:
            with self.clock.ticking():
                text = self.tokenizer.apply_chat_template(
                    messages, tools=None if tools is None else [*tools], tokenize=False,
                    add_generation_prompt=opened, **self.options.kwargs,
                )  # fmt: skip
        except Exception as error:  # templates raise errors of their own for roles they refuse
            raise BadRow("chat template refuses the messages", f"{error}; {REMEDY}") from None
        assert isinstance(text, str)  # no ids, as tokenize is False
        return text

    def _after(
        self, prompt: str, before: list[Message], message: Message, tools: list[dict] | None
    ) -> str | None:
        """What the template writes after the prompt when the answer is given; None: nothing can be.

        A finished turn may lack the thought with which the prompt ends, and the template may move
        what stood before the last question (a system message, tools) once it is answered.
        """
        whole = self._render([*before, message], tools, opened=False)
        if whole.startswith(prompt):
            return whole[len(prompt) :]
        bare = _without_thought(prompt)
        if whole.startswith(bare):
            return whole[len(bare) :]
        head = self._head(before, tools)
        question = str(before[-1]["content"]).strip()
        asked = bare[bare.rfind(question) :] if question in bare else bare
        end = head.rfind(asked) + len(asked)
        if question and asked in head and whole.startswith(head[:end]):
            return whole[end:]
        return None

    def _without_empty_thought(self, text: str) -> str:
        """A text without the empty thought that the template may begin an answer with."""
        closing = CLOSING.search(text)
        if closing is None or self.shows(text[: closing.start()]):
            return text
        return text[closing.end() :].lstrip()

    def _head(
        self, before: list[Message], tools: list[dict] | None, role: str = "assistant"
    ) -> str:
        """What the template writes before the content of a message that follows `before`."""
        probes = ([*before, {"role": role, "content": text}] for text in ("A", "B"))
        return os.path.commonprefix([self._render(p, tools, opened=False) for p in probes])

    def _ended(self, text: str, answered: bool) -> str:
        """A text up to the end of turn: the first special token after what is said, or all.

        EOS belongs to it where it stands right behind, and other turns follow it. Where only the
        turn that follows is preceded by EOS, an answer, but no call of tools, ends with that.
        """
        tail, opening, between = self._tail()
        eos = self.tokenizer.eos_token
        if tail and text.endswith(tail):
            end = self.specials.search(tail) or self.added.search(tail)
            if end is None:
                return text
            kept = end.start() if end.group() == opening else end.end()
            after = self.specials.match(tail, kept)
            if after and after.group() == eos and between.startswith(tail[: after.end()]):
                kept = after.end()
            return text[: len(text) - len(tail) + kept]
        end = self.specials.search(between) if answered and not tail else None
        if end and end.group() == eos and not between[: end.start()].strip():
            return text + between[: end.end()]  # it ends a turn when another follows
        ends = [m.end() for m in self.specials.finditer(text) if not text[m.end() :].strip()]
        return text[: ends[0]] if ends else text

    def _tail(self) -> tuple[str, str, str]:
        """What follows the content of a last answer, the token that opens a user's turn, and what
        follows an answer's content where the user speaks next.

        A token that opens turns and closes none is no end of one.
        """
        if self._ending is None:
            question = {"role": "user", "content": "a"}
            try:
                head = self._head([question], None)
                answer = self._render(
                    [question, {"role": "assistant", "content": "A"}], None, opened=False
                )
                asked = self._head([], None, "user")
                closed = self.prompt([question | {"content": "A"}])[len(asked) :]
            except BadRow:  # it wants other messages
                self._ending = "", "", ""
            else:
                opens = [m.group() for m in self.specials.finditer(asked)][-1:]
                opening = opens[0] if opens and opens[0] not in closed else ""
                if opening == self.tokenizer.eos_token:
                    opening = ""
                self._ending = answer[len(head) + 1 :], opening, self._between(question, head)
        return self._ending

    def _between(self, question: Message, head: str) -> str:
        """What follows an answer's content where the user speaks next; nothing if unknown."""
        answer = {"role": "assistant", "content": "A"}
        try:
            text = self._render([question, answer, question], None, opened=False)
        except BadRow:  # it wants other messages
            return ""
        return text[len(head) + 1 :] if text.startswith(head + "A") else ""


def text_of(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int] | np.ndarray,
    skip_special_tokens: bool = False,
) -> str:
    """The text of one sequence of token ids."""
    text = tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
    assert isinstance(text, str)  # a batch would make a list
    return text


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The special tokens by id, named ones and added ones."""
    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def without_second_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Token ids with BOS once, where both the text and the tokenizer begin with it."""
    bos = tokenizer.bos_token_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def _pattern(words: Iterable[str]) -> re.Pattern[str]:
    """Any of the words, longer ones first; without words, nothing."""
    longest = sorted(map(re.escape, filter(None, words)), key=len, reverse=True)
    return re.compile("|".join(longest) or r"(?!)")


def _thought(content: str) -> tuple[str, str, str]:
    """A content's beginning up to where its thought is closed, the thought alone, the answer."""
    *_, closing = CLOSING.finditer(content) if CLOSING.search(content) else (None,)
    if closing is None:
        return "", "", content
    answer = content[closing.end() :].lstrip()
    tag = closing["a"] + closing["name"] + closing["b"]
    thought = content[: closing.start()].split(tag, 1)[-1].strip()
    return content[: len(content) - len(answer)], thought, answer


def _without_thought(prompt: str) -> str:
    """A prompt without the thought, open or closed, with which it ends."""
    if empty := EMPTY_END.search(prompt):
        return prompt[: empty.start()]
    closed = CLOSED_END.search(prompt)
    if closed is None:
        opened = OPEN_END.search(prompt)
        return prompt if opened is None else prompt[: opened.start()]
    start = prompt.rfind(closed["a"] + closed["name"] + closed["b"], 0, closed.start())
    alone = start < 0 or CLOSING.search(prompt[start : closed.start()])
    return prompt[: closed.start() if alone else start]


def _continued(text: str, opened: re.Match[str], unclosed: bool) -> str:
    """A text after a prompt that has opened its thought: it is not opened again, but closed,
    unless the message, too, leaves it `unclosed`.
    """
    tag, space = opened["a"] + opened["name"] + opened["b"], opened["space"]
    closing = opened["a"] + "/" + opened["name"] + opened["b"]
    begun = text.lstrip()
    if begun.startswith(tag):
        text = begun.removeprefix(tag)
        text = text.removeprefix(space) if text.startswith(space) else text.lstrip()
    elif closing not in text and not unclosed:
        text = (f"\n{closing}\n\n" if space else closing) + text
    return text
