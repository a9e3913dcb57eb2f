"""Turns a parsed kernel into the bytecode of `vm.c`.

Registers, constants and special registers get places in a warp's register file: 128 bytes for 32
lanes of 32 bits (16-bit registers too), 256 bytes for 64 bits. Predicates are bit masks elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.gpu_emulator import isa
from tests.gpu_emulator.ptx import Kernel, Statement

SPECIAL = ["%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ntid.y", "%ntid.z", "%ctaid.x", "%ctaid.y",
           "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid", "%warpid"]  # fmt: skip
LONE_OPS = ["BRA", "RET", "LD_PARAM", "LD_GLOBAL", "ST_GLOBAL", "LD_SHARED", "ST_SHARED",
            "CP_ASYNC", "FENCE_PROXY", "NOP", "PACK", "UNPACK", "MBAR_INIT", "MBAR_INVAL",
            "MBAR_ARRIVE", "MBAR_TRY", "TMA_LOAD", "TMA_STORE"]  # fmt: skip
WARP_OPS = ["BAR", "WARP_SYNC", "SHFL", "REDUX", "VOTE", "ELECT", "LDMATRIX", "STMATRIX", "MMA",
            "CP_COMMIT", "CP_WAIT", "BULK_COMMIT", "BULK_WAIT", "BRX", "SETMAXNREG", "WGMMA",
            "WGMMA_FENCE", "WGMMA_COMMIT", "WGMMA_WAIT"]  # fmt: skip
OPS = {name: len(isa.NAMES) + k for k, name in enumerate(LONE_OPS + WARP_OPS)}
FAULTS = [
    ("LOAD_OUTSIDE", "load outside every tensor's storage"),
    ("STORE_OUTSIDE", "store outside every tensor's storage"),
    ("LOAD_MISALIGNED", "misaligned load"),
    ("STORE_MISALIGNED", "misaligned store"),
    ("LOAD_PADDING", "load of a storage's bytes that belong to no tensor argument"),
    ("STORE_PADDING", "store to a storage's bytes that belong to no tensor argument"),
    ("RACE_WRITES", "two blocks write one address"),
    ("RACE_READ_WRITE", "a block reads what another writes"),
    ("SHARED_OUTSIDE", "shared access out of bounds"),
    ("SHARED_MISALIGNED", "misaligned shared access"),
    ("UNINITIALISED", "read of shared memory that was never written"),
    ("PENDING", "read of shared memory whose asynchronous copy was not waited for"),
    ("PENDING_OVERWRITTEN", "write to shared memory with an asynchronous copy under way"),
    ("SHARED_RACE_READ", "shared read not ordered after another warp's write"),
    ("SHARED_RACE_WRITE", "shared write not ordered after another warp's write"),
    ("SHARED_RACE_READ_WRITE", "shared write not ordered after another warp's read"),
    ("NO_PROXY_FENCE", "asynchronous access to shared memory without a proxy fence"),
    ("BAD_MBARRIER", "misuse of an mbarrier"),
    ("BAD_DESCRIPTOR", "bad matrix or tensor descriptor"),
    ("WGMMA_REGISTER", "use of a register that a matrix product under way owns"),
    ("WGMMA_OPERAND", "write to shared memory that a matrix product under way reads"),
    ("STORE_OPERAND", "write to shared memory that a TMA store under way reads"),
    ("BAD_REGISTERS", "setmaxnreg beyond its rules"),
    ("BAD_BARRIER", "warps meet at a barrier with different counts"),
    ("UNWAITED", "the kernel ends with asynchronous work under way"),
    ("DIVERGENT_SYNC", "lanes of a warp do not meet at a synchronizing instruction"),
    ("DEADLOCK", "no warp can go on"),
    ("UNSUPPORTED", "the emulator cannot do this instruction"),
]
BY_DESIGN = {"LOAD_PADDING"}  # worth knowing, not wrong by itself

INS = np.dtype(
    [(n, "<i4") for n in ("op", "guard", "out", "a", "b", "c", "d", "list", "count", "size",
                          "flags", "line")] + [("imm", "<i8")]
)  # fmt: skip


def c_header() -> str:
    """The numbers that `vm.c` and this module share."""
    lines = [f"#define ALU_END {len(isa.NAMES)}"]
    lines += [f"#define OP_{name} {number}" for name, number in OPS.items()]
    lines.append(f"#define OP_SYNC_FIRST {OPS[WARP_OPS[0]]}")
    lines += [f"#define F_{name} {number}" for number, (name, _) in enumerate(FAULTS)]
    return "\n".join(lines) + "\n"


@dataclass
class Program:
    """What `vm.c` runs."""

    kernel: Kernel
    code: np.ndarray
    lists: np.ndarray
    image: np.ndarray
    special: np.ndarray
    predicates: int
    params: dict[str, int]
    param_bytes: int
    source: list[Statement]
    executed: np.ndarray  # of every instruction: did it ever run
    param_base: int | None = None  # where the parameters' address lies in the register file

    def coverage(self) -> tuple[float, list[int]]:
        """The share of instructions that ran, and the source lines of those that did not."""
        missed = {s.line[1] for s, ran in zip(self.source, self.executed, strict=True) if not ran}
        return float(self.executed.mean()), sorted(missed)
