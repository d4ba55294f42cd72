"""Evaluation suites: tasks in a YAML file, answered by any model, scored, compared and exported."""
