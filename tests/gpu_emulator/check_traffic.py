"""What a kernel of `rpo_kernels` does not touch: counted in instructions.

python -m pytest -p tests.gpu_emulator.plugin --sm 90 tests/gpu_emulator/check_traffic.py
"""

from __future__ import annotations

import torch

from rpo_kernels.backends import tiles
from rpo_kernels.backends import triton_backend as backend


def test_a_factor_of_one_costs_no_pass(driver):
    """As many instructions whatever the size; any other factor's grow with it."""
    whole = 8 * driver.device.multiprocessors * tiles.SCALE_BLOCK

    def instructions(factor, rounds):
        backend.scale_(torch.ones(rounds * whole, dtype=torch.bfloat16), torch.tensor(factor))
        return driver.launches[-1].instructions

    assert instructions(1.0, 1) == instructions(1.0, 2)
    assert instructions(0.5, 1) > 2 * instructions(1.0, 1)
