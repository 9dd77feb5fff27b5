"""ExecuTorch: export, what stands in a file, and the model that its runtime computes."""
