"""Loops over rows and vocabulary panels: `recompute` (log-probs, 4U) and `streaming` (gradient in
forward, 3U or 2U).
"""
