"""Measuring what a trained model sees."""
