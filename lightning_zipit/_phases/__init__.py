"""The phases of a merge, one file for each: functions and small classes from values to a value."""
