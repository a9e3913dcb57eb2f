"""Whether a model trains at all, and whether it packs: both measured, on made-up tokens.

    L tokens of the longest sequence of the probe

Trains: a forward is the same twice, to the bit, autograd can follow it, and no token's state
depends on what follows it. Packs: in a packed row, every token of every sequence
has the state that it has alone, the first tokens of a branch and those beyond every window among
them. Equal means: to rounding, which is measured, too: by changing the last digit of what every
matrix gives.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from trainer.data.batches import Batch, pack
from trainer.data.pairs import Pair, Sequence
from trainer.errors import InputError
from trainer.model.attention import packs
from trainer.model.backbone import BROKEN, run_to_head
from trainer.model.fit import positions, rope_changes, vocabulary_size
from trainer.model.generate import pads_exactly
from trainer.model.head import check_head
from trainer.model.policy import PreferenceModel
from trainer.model.rounding import MARGIN, difference_of, in_float32, last_digits

SHORT, BRANCH = 24, 12  # tokens of a shared prefix, where there is no window, and of a response
# Numbers of a config beyond which a token may not see, or be seen otherwise.
REACH = re.compile("window|chunk|block_size|topk|local_attention|extent|n_floor|floor_scale")
UNTOLD = "has layers that do not tell their window (no FlashAttention support)"


def check_architecture(model: PreTrainedModel, packing: bool | str) -> str | None:
    """Refuse what a model without numbers, on the meta device, shows that it cannot do.

    Returns:
        Why batches will not be packed; None where that is to be measured.

    Raises:
        InputError: this architecture cannot be trained, or not in packed rows.
    """
    try:
        check_head(model)
    except InputError:
        raise
    except Exception:  # whatever an operation says that does not work without numbers
        pass
    return _decided(model, packing, None if packs(model) else UNTOLD)


def _decided(model: PreTrainedModel, packing: bool | str, reason: str | None) -> str | None:
    """What is said of packing, where there is a reason against it."""
    name = type(model).__name__
    if packing is False:
        return "no, as packing is false"
    if reason and packing is True:
        raise InputError(f"packing: {name} {reason}; set it to auto or false")
    return reason and f"no, as {name} {reason}"


@torch.no_grad()
def check_model(
    model: PreferenceModel, pairs: Iterable[Pair], packing: bool | str = "auto"
) -> str | None:
    """Let a model run packed rows if it can, else every sequence alone.

    Args:
        model: the policy, before it is wrapped for training.
        pairs: all that it will see.
        packing: true or false decides; "auto" packs where that changes nothing.

    Returns:
        Why batches are not packed; None where they are.

    Raises:
        InputError: this model cannot be trained, or not in packed rows although `packing` is true.
    """
    training, reason = model.training, None
    lengths = [len(s.ids) for pair in pairs for s in (pair.chosen, pair.rejected)]
    batch = _made_up(model.language_model, max(lengths))
    try:
        model.train()
        model.pack(False)
        wanted, noise = _trains(model, batch)
        with in_float32(model.language_model):
            if packing is not False:
                reason = _rope(model, lengths)
                reason = reason or _unpackable(model, batch, wanted, MARGIN * noise)
        model.pads = pads_exactly(model.language_model)
        said = _decided(model.language_model, packing, reason)
        model.pack(said is None)
        return said
    finally:
        model.train(training)


def _rope(model: PreferenceModel, lengths: list[int]) -> str | None:
    """Why data of these lengths would not have the RoPE of each sequence in a common row."""
    changes, kind = rope_changes(model.language_model)
    if not min(lengths) <= changes < max(lengths):
        return None
    return (
        f"has sequences on both sides of {changes} tokens, where its RoPE ({kind}) has other "
        "frequencies"
    )


def _made_up(model: PreTrainedModel, longest: int) -> Batch:
    """Two pairs of random tokens, all of them trained on; the first reaches beyond every window."""
    config = model.config.get_text_config()
    limit = positions(model) or max(longest, SHORT + BRANCH)
    reaches = [n for n in _reaches(config.to_dict()) if n < longest]
    prefix = min(max([SHORT, *reaches]) + 2, limit - BRANCH)
    vocabulary = vocabulary_size(model)
    marks = {v for k, v in _numbers(model.config.to_dict()) if re.search("token_(id|index)", k)}
    plain = np.setdiff1d(np.arange(vocabulary), np.array(sorted(marks), int))
    draw = np.random.default_rng(0)

    def pair(shared: int, chosen: int, rejected: int) -> Pair:
        start = draw.choice(plain, shared)
        ids = (np.concatenate([start, draw.choice(plain, n)]) for n in (chosen, rejected))
        one, other = (Sequence(i.astype(np.int32), i.astype(np.int32)) for i in ids)
        return Pair(one, other, shared)

    return pack([pair(prefix, BRANCH, BRANCH - 3), pair(3, 5, 7)], (0, 1)).to(model.device)


def _reaches(config: dict) -> Iterator[int]:
    for key, value in _numbers(config):
        if REACH.search(key):
            yield value


def _numbers(config: dict) -> Iterator[tuple[str, int]]:
    """The whole numbers of a config, those of its lists and of the configs in it included."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int) and not isinstance(number, bool):
                yield key, number


