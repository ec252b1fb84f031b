"""Networks of public packages, and what a merge makes of each."""
