"""Benchmarks of rpo_kernels and its peers: `python -m benchmarks.run --help`, `pytest
benchmarks/`.
"""
