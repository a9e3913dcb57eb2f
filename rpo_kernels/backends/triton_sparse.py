"""The kept part of a panel's two matmuls: two Triton kernels, and what says who computes what.

Each block of `size` rows keeps its own vocabulary entries. ``panel^T @ W`` sums over entries, so a
program walks the list of its block. ``panel @ scaled`` sums over rows, so a program owns a tile of
entries and walks the row blocks that keep any of them; what others of the tile did not keep is
computed all the same, which only drops less. So a tile should hold entries kept by the same blocks:
they are sorted by the position in a Gray code of the bits that say which blocks keep them. On real
answers (4,096 rows in 16 blocks, 27 % kept, tiles of 128 entries, 8 blocks a pass) 29 % is
computed, against 52 % if sorted by the number of blocks.

Every output has one writer, every sum a fixed order, and nothing here waits for the device.

Key: n rows, g row blocks, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpo_kernels import tuning
from rpo_kernels.backends import tiles
from rpo_kernels.backends.launch import on_device
from rpo_kernels.backends.triton_kernels import INTERPRETED, _quarters

MOST_SPLITS = 4  # of a block's list, where there are fewer tiles than multiprocessors


@triton.jit
def _multiply(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b``."""
    if INTERPRETED:  # the interpreter multiplies bf16 as raw bits
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["n", "V", "splits"])
def kept_rows(
    panel,  # (V, n), stride (stride_pv, 1)
    weight,  # (V, D), stride (stride_wv, 1)
    entries,  # (g, V) int32: what a block keeps comes first
    counts,  # (g,) int32: how many that are
    out,  # (splits, n, D) float32, stride (n * stride_on, stride_on, 1)
    n,
    readable,  # columns of panel that may be read: at least n, a multiple of 16 if possible
    V,
    splits,
    stride_pv,
    stride_wv,
    stride_on,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``out[i, d] = sum_(v kept by the block of i) panel[v, i] * weight[v, d]``.

    Grid (tiles of D * tiles of rows, splits), tiles of D fastest: they share the panel.

    .                                  i                            D →
        entries  v [ . . . | . . ]     v  [ panel ]^T   x   v  [ . . | weight | . . ]
                   one split: BLOCK_V rows are gathered at a time
    """
    tiles_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pid_n = tl.program_id(0) // tiles_d
    offs_d = tl.program_id(0) % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    block = pid_n * BLOCK_N // SIZE
    count = tl.load(counts + block)
    share = tl.cdiv(tl.cdiv(count, BLOCK_V), splits) * BLOCK_V
    start = tl.program_id(1) * share
    stop = tl.minimum(start + share, count)
    first = entries + block.to(tl.int64) * V
    last = tl.maximum(stop - 1, 0)  # taken again, times zero, beyond the end
    offs_v = tl.arange(0, BLOCK_V)
    v = tl.load(first + tl.minimum(start + offs_v, last)).to(tl.int64)
    acc = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for k in range(start, stop, BLOCK_V):
        tile_p = tl.load(
            panel + v[None, :] * stride_pv + rows[:, None],
            mask=(offs_v < stop - k)[None, :] & (rows < readable)[:, None],
            other=0.0,
        )
        w_ptrs = weight + v[:, None] * stride_wv + offs_d[None, :]
        if D % BLOCK_D == 0:
            tile_w = tl.load(w_ptrs)
        else:
            tile_w = tl.load(w_ptrs, mask=(offs_d < D)[None, :], other=0.0)
        # for the next turn: were it loaded there, Triton would not prefetch both tiles
        v = tl.load(first + tl.minimum(k + BLOCK_V + offs_v, last)).to(tl.int64)
        acc = _multiply(tile_p, tile_w.to(tile_p.dtype), acc, PRECISION)
    part = out + tl.program_id(1).to(tl.int64) * n * stride_on
    tl.store(
        part + offs_n[:, None] * stride_on + offs_d[None, :],
        acc,
        mask=(offs_n < n)[:, None] & (offs_d < D)[None, :],
    )


@triton.jit
def _add_step(
    acc, panel, scaled, walk, k, v, offs_d, n, stride_pv, stride_sn,
    D: tl.constexpr, SIZE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """``acc + panel[v, rows] @ scaled[rows, d]`` for the BLOCK_N rows of step `k` of the walk."""
    steps: tl.constexpr = SIZE // BLOCK_N
    block = ((walk >> (4 * (k // steps))) & 15).to(tl.int32)
    offs_n = block * SIZE + k % steps * BLOCK_N + tl.arange(0, BLOCK_N)
    p_ptrs = panel + v[:, None] * stride_pv + offs_n[None, :]
    s_ptrs = scaled + offs_n.to(tl.int64)[:, None] * stride_sn + offs_d[None, :]
    if RAGGED:
        tile_p = tl.load(p_ptrs, mask=(offs_n < n)[None, :], other=0.0)
        tile_s = tl.load(s_ptrs, mask=(offs_n < n)[:, None] & (offs_d < D)[None, :], other=0.0)
    elif D % BLOCK_D == 0:
        tile_p = tl.load(p_ptrs)
        tile_s = tl.load(s_ptrs)
    else:
        tile_p = tl.load(p_ptrs)
        tile_s = tl.load(s_ptrs, mask=(offs_d < D)[None, :], other=0.0)
    return _multiply(tile_p, tile_s, acc, PRECISION)


@triton.jit(do_not_specialize=["n", "V"])
def kept_weight(
    panel,  # (V, n), stride (stride_pv, 1)
    scaled,  # (n, D), stride (stride_sn, 1)
    order,  # (V,) int32: entries, tile after tile
    walks,  # (tiles,) int64: the row blocks that a tile needs, 4 bits each, lowest first
    counts,  # (tiles,) int32: how many these are
    out,  # (V, D) float32, stride (stride_ov, 1)
    scale,
    n,
    V,
    stride_pv,
    stride_sn,
    stride_ov,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``out[v, d] += scale * sum_(i in the blocks of the tile of v) panel[v, i] * scaled[i, d]``.

    Grid (tiles of D * tiles of entries,), tiles of D fastest: they share the panel.

    .        n →                               D →
        v  [ tile | skipped | tile ]  x  n [ scaled ]  →  added to the gathered rows v of out
    """
    tiles_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    steps: tl.constexpr = SIZE // BLOCK_N
    pid_v = tl.program_id(0) // tiles_d
    pid_d = tl.program_id(0) % tiles_d
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    v = tl.load(order + tl.minimum(offs_v, V - 1)).to(tl.int64)
    walk = tl.load(walks + pid_v)
    count = tl.load(counts + pid_v)
    acc = tl.zeros((BLOCK_V, BLOCK_D), dtype=tl.float32)
    # only the last step can lie partly beyond n
    final = tl.maximum(count - 1, 0)
    rest = n - ((walk >> (4 * final)) & 15).to(tl.int32) * SIZE  # rows from the last block on
    total = final * steps + tl.minimum(tl.cdiv(rest, BLOCK_N), steps)
    total = tl.where(count > 0, total, 0)
    whole = tl.where((rest < SIZE) & (rest % BLOCK_N > 0), tl.maximum(total - 1, 0), total)
    for k in range(0, whole):
        acc = _add_step(
            acc, panel, scaled, walk, k, v, offs_d, n, stride_pv, stride_sn,
            D, SIZE, PRECISION, BLOCK_N, BLOCK_D, False,
        )  # fmt: skip
    for k in tl.range(whole, total, num_stages=1):
        acc = _add_step(
            acc, panel, scaled, walk, k, v, offs_d, n, stride_pv, stride_sn,
            D, SIZE, PRECISION, BLOCK_N, BLOCK_D, True,
        )  # fmt: skip
    quarters = _quarters(acc)
    mask_v = offs_v < tl.where(count > 0, V, 0)
    for k in tl.static_range(4):
        offs_d = pid_d * BLOCK_D + k * (BLOCK_D // 4) + tl.arange(0, BLOCK_D // 4)
        tile = out + v[:, None] * stride_ov + offs_d[None, :]
        mask = mask_v[:, None] & (offs_d < D)[None, :]
        tl.store(tile, tl.load(tile, mask=mask, other=0.0) + scale * quarters[k], mask=mask)


def kept_first(keep: Tensor) -> tuple[Tensor, Tensor]:
    """``(g, V)`` int32, for each row of `keep` (g, V) what it keeps, ascending, then the rest; and
    how many it keeps, (g,) int32.
    """
    rank = keep.cumsum(1, dtype=torch.int32)
    numbers = torch.arange(keep.shape[1], dtype=torch.int32, device=keep.device)
    place = torch.where(keep, rank - 1, rank[:, -1:] + numbers - rank)
    entries = torch.empty_like(rank)
    entries.scatter_(1, place.long(), numbers.expand(keep.shape))
    return entries, rank[:, -1].contiguous()


def plan(keep: Tensor, block_v: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles of entries kept by the same row blocks.

    Args:
        keep: (g, V) bool, g <= 16. block_v: entries of a tile.

    Returns:
        ``order``, ``walks`` and ``counts`` of `kept_weight`.
    """
    blocks, vocab = keep.shape
    numbers = torch.arange(blocks, device=keep.device)[:, None]
    position = (keep.long() << numbers).sum(0)
    for shift in (1, 2, 4, 8):
        position = position ^ (position >> shift)
    order = position.to(torch.int32).argsort(descending=True, stable=True)
    tiles_v = -(-vocab // block_v)
    flags = torch.zeros(blocks, tiles_v * block_v, dtype=torch.bool, device=keep.device)
    flags[:, :vocab] = keep[:, order]
    flags = flags.view(blocks, tiles_v, block_v).any(2)
    rank = flags.cumsum(0)
    walks = torch.where(flags, numbers << (4 * (rank - 1).clamp(min=0)), 0).sum(0)
    return order.to(torch.int32), walks, rank[-1].to(torch.int32)


def launch_rows(
    panel: Tensor, size: int, keep: Tensor, weight: Tensor, out: Tensor, tile: tiles.Tile
) -> None:
    """``out (n, D) = panel^T @ weight`` over the entries that each block keeps."""
    (n, width), vocab = out.shape, panel.shape[0]
    entries, counts = kept_first(keep)
    readable = -(-n // 16) * 16
    end = panel.storage_offset() + (vocab - 1) * panel.stride(0) + readable
    if panel.stride(0) % 16 or end * panel.itemsize > panel.untyped_storage().nbytes():
        readable = n
    programs = -(-n // tile.block_n) * -(-width // tile.block_d)
    slots = tiles.of_device(panel.device)[1] * tile.per_sm
    splits = min(MOST_SPLITS, max(1, slots // programs))
    parts = out[None] if splits == 1 else out.new_empty(splits, n, width)
    wide = weight.dtype != panel.dtype  # autocast: the weight's tile is twice as large
    kept_rows[(programs, splits)](
        panel=panel,
        weight=weight,
        entries=entries,
        counts=counts,
        out=parts,
        n=n,
        readable=readable,
        V=vocab,
        splits=splits,
        stride_pv=panel.stride(0),
        stride_wv=weight.stride(0),
        stride_on=parts.stride(1),
        D=width,
        SIZE=size,
        num_stages=max(1, tile.num_stages // 2) if wide else tile.num_stages,
        **_shape(tile, size),
    )
    if splits > 1:
        torch.sum(parts, 0, out=out)


def launch_weight(
    panel: Tensor,
    size: int,
    keep: Tensor,
    scaled: Tensor,
    out: Tensor,
    scale: float,
    tile: tiles.Tile,
    span: int,
) -> None:
    """``out (V, D) += scale * panel @ scaled`` over at least the entries that each block keeps,
    `span` blocks a pass.
    """
    vocab, width = out.shape
    for first in range(0, keep.shape[0], span):
        part = panel[:, first * size : (first + span) * size]
        order, walks, counts = plan(keep[first : first + span], tile.block_v)
        kept_weight[(counts.shape[0] * -(-width // tile.block_d),)](
            panel=part,
            scaled=scaled[first * size : (first + span) * size],
            order=order,
            walks=walks,
            counts=counts,
            out=out,
            scale=float(scale),
            n=part.shape[1],
            V=vocab,
            stride_pv=part.stride(0),
            stride_sn=scaled.stride(0),
            stride_ov=out.stride(0),
            D=width,
            SIZE=size,
            num_stages=tile.num_stages,
            **_shape(tile, size),
        )


def _shape(tile: tiles.Tile, size: int) -> dict:
    """The launch arguments that both kernels share."""
    assert size % tile.block_n == 0, (size, tile)
    return {
        "PRECISION": tiles.precision(),
        "BLOCK_N": tile.block_n,
        "BLOCK_V": tile.block_v,
        "BLOCK_D": tile.block_d,
        "num_warps": tile.num_warps,
        "enable_fp_fusion": True,
    }


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
    """`Backend.kept_products`, for `size` a multiple of 32; `d_weight` and `d_bias` may get more
    than what is kept.
    """
    if panel.numel() == 0:
        return
    own = tuning.kernels(panel.device, panel.dtype)
    with on_device(panel):
        if d_rows is not None:
            launch_rows(panel, size, keep, weight, d_rows, own.kept_rows)
        if d_weight is not None:
            tile = own.kept_weight
            launch_weight(panel, size, keep, scaled, d_weight, scale, tile, own.span)
    if d_bias is not None:
        for block, kept in enumerate(keep):
            rows = slice(block * size, (block + 1) * size)
            product = torch.mv(panel[:, rows], coef[rows].to(panel.dtype))
            d_bias.add_(torch.where(kept, product, 0).to(d_bias.dtype), alpha=scale)
