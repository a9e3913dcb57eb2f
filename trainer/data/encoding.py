"""From text to token ids and labels: which tokens a model reads, and which it is trained on.

A response is a list of turns: a prompt, and what the model says after it (`chat`). A sequence is
the last turn's prompt and what is said, so the model is trained on exactly the tokens that it will
see at inference. Earlier turns of the response stand in that prompt. One is trained on where it
stands there as it was said; where the template rewrites it, without its thought, say, the model
reads it and never says it. All texts of many rows are tokenized in one call, which uses every core.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from trainer.console import progress, say
from trainer.data.batches import Split
from trainer.data.chat import REMEDY, Chat, ChatOptions, without_second_bos
from trainer.data.pairs import IGNORE, Pair, Sequence
from trainer.data.rows import BadRow, BadRows, Message, Row
from trainer.data.truncation import Limits
from trainer.errors import InputError
from trainer.paths import find_file

CHUNK = 256  # rows that are tokenized in one call
JOINED = re.compile(
    r"[A-Za-z0-9.,:;?!)\]\"'][A-Za-z0-9(\[\"']"
)  # words without white space between

Turn = tuple[str, str]  # a prompt, and what the model says after it


def use_chat_template(tokenizer: PreTrainedTokenizerBase, path: str | None) -> None:
    """Let a Jinja file stand in for the tokenizer's own chat template, if there is one."""
    if path is not None:
        template = Path(find_file(path)).read_text(encoding="utf-8")
        if not template.strip():
            raise InputError(f"chat_template_path: {path} is empty")
        tokenizer.chat_template = template


def encode_rows(
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    bad: BadRows,
    options: ChatOptions | None = None,
) -> Split:
    """Encode every row.

    Args:
        rows: checked rows.
        tokenizer: renders chat messages by its chat template; strings are concatenated.
        limits: most tokens of a sequence, and what becomes of a longer pair.
        bad: receives the rows that cannot be used once they are rendered.
        options: what the chat template is told beside the messages.

    Returns:
        The pairs, with counts of pairs, tokens, trained tokens, truncated and dropped pairs, bad
        rows, and assistant turns that are read and not trained on.

    Raises:
        InputError: bad rows under the policy `error`, or no row left.
    """
    encoder, pairs = Encoder(tokenizer, limits, options), []
    for start in progress(range(0, len(rows), CHUNK), "encoding"):
        for row, result in encoder.encode(rows[start : start + CHUNK]):
            if isinstance(result, BadRow):
                bad.add(row.source, result)
            else:
                pairs.append(result)
    bad.settle(len(pairs), encoder.dropped)
    for warning in (*string_warnings(rows, tokenizer, bad.of), *encoder.notes()):
        say(warning)
    sources = Counter(row.source.rpartition(":")[0] for row in rows)
    report = {
        "pairs": len(pairs),
        "tokens": sum(pair.tokens for pair in pairs),
        "trained_tokens": sum(s.trained_tokens for p in pairs for s in (p.chosen, p.rejected)),
        "longest": max(len(s.ids) for p in pairs for s in (p.chosen, p.rejected)),
        "truncated_pairs": encoder.truncated["pairs"],
        "truncated_prompts": encoder.truncated["prompts"],
        "truncated_responses": encoder.truncated["responses"],
        "untrained_turns": encoder.untrained,
        "dropped": dict(encoder.dropped),
        "bad_rows": dict(bad.reasons),
        "sources": dict(sources),
    }
    return Split(pairs, report)


