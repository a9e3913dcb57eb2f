"""`rpo_kernels` on an emulated GPU: CPU tensors take the paths that GPU tensors would.

What asks for a tensor's device is replaced in memory.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import torch
import triton

from tests.gpu_emulator.driver import install


def float32_products(out, a, b, accumulate, scale=1.0):
    """``out (+)= scale * a @ b`` as a GPU does it: products summed in float32, rounded once."""
    product = a.float() @ b.float() * scale
    if accumulate:
        product += out.float()
    out.copy_(product)


def supports(hidden):
    """`triton_backend.supports` without its question for the device."""
    if hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise RuntimeError(f"backend='triton': got {hidden.dtype}; pass backend='torch'")


@contextlib.contextmanager
def gpu(sm: int, **options):
    """An emulated GPU with the package's kernels on it; yields its `EmulatedDriver`.

    Args:
        sm: compute capability, 80, 86 or 90.
        options: those of `EmulatedDriver`.
    """
    from rpo_kernels import strategy
    from rpo_kernels.backends import tiles, triton_backend
    from rpo_kernels.engines import panel, recompute, streaming

    driver = install(sm, **options)
    family = tiles.cuda_family(sm // 10, sm % 10), driver.device.multiprocessors
    shape = recompute._shape
    changes = [
        (tiles, "of_device", lambda device: family),
        (triton_backend, "supports", supports),
        (strategy, "CPU_WORKSPACE_MB", 1024),
        (recompute, "_shape", lambda *arguments: shape(*arguments[:-1], False)),
        (panel, "rounds_products", lambda x: False),
        *((m, "matmul_into", float32_products) for m in (panel, recompute, streaming)),
        *((m, "stride", lambda n, device: -(-n // panel.ALIGN) * panel.ALIGN)
          for m in (panel, recompute, streaming)),
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        for module, name, value in changes:
            stack.enter_context(mock.patch.object(module, name, value))
        try:
            yield driver
        finally:
            triton.runtime.driver._active = None
