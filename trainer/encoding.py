"""From text to token ids and labels: chat template, which tokens are trained on.

Prompt and response are rendered together, and the prompt's tokens must be a prefix of the result:
so the model is trained on exactly the tokens that it will see at inference. Only assistant messages
of the response are trained on, each up to and including its end-of-turn token.

A response is a list of stages: the text from the start of the prompt up to some point, and whether
what it adds to the stage before is trained on. The first stage is the prompt. All stages of many
rows are tokenized in one call, which uses every core.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from trainer.config import InputError, find_file
from trainer.data import BadRow, BadRows, Message, Row
from trainer.pairs import IGNORE, Pair, Sequence, Split
from trainer.report import progress
from trainer.truncation import Limits

CHUNK = 256  # rows that are tokenized in one call

Stage = tuple[str, bool]


def use_chat_template(tokenizer: PreTrainedTokenizerBase, path: str | None) -> None:
    """Let a Jinja file stand in for the tokenizer's own chat template, if there is one."""
    if path is not None:
        template = Path(find_file(path)).read_text(encoding="utf-8")
        if not template.strip():
            raise InputError(f"chat_template_path: {path} is empty")
        tokenizer.chat_template = template


def encode_rows(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, limits: Limits, bad: BadRows
) -> Split:
    """Encode every row.

    Args:
        rows: checked rows.
        tokenizer: renders chat messages by its chat template; strings are concatenated.
        limits: most tokens of a sequence, and what becomes of a longer pair.
        bad: receives the rows that cannot be used once they are rendered.

    Returns:
        The pairs, with counts of pairs, tokens, trained tokens, truncated and dropped pairs, and
        bad rows.

    Raises:
        InputError: bad rows under the policy `error`, or no row left.
    """
    encoder, pairs = Encoder(tokenizer, limits), []
    for start in progress(range(0, len(rows), CHUNK), "encoding"):
        for row, result in encoder.encode(rows[start : start + CHUNK]):
            if isinstance(result, BadRow):
                bad.add(row.source, result)
            else:
                pairs.append(result)
    bad.settle(len(pairs), encoder.dropped)
    sources = Counter(row.source.rpartition(":")[0] for row in rows)
    report = {
        "pairs": len(pairs),
        "tokens": sum(pair.tokens for pair in pairs),
        "trained_tokens": sum(s.trained_tokens for p in pairs for s in (p.chosen, p.rejected)),
        "longest": max(len(s.ids) for p in pairs for s in (p.chosen, p.rejected)),
        "truncated_pairs": encoder.truncated["pairs"],
        "truncated_prompts": encoder.truncated["prompts"],
        "truncated_responses": encoder.truncated["responses"],
        "dropped": dict(encoder.dropped),
        "bad_rows": dict(bad.reasons),
        "sources": dict(sources),
    }
    return Split(pairs, report)


