"""Floor 0: arrays and Numba. Nothing here knows a cell or a layer."""
