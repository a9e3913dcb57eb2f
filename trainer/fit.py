"""What the data asks of a model: token ids and positions within its tables, one set of frequencies.

A pair's numbers may not depend on what it is packed with. RoPE of the types longrope and dynamic
chooses its frequencies by the longest sequence of a row, so those are refused where data is on both
sides of that choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sized

from torch import nn
from transformers import PreTrainedModel

from trainer.config import InputError
from trainer.pairs import Pair


def check_fit(model: PreTrainedModel, pairs: Iterable[Pair]) -> None:
    """Refuse pairs that a model cannot read, or would read differently when packed.

    Raises:
        InputError: a token id without an embedding, a sequence longer than the table of positions,
            or sequences that RoPE would treat in two ways.
    """
    name, pairs = type(model).__name__, list(pairs)
    token = max(pairs, key=_largest_id)
    rows = model.get_input_embeddings().num_embeddings
    if _largest_id(token) >= rows:
        raise InputError(
            f"model_name_or_path: expected an embedding for every token, but the tokenizer gives "
            f"the id {_largest_id(token)} and {name} has {rows} embeddings{token.place}; use the "
            "model's own tokenizer"
        )
    shortest, longest = min(pairs, key=_shortest), max(pairs, key=lambda pair: pair.longest)
    limit = positions(model)
    if limit is not None and longest.longest > limit:
        raise InputError(
            f"max_length: expected at most {limit}, the positions of {name}, got a sequence of "
            f"{longest.longest} tokens{longest.place}; lower it"
        )
    _check_rope(model, _shortest(shortest), longest)


def _largest_id(pair: Pair) -> int:
    return max(int(sequence.ids.max()) for sequence in (pair.chosen, pair.rejected))


def _shortest(pair: Pair) -> int:
    return min(len(pair.chosen.ids), len(pair.rejected.ids))


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


def _check_rope(model: PreTrainedModel, shortest: int, longest: Pair) -> None:
    """Refuse sequences on both sides of where RoPE's frequencies change."""
    text = model.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    for own in (rope, *(v for v in rope.values() if isinstance(v, dict))):  # or by type of layer
        kind, limit = own.get("rope_type"), own.get("original_max_position_embeddings")
        if kind == "dynamic":  # beyond it they change with every length
            limit, shortest = text.max_position_embeddings, 0
        if kind in ("dynamic", "longrope") and shortest <= limit < longest.longest:
            raise InputError(
                f"max_length: expected at most {limit}, as the RoPE of {type(model).__name__} "
                f"({kind}) has other frequencies for longer sequences and all of a packed row "
                f"share them, got sequences of up to {longest.longest} tokens{longest.place}; "
                "lower it"
            )
