"""Comparisons of methods at equal cost, run by run."""
