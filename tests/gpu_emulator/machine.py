"""Runs a program on every block of a launch, and explains the faults that `vm.c` found."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
import triton

from tests.gpu_emulator import isa
from tests.gpu_emulator.assembler import assemble
from tests.gpu_emulator.bytecode import BY_DESIGN, FAULTS, c_header

SHARED_BASE = 1024  # the hardware keeps the first KiB
HERE = Path(__file__).parent


class CRegion(ctypes.Structure):
    _fields_ = [
        ("start", ctypes.c_uint64), ("stop", ctypes.c_uint64), ("writer", ctypes.c_void_p),
        ("reader", ctypes.c_void_p), ("inside", ctypes.c_void_p), ("shift", ctypes.c_int32),
        ("pad", ctypes.c_int32),
    ]  # fmt: skip


class CFault(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int32), ("ins", ctypes.c_int32), ("thread", ctypes.c_int32),
        ("cta", ctypes.c_int32), ("address", ctypes.c_uint64), ("extra", ctypes.c_int64),
    ]  # fmt: skip


class CLaunch(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("code", "lists", "image", "special", "params", "regions",
                                         "faults", "counts", "executed")),
        ("instructions", ctypes.c_int64), ("limit", ctypes.c_int64), ("seed", ctypes.c_uint64),
        *((n, ctypes.c_int32) for n in ("ncode", "register_bytes", "predicates", "nregions",
                                        "max_faults", "nfaults", "threads", "shared")),
        ("grid", ctypes.c_int32 * 3), ("kinds", ctypes.c_int32), ("shared_base", ctypes.c_int32),
        ("quantum", ctypes.c_int32), ("aborted", ctypes.c_int32), ("nearest", ctypes.c_int32),
        ("registers", ctypes.c_int32),
        ("noise", ctypes.c_float),
    ]  # fmt: skip


FLAGS = ["-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-math-errno", "-fPIC"]


def built(name: str, command: list[str], files: dict[str, str]) -> Path:
    """Run a compiler in a folder with `files`, unless its result is there already."""
    key = hashlib.sha256("".join([*command, *files.values()]).encode()).hexdigest()[:16]
    result = Path(triton.knobs.cache.dir) / f"gpu-emulator-{key}-{name}"
    if not result.exists():
        result.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            for path, text in files.items():
                (Path(folder) / path).write_text(text)
            subprocess.run([*command, "-o", name], check=True, cwd=folder)
            made = Path(folder) / name
            partial = result.with_suffix(f".{os.getpid()}")
            partial.write_bytes(made.read_bytes())
            partial.replace(result)
    return result


@functools.cache
def library() -> ctypes.CDLL:
    """The interpreter, compiled once for a machine; its arithmetic, which takes longest, apart."""
    headers = {path.name: path.read_text() for path in HERE.glob("*.h")}
    alu = built("alu.o", ["gcc", "-O2", "-ftree-vectorize", *FLAGS, "-c", "alu.c"],
                {"vm.h": headers["vm.h"], "alu.c": isa.c_source()})  # fmt: skip
    files = headers | {"ops.inc": c_header(), "vm.c": (HERE / "vm.c").read_text()}
    command = ["gcc", "-O3", *FLAGS, "-shared", "vm.c", str(alu), "-lm"]
    return ctypes.CDLL(str(built("vm.so", command, files)))


def mark(inside: torch.Tensor, tensor: torch.Tensor, size: int) -> None:
    """Set what belongs to `tensor`, in granules of `size` bytes of its storage."""
    if not tensor.numel():
        return
    factor = tensor.element_size() // size
    shape, strides = list(tensor.shape), [s * factor for s in tensor.stride()]
    if factor > 1:
        shape, strides = [*shape, factor], [*strides, 1]
    inside.as_strided(shape, strides, tensor.storage_offset() * factor).fill_(1)


class Memory:
    """The storages that a launch's tensors lie in, with their shadows."""

    def __init__(self, regions):
        by_storage = {}
        for region in regions:
            by_storage.setdefault((region.start, region.stop), []).append(region)
        self.keep, entries = [], []
        for (start, stop), members in sorted(by_storage.items()):
            if stop == start:
                continue
            size = min(r.keep.element_size() for r in members)
            granules = (stop - start) // size
            inside = None  # everything
            if not any(r.keep.numel() * r.keep.element_size() == stop - start for r in members):
                inside = torch.zeros(granules, dtype=torch.uint8)
                for r in members:
                    mark(inside, r.keep, size)
            writer, reader = np.zeros(granules, np.uint32), np.zeros(granules, np.uint32)
            self.keep.append((inside, writer, reader, members))
            entries.append(
                CRegion(start, stop, writer.ctypes.data, reader.ctypes.data,
                        None if inside is None else inside.data_ptr(), size.bit_length() - 1, 0)
            )  # fmt: skip
        self.names = [(r.name, r) for rs in by_storage.values() for r in rs]
        self.array = (CRegion * max(len(entries), 1))(*entries)
        self.count = len(entries)

    def describe(self, address: int) -> str:
        """Where an address lies, relative to the tensor argument next to it."""

        def distance(region):
            start, stop = region.view
            return 0 if start <= address < stop else min(abs(address - start), abs(address - stop))

        if not self.names:
            return hex(address)
        name, region = min(self.names, key=lambda pair: distance(pair[1]))
        start, stop = region.view
        where = f"byte {address - start} of {name} ({stop - start} bytes"
        return where + f", shape {tuple(region.keep.shape)}, stride {region.keep.stride()})"


