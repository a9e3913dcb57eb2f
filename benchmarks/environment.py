"""What a figure depends on besides the code: device, versions, commit, threads, load."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch", "triton", "transformers", "trl", "liger_kernel", "cut-cross-entropy", "numpy",
)  # fmt: skip


def _command(*words: str) -> str | None:
    try:
        result = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _cpu_name() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text()
        match = re.search(r"model name\s*:\s*(.+)", info)
        flags = [f for f in ("avx512_bf16", "amx_bf16", "avx512f", "avx2") if f in info]
        return f"{match[1] if match else platform.machine()} ({', '.join(flags)})"
    except OSError:
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def source_hash() -> str:
    """Of every Python file of the package: names the measured code where there is no git."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "rpo_kernels").rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def device_record(device: str) -> dict:
    record = {
        "kind": device,
        "name": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        record |= {
            "name": gpu.name,
            "host": _cpu_name(),
            "memory_bytes": gpu.total_memory,
            "driver": _command(*query),
            "cuda": torch.version.cuda,
        }
    return record


def source() -> dict:
    """The code that is measured."""
    changed = _command("git", "status", "--porcelain", "--", "rpo_kernels", "benchmarks/*.py")
    return {
        "commit": _command("git", "rev-parse", "HEAD") or os.environ.get("RPO_COMMIT"),
        "uncommitted_changes": None if changed is None else bool(changed),
        "source_sha256": source_hash(),
    }


def describe(device: str) -> dict:
    """Everything that a results file states about where its figures come from."""
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "device": device_record(device),
        "versions": versions | {"torch": torch.__version__, "python": platform.python_version()},
        **source(),
        "threads": torch.get_num_threads(),
        "load_at_start": os.getloadavg()[0],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
