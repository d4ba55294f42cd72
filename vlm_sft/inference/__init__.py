"""Load a checkpoint and generate answers."""
