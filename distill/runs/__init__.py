"""Runs on disk: training, sweeps, comparison, smoke tests and TensorBoard."""

CHECKPOINT_SECONDS = 60.0
"""Default time between checkpoints."""
