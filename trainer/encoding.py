"""From text to token ids and labels: chat template, which tokens are trained on, truncation.

Prompt and response are rendered together, and the prompt's tokens must be a prefix of the result:
so the model is trained on exactly the tokens that it will see at inference. Only assistant messages
of the response are trained on, each up to and including its end-of-turn token. Labels are aligned
with hidden states: `labels[t]` is the token that position t predicts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trainer.data import BadRow, BadRows, Row, Text

if TYPE_CHECKING:
    from trainer.packing import Batch

IGNORE = -100


@dataclass(frozen=True)
class Sequence:
    """One prompt and response: T token ids; T labels, the next id if it is trained on, or -100."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def trained_tokens(self) -> int:
        """Number of tokens that the loss sees."""
        return sum(label != IGNORE for label in self.labels)


@dataclass(frozen=True)
class Pair:
    """The chosen and the rejected sequence of one row."""

    chosen: Sequence
    rejected: Sequence
    shared: int = 0
    """Tokens that both begin with and that are computed once (`packing.share_prefixes`)."""

    @property
    def tokens(self) -> int:
        """Tokens of both sequences, prompt included."""
        return len(self.chosen.ids) + len(self.rejected.ids)

    @property
    def packed_tokens(self) -> int:
        """Tokens of the pair in a packed row, where the shared ones stand once."""
        return self.tokens - self.shared


@dataclass(slots=True)
class Split:
    """A data set ready to train on or to evaluate: its pairs, and what the report says of them."""

    pairs: list[Pair]
    report: dict[str, object] = field(default_factory=dict)
    reference: Callable[[Batch], Tensor] | None = None
    """Summed reference log-probs (2B,) in nats of a batch of pairs, chosen ones first."""


def encode_rows(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, bad: BadRows
) -> Split:
    """Encode every row.

    Args:
        rows: checked rows.
        tokenizer: renders chat messages by its chat template; strings are concatenated.
        max_length: most tokens a sequence may have, >= 2; see `truncate` for what is cut.
        bad: receives the rows whose prompt is no prefix of the rendered text, or whose responses
            are equal once cut.

    Returns:
        The pairs, with counts of pairs, tokens, trained tokens, truncated pairs and bad rows.

    Raises:
        InputError: bad rows under the policy `error`, or no row left.
    """
    pairs, truncated = [], 0
    for row in rows:
        try:
            prompt, chosen, rejected = _render_pair(row, tokenizer)
            too_long = len(prompt) + max(len(chosen), len(rejected)) > max_length
            prompt, chosen, rejected = truncate(prompt, chosen, rejected, max_length)
            if chosen == rejected:
                raise BadRow("responses equal after truncation", f"max_length is {max_length}")
        except BadRow as problem:
            bad.add(row.source, problem)
            continue
        truncated += too_long
        pairs.append(Pair(_sequence(prompt, chosen), _sequence(prompt, rejected)))
    bad.settle(len(pairs))
    report = {
        "pairs": len(pairs),
        "tokens": sum(pair.tokens for pair in pairs),
        "trained_tokens": sum(s.trained_tokens for p in pairs for s in (p.chosen, p.rejected)),
        "truncated_pairs": truncated,
        "bad_rows": dict(bad.reasons),
    }
    return Split(pairs, report)


Token = tuple[int, bool]  # id, whether it is trained on


