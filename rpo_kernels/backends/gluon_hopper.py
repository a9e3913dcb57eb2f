"""Chooses and launches the Hopper kernels of `gluon_kernels`.

They are the default on compute capability 9.0 for bfloat16 and float16, with a Triton that they
were tested with. ``RPO_KERNELS_HOPPER=triton`` leaves them out, ``gluon`` insists on them whatever
Triton there is; `python -m rpo_kernels.doctor --save` keeps what is faster. These keep to
`triton_kernels` all the same:

    float32 operands, and a float32 panel of half-precision operands
    an operand or a panel whose rows do not begin at multiples of 16 bytes: TMA cannot address it
    a panel of ragged rows whose padding may not be written: TMA stores whole units of 16 bytes
    log-sum-exps under a negative scale: the largest logit is that of the smallest product

Key: n rows, D hidden size, V vocabulary, p panel entries.
"""

from __future__ import annotations

import functools
import os
import re
from types import ModuleType

import torch
import triton
from torch import Tensor

from rpo_kernels import tuning
from rpo_kernels.backends import tiles
from rpo_kernels.backends.launch import base2_factors, blocks, dense, reach_of, slope
from rpo_kernels.spec import Transform

VARIABLE = "RPO_KERNELS_HOPPER"
OLDEST, NEWEST = (3, 6), (3, 8)  # releases of Triton
CHOICES = tuning.HOPPER
ROWS, VOCAB, WIDTH = 256, 128, 64  # a tile and its step, half of its rows a consumer's
UNIT = 8  # half-precision elements that TMA stores together
PART = 32  # vocabulary entries of a tile that are stored at a time
STAGES = 4  # slots of 48 KiB; with 32 KiB of buffers for stores 224 of the 227 KiB there are
# slots by which the second consumer follows: of 512 tensor-core cycles each, where an epilogue's
# 128 EX2 a thread take 1,024
LAG = 2


def wanted(like: Tensor | None = None) -> bool:
    """Whether the environment asks for the Gluon kernels, or, where it says nothing, what was saved
    for tensors like `like`, or the default.

    Raises:
        ValueError: `VARIABLE` is set to something else than `CHOICES`.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", *CHOICES):
        raise ValueError(
            f"{VARIABLE}: expected one of {', '.join(CHOICES)}, got {asked!r}; unset it for the "
            "device's default"
        )
    if like is None or (asked and not tuning.is_trial()):
        return asked == "gluon"
    return tuning.kernels(like.device, like.dtype).hopper == "gluon" and tested()


@functools.cache
def tested() -> bool:
    """Whether this Triton is one that the kernels were tested with."""
    found = tuple(int(number) for number in re.findall(r"\d+", triton.__version__)[:2])
    return OLDEST <= found <= NEWEST


@functools.cache
def kernels() -> ModuleType:
    """`gluon_kernels`, imported where it is asked for only.

    Raises:
        RuntimeError: the Triton that is installed has no Gluon, or another one.
    """
    try:
        from rpo_kernels.backends import gluon_kernels
    except (ImportError, AttributeError, TypeError) as error:
        raise RuntimeError(
            f"{VARIABLE}=gluon: expected a Triton with Gluon as in 3.6 to 3.8, got Triton "
            f"{triton.__version__} ({error}); install triton==3.7.1, or unset {VARIABLE}"
        ) from error
    return gluon_kernels


def check(hidden: Tensor) -> None:
    """Return if what the environment asks for can run on tensors like `hidden`, or it asks nothing.

    Raises:
        ValueError: `VARIABLE` is neither of `CHOICES`.
        RuntimeError: the device is no Hopper GPU, or Triton lacks what the kernels need.
    """
    if not wanted():
        return
    family = tiles.of_device(hidden.device)[0]
    if family != "sm_90":
        raise RuntimeError(
            f"{VARIABLE}=gluon: expected a GPU of compute capability 9.0, got {family}; "
            f"unset {VARIABLE}"
        )
    kernels()


def _addressable(tensor: Tensor) -> bool:
    """Whether every row of a matrix begins at a multiple of 16 bytes."""
    step = tensor.stride(0) * tensor.itemsize
    return tensor.data_ptr() % 16 == 0 and step % 16 == 0 and tensor.stride(1) == 1


def takes_panel(hidden: Tensor, weight: Tensor, out: Tensor) -> bool:
    """Whether `exp_panel` is to fill ``out (p, n)``; `hidden` (n, D), `weight` (p, D)."""
    if not wanted(hidden) or hidden.dtype.itemsize != 2 or out.dtype != hidden.dtype:
        return False
    if out.shape[1] % UNIT and reach_of(out) == out.shape[1]:
        return False
    return all(_addressable(matrix) for matrix in (hidden, weight, out))


def takes_sums(hidden: Tensor, weight: Tensor, transform: Transform) -> bool:
    """Whether `lse_partials` is to run on `hidden` (n, D) and `weight` (V, D)."""
    if not wanted(hidden) or hidden.dtype.itemsize != 2:
        return False
    rising = transform.softcap is not None or transform.scale > 0
    return rising and _addressable(hidden) and _addressable(weight)


@functools.cache
def _layout(dtype: torch.dtype, rows: int, columns: int):
    """How shared memory holds a tile: the same for every launch, and slow to find."""
    from triton.experimental.gluon import language as gl

    kind = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for([rows, columns], kind)


def _described(matrix: Tensor, rows: int, columns: int):
    """A Gluon tensor descriptor of `matrix` for tiles of rows x columns."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    shape, strides = list(matrix.shape), list(matrix.stride())
    layout = _layout(matrix.dtype, rows, columns)
    return TensorDescriptor(matrix, shape, strides, [rows, columns], layout)


