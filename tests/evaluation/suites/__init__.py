"""Suites are read, answered, scored, compared and exported."""
