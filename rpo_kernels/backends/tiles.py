"""Tile configurations as data: one entry for every architecture family and dtype class.

None was chosen by measurement yet. The Hopper entry follows from arithmetic: a 256 x 128 x 64
step of bf16 takes 1,024 tensor-core cycles an SM and loads 48 KiB through L2, where two of 128 x
128 load 64 KiB in the same time; four such stages fill the shared memory, and 256 threads hold
the accumulator in 128 registers each. float32 products are exact FMAs without matrix units
(except on CDNA), so their tiles are small. `tests/triton/test_compile.py` compiles every entry
and checks shared memory, spills and matrix instructions. `benchmarks/autotune.py` times candidates
for these defaults, `python -m rpo_kernels.doctor` for one device, whose choice `tuning` keeps.

Key: N rows, V vocabulary, D hidden size.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

KIB = 1024


class Tile(NamedTuple):
    """A matmul tile, ``(block_n, block_d) x (block_d, block_v)``, and how it runs.

    In `KEPT` another dimension than D is summed over. `per_sm` programs fit an SM at once; `tma`:
    operands come through tensor descriptors if aligned.
    """

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    per_sm: int = 1
    tma: bool = False


class Config(NamedTuple):
    """What the launchers need to know about one architecture and dtype class.

    `tile` serves both matmul kernels. `exp_path` says who multiplies in `exp_panel`: "fused" is one
    Triton kernel, logits stay in float32 registers; "panel" is the vendor's matmul into the output,
    then one pass over it, so that logits are rounded to the output's dtype once. `hopper`: "gluon",
    the kernels of `gluon_hopper` wherever they can, in place of both. On an H100 they fill a panel
    of 8,192 rows in 1.12 (D = 2,048) and 1.03 (D = 4,096) of a bare matmul, Triton's in 1.29 and
    1.15; log-sum-exps take 1.22 and 1.18, Triton's 1.24 and 1.14.
    """

    tile: Tile
    exp_path: str
    hopper: str = "triton"


CONFIGS: dict[tuple[str, str], Config] = {
    ("sm_80", "half"): Config(Tile(128, 128, 64, 8, 4), "fused"),
    ("sm_80", "single"): Config(Tile(64, 64, 16, 4, 3, 2), "panel"),
    ("sm_86", "half"): Config(Tile(128, 128, 32, 8, 4), "fused"),
    ("sm_86", "single"): Config(Tile(64, 64, 16, 4, 3, 2), "panel"),
    ("sm_90", "half"): Config(Tile(256, 128, 64, 8, 4, 1, True), "fused", "gluon"),
    ("sm_90", "single"): Config(Tile(64, 64, 16, 4, 3, 2), "panel"),
    ("sm_100", "half"): Config(Tile(256, 128, 64, 8, 4, 1, True), "fused"),
    ("sm_100", "single"): Config(Tile(64, 64, 16, 4, 3, 2), "panel"),
    ("gfx942", "half"): Config(Tile(128, 128, 64, 4, 2), "fused"),
    ("gfx942", "single"): Config(Tile(64, 64, 32, 4, 2, 2), "panel"),
    ("interpreter", "half"): Config(Tile(64, 128, 64, 4, 1), "fused"),
    ("interpreter", "single"): Config(Tile(64, 128, 64, 4, 1), "fused"),
}

# the tiles of `triton_sparse`: (block_n, block_v) x (block_v, block_d) for the rows, and
# (block_v, block_n) x (block_n, block_d) for the weight, where a small block_v computes less that
# was not kept
KEPT: dict[tuple[str, str], tuple[Tile, Tile]] = {
    ("sm_80", "half"): (Tile(128, 64, 128, 8, 4), Tile(64, 128, 128, 8, 4)),
    ("sm_80", "single"): (Tile(64, 16, 64, 4, 3, 2), Tile(16, 64, 64, 4, 3, 2)),
    ("sm_86", "half"): (Tile(128, 32, 128, 4, 4, 2), Tile(32, 128, 128, 8, 4)),
    ("sm_86", "single"): (Tile(64, 16, 64, 4, 3, 2), Tile(16, 64, 64, 4, 3, 2)),
    ("sm_90", "half"): (Tile(256, 64, 128, 8, 4), Tile(64, 128, 256, 8, 4)),
    ("sm_90", "single"): (Tile(64, 16, 64, 4, 3, 2), Tile(16, 64, 64, 4, 3, 2)),
    ("sm_100", "half"): (Tile(256, 64, 128, 8, 4), Tile(64, 128, 256, 8, 4)),
    ("sm_100", "single"): (Tile(64, 16, 64, 4, 3, 2), Tile(16, 64, 64, 4, 3, 2)),
    ("gfx942", "half"): (Tile(128, 64, 128, 4, 2), Tile(64, 128, 128, 4, 2)),
    ("gfx942", "single"): (Tile(64, 32, 64, 4, 2, 2), Tile(32, 64, 64, 4, 2, 2)),
    ("interpreter", "half"): (Tile(32, 32, 64, 4, 1), Tile(32, 32, 64, 4, 1)),
    ("interpreter", "single"): (Tile(32, 32, 64, 4, 1), Tile(32, 32, 64, 4, 1)),
}

SHARED_LIMIT = {
    "sm_80": 163 * KIB,
    "sm_86": 99 * KIB,
    "sm_90": 227 * KIB,
    "sm_100": 227 * KIB,
    "gfx942": 64 * KIB,
}

# row blocks in flight together: their hidden states (2 MiB each at D = 4096 in bf16) stay in L2
GROUP_ROWS = 8
GROUP_VOCAB = 8  # vocabulary blocks that take turns on a row block in `exp_panel`
MERGE_SPLITS, MERGE_ROWS = 64, 32  # tile of the merge of partial log-sum-exps
EPILOGUE_VOCAB, EPILOGUE_ROWS = 64, 128  # tile of the pass over a panel of logits
TAIL_TOKENS = 1024  # log-probs summed at a time
PICK_ROWS, PICK_WIDTH = 4, 512  # tile of the targets' logits
TARGET_ROWS = 128  # rows whose targets' entries are placed at a time: one a thread
SCALE_BLOCK = 4096  # elements of a gradient multiplied at a time
# row blocks of one pass of `triton_sparse.kept_weight`, at most 16: a pass reads and writes float32
# dW; entries are grouped by which of these blocks keep them, and more blocks mean more patterns
SPAN = 8


@functools.cache
def of_device(device: torch.device) -> tuple[str, int]:
    """The family of `CONFIGS` and the number of multiprocessors."""
    import triton

    if triton.knobs.runtime.interpret:
        return "interpreter", 4
    found = torch.cuda.get_device_properties(device)
    family = cuda_family(found.major, found.minor) if torch.version.hip is None else "gfx942"
    return family, found.multi_processor_count


def cuda_family(major: int, minor: int) -> str:
    """The entry for a CUDA compute capability: the newest family that it has all features of."""
    if (major, minor) == (8, 0):
        return "sm_80"
    if major == 9:
        return "sm_90"
    if major in (10, 11):
        return "sm_100"
    return "sm_86"


def dtype_class(itemsize: int) -> str:
    """The "half" (2 bytes) or "single" (4 bytes) column of `CONFIGS`."""
    return "half" if itemsize == 2 else "single"


def precision() -> str:
    """How `tl.dot` multiplies float32: exactly, unless PyTorch's own matmuls may use TF32."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def sum_precision() -> str:
    """How `tl.dot` multiplies float32 for a log-sum-exp: three TF32 products where `precision` says
    one. Triton cuts operands to TF32, the vendor's matmul of a panel rounds them: what the panel's
    entries are divided by must not be biased against them.
    """
    return "tf32x3" if precision() == "tf32" else "ieee"


def choose_splits(row_blocks: int, vocab_blocks: int, slots: int, most: int) -> int:
    """Into how many spans to cut the vocabulary, so that ``row_blocks * splits`` fills `slots`.

    The time is about waves times blocks of a span; the fewest splits with the least of that win.
    At least ``slots / GROUP_ROWS`` spans run side by side if there are rows enough, so that the
    rows in flight stay in L2.

    Args:
        row_blocks, vocab_blocks: blocks of each kind.
        slots: programs that run at once. most: bound from memory.
    """
    top = max(1, min(vocab_blocks, most, 4 * slots))
    low = min(top, -(-slots // GROUP_ROWS)) if row_blocks > GROUP_ROWS else 1

    def time(splits: int) -> int:
        return -(-row_blocks * splits // slots) * -(-vocab_blocks // splits)

    return min(range(low, top + 1), key=lambda splits: (time(splits), splits))