class Encoder:
    """A tokenizer, its chat template, and the limits; counts what it cuts, drops, leaves out."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, limits: Limits, options: ChatOptions | None = None
    ) -> None:
        """Look the special tokens up once."""
        self.tokenizer, self.limits = tokenizer, limits
        self.chat = Chat(tokenizer, options or ChatOptions())
        self.added_end = added_end(tokenizer)
        self.opening: list[int] | None = None
        self.untrained = 0
        """Assistant turns of responses that the template rewrites once others follow."""
        self.dropped: Counter[str] = Counter()
        self.truncated: Counter[str] = Counter()

    def encode(self, rows: list[Row]) -> list[tuple[Row, Pair | BadRow]]:
        """The pairs of a few rows, or what is wrong with them; dropped rows are missing."""
        rendered: list[tuple[Row, list[list[Turn]]]] = []
        results: list[tuple[Row, Pair | BadRow]] = []
        for row in rows:
            try:
                rendered.append((row, self._render(row)))
            except BadRow as problem:
                results.append((row, problem))
        plain: set[str] = set()
        chat: set[str] = set()
        for row, responses in rendered:
            texts = plain if isinstance(row.prompt, str) else chat
            for turns in responses:
                texts.update(text for prompt, said in turns for text in (prompt, prompt + said))
        ids = {False: self._tokenize(plain, chat=False), True: self._tokenize(chat, chat=True)}
        for row, responses in rendered:
            is_chat = not isinstance(row.prompt, str)
            try:
                parts = [self._assemble(turns, ids[is_chat], is_chat) for turns in responses]
                pair = self._pair(parts, is_chat, row.source)
            except BadRow as problem:
                results.append((row, problem))
            else:
                results += [(row, pair)] if pair else []
        return results

    def notes(self) -> list[str]:
        """What a user should know of how the chat template was used."""
        notes = []
        if self.chat.clock.asked:
            date = self.chat.clock.date
            notes.append(
                f"the chat template writes the date: {date}; another day has other tokens and "
                f"another reference table, --date {date} this one"
            )
        if self.untrained:
            notes.append(
                f"{self.untrained} earlier turns of responses are read and not trained on, as the "
                "chat template rewrites them (without their thoughts, say) once others follow"
            )
        return notes

    def _render(self, row: Row) -> list[list[Turn]]:
        """The turns of chosen and rejected."""
        if row.strings is not None:
            prompt, chosen, rejected = row.strings
            return [[(prompt, text)] for text in (chosen, rejected)]
        question, *responses = row.messages
        first, rendered = self.chat.prompt(question, row.tools), []
        for response in responses:
            turns = []
            for i, message in enumerate(response):
                if message["role"] == "assistant":
                    before = question + response[:i]
                    prompt = self.chat.prompt(before, row.tools) if i else first
                    said = self.chat.said(prompt, before, message, row.tools)
                    if not self.chat.shows(said):
                        raise BadRow(
                            "nothing to train on",
                            "the chat template makes special tokens and white space only of an "
                            "assistant's message; give it content, or a chat_template_path that "
                            "shows its tool_calls",
                        )
                    turns.append((prompt, said))
            rendered.append(turns)
        return rendered

    def _tokenize(self, texts: set[str], chat: bool) -> dict[str, list[int]]:
        """Token ids of texts; strings get the tokenizer's BOS, if they bring none, and no EOS."""
        if not texts:
            return {}
        listed = list(texts)
        rows = self.tokenizer(
            listed, add_special_tokens=not chat, return_attention_mask=False, verbose=False
        )["input_ids"]
        if not chat:
            rows = [ids[: len(ids) - self.added_end] for ids in rows]
        rows = [without_second_bos(self.tokenizer, ids) for ids in rows]
        return dict(zip(listed, rows, strict=True))

    def _assemble(
        self, turns: list[Turn], ids: dict[str, list[int]], chat: bool
    ) -> tuple[int, list[int], list[bool]]:
        """How many tokens the first prompt has, all tokens, and which of them are trained on."""
        first, last = ids[turns[0][0]], ids[turns[-1][0]]
        if not first:
            raise BadRow("empty prompt", "nothing predicts the first token (there is no BOS)")
        replies = [self._reply(prompt, said, ids, chat) for prompt, said in turns]
        eos = self.tokenizer.eos_token_id
        ends = self.chat.special_ids if chat else {eos}
        if eos is not None and replies[-1][-1] not in ends:  # a template may never end a turn
            replies[-1] = [*replies[-1], eos]
        tokens = last + replies[-1]
        trained = [False] * len(tokens)
        for (prompt, _), reply in zip(turns, replies, strict=True):
            start, end = len(ids[prompt]), len(ids[prompt]) + len(reply)
            if tokens[:end] == ids[prompt] + reply:
                trained[start:end] = [True] * len(reply)
            else:
                self.untrained += 1
        return _common(first, tokens), tokens, trained

    def _reply(self, prompt: str, said: str, ids: dict[str, list[int]], chat: bool) -> list[int]:
        """Tokens of what is said after a prompt, whose own tokens stay as they are.

        Where the two would share a token (line breaks, say), a chat's are tokenized apart: at
        inference the prompt is complete, too.
        """
        before, whole = ids[prompt], ids[prompt + said]
        reply = whole[len(before) :]
        if whole[: len(before)] != before:
            if not chat:
                raise BadRow(
                    "prompt is no prefix",
                    "its tokens change when the response follows; begin the response with the "
                    "space or line break between the two",
                )
            reply = self.tokenizer(said, add_special_tokens=False)["input_ids"]
            if self.tokenizer.decode(before + reply) != self.tokenizer.decode(whole):
                raise BadRow(
                    "prompt is no prefix",
                    "its tokens change when the response follows, as that begins with white space "
                    "or the chat template's prompt ends with it; remove it, or give another "
                    "chat_template_path",
                )
        if not reply:
            raise BadRow("nothing to train on", "the response renders to no token")
        return reply

    def _pair(
        self, parts: list[tuple[int, list[int], list[bool]]], chat: bool, source: str
    ) -> Pair | None:
        """Cut to the limits; None if the pair is dropped.

        Raises:
            BadRow: the template, or the tokenizer, removes what the responses differ in.
        """
        if parts[0][1:] == parts[1][1:]:
            raise BadRow("chosen equals rejected", "once rendered and tokenized")
        size = min(count for count, _, _ in parts)  # less than the prompt, if that is rewritten
        if not size:
            raise BadRow(
                "prompt is no prefix",
                "the chat template rewrites it from its first token on once turns follow; "
                f"{REMEDY}",
            )
        prompt, limits = np.array(parts[0][1][:size], np.int32), self.limits
        answers = [(tokens[size:], trained[size:]) for _, tokens, trained in parts]
        lengths = [len(tokens) for tokens, _ in answers]
        why = limits.too_long(size, max(lengths))
        if why and limits.mode == "drop":
            self.dropped[why] += 1
            return None
        left = max(lengths)
        if size + left > limits.max_length:
            head = int(prompt[0] == self.tokenizer.bos_token_id)
            tail = self._opening_length(prompt) if chat and limits.mode == "keep_start" else 0
            remains, left = limits.cut(size, max(lengths), head, tail)
            if all(tokens[:left] == answers[0][0][:left] for tokens, _ in answers):
                self.dropped["responses equal after truncation"] += 1
                return None
            if not all(any(trained[:left]) for _, trained in answers):
                self.dropped["no trained token left after truncation"] += 1
                return None
            self.truncated["pairs"] += 1
            self.truncated["prompts"] += len(remains) < size
            self.truncated["responses"] += sum(length > left for length in lengths)
            prompt = prompt[remains]
        chosen, rejected = (_sequence(prompt, tokens[:left], t) for tokens, t in answers)
        return Pair(chosen, rejected, source=source)

    def _opening_length(self, prompt: np.ndarray) -> int:
        """How many of the prompt's last tokens open the assistant's turn."""
        if self.opening is None:
            probe: list[Message] = [{"role": "user", "content": "a"}]
            closed, opened = map(self.chat.ids, self.chat.both(probe))
            self.opening = opened[_common(closed, opened) :]
        size = len(self.opening)
        return size if size and prompt[-size:].tolist() == self.opening else 0


