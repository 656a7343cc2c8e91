"""The training loop and what it keeps: order of pictures, optimisers, processes, checkpoints, the run directory."""
