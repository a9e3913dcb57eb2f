"""Regularized Preference Optimization (RPO, arXiv 2405.16436) without logits: fused log-probs and
preference losses.
"""

from rpo_kernels.api import RPOOutput, fused_preference_loss, fused_rpo_loss, linear_logprobs

__all__ = ["RPOOutput", "fused_preference_loss", "fused_rpo_loss", "linear_logprobs"]
__version__ = "0.1.0"
