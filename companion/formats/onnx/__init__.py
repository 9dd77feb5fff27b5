"""ONNX: export, layers, the served model, and whether it computes the same."""
