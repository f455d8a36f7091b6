"""Runs on disk: training one, sweeps, comparison, smoke runs, TensorBoard."""
