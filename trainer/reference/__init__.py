"""Reference log-probs: what the policy is compared with."""
