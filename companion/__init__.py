"""Quantization-aware fine-tuning in PyTorch: the package that the course builds and uses.

The names below are the public interface; each is explained where the book builds it.
"""

from companion.cost import latency, model_bytes
from companion.evaluate import Estimate, accuracy
from companion.export import export_onnx
from companion.integers import choose_scale, dequantize, fake_quantize, pack, quantize, unpack
from companion.language import perplexity, recovery
from companion.models import load_pretrained
from companion.packed import load_quantized, save_quantized
from companion.qat import convert, prepare_qat
from companion.scheme import W2, W3, W4, W4A8, W8, W8A8, Activations, QuantScheme
from companion.study import compare
from companion.tasks import load_task
from companion.to_torchao import to_torchao
from companion.train import fit
from companion.wrapper import QuantWrapper

__version__ = "0.1.0"

__all__ = [
    "W2",
    "W3",
    "W4",
    "W4A8",
    "W8",
    "W8A8",
    "Activations",
    "Estimate",
    "QuantScheme",
    "QuantWrapper",
    "accuracy",
    "choose_scale",
    "compare",
    "convert",
    "dequantize",
    "export_onnx",
    "fake_quantize",
    "fit",
    "latency",
    "load_pretrained",
    "load_quantized",
    "load_task",
    "model_bytes",
    "pack",
    "perplexity",
    "prepare_qat",
    "quantize",
    "recovery",
    "save_quantized",
    "to_torchao",
    "unpack",
]
