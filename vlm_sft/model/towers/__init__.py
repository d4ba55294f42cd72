"""Loaders of the three libraries that vision encoders come from."""
