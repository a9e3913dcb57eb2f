"""What a launch hands over: arguments as parameters, memory regions; what a driver would refuse."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.cache import get_cache_manager

try:
    from triton.backends.driver import expand_signature
except ImportError:  # before Triton 3.8 each backend has its own, beside what needs libcuda
    expand_signature = None


class LaunchError(RuntimeError):
    """The real driver would refuse this launch."""


@dataclass
class TensorMap:
    """What ``cuTensorMapEncodeTiled`` would be given, innermost dimension first."""

    address: int
    element_bytes: int
    element_type: int
    shape: list[int]
    strides: list[int]  # bytes, of dimensions 1, 2, ...
    box: list[int]
    swizzle: int  # 0 none, 1 32 bytes, 2 64 bytes, 3 128 bytes
    nan_fill: bool

    def problems(self) -> list[str]:
        """What the encoder would refuse, by the rules of the CUDA driver API for tiled maps."""
        found = []
        inner = self.box[0] * self.element_bytes
        if self.address % 16:
            found.append(f"global address {self.address:#x} is not a multiple of 16")
        for size in self.shape:
            if not 0 < size <= 2**32:
                found.append(f"dimension of {size}")
        for stride in self.strides:
            if stride % 16 or not 0 <= stride < 2**40:
                found.append(f"stride of {stride} bytes")
        for size in self.box:
            if not 0 < size <= 256:
                found.append(f"box of {size} elements")
        if inner % 16:
            found.append(f"box of {inner} bytes along the innermost dimension")
        span = {0: None, 1: 32, 2: 64, 3: 128}[self.swizzle]
        if span is not None and inner > span:
            found.append(f"box of {inner} bytes wider than the swizzle's span of {span}")
        for size, stride in zip(self.shape, [self.element_bytes, *self.strides], strict=True):
            if size > 1 and stride == 0:
                found.append("a stride of zero")
        return found

    def pack(self) -> bytes:
        """128 bytes of our own format; `vm.c` reads them back (``struct tensor_map``)."""
        rank = len(self.shape)
        head = struct.pack(
            "<QIIII", self.address, rank, self.element_bytes, self.swizzle, int(self.nan_fill)
        )
        shape, box = ([*sizes, *[1] * (5 - rank)] for sizes in (self.shape, self.box))
        strides = [*self.strides, *[0] * (5 - rank)]
        return head + struct.pack("<5Q4Q5II", *shape, *strides, *box, 0) + b"EMUTMAP\0"


@dataclass
class Region:
    """Memory that a launch may touch: what its tensor arguments cover."""

    name: str
    start: int
    stop: int  # of the storage
    view: tuple[int, int]  # of the tensor's own elements
    keep: Any = None


SCALARS = {
    "i1": "<i", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q",
    "u1": "<I", "u8": "<B", "u16": "<H", "u32": "<I", "u64": "<Q",
    "fp32": "<f", "f32": "<f", "fp64": "<d",
}  # fmt: skip


def pack_scalar(kind: str, value) -> bytes:
    """A by-value kernel parameter."""
    if kind == "fp16":
        return struct.pack("<e", value)
    if kind == "bf16":
        return struct.pack("<f", value)[2:]
    if kind in ("fp32", "f32"):
        return bytes(ctypes.c_float(value))
    return struct.pack(SCALARS[kind], value)


def region_of(name: str, tensor: torch.Tensor) -> Region:
    """The bytes of a tensor's storage, and of its own elements."""
    base = tensor.untyped_storage().data_ptr()
    start = tensor.data_ptr()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((n - 1) * step for n, step in steps) if tensor.numel() else -1
    view = (start, start + (last + 1) * tensor.element_size())
    return Region(name, base, base + tensor.untyped_storage().nbytes(), view, tensor)


