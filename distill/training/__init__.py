"""The training loop: step, state, optimizer, schedule, checkpoints, evaluation, distributed processes."""
