"""Ways out: the integers that were trained, in the formats that are served."""
