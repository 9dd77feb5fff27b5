"""The eager road of ``torch.ao.quantization``, for convolutional nets."""
