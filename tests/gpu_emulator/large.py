"""Blocks at the far end of tensors with more than 2**31 elements: 32-bit offsets would show.

    python -m emu.large --sm 80

Tensors are mostly untouched zeros, so they cost address space and not memory; only the last block
of each launch runs.
"""

from __future__ import annotations

import argparse
import math
import os

os.environ["TRITON_INTERPRET"] = "0"

import torch

from gpu_emulator.harness import gpu
from gpu_emulator.run import error


def last(name, grid):
    """The last block."""
    return [grid[0] * grid[1] * grid[2] - 1]


def lse(backend, kernels, tiles):
    """A weight of 2**31 elements: the last span of the vocabulary."""
    from rpo_kernels.spec import Transform

    vocab, width, rows = 2**20 + 77, 2056, 70
    assert vocab * width > 2**31
    make = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=make).bfloat16()
    tile = backend._config(hidden).tile
    weight = torch.zeros(vocab, width, dtype=torch.bfloat16)
    blocks = -(-vocab // tile.block_v)
    span = 3 * tile.block_v
    splits = -(-blocks // 3)
    start = (splits - 1) * span
    weight[start:] = (torch.randn(vocab - start, width, generator=make) / width**0.5).bfloat16()
    targets = torch.randint(start, vocab, (rows,), generator=make)
    partials = torch.full((2, splits, rows), math.nan)
    picked = torch.full((rows,), math.nan)
    kernels.lse_partials[(splits,)](
        **backend._operands(hidden, weight, tile), bias=None, targets=targets, partials=partials,
        target=picked, n=rows, V=vocab, span=span, splits=splits, **backend._factors(Transform()),
        GROUP=tiles.GROUP_ROWS,
    )  # fmt: skip
    logits = hidden.double() @ weight[start:].double().t() * math.log2(math.e)
    got = partials[0, -1].double() + partials[1, -1].double().log2()
    yield "lse_partials", error(got, (logits * math.log(2)).logsumexp(1) / math.log(2))
    yield "lse_partials target", error(picked, logits.gather(1, (targets - start)[:, None])[:, 0])


def panels(backend):
    """A panel of 2**31 elements: its last tile."""
    from rpo_kernels.spec import Transform

    vocab, rows, width = 40_003, 65_533, 64
    make = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, width, generator=make).bfloat16()
    weight = (torch.randn(vocab, width, generator=make) / width**0.5).bfloat16()
    targets = torch.randint(vocab - 40, vocab, (rows,), generator=make)
    shift = torch.zeros(rows)
    for name, fill in (("exp_fused", backend.exp_panel_fused), ("exp_epilogue", None)):
        out = torch.zeros(vocab, rows, dtype=torch.bfloat16)
        assert vocab * rows > 2**31
        tile = backend._config(hidden).tile
        logits = weight[-30:].double() @ hidden[-20:].double().t()
        target = torch.full((rows,), math.nan)
        if fill is None:
            out[-64:, rows - 128 : rows] = (
                weight[-64:].float() @ hidden[-128:].float().t()
            ).bfloat16()
            logits = out[-30:, rows - 20 : rows].double()
            mm, torch.mm = torch.mm, lambda *a, **k: None
            try:
                backend.exp_panel_matmul(
                    hidden, weight, None, shift, targets, 0, Transform(), out, None, target
                )
            finally:
                torch.mm = mm
            tail = out[-2:, rows - 20 : rows], logits[-2:]
        else:
            fill(hidden, weight, None, shift, targets, 0, Transform(), out, None, target, tile)
            tail = out[-30:, rows - 20 : rows], logits
        yield name, error(tail[0], tail[1].exp())


def kept(backend):
    """A panel and a gradient of 2**31 elements each: their last rows."""
    vocab, rows, width = 270_013, 8192, 8192
    assert vocab * rows > 2**31
    make = torch.Generator().manual_seed(2)
    panel = torch.zeros(vocab, rows, dtype=torch.bfloat16)
    keep = torch.zeros(rows // 256, vocab, dtype=torch.bool)
    keep[-1, -200:] = True
    panel[-200:, -256:] = torch.rand(200, 256, generator=make).bfloat16()
    weight = torch.zeros(vocab, width, dtype=torch.bfloat16)
    weight[-200:] = torch.randn(200, width, generator=make).bfloat16()
    d_rows = torch.zeros(rows, width)
    family = backend.tiles.of_device(panel.device)[0]
    tile, tile_w = backend.tiles.KEPT[family, "half"]
    from rpo_kernels.backends import triton_sparse

    triton_sparse.launch_rows(panel, 256, keep, weight, d_rows, tile)
    want = panel[-200:, -50:].double().t() @ weight[-200:, -100:].double()
    yield "kept_rows", error(d_rows[-50:, -100:], want)
    scaled = torch.zeros(rows, width, dtype=torch.bfloat16)
    scaled[-256:] = torch.randn(256, width, generator=make).bfloat16()
    d_weight = torch.zeros(vocab, width)
    triton_sparse.launch_weight(panel, 256, keep, scaled, d_weight, 1.0, tile_w)
    want = panel[-200:, -256:].double() @ scaled[-256:].double()
    done = d_weight[-200:, -tile_w.block_d :].abs().sum(1) > 0
    yield (
        f"kept_weight ({int(done.sum())} rows)",
        error(d_weight[-200:, -tile_w.block_d :][done], want[:, -tile_w.block_d :][done]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sm", type=int, default=80)
    args = parser.parse_args()
    from rpo_kernels.backends import tiles
    from rpo_kernels.backends import triton_backend as backend
    from rpo_kernels.backends import triton_kernels as kernels

    def choose(name, grid):
        if name == "kept_weight":  # kept entries come first: the last column tile of the first rows
            return list(range(min(grid[0], 512)))
        if name == "kept_rows":  # the last rows and columns, every split
            return [grid[0] * (k + 1) - 1 for k in range(grid[1])]
        return last(name, grid)

    with gpu(args.sm, blocks=choose) as driver:
        for results in (lse(backend, kernels, tiles), panels(backend), kept(backend)):
            for name, value in results:
                print(f"{name:28} {value:.2e}", flush=True)
        print(driver.report())


if __name__ == "__main__":
    main()
