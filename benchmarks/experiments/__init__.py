"""Controlled experiments: why the SFT term is there, and what it does."""
