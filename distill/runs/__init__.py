"""Runs on disk: training, sweeps, comparison, smoke tests and TensorBoard."""
