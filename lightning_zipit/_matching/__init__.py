"""Statistics to a map of every feature space: which features become one."""
