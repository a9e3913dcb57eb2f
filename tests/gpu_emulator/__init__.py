"""Runs Triton's compiled NVIDIA kernels (PTX) on a CPU, end to end through Triton's own JIT path.

    from tests.gpu_emulator import install
    driver = install(sm=80)            # now triton kernels launched on CPU tensors are emulated
    ...
    print(driver.report())             # launches, and every fault that was seen

README.md has the list of files, what is checked, and the limits.
"""

from tests.gpu_emulator.driver import EmulatedDriver, install

__all__ = ["EmulatedDriver", "install"]
