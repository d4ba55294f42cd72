"""Measure how well a trained model answers questions about images."""
