"""From a float model to one that trains rounded, and on to packed integers."""
