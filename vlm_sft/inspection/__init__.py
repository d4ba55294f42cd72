"""Inspect records and runs: tokens, filtering results, statistics, and HTML pages of them."""
