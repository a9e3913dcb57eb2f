"""Tile arithmetic in plain PyTorch, on any device.

Everything runs on tiles small enough for a CPU's cache (or, on a GPU, large enough to fill it),
vocabulary-major ``(p, n)``: a tile of logits is one matmul ``W_panel @ H^T``, and the passes over
it are in place. Logits live in base 2, ``y = z * log2(e)``: in ``exp(z - c) = 2^(y - c * log2(e))``
the product and the difference are one fused pass, and `exp2` is about twice as fast as `exp` on
CPUs. Nothing below ``exp(-60)`` is ever produced, because denormal floats slow CPU matmuls tenfold;
what that adds to a probability is at most 1e-26.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rpo_kernels import tuning
from rpo_kernels.losses import LOSSES
from rpo_kernels.rows import sum_sequences
from rpo_kernels.spec import (
    ACCUMULATOR,
    LN2,
    Objective,
    Transform,
    gathered_rows,
    target_entry,
)

LOG2E = math.log2(math.e)
FLOOR = -60 * LOG2E  # lowest exponent, in base 2
LOWEST = -1e38  # below any logit; finite, so that entries of -inf do not turn rows into NaN
# a tile of logits on a CPU: 4 MiB in fp32, a share of the last-level cache; few rows, since matmuls
# are slow where a tile has few vocabulary entries
DEFAULT_BLOCKS = tuning.Blocks(elements=2**20, rows=1024)
GPU_TILE = 2**25  # elements: 128 MiB in fp32


def tile_of(device: torch.device, dtype: torch.dtype) -> tuning.Blocks:
    """Elements and most rows of a tile: on a CPU those saved for it, if any."""
    if device.type != "cpu":
        return tuning.Blocks(GPU_TILE, GPU_TILE)
    return tuning.blocks(device, dtype, torch.get_num_threads(), DEFAULT_BLOCKS)


def _tile_shape(hidden: Tensor, max_bytes: int) -> tuple[int, int]:
    """Vocabulary entries and rows of a tile for `hidden` (n, D)."""
    tile = tile_of(hidden.device, hidden.dtype)
    rows = max(1, min(hidden.shape[0], tile.rows, max_bytes // (64 * 16)))
    entries = min(tile.elements, max_bytes // 16) // rows
    return entries // 64 * 64 if entries >= 64 else max(1, entries), rows


def _logits(hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """``weight (p, D) @ hidden (n, D)^T -> (p, n)``, float32 or float64; into `out` if it has that
    dtype.
    """
    dtype = ACCUMULATOR[hidden.dtype]
    if hidden.dtype == dtype:
        return torch.mm(weight, hidden.t(), out=out)
    if hidden.is_cuda:
        return torch.mm(weight, hidden.t(), out_dtype=dtype)
    return torch.mm(weight, hidden.t()).to(dtype)


def _base2_logits(
    tile: Tensor, bias: Tensor | None, transform: Transform
) -> tuple[Tensor, float, Tensor | None]:
    """Turn ``x (p, n)`` in place into ``y`` with ``z * log2(e) = factor * y``; also ``dz/dx (p,
    n)`` if it varies.
    """
    scale, cap = transform
    if bias is not None:
        tile.add_(bias.to(tile.dtype)[:, None])
    if cap is None:
        return tile, scale * LOG2E, None
    tile.mul_(scale / cap).tanh_()
    slope = torch.addcmul(tile.new_full((), scale), tile, tile, value=-scale)
    return tile, cap * LOG2E, slope


def _pick_targets(tile: Tensor, targets: Tensor, v0: int, out: Tensor) -> None:
    """``out[i] = tile[targets[i] - v0, i]`` wherever that row is in the tile."""
    index = targets - v0
    inside = (index >= 0) & (index < tile.shape[0])
    picked = tile.gather(0, index.clamp(0, tile.shape[0] - 1)[None])[0]
    torch.where(inside, picked, out, out=out)


def lse_and_target(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: Transform,
    max_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`Backend.lse_and_target`: one online pass over vocabulary tiles, within `max_bytes`."""
    n, dtype = hidden.shape[0], ACCUMULATOR[hidden.dtype]
    shift, sums, target = hidden.new_zeros(3, n, dtype=dtype)
    step, block = _tile_shape(hidden, max_bytes)
    for i in range(0, n, block):
        h, t, picked = (x[i : i + block] for x in (hidden, targets, target))
        scratch = hidden.new_empty(step, h.shape[0], dtype=dtype) if hidden.dtype == dtype else None
        running_max = hidden.new_full((h.shape[0],), LOWEST, dtype=dtype)
        total = torch.zeros_like(running_max)
        for v0 in range(0, weight.shape[0], step):
            w = weight[v0 : v0 + step]
            tile = _logits(h, w, None if scratch is None else scratch[: w.shape[0]])
            tile, factor, _ = _base2_logits(
                tile, None if bias is None else bias[v0 : v0 + step], transform
            )
            _pick_targets(tile, t, v0, picked)
            peak = torch.maximum(running_max, tile.amax(0) * factor)
            torch.add(-peak, tile, alpha=factor, out=tile)
            total.mul_(torch.exp2(running_max - peak)).add_(tile.clamp_(min=FLOOR).exp2_().sum(0))
            running_max = peak
        shift[i : i + block], sums[i : i + block] = running_max, total
        torch.add(-running_max, picked, alpha=factor, out=picked)
    return shift, sums, target


