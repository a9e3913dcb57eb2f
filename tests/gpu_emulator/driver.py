"""A stand-in for Triton's CUDA driver: it says which GPU there is, loads kernels and launches them.

Only the interface that Triton's JIT uses is here. A launch checks what the real driver and the
hardware would refuse, lays the arguments out as the kernel's parameters, and hands both to
`machine`.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver

from tests.gpu_emulator import machine
from tests.gpu_emulator.launcher import Launcher

KIB = 1024


@dataclass(frozen=True)
class Device:
    """What a GPU offers."""

    name: str
    shared: int  # bytes a block may opt in to
    multiprocessors: int
    registers: int = 65536
    threads: int = 1024
    grid: tuple[int, int, int] = (2**31 - 1, 65535, 65535)


DEVICES = {
    80: Device("A100", 163 * KIB, 108),
    86: Device("A10", 99 * KIB, 72),
    89: Device("L4", 99 * KIB, 58),
    90: Device("H100", 227 * KIB, 132),
}


@dataclass
class Function:
    """A loaded kernel."""

    name: str
    ptx: str
    cubin: bytes
    shared: int
    registers: int = 0
    spilled: int = 0
    threads: int = 1024
    program: Any = None  # `bytecode.Program`, made at the first launch


@dataclass
class Launch:
    """One launch as `EmulatedDriver.launches` records it."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    seconds: float
    instructions: int
    faults: int
    hash: str = ""


@dataclass
class Fault:
    """Something that the kernel, or its launch, did wrong."""

    kind: str
    kernel: str
    detail: str
    count: int = 1
    where: dict = field(default_factory=dict)

    @property
    def is_note(self) -> bool:
        """Worth knowing, not wrong by itself."""
        return self.kind.startswith("note: ")

    def __str__(self) -> str:
        times = f" (x{self.count})" if self.count > 1 else ""
        return f"{self.kind} in {self.kernel}: {self.detail}{times}"


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack, from ``cuobjdump``."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    return (int(found[1]), int(found[2])) if found else (0, 0)


class Utils:
    """The part of Triton's native driver module that its Python side calls."""

    functions: dict[int, Function] = {}  # of the process: Triton keeps kernels over drivers
    count = 0

    def __init__(self, driver: EmulatedDriver):
        self.driver = driver

    def get_device_properties(self, device: int) -> dict[str, int]:
        found = self.driver.device
        return {
            "max_shared_mem": found.shared,
            "max_num_regs": found.registers,
            "multiprocessor_count": found.multiprocessors,
            "warpSize": 32,
            "sm_clock_rate": 1_410_000,
            "mem_clock_rate": 1_215_000,
            "mem_bus_width": 5120,
        }

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int):
        """Register a kernel; its PTX is found by `Launcher`, which knows the kernel's hash."""
        registers, stack = resource_usage(cubin)
        Utils.count += 1
        handle = Utils.count
        function = Function(name, "", cubin, shared, registers, stack)
        if registers:
            whole = -(-registers * 32 // 256) * 256  # registers are given to warps, 256 at a time
            function.threads = min(1024, self.driver.device.registers // whole * 32)
        self.functions[handle] = function
        return handle, handle, registers, stack // 4, function.threads

    def unload_module(self, module: int) -> None:
        self.functions.pop(module, None)


class EmulatedDriver(GPUDriver):
    """Give it to ``triton.runtime.driver.set_active``; `install` does that and more.

    Args:
        sm: compute capability, 80 or 90 (10 * major + minor).
        execute: False only records launches.
        seed: of the order in which warps run.
        noise: relative error added to the hardware's approximate instructions, such as 2**-22.
        nearest: matrix products round each step's sum to nearest; by default, as tensor cores do,
            toward zero.
        quantum: most instructions that a warp runs before another may.
        limit: instructions of a block after which it counts as hung.
        blocks: ``(kernel's name, grid) -> numbers`` of the blocks to run; all by default.
    """

    def __init__(self, sm: int = 80, execute: bool = True, seed: int = 0, **options):
        self.sm, self.device, self.run, self.seed = sm, DEVICES[sm], execute, seed
        self.options = options
        self.utils = Utils(self)
        self.launcher_cls = Launcher
        self.launches: list[Launch] = []
        self.faults: dict[tuple, Fault] = {}
        self.kernels: dict[str, Function] = {}  # by hash
        self.get_device_capability = lambda device=0: divmod(sm, 10)
        self.get_current_stream = lambda device=0: 0
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self):
        return lambda call, quantiles, **_: [0.0] * len(quantiles)

    def add_fault(self, kind: str, kernel: str, detail: str, key=None, count: int = 1, **where):
        """Count a fault; the same kind at the same place is one entry."""
        key = (kind, kernel, detail if key is None else key)
        if key in self.faults:
            self.faults[key].count += count
        else:
            self.faults[key] = Fault(kind, kernel, detail, count, where)

    def execute(self, loaded: Function, grid, metadata, params, regions) -> None:
        """Run every block of a launch."""
        begin, before = time.perf_counter(), sum(f.count for f in self.faults.values())
        self.kernels.setdefault(metadata.hash, loaded)
        instructions = 0
        if self.run:
            instructions = machine.run(self, loaded, grid, metadata, params, regions)
        after = sum(f.count for f in self.faults.values())
        self.launches.append(
            Launch(
                loaded.name,
                grid,
                metadata.num_warps * 32,
                metadata.shared,
                time.perf_counter() - begin,
                instructions,
                after - before,
                metadata.hash,
            )  # fmt: skip
        )

    def wrong(self) -> list[Fault]:
        """The faults that are not mere notes."""
        return [fault for fault in self.faults.values() if not fault.is_note]

    def report(self) -> str:
        """Launches of every kernel, and the faults."""
        lines, names = [], {}
        for launch in self.launches:
            names.setdefault((launch.kernel, launch.hash), []).append(launch)
        for (name, key), found in names.items():
            blocks = sum(x * y * z for x, y, z in (launch.grid for launch in found))
            total = sum(launch.seconds for launch in found)
            lines.append(
                f"{name} [{key[:6]}]: {len(found)} launches, {blocks} blocks of "
                f"{found[0].threads} threads, {found[0].shared} bytes shared, "
                f"{sum(launch.instructions for launch in found):,} warp instructions, {total:.2f} s"
            )
            program = self.kernels[key].program
            if program is not None:
                loaded = self.kernels[key]
                lines[-1] += (
                    f", {program.coverage()[0]:.0%} of instructions ran; "
                    f"{loaded.registers} registers, {loaded.spilled} bytes of stack"
                )
        lines += [f"FAULT {fault}" for fault in self.faults.values()] or ["no faults"]
        return "\n".join(lines)


installed: set[int] = set()


def install(sm: int = 80, **options) -> EmulatedDriver:
    """Make an emulated GPU the active one. A process can have one `sm` only: Triton caches kernels
    by device number.
    """
    installed.add(sm)
    if len(installed) > 1:
        raise RuntimeError(f"one compute capability for each process, got {sorted(installed)}")
    driver = EmulatedDriver(sm, **options)
    triton.runtime.driver.set_active(driver)
    return driver
