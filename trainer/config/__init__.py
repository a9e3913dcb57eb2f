"""A run's settings: what a recipe and the command line may say, and what that may be."""