def run(driver, loaded, grid, metadata, params, regions) -> int:
    """Execute a launch; returns the number of warp instructions."""
    if loaded.program is None:
        loaded.program = assemble(loaded.ptx, SHARED_BASE)
    program, options = loaded.program, driver.options
    sizes = [size for _, size, _ in program.kernel.params]
    if [len(p) for p in params] != sizes:
        raise ValueError(
            f"{loaded.name}: parameters of {[len(p) for p in params]} bytes, kernel expects {sizes}"
        )
    raw = np.zeros(max(program.param_bytes, 8) + 256, np.uint8)
    base = -raw.ctypes.data % 128
    block = raw[base:]
    for (name, size, _), value in zip(program.kernel.params, params, strict=True):
        at = program.params[name]
        block[at : at + size] = np.frombuffer(value, np.uint8)
    image = program.image.copy()
    if program.param_base is not None:
        image[program.param_base : program.param_base + 256] = np.full(
            32, block.ctypes.data, np.uint64
        ).view(np.uint8)
    memory = Memory(regions)
    kinds, most = len(FAULTS), 4096
    faults = (CFault * most)()
    counts = np.zeros((len(program.code), kinds), np.uint32)
    threads = metadata.num_warps * 32
    if program.kernel.threads and program.kernel.threads != threads:
        words = f"{threads} threads, the kernel requires {program.kernel.threads}"
        driver.add_fault("illegal launch", loaded.name, words)
    launch = CLaunch(
        code=program.code.ctypes.data, lists=program.lists.ctypes.data, image=image.ctypes.data,
        special=program.special.ctypes.data, params=block.ctypes.data,
        regions=ctypes.addressof(memory.array), faults=ctypes.addressof(faults),
        counts=counts.ctypes.data, executed=program.executed.ctypes.data,
        limit=options.get("limit", 200_000_000),
        seed=driver.seed + len(driver.launches), ncode=len(program.code),
        register_bytes=len(image), predicates=program.predicates, nregions=memory.count,
        max_faults=most, threads=threads, shared=max(metadata.shared, 0),
        grid=(ctypes.c_int32 * 3)(*grid), kinds=kinds, shared_base=SHARED_BASE,
        quantum=options.get("quantum", 400), noise=options.get("noise", 0.0),
        nearest=int(options.get("nearest", False)), registers=loaded.registers,
    )  # fmt: skip
    total, chosen = grid[0] * grid[1] * grid[2], options.get("blocks")
    ranges = [(0, total)] if chosen is None else [(k, k + 1) for k in chosen(loaded.name, grid)]
    for first, last in ranges:
        library().run_blocks(
            ctypes.byref(launch), ctypes.c_int64(first), ctypes.c_int64(last), ctypes.c_int64(1)
        )
    for k in range(launch.nfaults):
        fault = faults[k]
        kind, meaning = FAULTS[fault.kind]
        statement = program.source[fault.ins]
        file = program.kernel.files.get(statement.line[0], "?")
        shared = kind.startswith("SHARED") or kind in (
            "UNINITIALISED", "PENDING", "PENDING_OVERWRITTEN", "NO_PROXY_FENCE", "WGMMA_OPERAND",
            "STORE_OPERAND",
            "BAD_MBARRIER")  # fmt: skip
        place = f"shared {fault.address}" if shared else memory.describe(fault.address)
        x, rest = fault.cta % grid[0], fault.cta // grid[0]
        driver.add_fault(
            ("note: " if kind in BY_DESIGN else "") + meaning,
            loaded.name,
            f"block ({x}, {rest % grid[1]}, {rest // grid[1]}) of {grid}, thread {fault.thread}, "
            f"{Path(file).name}:{statement.line[1]}, `{statement.text}`, {place}, "
            f"extra {fault.extra}",
            key=(kind, statement.line, loaded.name),
            count=int(counts[fault.ins, fault.kind]),
            hash=metadata.hash,
        )
    return launch.instructions
