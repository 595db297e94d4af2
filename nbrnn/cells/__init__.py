"""Floor 1: one file a cell, its equations forward and backward and nothing else."""
