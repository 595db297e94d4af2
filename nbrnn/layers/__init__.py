"""Floor 2: layers, modules with parameters and three calls."""
