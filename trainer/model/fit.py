"""What the data asks of a model: token ids and positions within its tables, one set of frequencies.

RoPE of the type longrope chooses its frequencies by the longest sequence of a row, so data on both
sides of that choice is not packed; that of the type dynamic by what was read before, so it is
refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sized
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from trainer.data.pairs import Pair
from trainer.errors import InputError


def vocabulary_size(model: PreTrainedModel) -> int:
    """How many token ids the input embedding can read."""
    embedding: Any = model.get_input_embeddings()  # a class of their own in some architectures
    return embedding.num_embeddings


def check_fit(model: PreTrainedModel, pairs: Iterable[Pair]) -> None:
    """Refuse pairs that a model cannot read.

    Raises:
        InputError: a token id without an embedding, a sequence longer than the table of positions,
            or than what dynamic RoPE reads always alike.
    """
    name, pairs = type(model).__name__, list(pairs)
    token = max(pairs, key=_largest_id)
    rows = vocabulary_size(model)
    if _largest_id(token) >= rows:
        raise InputError(
            f"model_name_or_path: expected an embedding for every token, but the tokenizer gives "
            f"the id {_largest_id(token)} and {name} has {rows} embeddings{token.place}; use the "
            "model's own tokenizer"
        )
    longest = max(pairs, key=lambda pair: pair.longest)
    limit = positions(model)
    if limit is not None and longest.longest > limit:
        raise InputError(
            f"max_length: expected at most {limit}, the positions of {name}, got a sequence of "
            f"{longest.longest} tokens{longest.place}; lower it"
        )
    changes, kind = rope_changes(model)
    if kind == "dynamic" and longest.longest > changes:
        raise InputError(
            f"max_length: expected at most {changes}, as the RoPE of {name} (dynamic) has other "
            f"frequencies for longer sequences, and for those that follow them, got sequences of "
            f"up to {longest.longest} tokens{longest.place}; lower it"
        )


def _largest_id(pair: Pair) -> int:
    return max(int(sequence.ids.max()) for sequence in (pair.chosen, pair.rejected))


def check_answers(
    model: PreTrainedModel, prompts: Iterable[Sized], tokens: int, field: str = "max_new_tokens"
) -> None:
    """Refuse answers of `tokens` to `prompts`, each its tokens, beyond the table of positions.

    Raises:
        InputError: naming `field`, and the tokens that are left for an answer.
    """
    limit, longest = positions(model), max(map(len, prompts), default=0)
    if limit is not None and longest + tokens > limit:
        raise InputError(
            f"{field}: {type(model).__name__} has {limit} positions, and a prompt {longest} "
            f"tokens; expected at most {limit - longest}, got {tokens}; lower it, or shorten the "
            "prompts"
        )


def positions(model: PreTrainedModel) -> int | None:
    """The most tokens that a model with a table of positions can read; None without a table."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return None
    tokens = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    found = any(table.num_embeddings in (limit, limit + 2) for table in tables)  # OPT's begins at 2
    return limit if found else None


def rope_changes(model: PreTrainedModel) -> tuple[float, str]:
    """The most tokens of a sequence before RoPE has other frequencies, and which type has them."""
    text = model.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    found = [(math.inf, "")]
    for own in (rope, *(v for v in rope.values() if isinstance(v, dict))):  # or by type of layer
        if own.get("rope_type") == "longrope":
            found.append((own["original_max_position_embeddings"], "longrope"))
        if own.get("rope_type") == "dynamic":
            found.append((text.max_position_embeddings, "dynamic"))
    return min(found)
