"""Training loop: step, state, optimizer, learning-rate schedule, checkpoints, metrics and evaluation."""
