"""The device, its software, and what keeps them from working together."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from rpo_kernels.tuning import cpu_name

PACKAGES = ("triton", "transformers", "accelerate", "trl")
FEATURES = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
NVIDIA, AMD = Path("/dev/nvidiactl"), Path("/dev/kfd")
START = "https://pytorch.org/get-started/locally"
DRIVER = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def output_of(*words: str, folder: Path | None = None) -> str | None:
    """What a command prints; None where it fails or does not exist."""
    try:
        result = subprocess.run(words, capture_output=True, text=True, cwd=folder, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def version_of(package: str) -> str | None:
    """The version that is installed; None where none is."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_features() -> str:
    """What the processor has of the instructions that matter to matmuls."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return ""
    return ", ".join(flag for flag in FEATURES if flag in flags)


def driver() -> str | None:
    """Of NVIDIA's GPUs."""
    found = output_of(*DRIVER)  # a line a GPU
    return found.splitlines()[0] if found else None


def device_record(device: str) -> dict:
    """What a figure depends on: of the "cpu", or of the "cuda" device in use and its host."""
    host = f"{cpu_name()} ({cpu_features()})"
    record: dict[str, object] = {"kind": device, "name": host, "cores": os.cpu_count()}
    try:
        record["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # not on Windows
        record["memory_bytes"] = None
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        record |= {
            "name": gpu.name,
            "host": host,
            "memory_bytes": gpu.total_memory,
            "multiprocessors": gpu.multi_processor_count,
            "capability": f"{gpu.major}.{gpu.minor}",
            "driver": driver(),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }
    return record


def versions() -> dict[str, str | None]:
    """Of this package, of what it runs on and of what runs it."""
    import rpo_kernels

    own = {"rpo_kernels": rpo_kernels.__version__, "torch": torch.__version__}
    return own | {name: version_of(name) for name in PACKAGES} | {
        "python": platform.python_version()
    }  # fmt: skip


def unusable_gpu() -> str | None:
    """Why PyTorch does not use a GPU that this machine has, and the remedy; None if it has none or
    PyTorch uses it.
    """
    if torch.cuda.is_available() or not (NVIDIA.exists() or AMD.exists()):
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"this machine has a GPU, and torch {torch.__version__} is built for CPUs only; "
            f"install a build for the GPU: {START}; or pass --device cpu"
        )
    try:
        torch.cuda.init()
        reason = "no device is visible"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
    found = driver()
    where = f" (driver {found})" if found else ""
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    return (
        f"torch {torch.__version__}, built for {built}, cannot use this machine's GPU{where}: "
        f"{reason}; update the driver, install a torch built for a release that the driver has "
        f"({START}), check CUDA_VISIBLE_DEVICES, or pass --device cpu"
    )


def compiler_problem() -> str | None:
    """What Triton lacks to compile its launchers on this machine, and the remedy; None if nothing.

    It takes the compiler that CC names, or else gcc or clang.
    """
    if importlib.util.find_spec("triton") is None:
        return (
            "a GPU without the package triton, so the torch backend would run, several times "
            "slower; pip install triton, or pass --backend torch"
        )
    given = os.environ.get("CC")
    if given and shutil.which(given) is None:
        return f"CC: expected a C compiler, which Triton needs, got {given!r}; correct or unset it"
    if not given and not (shutil.which("gcc") or shutil.which("clang")):
        return (
            "Triton needs a C compiler, and neither gcc nor clang is on PATH; install one "
            "(apt-get install gcc), or set CC to yours"
        )
    return None


def remedy(error: str) -> str:
    """What to do about a kernel that raised ``error``, "Type: message"."""
    lower = error.lower()
    if "out of memory" in lower or error.startswith("MemoryError"):
        return "free memory, or pass fewer --tokens"
    if "outofresources" in lower or "out of resource" in lower or "shared memory" in lower:
        return "its tile does not fit this GPU: pass backend='torch', and report it with --json"
    if any(word in lower for word in ("ptx", "no kernel image", "driver", "invalid device")):
        return "the driver is too old for this Triton: update it, or install an older Triton"
    if "compiler" in lower or "python.h" in lower or "calledprocesserror" in lower:
        return "Triton needs a C compiler and Python's headers: apt-get install gcc python3-dev"
    return "pass backend='torch' until it is solved, and report it with --json"
