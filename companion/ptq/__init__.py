"""Post-training quantization: what calibration alone can do."""
