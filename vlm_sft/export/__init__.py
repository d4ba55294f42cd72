"""Checkpoints to the formats other programs load."""
