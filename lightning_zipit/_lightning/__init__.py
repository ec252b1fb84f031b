"""All that knows Lightning: Trainer, callback, command line, checkpoints."""
