"""Matching: compute the map of every feature space from its statistics."""
