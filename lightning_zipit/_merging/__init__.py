"""Merging: compute merged weights from maps, and build stems, trunk and heads."""