class Launcher:
    """What Triton calls to launch a kernel; one for each compiled kernel."""

    def __init__(self, src, metadata):
        self.metadata = metadata
        self.signature = list(src.signature.items())
        self.descriptors = list(getattr(metadata, "tensordesc_meta", None) or [])
        if expand_signature:  # raises if a type is unknown, as the real launcher would
            expand_signature(tuple(v for _, v in self.signature), self.descriptors, "nvTmaDesc")
        group = get_cache_manager(metadata.hash).get_group(f"{metadata.name[:150]}.json")
        if group is None:
            group = get_cache_manager(metadata.hash).get_group(f"{src.name[:150]}.json")
        self.ptx = Path(next(p for n, p in group.items() if n.endswith(".ptx"))).read_text()

    def __call__(
        self, x, y, z, stream, function, packed, launch_metadata, enter_hook, exit_hook, *args
    ):
        if enter_hook is not None:
            enter_hook(launch_metadata)
        driver = triton.runtime.driver.active
        loaded = driver.utils.functions[function]
        loaded.ptx = self.ptx
        params, regions = self.arguments(args, driver, loaded)
        self.check((x, y, z), driver, loaded)
        if x * y * z > 0:
            driver.execute(loaded, (x, y, z), self.metadata, params, regions)
        if exit_hook is not None:
            exit_hook(launch_metadata)

    def arguments(self, args, driver, loaded) -> tuple[list[bytes], list[Region]]:
        """The kernel's parameters in order, and what its pointers may touch."""
        params, regions, described = [], [], iter(self.descriptors)

        def add(name, kind, value):
            if isinstance(kind, tuple):
                for index, (k, v) in enumerate(zip(kind, value, strict=True)):
                    add(f"{name}.{index}", k, v)
            elif kind == "constexpr":
                return
            elif kind[0] == "*":
                regions.extend([] if value is None else [region_of(name, value)])
                params.append(struct.pack("<Q", 0 if value is None else value.data_ptr()))
            elif kind.startswith("tensordesc"):
                meta = next(described, None)
                regions.append(region_of(name, value.base))
                if meta is None:  # no TMA here: a pointer, sizes and flags instead
                    flags = [value.padding == "nan", value.round_f32_to_tf32]
                    params.append(struct.pack("<Q", value.base.data_ptr()))
                    params.extend(pack_scalar("i64", x) for x in (*value.shape, *value.strides))
                    params.extend(pack_scalar("i8", int(flag)) for flag in flags)
                else:
                    params.append(self.tensor_map(value, meta, name, driver, loaded).pack())
                params.extend(pack_scalar("i32", s) for s in value.shape)
                params.extend(pack_scalar("i64", s) for s in value.strides)
            else:
                params.append(pack_scalar(kind, value))

        for (name, kind), value in zip(self.signature, args, strict=True):
            add(name, kind, value)
        # global scratch and profile scratch
        for size in (self.metadata.global_scratch_size, self.metadata.profile_scratch_size):
            if size:
                raise NotImplementedError("scratch memory")
            params.append(bytes(8))
        return params, regions

    def tensor_map(self, value, meta, name, driver, loaded) -> TensorMap:
        bytes_ = meta["elem_size"]
        made = TensorMap(
            address=value.base.data_ptr(),
            element_bytes=bytes_,
            element_type=meta["elem_type"],
            shape=list(reversed(value.shape)),
            strides=[s * bytes_ for s in reversed(value.strides[:-1])],
            box=list(reversed(meta["block_size"])),
            swizzle=meta["swizzle"],
            nan_fill=value.padding == "nan",
        )
        for problem in made.problems():
            driver.add_fault("illegal descriptor", loaded.name, f"{name}: {problem}")
            raise LaunchError(f"{loaded.name}: tensor map of {name}: {problem}")
        return made

    def check(self, grid, driver, loaded) -> None:
        """Raise what the real driver would refuse."""
        device, problems = driver.device, []
        for axis, size, most in zip("xyz", grid, device.grid, strict=True):
            if not 0 <= size <= most:
                problems.append(f"grid.{axis} = {size}, at most {most}")
        threads = self.metadata.num_warps * 32
        if threads > loaded.threads:
            problems.append(
                f"{threads} threads of {loaded.registers} registers, at most {loaded.threads}"
            )
        if self.metadata.shared > device.shared:
            problems.append(f"{self.metadata.shared} bytes shared, at most {device.shared}")
        if getattr(self.metadata, "num_ctas", 1) != 1:
            raise NotImplementedError("clusters")
        for problem in problems:
            driver.add_fault("illegal launch", loaded.name, problem)
            raise LaunchError(f"{loaded.name}: {problem}")
        if 0 in grid:
            driver.add_fault("note: empty launch", loaded.name, f"grid {grid}: Triton skips it")
