"""What checkpoints say, and what of it may be imported or called."""
