"""Quantization-aware fine-tuning in PyTorch: the package that the course builds and uses.

The names below are the public interface; each is explained where the book builds it. They are
imported when they are first used, so that ``import companion`` costs next to nothing and asks
only for what is needed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from companion.classic.wrapper import QuantWrapper
    from companion.course.models import load_pretrained
    from companion.course.tasks import load_task
    from companion.evaluation.cost import latency, model_bytes
    from companion.evaluation.estimates import Estimate, accuracy
    from companion.evaluation.language import perplexity, recovery
    from companion.formats.compressed_tensors import export_compressed_tensors
    from companion.formats.executorch.export import export_executorch
    from companion.formats.gguf import export_gguf
    from companion.formats.hub import load_quantized, save_quantized
    from companion.formats.onnx.export import export_onnx
    from companion.formats.torchao import to_torchao
    from companion.numerics.affine import choose_scale, dequantize, fake_quantize, quantize
    from companion.numerics.packing import pack, unpack
    from companion.numerics.scheme import W2, W3, W4, W4A8, W8, W8A8, Activations, QuantScheme
    from companion.qat.packed import release_cache
    from companion.qat.prepare import convert, prepare_qat
    from companion.study.compare import compare
    from companion.training.blocks import fit_blocks
    from companion.training.fit import fit

__version__ = "0.2.0"

_HOME = {
    "classic.wrapper": ("QuantWrapper",),
    "course.models": ("load_pretrained",),
    "course.tasks": ("load_task",),
    "evaluation.cost": ("latency", "model_bytes"),
    "evaluation.estimates": ("Estimate", "accuracy"),
    "evaluation.language": ("perplexity", "recovery"),
    "formats.compressed_tensors": ("export_compressed_tensors",),
    "formats.executorch.export": ("export_executorch",),
    "formats.gguf": ("export_gguf",),
    "formats.hub": ("load_quantized", "save_quantized"),
    "formats.onnx.export": ("export_onnx",),
    "formats.torchao": ("to_torchao",),
    "numerics.affine": ("choose_scale", "dequantize", "fake_quantize", "quantize"),
    "numerics.packing": ("pack", "unpack"),
    "numerics.scheme": ("W2", "W3", "W4", "W4A8", "W8", "W8A8", "Activations", "QuantScheme"),
    "qat.packed": ("release_cache",),
    "qat.prepare": ("convert", "prepare_qat"),
    "study.compare": ("compare",),
    "training.blocks": ("fit_blocks",),
    "training.fit": ("fit",),
}
_MODULE = {name: f"companion.{module}" for module, names in _HOME.items() for name in names}

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
    "export_compressed_tensors",
    "export_executorch",
    "export_gguf",
    "export_onnx",
    "fake_quantize",
    "fit",
    "fit_blocks",
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
    "release_cache",
    "save_quantized",
    "to_torchao",
    "unpack",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its room on first use."""
    if name not in _MODULE:
        raise AttributeError(f"module 'companion' has no attribute {name!r}")
    value = getattr(import_module(_MODULE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# by its name, since every room imports this face, and formats stands above most of them
import_module("companion.formats.registration").register_with_transformers()
