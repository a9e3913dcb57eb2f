"""pytest plugin: tests of Triton kernels, on an emulated GPU.

    python -m pytest -p tests.gpu_emulator.plugin --sm 90 tests/triton/test_kernels.py

A test fails if the emulator sees a fault in any launch, besides what the test itself checks.
`--noise` and `--seed` are those of `EmulatedDriver`. Launches and faults are printed at the end.
"""

from __future__ import annotations

import contextlib
import os

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import pytest
import torch

from tests.gpu_emulator.harness import gpu

DRIVER = pytest.StashKey()


def pytest_addoption(parser):
    group = parser.getgroup("gpu emulator")
    group.addoption("--sm", type=int, default=80, help="compute capability, 80, 86 or 90")
    group.addoption("--noise", type=float, default=0.0, help="of approximate instructions")
    group.addoption("--seed", type=int, default=0, help="of the order in which warps run")


def pytest_configure(config):
    torch.set_num_threads(1)
    options = {"seed": config.option.seed, "noise": config.option.noise}
    stack = contextlib.ExitStack()
    config.stash[DRIVER] = stack.enter_context(gpu(config.option.sm, **options))
    config.add_cleanup(stack.close)


@pytest.fixture(scope="session")
def driver(request):
    """The `EmulatedDriver` that runs every launch."""
    return request.config.stash[DRIVER]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    driver = item.config.stash[DRIVER]
    before = {key: fault.count for key, fault in driver.faults.items()}
    result = yield
    new = [f for k, f in driver.faults.items() if f.count > before.get(k, 0) and not f.is_note]
    if new:
        pytest.fail("\n".join(str(fault) for fault in new[:5]), pytrace=False)
    return result


def pytest_terminal_summary(terminalreporter, config):
    terminalreporter.write_line(config.stash[DRIVER].report())
