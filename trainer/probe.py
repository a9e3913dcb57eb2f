"""Whether a model trains at all, and whether it packs: both measured, on made-up tokens.

    L tokens of the longest sequence of the probe

Trains: a forward is the same twice, to the bit, leaves the weights as they are, and no token's
state depends on what follows it. Packs: in a packed row, every token of every sequence
has the state that it has alone, the first tokens of a branch and those beyond every window among
them. Equal means: to rounding, which is measured, too: by changing the last digit of what every
matrix gives.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer.attention import packs
from trainer.backbone import run_to_head
from trainer.config import InputError
from trainer.fit import positions, rope_changes
from trainer.model import PreferenceModel
from trainer.packing import Batch, pack
from trainer.pairs import Pair, Sequence

SHORT, BRANCH = 24, 12  # tokens of a shared prefix, where there is no window, and of a response
# Numbers of a config beyond which a token may not see, or be seen otherwise.
REACH = re.compile("window|chunk|block_size|topk|local_attention|extent|n_floor|floor_scale")
MARGIN = 4  # two equal things have roundings of their own


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
    training, name = model.training, type(model.language_model).__name__
    lengths = [len(s.ids) for pair in pairs for s in (pair.chosen, pair.rejected)]
    batch = _made_up(model.language_model, max(lengths))
    try:
        model.train()
        model.pack(False)
        with _in_float32(model.language_model):
            wanted, noise = _alone(model, batch)
            reason = "packing is false" if packing is False else _rope(model, lengths)
            reason = reason or _unpackable(model, batch, wanted, MARGIN * noise)
        if packing is False:
            return reason
        if reason and packing is True:
            raise InputError(f"packing: {name} {reason}; set it to auto or false")
        model.pack(reason is None)
        return reason
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
    limit = positions(model) or longest
    reaches = [n for n in _reaches(config.to_dict()) if n < longest]
    prefix = min(max([SHORT, *reaches]) + 2, limit - BRANCH)
    vocabulary = model.get_input_embeddings().num_embeddings
    marks = {v for k, v in _numbers(model.config.to_dict()) if re.search("token_(id|index)", k)}
    plain = np.setdiff1d(np.arange(vocabulary), np.array(sorted(marks), int))
    draw = np.random.default_rng(0)

    def pair(shared: int, chosen: int, rejected: int) -> Pair:
        start = draw.choice(plain, shared)
        ids = (np.concatenate([start, draw.choice(plain, n)]) for n in (chosen, rejected))
        return Pair(*(Sequence(i.astype(np.int32), i.astype(np.int32)) for i in ids), shared)

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


def _alone(model: PreferenceModel, batch: Batch) -> tuple[Tensor, float]:
    """States (N, D) of sequences alone, and how far rounding moves one; refuses what is no model.

    Raises:
        InputError: two equal forwards differ, one changes the weights, or sees what follows.
    """
    name = type(model.language_model).__name__
    versions = [p._version for p in model.parameters()]
    states = model.hidden(batch)
    if not torch.equal(states, model.hidden(batch)):
        raise InputError(
            f"{name}: two equal forwards give different states, so policy and reference could not "
            "agree; a model that draws random numbers in evaluation cannot be trained here"
        )
    if versions != [p._version for p in model.parameters()]:
        raise InputError(
            f"{name}: a forward in evaluation changes the weights; it cannot be trained here"
        )
    with _last_digits(model.language_model):
        noise = _difference(model.hidden(batch), states)
    ids = next(batch.passes(packed=False)).ids
    end = ids.shape[1] - BRANCH // 2
    other = torch.cat([ids[:, :end], ids[:, : ids.shape[1] - end]], 1)
    first, second = (run_to_head(model.language_model, x).hidden[0, :end] for x in (ids, other))
    difference = _difference(second, first)
    if not difference <= MARGIN * noise:
        raise InputError(
            f"{name}: a token's state depends on tokens that follow it (by {difference:.1e}, and "
            f"rounding by {noise:.1e}); expected a causal language model, a decoder"
        )
    return states, noise


@contextlib.contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Let a model in bfloat16, whose rounding could hide anything, compute in float32.

    Its weights are exact there, too. A layer's are converted for its forward alone, so the memory
    is that of one layer. Packed 4-bit weights stay as they are.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    inside = {id(x) for layer in layers for x in _tensors(layer)}
    stored: dict[int, Tensor] = {}

    def widen(tensors: Iterable[Tensor]) -> None:
        for x in tensors:
            if x.dtype in (torch.bfloat16, torch.float16):
                stored[id(x)], x.data = x.data, x.data.float()

    def restore(tensors: Iterable[Tensor]) -> None:
        for x in tensors:
            x.data = stored.pop(id(x), x.data)

    if not all(p.is_floating_point() for p in model.parameters()):
        yield
        return
    hooks = [m.register_forward_pre_hook(lambda layer, _: widen(_tensors(layer))) for m in layers]
    hooks += [
        m.register_forward_hook(lambda layer, *_: restore(_tensors(layer)), always_call=True)
        for m in layers
    ]
    rest = [x for x in _tensors(model) if id(x) not in inside]
    widen(rest)
    try:
        yield
    finally:
        restore(rest)
        for hook in hooks:
            hook.remove()


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@contextlib.contextmanager
def _last_digits(model: PreTrainedModel) -> Iterator[None]:
    """Let what every matrix and table gives differ in its last digit, as rounding does."""
    dice = torch.Generator().manual_seed(0)

    def change(_module: nn.Module, _args: tuple, output: object) -> object:
        if not isinstance(output, Tensor):  # a router that is a Linear gives several things
            return output
        signs = torch.randint(0, 2, output.shape, generator=dice).to(output) * 2 - 1
        return output * (1 + torch.finfo(output.dtype).eps * signs)

    rounding = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    hooks = [module.register_forward_hook(change) for module in rounding]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _difference(states: Tensor, wanted: Tensor) -> float:
    """The largest relative difference of a token's state; N tokens (N, D)."""
    errors = (states - wanted).float().norm(dim=-1) / wanted.float().norm(dim=-1)
    return errors.max().item()


def _unpackable(
    model: PreferenceModel, batch: Batch, wanted: Tensor, tolerance: float
) -> str | None:
    """Why packed rows are not an option; the model is left packed, if they are."""
    if not packs(model.language_model):
        return "has layers that do not tell their window (no FlashAttention support)"
    try:
        model.pack(True)
        packed = model.hidden(batch)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        model.pack(False)
        return f"cannot run packed sequences: {error}"
    difference = _difference(packed, wanted)
    if not difference <= tolerance:
        model.pack(False)
        return (
            "does not treat packed sequences as it does alone: a token's state differs by "
            f"{difference:.1e}, rounding makes {tolerance:.1e}"
        )
    return None
