"""Report and diagnosis of a merge."""
