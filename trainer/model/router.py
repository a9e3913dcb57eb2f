"""The load-balancing loss of mixtures of experts, as the model's own forward adds it to a loss.

A model whose config has `output_router_logits` adds, to any loss that it computes, a coefficient
times a product of means over tokens: of what the router chose, and of how probable that was. Means
over a batch would depend on what is in it, so here they are each sequence's: what the model's
forward adds for that sequence alone, averaged over a step's sequences. So packing, prefix sharing,
micro-batches and ranks change nothing of it.

The forward itself computes it, under whatever names, from router logits that were kept: its
backbone is replaced by their part for one sequence, lm_head and the loss on tokens by nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput


def balance_loss(model: PreTrainedModel, output: ModelOutput, sequences: list[Tensor]) -> Tensor:
    """The model's own load-balancing loss (), times its coefficient, summed over sequences.

    Args:
        model: whose config asks for it.
        output: its backbone's, with router logits of all tokens: (T, experts) for every layer.
        sequences: the places (n,) of each sequence's tokens among the T.
    """
    layers = [logits.flatten(0, -2) for logits in output["router_logits"]]
    total = layers[0].new_zeros(())
    for places in sequences:
        places = places.to(layers[0].device)
        total = total + _own_loss(model, output, tuple(x.index_select(0, places) for x in layers))
    return total


def _own_loss(model: PreTrainedModel, output: ModelOutput, logits: tuple[Tensor, ...]) -> Tensor:
    """What the model's forward adds to a loss for one sequence."""
    ids = torch.zeros(1, len(logits[0]), dtype=torch.long, device=logits[0].device)
    states = output["last_hidden_state"].new_zeros(1, len(logits[0]), 1)
    fields = {"last_hidden_state": states, "router_logits": logits}
    with _only_the_router(model, type(output)(**fields)):
        return model(input_ids=ids, labels=ids).loss


@contextlib.contextmanager
def _only_the_router(model: PreTrainedModel, output: ModelOutput) -> Iterator[None]:
    """Let the model's forward run without backbone, lm_head and loss on tokens."""
    head, backbone, loss = model.get_output_embeddings(), model.base_model, model.loss_function
    backbone.forward = lambda *_args, **_kwargs: output
    model.loss_function = lambda *_args, **_kwargs: output["last_hidden_state"].new_zeros(())
    model.set_output_embeddings(nn.Identity())
    try:
        yield
    finally:
        model.set_output_embeddings(head)
        model.loss_function = loss
        del backbone.forward
