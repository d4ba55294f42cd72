"""Count what became of every request of a run, and write it as a page with charts."""
