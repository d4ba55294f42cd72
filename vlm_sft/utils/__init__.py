"""Files, text and terminal: what every other package builds on."""
