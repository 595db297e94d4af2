"""Floor 3: losses, optimizers, schedules, clipping, the trainer and its checkpoints."""
