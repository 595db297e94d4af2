"""The asv suites. Everything is compiled in `setup`, never in a timed body."""
