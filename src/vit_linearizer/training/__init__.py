"""The one training loop and all it keeps: configuration, schedule, checkpoints, run folder, progress."""