def string_warnings(rows: list[Row], tokenizer: PreTrainedTokenizerBase, of: str) -> list[str]:
    """What looks like a mistake in rows of strings of the data `of`, each once, with the remedy."""
    strings, warnings = [(row.source, *row.strings) for row in rows if row.strings], []
    if strings and tokenizer.chat_template is not None:
        warnings.append(
            f"warning: {len(strings)} rows of the {of} are strings, which are trained on without "
            "the model's chat template; for a chat model write them as messages, "
            '[{"role": "user", "content": ...}] and [{"role": "assistant", "content": ...}]'
        )
    joined = [
        (source, prompt, text)
        for source, prompt, *responses in strings
        for text in responses
        if JOINED.fullmatch(prompt[-1:] + text[:1])
    ]
    if joined:
        source, prompt, text = joined[0]
        warnings.append(
            f"warning: {len(joined)} responses of the {of} follow their prompt without white "
            f"space, as in {prompt[-20:] + text[:20]!r} ({source}); begin them with the "
            "space or line break between the two"
        )
    return warnings


def _common(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix."""
    size = min(len(a), len(b))
    return next((k for k in range(size) if a[k] != b[k]), size)


def added_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens, 0 or 1, the tokenizer appends as EOS to a text of its own accord."""
    eos = tokenizer.eos_token_id
    return int(eos is not None and tokenizer("a")["input_ids"][-1:] == [eos])


def _sequence(prompt: np.ndarray, response: list[int], trained: list[bool]) -> Sequence:
    ids = np.concatenate([prompt, np.array(response, np.int32)])
    labels = np.full(len(ids), IGNORE, np.int32)
    begin = len(prompt)
    flags = np.array(trained[: len(response)])
    labels[begin - 1 : -1] = np.where(flags, ids[begin:], IGNORE)
    return Sequence(ids, labels)
