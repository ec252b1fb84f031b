"""Maps to merged weights, and these to real modules."""
