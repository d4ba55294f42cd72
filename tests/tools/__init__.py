"""Developer tools: mutation runs, mask proofs, kill runs (see scripts/nightly)."""
