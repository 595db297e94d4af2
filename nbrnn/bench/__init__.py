"""The speed of this machine, of nbrnn and of other engines: `nbrnn bench`, and what the benchmarks share."""
