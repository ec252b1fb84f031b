"""The matching phase: from statistics to a map of every feature space."""
