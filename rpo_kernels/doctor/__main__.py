"""``python -m rpo_kernels.doctor``."""

from rpo_kernels.doctor.cli import main

raise SystemExit(main())
