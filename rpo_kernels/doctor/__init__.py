"""Is it right and fast on this machine? ``python -m rpo_kernels.doctor``; see `cli`."""
