"""What the integers are: schemes, scales, rounding, packing. It knows no model."""
