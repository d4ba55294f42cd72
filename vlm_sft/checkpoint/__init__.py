"""Everything about a run's files on disk: run directory, checkpoints, shards, optimizer state."""
