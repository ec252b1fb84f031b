"""Checkpoints: reading, descriptions of source models, and trust in the names that a file holds."""
