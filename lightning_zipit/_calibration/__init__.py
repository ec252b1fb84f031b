"""Batches to the statistics of every feature space."""
