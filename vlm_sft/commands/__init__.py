"""The commands behind the entry points, and the argument parser they share."""
