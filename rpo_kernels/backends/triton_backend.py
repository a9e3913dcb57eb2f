"""Launchers of the Triton kernels: choose tiles, allocate partials, launch by keyword.

The maths is in `triton_kernels`. float32 products are exact ("ieee") unless
``torch.backends.cuda.matmul`` allows TF32, as for PyTorch's own matmuls.

Key: n rows, D hidden size, V vocabulary, p panel entries, B pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rpo_kernels import tuning
from rpo_kernels.backends import gluon_hopper, tiles
from rpo_kernels.backends import triton_kernels as kernels
from rpo_kernels.backends.launch import base2_factors, blocks, dense, on_device, reach_of, slope
from rpo_kernels.backends.triton_sparse import kept_products
from rpo_kernels.backends.triton_tail import scale_, tail
from rpo_kernels.backends.triton_targets import finish_panel, put_targets_, target_logits
from rpo_kernels.spec import Transform

__all__ = [
    "exp_panel",
    "finish_panel",
    "kept_products",
    "lse_and_target",
    "put_targets_",
    "scale_",
    "supports",
    "tail",
    "target_logits",
]


def supports(hidden: Tensor) -> None:
    """Return if the kernels can run on tensors like `hidden`.

    Raises:
        RuntimeError: they cannot; the message says what to do.
    """
    if hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise RuntimeError(
            f"backend='triton': expected float32, bfloat16 or float16, got {hidden.dtype}; "
            "pass backend='torch'"
        )
    if kernels.INTERPRETED.value:
        return gluon_hopper.check(hidden)
    if not hidden.is_cuda:
        raise RuntimeError(
            f"backend='triton': expected tensors on a GPU, got {hidden.device}; "
            "pass backend='torch', or set TRITON_INTERPRET=1 before the first import of triton to "
            "interpret the kernels"
        )
    if torch.version.hip is None and torch.cuda.get_device_capability(hidden.device) < (8, 0):
        raise RuntimeError(
            "backend='triton': expected compute capability 8.0 or newer; pass backend='torch'"
        )
    gluon_hopper.check(hidden)


def _config(hidden: Tensor) -> tuning.Kernels:
    return tuning.kernels(hidden.device, hidden.dtype)


def _operands(hidden: Tensor, weight: Tensor, tile: tiles.Tile) -> dict:
    """The matmul's arguments: descriptors if `tile` asks and alignment allows, else pointers."""
    hw = {"hidden": hidden, "weight": weight}
    tma = tile.tma and all(
        t.data_ptr() % 16 == 0 and t.stride(0) * t.itemsize % 16 == 0 for t in hw.values()
    )
    if tma:
        blocks = {"hidden": [tile.block_n, tile.block_d], "weight": [tile.block_v, tile.block_d]}
        operands = {
            k: TensorDescriptor(t, list(t.shape), list(t.stride()), blocks[k])
            for k, t in hw.items()
        }
    return (operands if tma else hw) | {
        "stride_hn": hidden.stride(0),
        "stride_wv": weight.stride(0),
        "D": hidden.shape[1],
        "TMA": tma,
        "PRECISION": tiles.precision(),
        "BLOCK_N": tile.block_n,
        "BLOCK_V": tile.block_v,
        "BLOCK_D": tile.block_d,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }


def lse_partials(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    partials: Tensor,
    target: Tensor,
    span: int,
    transform: Transform,
) -> None:
    """Partial log-sum-exps over spans of the vocabulary; `gluon_hopper` has the same."""
    n, splits, tile = hidden.shape[0], partials.shape[1], _config(hidden).tile
    kernels.lse_partials[(blocks(n, tile.block_n) * splits,)](
        **_operands(hidden, weight, tile) | {"PRECISION": tiles.sum_precision()},
        bias=dense(bias),
        targets=dense(targets),
        partials=partials,
        target=target,
        n=n,
        V=weight.shape[0],
        span=span,
        splits=splits,
        **base2_factors(transform),
        GROUP=tiles.GROUP_ROWS,
    )