def _trains(model: PreferenceModel, batch: Batch) -> tuple[Tensor, float]:
    """`_alone`, in float32, of a model that has a gradient.

    Raises:
        InputError: it has none, or its own code fails.
    """
    try:
        _check_backward(model.language_model, batch.input_ids[:, :BRANCH])
        with in_float32(model.language_model):
            return _alone(model, batch)
    except BROKEN as error:
        if isinstance(error, InputError | torch.OutOfMemoryError):
            raise
        raise InputError(
            f"{type(model.language_model).__name__}: cannot run a sequence of made-up tokens, so "
            f"it cannot be trained: {error}"
        ) from error


def _alone(model: PreferenceModel, batch: Batch) -> tuple[Tensor, float]:
    """States (N, D) of sequences alone, and how far rounding moves one; refuses what is no model.

    Raises:
        InputError: two equal forwards differ, or one sees what follows.
    """
    name = type(model.language_model).__name__
    states = model.hidden(batch)
    if not torch.equal(states, model.hidden(batch)):
        raise InputError(
            f"{name}: two equal forwards give different states, so policy and reference could not "
            "agree; a model that draws random numbers in evaluation cannot be trained here"
        )
    with last_digits(model.language_model):
        noise = difference_of(model.hidden(batch), states)
    ids = next(batch.passes(packed=False)).ids
    end = ids.shape[1] - BRANCH // 2
    other = torch.cat([ids[:, :end], ids[:, : ids.shape[1] - end]], 1)
    first, second = (run_to_head(model.language_model, x).hidden[0, :end] for x in (ids, other))
    difference = difference_of(second, first)
    if not difference <= MARGIN * noise:
        raise InputError(
            f"{name}: a token's state depends on tokens that follow it (by {difference:.1e}, and "
            f"rounding by {noise:.1e}); expected a causal language model, a decoder"
        )
    return states, noise


def _check_backward(model: PreTrainedModel, ids: Tensor) -> None:
    """Let autograd follow a forward, to the token embeddings (1, T, D)."""
    leaves = []

    def begin(_module: object, _args: tuple, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1] * 1

    hook = model.get_input_embeddings().register_forward_hook(begin)
    try:
        with torch.enable_grad():
            hidden = run_to_head(model, ids).hidden
            torch.autograd.grad(hidden.float().sum(), leaves, allow_unused=True)
    finally:
        hook.remove()


def _unpackable(
    model: PreferenceModel, batch: Batch, wanted: Tensor, tolerance: float
) -> str | None:
    """Why packed rows are not an option; the model is left packed, if they are."""
    if not packs(model.language_model):
        return UNTOLD
    try:
        model.pack(True)
        packed = model.hidden(batch)
    except torch.OutOfMemoryError:
        raise
    except BROKEN as error:
        model.pack(False)
        return f"cannot run packed sequences: {error}"
    difference = difference_of(packed, wanted)
    if not difference <= tolerance:
        model.pack(False)
        return (
            "does not treat packed sequences as it does alone: a token's state differs by "
            f"{difference:.1e}, rounding makes {tolerance:.1e}"
        )
    return None
