"""What every launch of a Triton kernel needs, whichever file the kernel stands in."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

from rpo_kernels.spec import Transform

LOG2E = math.log2(math.e)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def dense(vector: Tensor | None) -> Tensor | None:
    """The kernels read vectors with stride 1, whatever the caller cut them from."""
    return None if vector is None else vector.contiguous()


def blocks(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)


def reach_of(out: Tensor) -> int:
    """Columns of a panel ``out (p, n)`` that may be written: n, or n rounded up to a multiple of 16
    if every row of `out` ends there, the last one too.
    """
    n, wide = out.shape[1], blocks(out.shape[1], 16) * 16
    end = (out.storage_offset() + (out.shape[0] - 1) * out.stride(0) + wide) * out.itemsize
    fits = out.stride(0) == wide and end <= out.untyped_storage().nbytes()
    return wide if fits else n


def slope(transform: Transform) -> float | None:
    """``dz/dx`` at 0, or None where it is 1 everywhere."""
    return None if transform.softcap is None and transform.scale == 1.0 else float(transform.scale)


def base2_factors(transform: Transform) -> dict[str, float | None]:
    """``inner`` and ``outer`` of the kernels' base-2 logit."""
    scale, cap = transform
    if cap is None:
        return {"inner": None, "outer": scale * LOG2E}
    return {"inner": scale / cap, "outer": cap * LOG2E}
