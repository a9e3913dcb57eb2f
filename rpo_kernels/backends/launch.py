"""What every launch of a Triton kernel needs, whichever file the kernel stands in."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def dense(vector: Tensor | None) -> Tensor | None:
    """The kernels read vectors with stride 1, whatever the caller cut them from."""
    return None if vector is None else vector.contiguous()