class Encoder:
    """A tokenizer, its special tokens, and the limits; counts what it cuts and drops."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> None:
        """Look the special tokens up once."""
        self.tokenizer, self.limits = tokenizer, limits
        added = {token for token, info in tokenizer.added_tokens_decoder.items() if info.special}
        self.special = added | set(tokenizer.all_special_ids)
        self.added_end = added_end(tokenizer)
        self.opening: list[int] | None = None
        self.dropped: Counter[str] = Counter()
        self.truncated: Counter[str] = Counter()

    def encode(self, rows: list[Row]) -> list[tuple[Row, Pair | BadRow]]:
        """The pairs of a few rows, or what is wrong with them; dropped rows are missing."""
        rendered, results = [], []
        for row in rows:
            try:
                rendered.append((row, self._render(row)))
            except BadRow as problem:
                results.append((row, problem))
        plain, chat = set(), set()
        for row, responses in rendered:
            texts = plain if isinstance(row.prompt, str) else chat
            texts.update(text for stages in responses for text, _ in stages)
        ids = {False: self._tokenize(plain, chat=False), True: self._tokenize(chat, chat=True)}
        for row, responses in rendered:
            is_chat = not isinstance(row.prompt, str)
            try:
                parts = [self._assemble(stages, ids[is_chat], is_chat) for stages in responses]
                pair = self._pair(parts, is_chat)
            except BadRow as problem:
                results.append((row, problem))
            else:
                results += [(row, pair)] if pair else []
        return results

    def _render(self, row: Row) -> list[list[Stage]]:
        """The stages of chosen and rejected."""
        responses = (row.chosen, row.rejected)
        if isinstance(row.prompt, str):
            return [[(row.prompt, False), (row.prompt + text, True)] for text in responses]
        prompt = self._text(row.prompt, row.tools, opened=True)
        rendered = []
        for response in responses:
            stages = [(prompt, False)]
            for i, message in enumerate(response):
                if message["role"] == "assistant":
                    before = row.prompt + response[:i]
                    if i:
                        stages.append((self._text(before, row.tools, opened=True), False))
                    stages.append((self._text([*before, message], row.tools, opened=False), True))
            rendered.append(stages)
        return rendered

    def _text(self, messages: list[Message], tools: list[dict] | None, opened: bool) -> str:
        if self.tokenizer.chat_template is None:
            raise BadRow(
                "no chat template",
                "the tokenizer has none; use string rows, a chat model's tokenizer, or "
                "chat_template_path",
            )
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=opened, tokenize=False
            )
        except Exception as error:  # templates raise errors of their own for roles they refuse
            raise BadRow("chat template refuses the messages", str(error)) from None

    def _tokenize(self, texts: set[str], chat: bool) -> dict[str, list[int]]:
        """Token ids of texts; strings get the tokenizer's BOS, if they bring none, and no EOS."""
        if not texts:
            return {}
        listed = list(texts)
        rows = self.tokenizer(
            listed, add_special_tokens=not chat, return_attention_mask=False, verbose=False
        )["input_ids"]
        bos = self.tokenizer.bos_token_id
        if not chat:
            rows = [ids[: len(ids) - self.added_end] for ids in rows]
        if bos is not None:
            rows = [ids[1:] if ids[:2] == [bos, bos] else ids for ids in rows]
        return dict(zip(listed, rows, strict=True))

    def _assemble(
        self, stages: list[Stage], ids: dict[str, list[int]], chat: bool
    ) -> tuple[list[int], list[int], list[bool]]:
        """Tokens of the prompt, tokens of the response, and which of those are trained on."""
        done = prompt = ids[stages[0][0]]
        if not prompt:
            raise BadRow("empty prompt", "nothing predicts the first token (there is no BOS)")
        tokens: list[int] = []
        trained: list[bool] = []
        for text, train in stages[1:]:
            now = ids[text]
            if now[: len(done)] != done:
                raise BadRow(
                    "prompt is no prefix",
                    "its tokens change when the response follows; "
                    + (
                        "the chat template rewrites earlier turns, or the response begins with "
                        "white space"
                        if chat
                        else "begin the response with the space or line break between the two"
                    ),
                )
            turn = now[len(done) :]
            end = 0 if not train else self._end_of_turn(turn) if chat else len(turn)
            if chat and train and not self._says(turn[:end]):
                raise BadRow(
                    "nothing to train on",
                    "the chat template makes special tokens and white space only of an assistant's "
                    "message; give it content, or a chat_template_path that shows its tool_calls",
                )
            tokens += turn
            trained += [k < end for k in range(len(turn))]
            done = now
        while trained and not trained[-1]:  # what follows the last end of turn predicts nothing
            tokens.pop()
            trained.pop()
        if not trained:
            raise BadRow("nothing to train on", "the response renders to no token")
        eos = self.tokenizer.eos_token_id
        ends = self.special if chat else {eos}
        if eos is not None and tokens[-1] not in ends:  # a template may never end a turn
            tokens, trained = [*tokens, eos], [*trained, True]
        return prompt, tokens, trained

    def _end_of_turn(self, turn: list[int]) -> int:
        """Trained length of an assistant turn: up to the special token at its end, or all.

        White space may follow that token. A special token before other text is part of what is
        said.
        """
        ends = (k for k in range(len(turn), 0, -1) if turn[k - 1] in self.special)
        end = next(ends, len(turn))
        return end if not self.tokenizer.decode(turn[end:]).strip() else len(turn)

    def _says(self, tokens: list[int]) -> bool:
        """Whether any token is neither special nor white space."""
        return any(t not in self.special and self.tokenizer.decode([t]).strip() for t in tokens)

    def _pair(self, parts: list[tuple], chat: bool) -> Pair | None:
        """Cut to the limits; None if the pair is dropped.

        Raises:
            BadRow: the template, or the tokenizer, removes what the responses differ in.
        """
        if parts[0][1:] == parts[1][1:]:
            raise BadRow("chosen equals rejected", "once rendered and tokenized")
        prompt, limits = np.array(parts[0][0], np.int32), self.limits
        lengths = [len(tokens) for _, tokens, _ in parts]
        why = limits.too_long(len(prompt), max(lengths))
        if why and limits.mode == "drop":
            self.dropped[why] += 1
            return None
        left = max(lengths)
        if len(prompt) + left > limits.max_length:
            head = int(prompt[0] == self.tokenizer.bos_token_id)
            tail = self._opening_length(prompt) if chat and limits.mode == "keep_start" else 0
            remains, left = limits.cut(len(prompt), max(lengths), head, tail)
            if all(tokens[:left] == parts[0][1][:left] for _, tokens, _ in parts):
                self.dropped["responses equal after truncation"] += 1
                return None
            self.truncated["pairs"] += 1
            self.truncated["prompts"] += len(remains) < len(prompt)
            self.truncated["responses"] += sum(length > left for length in lengths)
            prompt = prompt[remains]
        return Pair(*(_sequence(prompt, tokens[:left], trained) for _, tokens, trained in parts))

    def _opening_length(self, prompt: np.ndarray) -> int:
        """How many of the prompt's last tokens open the assistant's turn."""
        if self.opening is None:
            probe: list[Message] = [{"role": "user", "content": "a"}]
            closed, opened = (self._text(probe, None, opened=o) for o in (False, True))
            text = opened[len(closed) :] if opened.startswith(closed) else ""
            self.opening = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        size = len(self.opening)
        return size if size and prompt[-size:].tolist() == self.opening else 0


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
