"""What a merge did, in numbers and in words."""
