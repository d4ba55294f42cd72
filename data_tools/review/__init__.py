"""Review samples by eye: a local page, decisions of several reviewers, and their agreement."""
