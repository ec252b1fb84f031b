"""Phases of a merge: prepare, calibrate, match, merge."""
