"""The parts of the acceptance; each is run as a module in a process of its own."""
