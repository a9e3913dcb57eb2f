"""Runs Triton's compiled NVIDIA kernels (PTX) on a CPU, end to end through Triton's own JIT path.

    from gpu_emulator import install
    driver = install(sm=80)            # now triton kernels launched on CPU tensors are emulated
    ...
    print(driver.report())             # launches, and every fault that was seen

Files: `driver` stands in for the CUDA driver, `ptx` parses, `program` turns a kernel into bytecode,
`vm.c` executes it, `machine` drives that and collects faults. `projects` holds the harness for one
package. Limits stand in README.md.
"""

from gpu_emulator.driver import EmulatedDriver, install

__all__ = ["EmulatedDriver", "install"]
