"""Where people already work: `transformers` (a model's head, its losses) and `trl` (its trainers).

Nothing here is imported by `rpo_kernels` itself, which needs torch alone.
"""
