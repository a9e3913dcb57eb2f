"""The policy: loaded, checked, run to its loss; its answers."""
