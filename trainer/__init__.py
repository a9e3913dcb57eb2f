"""Preference training with RPO; `trainer/README.md` follows one batch through it."""
