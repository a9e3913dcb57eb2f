"""Is it right and fast on this machine? ``python -m rpo_kernels.doctor``: see `cli`."""

from rpo_kernels.doctor.cli import main

__all__ = ["main"]
