"""Integration with Lightning: Trainer, callback, command line, checkpoints."""
