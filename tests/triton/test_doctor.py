"""The doctor's checks of the Triton backend: interpreted, or compiled on the emulator."""

import pytest
import torch

pytest.importorskip("triton")

from rpo_kernels import tuning
from rpo_kernels.backends import tiles, triton_kernels
from rpo_kernels.backends import triton_backend as backend
from rpo_kernels.doctor import accuracy, candidates

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
BF16 = torch.bfloat16


@pytest.mark.skipif(triton_kernels.INTERPRETED.value, reason="the emulator is as thorough")
def test_every_kernel_is_right():
    found = list(accuracy.findings("triton", backend, DEVICE, BF16))
    assert not [finding for finding in found if not finding.right]
    names = {finding.name for finding in found}
    assert names >= accuracy.KERNELS.keys() | accuracy.ONCE.keys()


def test_every_path_is_a_candidate_and_right():
    """Fused, the vendor's matmul, and on Hopper Gluon: one of each is checked and timed."""
    found = candidates.trials("triton", DEVICE, BF16, 64)
    assert found[0].choice == tuning.kernels(DEVICE, BF16)  # what runs now comes first
    paths = {(x.part, x.choice.exp_path, x.choice.hopper): x for x in reversed(found)}
    wanted = {(part, "fused", "triton") for part in candidates.PARTS}
    wanted |= {("exp_panel", "panel", "triton")}
    if tiles.of_device(DEVICE)[0] == "sm_90":
        wanted |= {(part, "fused", "gluon") for part in candidates.PARTS}
    assert paths.keys() == wanted
    case = candidates.random_case(20, 72, 150, BF16, DEVICE)
    for trial in paths.values():
        timing = candidates.measure("triton", backend, trial, case, 1)
        assert not timing.error and len(timing.samples) == 1, timing


def test_a_tile_that_cannot_run_is_left_out():
    own = tuning.kernels(DEVICE, BF16)
    broken = own._replace(tile=own.tile._replace(block_d=0), exp_path="fused", hopper="triton")
    case = candidates.random_case(20, 72, 150, BF16, DEVICE)
    trial = candidates.Trial("exp_panel", broken, "no tile")
    assert candidates.measure("triton", backend, trial, case, 1).error


def test_the_fastest_panel_takes_the_fastest_tile_of_sums():
    own = tuning.kernels(DEVICE, BF16)._replace(hopper="triton")
    one, other = (
        own._replace(tile=own.tile._replace(num_warps=w), exp_path="fused") for w in (4, 8)
    )
    panel = own._replace(exp_path="panel")
    times = {("lse_and_target", one): 3.0, ("lse_and_target", other): 1.0}
    times |= {("exp_panel", one): 2.0, ("exp_panel", other): 4.0, ("exp_panel", panel): 2.5}
    timings = [
        candidates.Timing(candidates.Trial(part, choice, ""), [x])
        for (part, choice), x in times.items()
    ]
    assert candidates.fastest(timings) == panel._replace(tile=other.tile)
