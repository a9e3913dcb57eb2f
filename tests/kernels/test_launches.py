"""How many kernels a call launches on a GPU, and how often it waits for it: counted, not timed.

Engines and launchers run on tensors of the meta device, as large as real ones and without data. It
is no CPU, so they take a GPU's paths. A dispatch mode counts operators, stand-ins count the
launches of Triton kernels, and reading a value back is answered by what a real batch would say.

Key: N rows, B pairs, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import os
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from rpo_kernels import ops
from rpo_kernels.backends import (
    gluon_hopper,
    tiles,
    triton_backend,
    triton_kernels,
    triton_sparse,
    triton_tail,
    triton_targets,
)
from rpo_kernels.engines.panel import capacity
from rpo_kernels.engines.skipping import BLOCK, STEPS
from rpo_kernels.spec import Objective, Settings

D, V, PAIR = 2048, 151_936, 1024
aten = torch.ops.aten
KERNELS = [
    (triton_kernels, "lse_partials"),
    (triton_kernels, "lse_merge"),
    (triton_kernels, "exp_fused"),
    (triton_kernels, "exp_epilogue"),
    (triton_sparse, "kept_rows"),
    (triton_sparse, "kept_weight"),
    (triton_tail, "rpo_tail"),
    (triton_targets, "pick_logits"),
    (triton_targets, "put_entries"),
    (triton_targets, "finish_rows"),
]


class Counted(TorchDispatchMode):
    """Counts launches and synchronizations on the meta device.

    Args:
        answer: what the first look at a vector reads, a list of ints.
    """

    def __init__(self, answer: list[int]):
        super().__init__()
        self.answer = answer
        self.launches: dict[str, int] = {}
        self.waits = 0

    def launch(self, name: str) -> None:
        self.launches[name] = self.launches.get(name, 0) + 1

    def made(self, function):
        """`function`, which makes a tensor of Python numbers: on a GPU it waits for the copy."""

        def wrapped(*args, **kwargs):
            made = function(*args, **kwargs)
            self.waits += made.device.type == "meta"
            return made

        return wrapped

    @property
    def total(self) -> int:
        return sum(self.launches.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if func is aten._local_scalar_dense.default:
            self.waits += 1
            return True
        if name in ("_to_copy", "copy_"):
            source = args[0] if name == "_to_copy" else args[1]
            target = kwargs.get("device") or (args[0].device if name == "copy_" else source.device)
            if source.device.type != torch.device(target).type:
                self.waits += not kwargs.get("non_blocking")
                if source.device.type == "meta":
                    assert source.numel() == len(self.answer)
                    return torch.tensor(self.answer)
        if not (func.is_view or name.startswith(("empty", "new_empty")) or name == "device"):
            self.launch(name)
        if kwargs.get("out_dtype") is not None or "dtype" in func._overloadname:
            return kwargs.get("out")  # the meta device lacks this product
        return func(*args, **kwargs)


class StandIn:
    """Takes the place of a Triton kernel and counts its launches."""

    def __init__(self, name: str, counted: Counted):
        self.name, self.counted = name, counted

    def __getitem__(self, grid):
        return lambda **arguments: self.counted.launch(self.name)


@contextlib.contextmanager
def counting(answer: list[int]):
    """`Counted`, with the tiles of an H100 and no Triton kernel launched."""
    counted = Counted(answer)
    with contextlib.ExitStack() as stack:
        for module, name in KERNELS:
            stand_in = StandIn(name, counted)
            stack.enter_context(mock.patch.object(module, name, stand_in))
        # the Gluon kernels take as many launches
        stack.enter_context(mock.patch.dict(os.environ, {gluon_hopper.VARIABLE: "triton"}))
        stack.enter_context(mock.patch.object(tiles, "of_device", lambda device: ("sm_90", 132)))
        stack.enter_context(mock.patch.object(triton_backend, "supports", lambda hidden: None))
        for place, name in ((torch, "tensor"), (torch, "as_tensor"), (torch.Tensor, "new_tensor")):
            stack.enter_context(mock.patch.object(place, name, counted.made(getattr(place, name))))
        stack.enter_context(counted)
        yield counted


class Call(NamedTuple):
    """Counts of one call, forward and backward."""

    launches: int
    waits: int
    groups: int
    kinds: dict[str, int]


def plain(operator):
    """What an operator runs: a mode does not see inside the operator itself."""
    return operator._init_fn.__wrapped__


def call(rows: int, strategy: str, tolerance: float = 0.0, dtype=torch.bfloat16) -> Call:
    """The loss of `rows` tokens in pairs of `PAIR`, and its gradient, 1 GiB of workspace."""
    meta = lambda *shape, dtype=dtype: torch.empty(*shape, dtype=dtype, device="meta")  # noqa: E731
    sequences = 2 * rows // PAIR
    ends = list(range(0, rows + 1, PAIR // 2))
    hidden, weight, labels = meta(rows, D), meta(V, D), meta(rows, dtype=torch.int64)
    cu_seqlens, refs = meta(sequences + 1, dtype=torch.int64), meta(sequences, dtype=torch.float32)
    objective = Objective("sigmoid", 0.1, 0.0, 0.5, 0.005, "sum", 0.0, 0.0)
    settings = Settings(
        ignore_index=-100, scale=1.0, softcap=None, dtype=dtype, validate=True,
        tolerance=tolerance, max_bytes=2**30, strategy=strategy, backend="triton",
        needs=[True, True, False],
    )  # fmt: skip
    given = hidden, weight, None, labels, cu_seqlens
    with counting([*ends, 0, V - 1, *ends]) as counted:
        _, _, _, *saved = plain(ops.preference_loss)(*given, refs, *objective, *settings)
        if strategy == "recompute":
            counted.answer = [0, rows] if not tolerance else ends
            logps, norm, coef, keep = saved
            plain(ops.linear_logprobs_backward)(coef, logps, norm, keep, *given, *settings)
    room = capacity(V, D, dtype.itemsize, 2**30)
    return Call(counted.total, counted.waits, -(-rows // (room // PAIR * PAIR)), counted.launches)


@pytest.mark.parametrize("strategy", ["stream", "recompute"])
def test_exact_calls_wait_twice_whatever_the_number_of_groups(strategy):
    for rows in (2**14, 2**16):
        found = call(rows, strategy)
        assert found.waits == 2, found


def test_a_tolerance_waits_once_more():
    """To learn whether skipping pays; what is kept is chosen without a look at it."""
    for rows in (2**14, 2**16):
        found = call(rows, "stream", tolerance=1e-3)
        assert found.waits == 3, found


def test_choosing_takes_few_launches():
    """Three for every block of 256 rows, nine for every step of a bisection, and the lists."""
    few, many = (call(rows, "stream", tolerance=1e-3) for rows in (2**14, 2**16))
    blocks = -(-2048 // BLOCK)
    assert (many.launches - few.launches) / 24 <= 24 + 3 * blocks + 9 * STEPS + 105


def test_a_group_of_pairs_takes_few_launches():
    """What does not grow with a group's work: all but the matmuls and what fills the panel."""
    few, many = call(2**14, "stream"), call(2**16, "stream")
    assert many.groups - few.groups == 24
    large = sum(many.kinds[name] for name in ("addmm", "exp_fused", "lse_partials"))
    assert large == 4 * many.groups
    assert (many.launches - few.launches) / 24 <= 4 + 20


def test_a_panel_takes_few_launches():
    """Recomputing: two matmuls, the panel, its targets; the bias' sum, and dW's scale if rows are
    in one chunk.
    """
    found = call(2**14, "recompute")
    panels = found.kinds["exp_fused"]
    assert found.launches - 60 <= 8 * panels


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.new_tensor([1, 2]),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: torch.tensor([1, 2]).to(x.device),
        lambda x: bool((x > 0).all()),
        lambda x: x.amax().item(),
        lambda x: x.tolist(),
        lambda x: x.copy_(torch.ones(4)),
    ],
)
def test_every_kind_of_wait_is_counted(wait):
    with counting([1, 2, 3, 4]) as counted:
        wait(torch.empty(4, device="meta"))
        assert counted.waits == 1


if __name__ == "__main__":
    for rows in (2**14, 2**16):
        for strategy in ("stream", "recompute"):
            print(rows, strategy, call(rows, strategy))
