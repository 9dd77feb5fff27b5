"""One training loop, and what stands beside it: losses, checkpoints, processes, memory."""