def exp_panel(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor,
    targets: Tensor,
    v0: int,
    transform: Transform,
    out: Tensor,
    sums: Tensor | None = None,
    target: Tensor | None = None,
    max_bytes: int = 2**24,
) -> None:
    """`Backend.exp_panel`, tile by tile in place, within `max_bytes`."""
    n, dtype = hidden.shape[0], ACCUMULATOR[hidden.dtype]
    step, block = _tile_shape(hidden, max_bytes)
    for i in range(0, n, block):
        rows = slice(i, i + block)
        h, low = hidden[rows], -shift[rows]
        for v in range(0, weight.shape[0], step):
            part = out[v : v + step, rows]
            tile = _logits(h, weight[v : v + step], part if part.dtype == dtype else None)
            tile, factor, slope = _base2_logits(
                tile, None if bias is None else bias[v : v + step], transform
            )
            torch.add(low, tile, alpha=factor, out=tile)
            if target is not None:
                _pick_targets(tile, targets[rows], v0 + v, target[rows])
            tile.clamp_(min=FLOOR).exp2_()
            if sums is not None:
                sums[rows].add_(tile.sum(0))
            if slope is not None:
                tile.mul_(slope)
            elif transform.scale != 1.0:
                tile.mul_(transform.scale)
            if part.data_ptr() != tile.data_ptr():
                part.copy_(tile)


def kept_products(
    panel: Tensor,
    size: int,
    keep: Tensor,
    weight: Tensor,
    scaled: Tensor,
    coef: Tensor,
    d_rows: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    scale: float,
) -> None:
    """`Backend.kept_products`, on gathered rows of `weight`."""
    if d_rows is not None:
        d_rows.zero_()
    lists = keep.nonzero()[:, 1].split(keep.sum(1).tolist())
    for block, index in enumerate(lists):
        rows = slice(block * size, (block + 1) * size)
        columns = panel[:, rows]
        for part in index.split(gathered_rows(weight.shape[1], panel.dtype.itemsize)):
            entries = columns.index_select(0, part)
            if d_rows is not None:
                gathered = weight.index_select(0, part).to(panel.dtype)
                _add_product(d_rows[rows], entries.t(), gathered)
            if d_weight is not None:
                product = torch.mm(entries, scaled[rows]).to(d_weight.dtype)
                d_weight.index_add_(0, part, product, alpha=scale)
            if d_bias is not None:
                product = torch.mv(entries, coef[rows].to(entries.dtype)).to(d_bias.dtype)
                d_bias.index_add_(0, part, product, alpha=scale)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out += a (m, k) @ b (k, n)``, summed in the dtype of `out` where the device can."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.add_(torch.mm(a, b))


