"""``python -m rpo_kernels.doctor``."""

from rpo_kernels.doctor.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
