"""What a figure depends on besides the code: device, versions, commit, threads, load."""

from __future__ import annotations

import hashlib
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

import torch

from rpo_kernels import tuning
from rpo_kernels.doctor.environment import device_record, output_of, version_of

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch", "triton", "transformers", "trl", "liger_kernel", "cut-cross-entropy", "numpy",
)  # fmt: skip


def source_hash() -> str:
    """Of every Python file of the package: names the measured code where there is no git."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "rpo_kernels").rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def source() -> dict:
    """The code that is measured."""
    words = ("git", "status", "--porcelain", "--", "rpo_kernels", "benchmarks/*.py")
    changed = output_of(*words, folder=ROOT)
    return {
        "commit": output_of("git", "rev-parse", "HEAD", folder=ROOT)
        or os.environ.get("RPO_COMMIT"),
        "uncommitted_changes": None if changed is None else bool(changed),
        "source_sha256": source_hash(),
    }


def describe(device: str) -> dict:
    """Everything that a results file states about where its figures come from."""
    versions = {name: version_of(name) for name in PACKAGES}
    return {
        "device": device_record(device),
        "versions": versions | {"torch": torch.__version__, "python": platform.python_version()},
        **source(),
        "threads": torch.get_num_threads(),
        "tuned": tuning.file_of(torch.device(device)).exists(),
        "load_at_start": os.getloadavg()[0],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
