"""Count the outcomes of the requests of a run, and write a page with charts."""