def _operands(hidden: Tensor, weight: Tensor) -> dict:
    """What both kernels take for the matmul."""
    width, steps = hidden.shape[1], blocks(hidden.shape[1], WIDTH)
    # the first consumer must not be two tiles ahead: `lead` tells apart even and odd ones only
    apart = steps > LAG and steps + LAG > STAGES
    return {
        "hidden": _described(hidden, VOCAB, WIDTH),
        "weight": _described(weight, VOCAB, WIDTH),
        "D": width,
        "STAGES": STAGES,
        "LAG": LAG if apart else 0,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }


def _programs(hidden: Tensor, jobs: int) -> tuple[int]:
    return (min(jobs, tiles.of_device(hidden.device)[1]),)


def exp_panel(
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
    """`Backend.exp_panel` where `takes_panel` says so; the `tile` is the kernel's own."""
    p, n = out.shape
    splits = blocks(p, VOCAB)
    part_sum = None if sums is None else hidden.new_empty(splits, n, dtype=torch.float32)
    kernels().exp_fused_hopper[_programs(hidden, splits * blocks(n, ROWS))](
        **_operands(hidden, weight) | base2_factors(transform),
        out=_described(out.as_strided((p, reach_of(out)), out.stride()), PART, VOCAB),
        bias=dense(bias),
        shift=dense(shift),
        targets=dense(targets),
        part_sum=part_sum,
        target=target,
        n=n,
        p=p,
        v0=v0,
        splits=splits,
        slope=slope(transform),
        GROUP=tiles.GROUP_VOCAB,
    )
    if sums is not None and part_sum is not None:
        sums.add_(part_sum.sum(0))


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
    """Partial log-sum-exps over spans of the vocabulary where `takes_sums` says so.

    Args:
        hidden: (n, D). weight: (V, D). bias: (V,) or None. targets: (n,) int64.
        partials: (2, splits, n) float32, written: largest logit and sum, in base 2.
        target: (n,) float32, set to the target's base-2 logit.
        span: vocabulary entries of a split, a multiple of `VOCAB`.
        transform: scale, above 0, and softcap.
    """
    n, splits = hidden.shape[0], partials.shape[1]
    kernels().lse_partials_hopper[_programs(hidden, splits * blocks(n, ROWS))](
        **_operands(hidden, weight) | base2_factors(transform),
        bias=dense(bias),
        targets=dense(targets),
        partials=partials,
        target=target,
        n=n,
        V=weight.shape[0],
        span=span,
        splits=splits,
        GROUP=tiles.GROUP_ROWS,
    )
