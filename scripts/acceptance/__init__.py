"""Acceptance on a GPU: correctness, throughput and memory against stated targets."""
