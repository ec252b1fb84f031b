"""Calibration: compute the statistics of every feature space from batches."""
