"""Helpers that all phases share: copies, process groups, inputs, files."""
