"""How to run one call: dtype of the matmuls, workspace, strategy.

Nothing waits for a device. The rule of "auto" stands in the docstring of `fused_rpo_loss`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rpo_kernels.engines.panel import capacity
from rpo_kernels.engines.skipping import BLOCK, mask_shape
from rpo_kernels.spec import Settings

CPU_WORKSPACE_MB = 512
GPU_SHARE = 20  # a GPU's workspace is this part of its memory: the fewer chunks, the fewer passes
ACCUMULATOR_SHARE = 4  # "auto" streams split pairs while the accumulators fit this many workspaces


def default_workspace_mb(device: torch.device) -> float:
    """MiB of workspace where none is given: a twentieth of a GPU's memory, else 512."""
    if device.type != "cuda":
        return CPU_WORKSPACE_MB
    return torch.cuda.get_device_properties(device).total_memory / GPU_SHARE / 2**20


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def choose_settings(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    logit_scale: float,
    logit_softcap: float | None,
    validate: bool,
    grad_tolerance: float,
    max_workspace_mb: float | None,
    strategy: str,
    backend: str,
) -> Settings:
    """How to run one call, from the arguments that the public functions share; `strategy` stays as
    it was asked for.
    """
    grads = torch.is_grad_enabled()
    workspace = (
        default_workspace_mb(hidden.device) if max_workspace_mb is None else max_workspace_mb
    )
    needs = [t is not None and t.requires_grad and grads for t in (hidden, weight, bias)]
    return Settings(
        ignore_index=ignore_index,
        scale=float(logit_scale),
        softcap=logit_softcap,
        dtype=_compute_dtype(hidden, weight),
        validate=validate,
        tolerance=float(grad_tolerance),
        max_bytes=int(workspace * 2**20),
        strategy=strategy,
        backend=backend,
        needs=needs,
    )


def why_recompute(settings: Settings, weight: Tensor, rows: int) -> str:
    """Why "auto" recomputes, as part of a sentence; empty where it streams. The rule stands in
    `fused_rpo_loss`.

    Args:
        weight: (V, D). rows: N at most.
    """
    (vocab, width), max_bytes, dtype = weight.shape, settings.max_bytes, settings.dtype
    room = capacity(vocab, width, dtype.itemsize, max_bytes)
    split = settings.needs[1] and rows > room  # a pair may need accumulators
    if dtype == torch.float16:
        return "float16 streams in as many passes"
    if room < min(rows, BLOCK):
        return f"the workspace holds {room} rows of the vocabulary, and so few multiply slowly"
    if split and dtype.itemsize < 4 and weight.device.type == "cpu":
        return "the workspace does not hold all rows, and CPUs round half-precision products"
    if split and 8 * vocab * width > ACCUMULATOR_SHARE * max_bytes:
        return (
            "the workspace does not hold all rows, and accumulators for the weight take more than "
            f"{ACCUMULATOR_SHARE} workspaces"
        )
    return ""


def resolve_strategy(settings: Settings, weight: Tensor, rows: int, sequences: int) -> Settings:
    """Resolve "auto", and leave tolerances out where they would not pay.

    Raises:
        ValueError: the workspace does not suffice for what was asked.
    """
    (vocab, width), max_bytes = weight.shape, settings.max_bytes
    room = capacity(vocab, width, settings.dtype.itemsize, max_bytes)
    if settings.strategy == "stream" and room < 1:
        raise ValueError(
            f"max_workspace_mb: strategy='stream' expected room for one row of the vocabulary "
            f"({vocab}), got {max_bytes / 2**20:.1f} MiB; raise it or use strategy='recompute'"
        )
    if settings.strategy == "auto":
        recompute = why_recompute(settings, weight, rows)
        settings = settings._replace(strategy="recompute" if recompute else "stream")
    if settings.strategy == "recompute" and weight.device.type != "cpu":
        # a panel and its products for every block: 15 times slower than exact ones on an H100
        settings = settings._replace(tolerance=0.0)
    if settings.strategy == "recompute" and settings.tolerance:
        _check_blocks(room, rows, sequences, vocab, max_bytes)
    if not any(settings.needs):  # no gradient, nothing skipped
        settings = settings._replace(tolerance=0.0)
    return settings


def _check_blocks(room: int, rows: int, sequences: int, vocab: int, max_bytes: int) -> None:
    """What skipping needs when gradients are recomputed: a block of rows in the workspace, and a
    mask of what each block keeps that is no larger.
    """
    if math.prod(mask_shape(rows, sequences, vocab, tolerance=1.0)) > max_bytes:
        raise ValueError(
            f"max_workspace_mb: grad_tolerance > 0 with gradients recomputed expected room for its "
            f"mask, ({rows} rows / {BLOCK} + {sequences} sequences) x {vocab} bytes, got "
            f"{max_bytes / 2**20:.1f} MiB; raise it, or use strategy='stream' or grad_tolerance=0"
        )
    if room < BLOCK:
        raise ValueError(
            f"max_workspace_mb: grad_tolerance > 0 expected room for {BLOCK} rows of the vocabulary"
            f" ({vocab}), got {max_bytes / 2**20:.1f} MiB; raise it or use grad_tolerance=0"
        )