def lse_and_target(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: Transform,
    max_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`Backend.lse_and_target` in two kernels: no logit reaches memory, only partial sums, 8 bytes
    a row and split of the vocabulary.
    """
    n, vocab, tile = hidden.shape[0], weight.shape[0], _config(hidden).tile
    gluon = gluon_hopper.takes_sums(hidden, weight, transform)
    # every row begins at a multiple of 16 bytes: Triton compiles for one alignment only
    shift, sums, target = hidden.new_zeros(3, blocks(n, 4) * 4, dtype=torch.float32)[:, :n]
    slots = tiles.of_device(hidden.device)[1] * tile.per_sm
    least = min(blocks(vocab, tile.block_v), blocks(slots, tiles.GROUP_ROWS))
    step = max(tile.block_n, max_bytes // (8 * least) // tile.block_n * tile.block_n)
    for i in range(0, n, step):
        h = hidden[i : i + step]
        rows = h.shape[0]
        row_blocks, vocab_blocks = blocks(rows, tile.block_n), blocks(vocab, tile.block_v)
        splits = tiles.choose_splits(row_blocks, vocab_blocks, slots, max_bytes // (8 * rows))
        each = blocks(vocab_blocks, splits)
        splits = blocks(vocab_blocks, each)
        partials = hidden.new_empty(2, splits, rows, dtype=torch.float32)
        with on_device(hidden):
            sum_up = gluon_hopper.lse_partials if gluon else lse_partials
            part = (bias, targets[i : i + step], partials, target[i : i + step])
            sum_up(h, weight, *part, each * tile.block_v, transform)
            kernels.lse_merge[(blocks(rows, tiles.MERGE_ROWS),)](
                partials=partials,
                shift=shift[i : i + step],
                sums=sums[i : i + step],
                n=rows,
                splits=splits,
                BLOCK_S=tiles.MERGE_SPLITS,
                BLOCK_N=tiles.MERGE_ROWS,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return shift, sums, target - shift


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
    """`Backend.exp_panel`, with ``out.stride(1) == 1``.

    `max_bytes` is not used: the only temporaries are partial sums, 1/64 of a bf16 panel.
    """
    if out.numel() == 0:
        return
    config = _config(hidden)
    matmul_first = config.exp_path == "panel" and out.dtype == hidden.dtype
    launch = exp_panel_matmul if matmul_first else exp_panel_fused
    if gluon_hopper.takes_panel(hidden, weight, out):
        launch = gluon_hopper.exp_panel
    with on_device(hidden):
        panel = (bias, shift, targets, v0, transform, out, sums, target)
        launch(hidden, weight, *panel, config.tile)


def _panel_arguments(
    bias: Tensor | None,
    shift: Tensor,
    targets: Tensor,
    v0: int,
    transform: Transform,
    out: Tensor,
    part_sum: Tensor | None,
    target: Tensor | None,
) -> dict:
    """What both kernels that fill a panel take for its epilogue."""
    reach = reach_of(out)
    return {
        "bias": dense(bias),
        "shift": dense(shift),
        "targets": dense(targets),
        "out": out.as_strided((out.shape[0], reach), out.stride()),
        "part_sum": part_sum,
        "target": target,
        "n": out.shape[1],
        "reach": reach,
        "p": out.shape[0],
        "v0": v0,
        "stride_ov": out.stride(0),
        "slope": slope(transform),
        "enable_fp_fusion": True,
    } | base2_factors(transform)


def exp_panel_fused(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor,
    targets: Tensor,
    v0: int,
    transform: Transform,
    out: Tensor,
    sums: Tensor | None,
    target: Tensor | None,
    tile: tiles.Tile,
) -> None:
    """`exp_panel` in one kernel: logits stay in float32 registers."""
    n, parts = out.shape[1], blocks(out.shape[0], tile.block_v)
    part_sum = None if sums is None else hidden.new_empty(parts, n, dtype=torch.float32)
    arguments = _panel_arguments(bias, shift, targets, v0, transform, out, part_sum, target)
    grid = (parts * blocks(n, tile.block_n),)
    kernels.exp_fused[grid](**_operands(hidden, weight, tile) | arguments, GROUP=tiles.GROUP_VOCAB)
    if sums is not None and part_sum is not None:
        sums.add_(part_sum.sum(0))


def exp_panel_matmul(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor,
    targets: Tensor,
    v0: int,
    transform: Transform,
    out: Tensor,
    sums: Tensor | None,
    target: Tensor | None,
    tile: tiles.Tile | None = None,
) -> None:
    """`exp_panel` as the vendor's matmul into `out`, in its dtype, and one pass in place."""
    torch.mm(weight, hidden.t(), out=out)
    n, parts = out.shape[1], blocks(out.shape[0], tiles.EPILOGUE_VOCAB)
    part_sum = None if sums is None else hidden.new_empty(parts, n, dtype=torch.float32)
    kernels.exp_epilogue[(parts, blocks(n, tiles.EPILOGUE_ROWS))](
        **_panel_arguments(bias, shift, targets, v0, transform, out, part_sum, target),
        BLOCK_N=tiles.EPILOGUE_ROWS,
        BLOCK_V=tiles.EPILOGUE_VOCAB,
        num_warps=8,
    )
    if sums is not None and part_sum is not None:
        sums.add_(part_sum.sum(0))
