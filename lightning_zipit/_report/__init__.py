"""The report of a merge, and its diagnosis."""