def truncate(
    prompt: list[Token], chosen: list[Token], rejected: list[Token], max_length: int
) -> tuple[list[Token], list[Token], list[Token]]:
    """Cut a pair to `max_length`, keeping both prompts equal and no response empty.

    A prompt that leaves too little room loses its start, but never more than makes room for
    `max_length // 2` response tokens; what is still too long loses the end of its response.
    """
    longest = max(len(chosen), len(rejected))
    room = max_length - min(longest, max_length // 2)
    prompt = prompt[max(0, len(prompt) - room) :]
    left = max_length - len(prompt)
    return prompt, chosen[:left], rejected[:left]


def _sequence(prompt: list[Token], response: list[Token]) -> Sequence:
    tokens = prompt + response
    labels = [token if trained else IGNORE for token, trained in tokens[1:]]
    return Sequence(tuple(token for token, _ in tokens), (*labels, IGNORE))


def _render_pair(
    row: Row, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Token], list[Token], list[Token]]:
    render = _render_strings if isinstance(row.prompt, str) else _render_messages
    prompt, chosen = render(row.prompt, row.chosen, tokenizer)
    _, rejected = render(row.prompt, row.rejected, tokenizer)
    return [(token, False) for token in prompt], chosen, rejected


def _after(prefix: list[int], full: list[int], remedy: str) -> list[int]:
    if full[: len(prefix)] != prefix:
        raise BadRow(
            "prompt is no prefix", f"its tokens change when the response follows; {remedy}"
        )
    return full[len(prefix) :]


def _render_strings(
    prompt: str, response: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[Token]]:
    """Plain text: the tokenizer's own BOS, prompt, response, and EOS once."""
    eos = tokenizer.eos_token_id
    prompt_ids, full_ids = (
        _without(tokenizer(text)["input_ids"], eos) for text in (prompt, prompt + response)
    )
    response_ids = _after(
        prompt_ids, full_ids, "begin the response with the space or line break between the two"
    )
    if not prompt_ids:
        raise BadRow(
            "empty prompt", "nothing predicts the first response token (this tokenizer adds no BOS)"
        )
    return prompt_ids, [(token, True) for token in (*response_ids, *([] if eos is None else [eos]))]


def _without(ids: list[int], eos: int | None) -> list[int]:
    return ids[:-1] if ids and ids[-1] == eos else ids


def _render_messages(
    prompt: Text, response: Text, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[Token]]:
    """Chat messages: rendered up to where each assistant message begins, and to where it ends."""
    if tokenizer.chat_template is None:
        raise BadRow(
            "no chat template",
            "the tokenizer has none; use string rows or a chat model's tokenizer",
        )

    def ids_of(messages: list[dict[str, str]], opened: bool) -> list[int]:
        try:
            return tokenizer.apply_chat_template(
                messages, add_generation_prompt=opened, return_dict=False
            )
        except (
            Exception
        ) as error:  # templates raise jinja2 errors of their own for role orders they refuse
            raise BadRow("chat template refuses the messages", str(error)) from None

    remedy = "the chat template rewrites earlier turns, or the response begins with white space"
    prompt_ids = ids_of(prompt, opened=True)
    done, tokens = list(prompt_ids), []
    for i, message in enumerate(response):
        if message["role"] != "assistant":
            continue
        opened = ids_of(prompt + response[:i], opened=True)
        closed = ids_of(prompt + response[: i + 1], opened=False)
        tokens += [(token, False) for token in _after(done, opened, remedy)]
        turn = _after(opened, closed, remedy)
        end = _end_of_turn(turn, tokenizer)
        tokens += [(token, k < end) for k, token in enumerate(turn)]
        done = closed
    while not tokens[-1][
        1
    ]:  # what the template writes after the last end-of-turn token predicts nothing
        tokens.pop()
    special = _special_ids(tokenizer)
    if (
        tokens[-1][0] not in special and tokenizer.eos_token_id is not None
    ):  # a template that never ends a turn
        tokens.append((tokenizer.eos_token_id, True))
    return prompt_ids, tokens


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = {token for token, info in tokenizer.added_tokens_decoder.items() if info.special}
    return added | set(tokenizer.all_special_ids)


def _end_of_turn(turn: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Trained length of an assistant turn: up to its last special token, inclusive, or all."""
    special = _special_ids(tokenizer)
    return max((k + 1 for k, token in enumerate(turn) if token in special), default=len(turn))
