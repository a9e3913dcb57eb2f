"""Compile the kernels for one GPU architecture, on any machine, and print what came out as JSON.

    python tests/triton/compile_kernels.py sm_90
    python tests/triton/compile_kernels.py sm_90 --oversized  a tile that no check may let pass
    python tests/triton/compile_kernels.py sm_90 --gluon      the kernels of `gluon_hopper` instead

Runs in a process of its own, without TRITON_INTERPRET. The launchers say what to compile: they run
on tensors of the meta device, and every launch is recorded instead of done. So signatures,
alignments and options are those of a launch at N = 65,536, V = 262,144, D = 8,192, where N * V is
2^34 and V * D is 2^31.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rpo_kernels.backends import gluon_hopper, tiles, triton_sparse, triton_tail, triton_targets
from rpo_kernels.backends import triton_backend as backend
from rpo_kernels.backends import triton_kernels as kernels
from rpo_kernels.engines.panel import stride
from rpo_kernels.losses import LOSSES
from rpo_kernels.spec import Objective, Transform

N, V, D, PANEL, RAGGED = 65536, 262144, 8192, 32768, 1040
ODD = 3047  # rows of a real batch: no power of two divides them
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MATRIX = {
    "sm_80": "mma.sync",
    "sm_86": "mma.sync",
    "sm_90": "wgmma",
    "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma",
}
KEPT_ROWS = 4096  # rows of a panel for the kept products
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


class Recorder:
    """Stands in for a kernel: ``recorder[grid](**arguments)`` keeps the arguments."""

    def __init__(self, kernel: triton.JITFunction, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda **arguments: self.launches.append((self.kernel, arguments))


def record(family: str, calls: Iterator) -> list:
    """Run launchers on meta tensors; return their launches."""
    launches = []
    places = [(kernels, n) for n in ("lse_partials", "lse_merge", "exp_fused", "exp_epilogue")]
    places += [(triton_tail, n) for n in ("rpo_tail", "scale_in_place")]
    places += [(triton_targets, n) for n in ("pick_logits", "put_entries", "finish_rows")]
    places += [(triton_sparse, "kept_rows"), (triton_sparse, "kept_weight")]
    if gluon_hopper.wanted():
        places += [(gluon_hopper.kernels(), f"{n}_hopper") for n in ("exp_fused", "lse_partials")]
    originals = [getattr(module, name) for module, name in places]
    for (module, name), kernel in zip(places, originals, strict=True):
        setattr(module, name, Recorder(kernel, launches))
    device, tiles.of_device = tiles.of_device, lambda device: (family, 132)
    try:
        for call in calls:
            call()
    finally:
        tiles.of_device = device
        for (module, name), kernel in zip(places, originals, strict=True):
            setattr(module, name, kernel)
    return launches


def calls_of(
    family: str,
    dtype: torch.dtype,
    width: int,
    transform: Transform,
    bias: bool,
    exp_tile=None,
    rows: int = N,
):
    """Yield one call of every launcher that `dtype` concerns; panels as `engines.panel` makes them
    on a GPU.
    """

    def meta(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    hidden, weight, targets = meta(rows, width), meta(V, width), meta(rows, dtype=torch.int64)
    offset = meta(V) if bias else None
    shift, total, logit = (meta(rows, dtype=torch.float32) for _ in range(3))
    out = meta(PANEL, stride(rows, torch.device("cuda")))[:, :rows]
    panel = weight[:PANEL], None if offset is None else offset[:PANEL]
    arguments = (hidden, *panel, shift, targets, 0, transform, out, total, logit)
    tile = exp_tile or tiles.CONFIGS[family, tiles.dtype_class(dtype.itemsize)].tile
    if exp_tile is None:
        yield lambda: backend.lse_and_target(hidden, weight, offset, targets, transform, 2**28)
        yield lambda: backend.exp_panel_matmul(*arguments)
    yield lambda: backend.exp_panel_fused(*arguments, tile)


def gluon_calls(dtype: torch.dtype, width: int, transform: Transform, bias: bool, rows: int):
    """The calls that `gluon_hopper` serves: a whole log-sum-exp and a panel, its targets picked."""

    def meta(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    hidden, weight, targets = meta(rows, width), meta(V, width), meta(rows, dtype=torch.int64)
    offset = meta(V) if bias else None
    shift, total, logit = (meta(rows, dtype=torch.float32) for _ in range(3))
    out = meta(PANEL, stride(rows, torch.device("cuda")))[:, :rows]
    yield lambda: backend.lse_and_target(hidden, weight, offset, targets, transform, 2**28)
    yield lambda: backend.exp_panel(
        hidden, weight[:PANEL], None if offset is None else offset[:PANEL], shift, targets, 0,
        transform, out, total, logit,
    )  # fmt: skip


def small_calls(dtype: torch.dtype, width: int, transform: Transform, bias: bool):
    """One call of every launcher whose kernel touches each row or each parameter once."""
    hidden, weight = (torch.empty(x, width, dtype=dtype, device="meta") for x in (N, V))
    targets = torch.empty(N, dtype=torch.int64, device="meta")
    offset = torch.empty(V, dtype=dtype, device="meta") if bias else None
    rows = torch.empty(N, device="meta")
    panel = torch.empty(PANEL, N, dtype=dtype, device="meta")
    yield lambda: backend.target_logits(hidden, targets, weight, offset, transform, 0)
    yield lambda: backend.put_targets_(panel, targets, PANEL, rows)
    yield lambda: backend.finish_panel(panel, targets, rows, rows, rows, transform)
    yield lambda: backend.scale_(weight, rows[0])


def kept_call(dtype: torch.dtype, weight_dtype: torch.dtype, width: int, rows: int, size: int):
    """One call of `kept_products`, on a panel of `rows` rows of the whole vocabulary."""
    panel = torch.empty(V, rows, dtype=dtype, device="meta")
    keep = torch.empty(-(-rows // size), V, dtype=torch.bool, device="meta")
    weight = torch.empty(V, width, dtype=weight_dtype, device="meta")
    scaled = torch.empty(rows, width, dtype=dtype, device="meta")
    d_rows = torch.empty(rows, width, device="meta")
    d_weight = torch.empty(V, width, device="meta")
    yield lambda: backend.kept_products(
        panel, size, keep, weight, scaled, scaled[:, 0], d_rows, d_weight, None, 1.0
    )


def tail_calls(losses):
    """Yield the tail with every loss and both shapes of the SFT term."""
    logps = torch.empty(N, device="meta")
    offsets = torch.empty(2 * 64 + 1, dtype=torch.int64, device="meta")
    for number, loss in enumerate(losses):
        ref = torch.empty(128, device="meta") if LOSSES[loss].reference else None
        reduction = ("sequence_mean", "sum")[number % 2]
        objective = Objective(loss, 0.1, 0.1, 0.5, 0.01, reduction, 64.0, 4096.0)
        yield lambda ref=ref, objective=objective: backend.tail(logps, offsets, ref, objective)


def described(value) -> str:
    """The type of a tensor descriptor, Triton's or Gluon's."""
    element, layout = POINTERS[value.base.dtype][1:], getattr(value, "layout", None)
    return f"tensordesc<{element}{value.block_shape}{'' if layout is None else f',{layout!r}'}>"


def source(kernel: triton.JITFunction, arguments: dict) -> ASTSource:
    """The source that a launch with these arguments would compile."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value, name = arguments[parameter.name], parameter.name
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (free and type(value) is int and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
        elif hasattr(value, "block_shape"):
            signature[name] = described(value)
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if free and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource(kernel, signature, constants, attributes)
    return ASTSource(kernel, signature, constants, attributes)


def nvidia_tool(name: str, *arguments: str) -> str:
    """What one of the tools inside Triton's package prints."""
    command = [Path(triton.__file__).parent / "backends/nvidia/bin" / name, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def resources(asm: dict) -> tuple[int, int]:
    """Bytes (or registers) spilled, and registers of a thread."""
    if "amdgcn" in asm:
        spills = sum(int(x) for x in re.findall(r"\.vgpr_spill_count:\s*(\d+)", asm["amdgcn"]))
        return spills, int(re.search(r"\.vgpr_count:\s*(\d+)", asm["amdgcn"])[1])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        usage = nvidia_tool("cuobjdump", "--dump-resource-usage", cubin.name)
    return int(re.search(r"STACK:(\d+)", usage)[1]), int(re.search(r"REG:(\d+)", usage)[1])


def accesses(asm: dict, kind: str) -> dict[int, int]:
    """How many instructions "store" (or "load") 2, 4, 8 and 16 bytes of global memory."""
    if "amdgcn" in asm:
        found = re.findall(rf"(?:global|buffer)_{kind}_(\w+)", asm["amdgcn"])
        sizes = {2: "short", 4: "dword", 8: "dwordx2", 16: "dwordx4"}
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(asm["cubin"])
            cubin.flush()
            text = nvidia_tool("cuobjdump", "--dump-sass", cubin.name)
        name = {"store": "STG", "load": "LDG"}[kind]
        words = re.findall(rf"\b{name}((?:\.\w+)+)", text)
        widths = (re.search(r"\.(U8|S8|U16|64|128|256)\b", word) for word in words)
        found, sizes = [x and x[1] for x in widths], {2: "U16", 4: None, 8: "64", 16: "128"}
    return {size: found.count(name) for size, name in sizes.items()}


def instructions(asm: dict) -> dict[str, int]:
    """How often each instruction stands in a kernel for NVIDIA, `MUFU.EX2` and the like apart.

    What a warp does whose threads have parted, which the assembler of Triton 3.8 puts behind all
    other code, does not count: no warp of ours parts.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        text = nvidia_tool("cuobjdump", "--dump-sass", cubin.name)
    text = text.partition("WARPSYNC.COLLECTIVE")[0]
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9]*(?:\.EX2)?)", text)
    return dict(Counter(found))


def build(family: str, kernel: triton.JITFunction, arguments: dict, label: str) -> dict:
    """Compile one launch and describe the result."""
    begin = time.perf_counter()
    options = {name: arguments[name] for name in OPTIONS if name in arguments}
    compiled = triton.compile(source(kernel, arguments), target=TARGETS[family], options=options)
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    spilled, registers = resources(compiled.asm)
    return {
        "kernel": kernel.__name__,
        "case": label,
        "shared": compiled.metadata.shared,
        "spilled": spilled,
        "registers": registers,
        "fused": options.get("enable_fp_fusion"),
        "matrix": MATRIX[family] in text,
        "tma": "cp.async.bulk.tensor" in text,
        "stores": accesses(compiled.asm, "store"),
        "loads": accesses(compiled.asm, "load"),
        "tile": [arguments.get(name) for name in ("BLOCK_N", "BLOCK_V", "num_warps")],
        "instructions": instructions(compiled.asm) if kernel.is_gluon() else None,
        "seconds": round(time.perf_counter() - begin, 2),
    }


def gluon_cases() -> list:
    """The launches of the kernels for Hopper."""
    found = []
    for label, *case in (
        ("bf16", torch.bfloat16, D, Transform(), False, N),
        ("fp16 capped bias ragged", torch.float16, RAGGED, Transform(1.0, 30.0), True, ODD),
    ):
        launches = record("sm_90", gluon_calls(*case))
        found += [(*x, label) for x in launches if x[0].__name__.endswith("_hopper")]
    return found


def main(family: str, oversized: bool, gluon: bool) -> None:
    """Compile everything for one family and print a JSON list."""
    os.environ[gluon_hopper.VARIABLE] = "gluon" if gluon else "triton"
    gemma, plain = Transform(1.0, 30.0), Transform()
    cases = []
    if gluon:
        cases = gluon_cases()
    elif oversized:
        huge = tiles.Tile(256, 256, 64, 8, 4)
        calls = calls_of(family, torch.bfloat16, D, plain, False, huge)
        cases += [(*launch, "oversized") for launch in record(family, calls)]
    else:
        for label, *case in (
            ("bf16", torch.bfloat16, D, plain, False),
            ("bf16 capped bias ragged", torch.bfloat16, RAGGED, gemma, True),
            ("fp32 capped bias ragged", torch.float32, RAGGED, gemma, True),
        ):
            for kernel, arguments in record(family, calls_of(family, *case)):
                once = "ragged" in label or kernel.__name__ in ("lse_partials", "exp_fused")
                if once and (kernel.__name__ != "lse_merge" or label.startswith("fp32")):
                    cases.append((kernel, arguments, label))
            if "ragged" in label:
                cases += [(*x, label) for x in record(family, small_calls(*case))]
        for label, dtype in (("bf16 odd rows", torch.bfloat16), ("fp32 odd rows", torch.float32)):
            calls = calls_of(family, dtype, D, plain, False, rows=ODD)
            launches = record(family, calls)
            cases += [(*x, label) for x in launches if x[0].__name__.startswith("exp_")]
        for label, *case in (
            ("bf16", torch.bfloat16, torch.bfloat16, D, KEPT_ROWS),
            ("bf16 autocast ragged", torch.bfloat16, torch.float32, RAGGED, KEPT_ROWS - 240),
            ("fp32 ragged", torch.float32, torch.float32, RAGGED, KEPT_ROWS - 255),
        ):
            first, second, *_ = record(family, kept_call(*case, size=256))
            cases += [(*first, label), (*second, label)]
        losses = list(LOSSES) if family == "sm_90" else ["orpo"]
        launches = record(family, tail_calls(losses))
        cases += [(*launch, loss) for launch, loss in zip(launches, losses, strict=True)]
    print(
        json.dumps([build(family, kernel, arguments, label) for kernel, arguments, label in cases])
    )


if __name__ == "__main__":
    main(sys.argv[1], "--oversized" in sys.argv[2:], "--gluon" in sys.argv[2:])