def tail(
    logps: Tensor, offsets: Tensor, ref_logps: Tensor | None, objective: Objective
) -> tuple[Tensor, Tensor]:
    """`Backend.tail`, in float64 vectors over the pairs."""
    loss, counts, reduction = (
        LOSSES[objective.loss_type],
        offsets.diff(),
        objective.sft_reduction,
    )
    # rounded as they are reported: against them as reference, the margin is 0
    sums = sum_sequences(logps, offsets).double()
    tokens = counts.double().clamp(min=1)
    per_token = 1 / tokens if loss.mean else torch.ones_like(tokens)
    quantity = (sums - (0 if ref_logps is None else ref_logps.double())) * per_token
    live = counts.view(2, -1).sum(0) > 0
    quantity = torch.where(live.repeat(2), quantity, torch.zeros_like(quantity))
    (c, r), (s_c, s_r), half = quantity.view(2, -1), sums.view(2, -1), quantity.shape[0] // 2
    beta = objective.beta
    value, d_c, d_r = loss.pair(c, r, beta, objective.epsilon, objective.gamma)
    per_sum = 1 / tokens[:half] if reduction == "sequence_mean" else torch.ones_like(s_c)
    sft = -s_c / tokens[:half] if reduction == "sequence_mean" else -s_c
    slopes = torch.cat([d_c, d_r]) * per_token / objective.num_pairs
    slopes[:half] += objective.sft_weight * (-per_sum / objective.sft_normalizer)
    pairs = torch.stack([value * live, sft, s_c, s_r, beta * c, beta * r], dim=1)
    coef = torch.repeat_interleave(slopes, counts, output_size=logps.shape[0])
    return pairs.to(logps.dtype), coef.to(logps.dtype)


def scale_(tensor: Tensor, factor: Tensor) -> None:
    """`Backend.scale_`; a GPU without Triton multiplies by 1 too."""
    if factor.device.type != "cpu" or factor != 1:
        tensor.mul_(factor)


def target_logits(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transform: Transform,
    max_bytes: int,
) -> Tensor:
    """`Backend.target_logits`, some rows at a time."""
    found = torch.empty_like(targets, dtype=ACCUMULATOR[hidden.dtype])
    size = max(1, max_bytes // (2 * hidden.shape[1] * (hidden.itemsize + found.itemsize)))
    for start in range(0, len(targets), size):
        index = targets[start : start + size]
        w = weight.index_select(0, index).to(hidden.dtype).to(found.dtype)
        h = hidden[start : start + size, None].to(found.dtype)
        x = torch.bmm(h, w[:, :, None]).view(-1)
        if bias is not None:
            x += bias.index_select(0, index)
        found[start : start + size] = transform.logit(x) / LN2
    return found


def put_targets_(panel: Tensor, targets: Tensor, v0: int, values: Tensor) -> None:
    """`Backend.put_targets_`."""
    index = targets - v0
    inside = (index >= 0) & (index < panel.shape[0])
    index = index.clamp(0, panel.shape[0] - 1)
    columns = torch.arange(panel.shape[1], device=panel.device)
    panel[index, columns] = torch.where(inside, values.to(panel.dtype), panel[index, columns])


def finish_panel(
    panel: Tensor,
    targets: Tensor,
    shift: Tensor,
    sums: Tensor,
    target: Tensor,
    transform: Transform,
) -> Tensor:
    """`Backend.finish_panel`."""
    logps = (target - sums.log2()) * LN2
    put_targets_(panel, targets, 0, target_entry(logps, shift, sums, transform))
    return logps
