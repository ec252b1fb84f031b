"""Many settings, validated and compared."""
