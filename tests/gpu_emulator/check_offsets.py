"""Blocks at the far end of tensors with more than 2**31 elements: 32-bit offsets would show.

    PYTHONPATH=tests pytest -p gpu_emulator.plugin --sm 80 tests/gpu_emulator/check_offsets.py

Tensors are mostly untouched zeros, which cost address space and no memory, and only the last blocks
of each launch run.

Key: n rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from support import gpu_product, relative_error

from rpo_kernels.backends import tiles, triton_sparse
from rpo_kernels.backends import triton_backend as backend
from rpo_kernels.backends import triton_kernels as kernels
from rpo_kernels.spec import Transform

LOG2E = math.log2(math.e)
EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def last_blocks(driver, monkeypatch):
    """Run the last block of a launch, or as many as the test says."""

    def run(count=1):
        def choose(name, grid):
            # of every split of the lists; kept entries are the first tiles of `kept_weight`
            ends = [grid[0] * (k + 1) for k in range(grid[1])] if name == "kept_rows" else None
            if ends is not None:
                return [end - 1 for end in ends]
            total = grid[0] * grid[1] * grid[2]
            return range(count) if name == "kept_weight" else [total - 1]

        monkeypatch.setitem(driver.options, "blocks", choose)

    return run


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_plain(found, plain, truth, eps=EPS):
    """Within twice the plain expression's error, plus one `eps`."""
    error, own = relative_error(found, truth), relative_error(plain, truth)
    assert error <= 2 * own + eps, f"error {error:.3e}, plain {own:.3e}"


def test_a_weight_of_more_than_2_to_31_elements(last_blocks):
    vocab, width, rows = 2**20 + 77, 2056, 70
    assert vocab * width > 2**31
    last_blocks()
    hidden, weight = normal(0, rows, width), torch.zeros(vocab, width, dtype=torch.bfloat16)
    tile = backend._config(hidden).tile
    span = 3 * tile.block_v
    splits = -(-vocab // span)
    start = (splits - 1) * span
    weight[start:] = normal(1, vocab - start, width) / 32
    targets = torch.randint(start, vocab, (rows,))
    partials = torch.full((2, splits, rows), math.nan)
    picked = torch.full((rows,), math.nan)
    kernels.lse_partials[(splits,)](
        **backend._operands(hidden, weight, tile), bias=None, targets=targets, partials=partials,
        target=picked, n=rows, V=vocab, span=span, splits=splits, **backend._factors(Transform()),
        GROUP=tiles.GROUP_ROWS,
    )  # fmt: skip
    truth = hidden.double() @ weight[start:].double().t()
    plain = gpu_product(hidden, weight[start:].t())
    lse = partials[0, -1].double() / LOG2E + partials[1, -1].double().log()
    assert_plain(lse, plain.logsumexp(1), truth.logsumexp(1))
    index = (targets - start)[:, None]
    pick = picked.double() / LOG2E
    assert_plain(pick, plain.gather(1, index)[:, 0], truth.gather(1, index)[:, 0])


@pytest.mark.parametrize("how", ["fused", "panel"])
def test_a_panel_of_more_than_2_to_31_elements(last_blocks, how):
    vocab, rows, width = 40_003, 65_533, 64
    assert vocab * rows > 2**31
    last_blocks()
    hidden, weight = normal(2, rows, width), normal(3, vocab, width) / 8
    targets, shift = torch.randint(vocab - 40, vocab, (rows,)), torch.zeros(rows)
    out = torch.zeros(vocab, rows, dtype=torch.bfloat16)
    arguments = (targets, 0, Transform(), out, None, torch.full((rows,), math.nan))
    if how == "fused":
        tile, tail = backend._config(hidden).tile, 30
        backend.exp_panel_fused(hidden, weight, None, shift, *arguments, tile)
        logits = weight[-tail:].double() @ hidden[-20:].double().t()
    else:
        tail = 2  # of the last tile: 40,003 = 625 * 64 + 3
        out[-64:, -128:] = (weight[-64:].float() @ hidden[-128:].float().t()).bfloat16()
        logits = out[-tail:, -20:].double()
        with mock.patch.object(torch, "mm"):
            backend.exp_panel_matmul(hidden, weight, None, shift, *arguments)
    truth = logits.exp()
    assert_plain(out[-tail:, -20:], truth.bfloat16(), truth, torch.finfo(torch.bfloat16).eps)


def test_products_of_more_than_2_to_31_elements(last_blocks):
    """The last rows of the panel and of both gradients."""
    vocab, rows, width = 270_013, 8192, 8192
    assert vocab * rows > 2**31 and vocab * width > 2**31
    last_blocks(count=width // 64)
    panel = torch.zeros(vocab, rows, dtype=torch.bfloat16)
    panel[-200:, -256:] = normal(4, 200, 256).abs()
    keep = torch.zeros(rows // 256, vocab, dtype=torch.bool)
    keep[-1, -200:] = True
    weight, scaled = (torch.zeros(x, width, dtype=torch.bfloat16) for x in (vocab, rows))
    weight[-200:], scaled[-256:] = normal(5, 200, width), normal(6, 256, width)
    tile, tile_w = tiles.KEPT[tiles.of_device(panel.device)[0], "half"]
    d_rows, d_weight = torch.zeros(rows, width), torch.zeros(vocab, width)
    triton_sparse.launch_rows(panel, 256, keep, weight, d_rows, tile)
    factors = panel[-200:, -50:].t(), weight[-200:, -50:]
    truth = factors[0].double() @ factors[1].double()
    assert_plain(d_rows[-50:, -50:], gpu_product(*factors), truth)
    triton_sparse.launch_weight(panel, 256, keep, scaled, d_weight, 1.0, tile_w)
    done = d_weight[-200:, -50:].abs().sum(1) > 0
    assert done.any()
    factors = panel[-200:, -256:][done], scaled[-256:, -50:]
    truth = factors[0].double() @ factors[1].double()
    assert_plain(d_weight[-200:, -50:][done], gpu_product(*factors), truth)
