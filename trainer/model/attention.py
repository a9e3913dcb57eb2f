"""Attention over packed pairs: no sequence sees another, and a common prefix is computed once.

    T packed tokens, H query heads, K key heads, d head size

    one row:   pair 0: prefix, chosen, rejected | pair 1: prefix, chosen, rejected | ...
    chosen and rejected each see their pair's prefix and themselves, in the order of positions.

With a prefix of no tokens these are two unrelated sequences, so this one layout packs pairs with
and without prefix sharing. A token's position is its place in its own sequence: a chosen and a
rejected token of one pair may have the same.

`pair_attention` is registered with transformers under `NAME`, in place of the model's own
attention. Every layer hands it that layer's window, scale and softcap, as it would to
FlashAttention, so no mask is needed per architecture or kind of layer; the layout of the row comes
through the backbone's keywords. On a GPU it is FlexAttention, which skips the blocks of the T x T
mask that are empty. Elsewhere it is one call per sequence, whose cost is the sum of squared lengths
instead of T^2. Without a layout (generation, the model's own forward) it is ordinary attention.
`torch.compile` leaves it out: its loop depends on the lengths of every batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trainer.data.batches import PairLayout
from trainer.errors import InputError

NAME = "packed_pairs"
# What a layer may do to attention scores that is not done here.
UNSUPPORTED = {"s_aux": "attention sinks", "position_bias": "a position bias"}


@torch.compiler.disable
def pair_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    pairs: PairLayout | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers calls it.

    Args:
        module: the attention layer.
        query: (1, H, T, d).
        key, value: (1, K, T, d).
        attention_mask: the mask to use without `pairs`; ignored with it.
        pairs: the layout of the row; None is ordinary attention.
        scaling: factor on the scores, 1 / sqrt(d) by default.
        sliding_window: tokens back that a token sees, itself included; None is all.
        softcap: ``s = cap * tanh(s / cap)`` on the scores, or None.
        dropout: must be 0 with `pairs`.
        **kwargs: further arguments of the layer.

    Returns:
        (1, T, H, d), and no weights.

    Raises:
        InputError: the layer asks for something that is not done here.
    """
    if pairs is None and softcap is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    if pairs is None:
        assert softcap is not None
        mask = attention_mask
        if mask is None and query.shape[2] > 1:
            mask = _causal_mask(query.shape[2], key.shape[2], None, query.device)
        return _softcapped(query, key, value, mask, scaling, softcap).transpose(1, 2), None

    asked = [what for name, what in UNSUPPORTED.items() if kwargs.get(name) is not None]
    asked += ["dropout"] * (dropout > 0) + ["no causality"] * (not _causal(module, kwargs))
    if asked:
        raise InputError(f"{type(module).__name__} has {asked[0]}, which cannot be packed")
    if _on_gpu(query):
        query, key, value = _autocast(query, key, value)
        blocks = pairs.block_mask(sliding_window, query.device)
        return flex_attention_forward(
            module, query, key, value, blocks, scaling=scaling, softcap=softcap
        )[0], None
    return _by_sequence(query, key, value, pairs, scaling, sliding_window, softcap), None


def _on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda"


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as autocast hands them to PyTorch's own attention, and not to FlexAttention:
    rotary embeddings leave queries and keys in float32, in which it would multiply exactly, slowly.
    """
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors)


def _causal(module: nn.Module, kwargs: dict[str, object]) -> bool:
    asked = kwargs.get("is_causal")
    return getattr(module, "is_causal", True) if asked is None else bool(asked)


def _by_sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pairs: PairLayout,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention one sequence at a time: prefix and chosen, then the rest of rejected."""
    sizes = [size for prefix, c, r in pairs.lengths for size in (prefix + c, r)]
    pieces = zip(*(x.split(sizes, 2) for x in (query, key, value)), strict=True)
    outputs = []
    for prefix, _, _ in pairs.lengths:
        q, k, v = next(pieces)
        outputs.append(_attend(q, k, v, scaling, window, softcap))
        q, *rest = next(pieces)
        k, v = (torch.cat([x[:, :, :prefix], y], 2) for x, y in zip((k, v), rest, strict=True))
        outputs.append(_attend(q, k, v, scaling, window, softcap))
    return torch.cat(outputs, 2).transpose(1, 2).contiguous()  # some layers take views of it


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention (1, H, n, d) of the last n tokens of a sequence to all its m tokens."""
    n, m = query.shape[2], key.shape[2]
    whole = n == m and (window is None or window >= m)
    mask = None if whole and softcap is None else _causal_mask(n, m, window, query.device)
    if softcap is not None:
        return _softcapped(query, key, value, mask, scaling, softcap)
    return F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=scaling, enable_gqa=True
    )


def _causal_mask(n: int, m: int, window: int | None, device: torch.device) -> Tensor:
    """(n, m): which of m tokens the last n of them see."""
    mask = torch.ones(n, m, dtype=torch.bool, device=device).tril(m - n)
    return mask if window is None else mask.triu(m - n - window + 1)


def _softcapped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """Attention (b, H, n, d) with a softcap, which PyTorch's own attention does not have."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scale / softcap))
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


AttentionInterface.register(NAME, pair_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def packs(model: PreTrainedModel) -> bool:
    """Whether a model's layers tell their window and softcap, as they would to FlashAttention."""
    return bool(model._supports_flash_attn)
