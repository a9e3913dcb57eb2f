"""Evaluation of trained models: the parts behind `python -m trainer.evaluate`."""
