"""What became of every request of a run, counted and shown."""
