"""The kernels as compiled for NVIDIA GPUs, executed on a CPU: the tests of kernels, for each GPU.

Whether Triton interprets or compiles, and for which architecture, holds for a whole process: each
run is a pytest of its own with `tests.gpu_emulator.plugin`, beside the other tests.
`tests/gpu_emulator/README.md` says what the emulator checks.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests import background

pytest.importorskip("triton")
import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
EMULATOR, KERNELS = "gpu_emulator/check_emulator.py", "triton/test_kernels.py"
SPARSE, ENGINES = "triton/test_sparse.py", "triton/test_engines.py"
TRAFFIC, GLUON = "gpu_emulator/check_traffic.py", "triton/test_gluon.py"
DOCTOR = "triton/test_doctor.py"
# without launches, with a process of its own, or with a shape drawn and so a compilation each
NEVER = "any_shape or import_needs or cpu_tensors or torch_backend or splits_cover or autotune"
TAIL = "test_tail or exactly_ln_2 or impossible"  # compiles to the same for every architecture
# a dtype more is a compilation more: each is run by two architectures, fp16 by one of each tile
AGAIN = "64-torch.float16 or 5-torch.float16 or 576-torch.float16 or (test_tail and not mean-True)"
RUNS = {
    "sm_90, kernels": (90, f"not ({NEVER} or {AGAIN})", EMULATOR, KERNELS, TRAFFIC),
    "sm_90, functions": (90, f"not ({NEVER} or {AGAIN})", SPARSE, ENGINES),
    "sm_90, Gluon": (90, "", GLUON, DOCTOR),
    "sm_80": (80, f"not ({NEVER} or {TAIL} or float16)", EMULATOR, KERNELS, SPARSE, ENGINES),
    "sm_86": (86, f"float16 and not ({NEVER})", KERNELS, SPARSE, ENGINES),
}


def missing() -> str:
    """What the emulator needs and this machine lacks."""
    tools = [tool for tool in ("ptxas", "cuobjdump") if not (TOOLS / tool).exists()]
    return ", ".join(tools + ["gcc"] * (shutil.which("gcc") is None))


pytestmark = pytest.mark.skipif(bool(missing()), reason=f"the emulator needs {missing()}")


def command(sm: int, words: str, *files: str) -> background.Command:
    """pytest on an emulated GPU of capability `sm`."""
    plugins = "-p tests.gpu_emulator.plugin -p no:cacheprovider"
    options = f"{plugins} -q --tb=short --sm {sm}".split()
    return background.Command(
        (sys.executable, "-W", "ignore", "-m", "pytest", *options, "-k", words)
        + tuple(f"tests/{file}" for file in files),
        (background.triton_cache(), ("OMP_NUM_THREADS", "1")),
    )


def commands(item):
    return () if missing() else (command(*RUNS[item.callspec.params["label"]]),)


@pytest.mark.parametrize("label", RUNS)
def test_as_compiled(label):
    done = background.result(command(*RUNS[label]))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
