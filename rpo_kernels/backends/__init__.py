"""Tile arithmetic. Two modules with the same functions, `torch_backend` and `triton_backend`;
neither imports the other.

lse_and_target(hidden, weight, bias, targets, transform, max_bytes) -> (lse, target_logit)
exp_panel(hidden, weight, bias, shift, targets, v0, transform, out, sums, target_logit) -> None
kept_products(panel, size, keep, weight, scaled, coef, d_rows, d_weight, d_bias, scale) -> None
tail(logps, offsets, ref_logps, loss_type, ...) -> (pairs, coef)
"""

from __future__ import annotations

import importlib.util
from types import ModuleType

from torch import Tensor

BACKENDS = ("auto", "triton", "torch")


def choose_backend(name: str, hidden: Tensor) -> ModuleType:
    """Return the backend module for tensors like `hidden` (any shape).

    ``auto`` is Triton for half and single precision on a GPU where Triton is installed, and torch
    everywhere else. An explicit name runs or raises.

    Raises:
        RuntimeError: Triton was asked for and cannot run on these tensors; the message says why and
            what to do.
    """
    if name == "auto":
        has_triton = hidden.is_cuda and importlib.util.find_spec("triton") is not None
        name = "triton" if has_triton and hidden.dtype.itemsize <= 4 else "torch"
    if name == "torch":
        from rpo_kernels.backends import torch_backend

        return torch_backend
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            "backend='triton' needs the package triton: pip install triton, or pass backend='torch'"
        )
    from rpo_kernels.backends import triton_backend

    triton_backend.supports(hidden)
    return triton_backend
