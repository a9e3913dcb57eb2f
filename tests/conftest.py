"""Without a GPU the kernels run under Triton's interpreter, to be chosen before its import."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["RPO_KERNELS_CACHE"] = os.devnull + "/none"  # the defaults run, whatever was saved here

from tests import background


def pytest_collection_finish(session):
    """Start what the selected tests will wait for (`tests.background`)."""
    if not session.config.option.collectonly:
        for item in session.items:
            background.start(getattr(item.module, "commands", lambda item: ())(item))


def pytest_sessionfinish():
    background.stop()


@pytest.fixture(autouse=True)
def skipping_pays(monkeypatch, request):
    """Small problems keep much: skip all the same, but where a test is about that choice."""
    if "break_even" not in request.node.name:
        from rpo_kernels.engines import skipping

        monkeypatch.setattr(skipping, "break_even", lambda *call: 1.0)


@pytest.fixture
def fresh_accelerator():
    """Accelerate keeps the first precision of a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
