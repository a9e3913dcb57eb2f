"""The fused head of a model that is trained: `rpo_kernels`', and what training asks beyond it.

A model must run at all, and its forward must leave its weights alone: policy and reference start
as one model, and what is saved is what was trained.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from rpo_kernels.integrations.head import (
    TOKENS,
    FusedLMHead,
    HeadError,
    measure_transform,
    output_layer,
    replace_head,
)
from trainer.errors import InputError
from trainer.model.backbone import BROKEN, quiet, without_cache


def check_head(model: PreTrainedModel) -> tuple[float, float | None]:
    """Scale and softcap that a model applies to lm_head's output; evaluation mode from here on.

    Raises:
        InputError: no fused head computes this. What the model's own code raises comes as it is.
    """
    quiet(model)
    try:
        return measure_transform(model, **without_cache(model))
    except HeadError as error:
        raise InputError(str(error)) from None


def fuse_head(model: PreTrainedModel) -> PreTrainedModel:
    """Replace the model's output layer, in place, by a `FusedLMHead` with the same parameters.

    Raises:
        InputError: the output layer is not a plain Linear, the model does something else to its
            output than a scale and a softcap, its forward fails, or changes its weights.
    """
    versions = [p._version for p in model.parameters()]
    try:
        transform = check_head(model)
    except (InputError, torch.OutOfMemoryError):
        raise
    except BROKEN as error:
        raise InputError(
            f"{type(model).__name__}: its forward fails on {TOKENS} made-up tokens, so it cannot "
            f"be trained: {error}; check the model's config"
        ) from error
    if versions != [p._version for p in model.parameters()]:
        raise InputError(
            f"{type(model).__name__}: a forward in evaluation changes the weights in place, so "
            "that they could not be saved; it cannot be trained here"
        )
    replace_head(model, FusedLMHead(output_layer(model), *transform))
    return model
