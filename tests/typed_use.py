"""The public interface as a type checker reads it: `mypy` runs on this file, nothing executes it.

Every name of ``companion.__all__`` is used once, and what it returns is asserted.
"""

from pathlib import Path
from typing import TYPE_CHECKING, assert_type

from torch import Tensor, nn

import companion as c
from companion.data.task import Task
from companion.evaluation.language import DocumentLosses, Recovery
from companion.training.fit import History

if TYPE_CHECKING:
    import pandas as pd


def numbers(x: Tensor) -> None:
    assert_type(c.choose_scale(x, 4, scale_dtype=x.dtype), tuple[Tensor, Tensor])
    scale, zero_point = c.choose_scale(x)
    assert_type(c.quantize(x, scale, zero_point, bits=4), Tensor)
    assert_type(c.dequantize(x, scale), Tensor)
    assert_type(c.fake_quantize(x, scale, bits=2), Tensor)
    assert_type(c.unpack(c.pack(x, bits=3), bits=3, n=8), Tensor)
    assert_type(c.W4, c.QuantScheme)
    assert_type([c.W8, c.W3, c.W2, c.W4A8, c.W8A8], list[c.QuantScheme])
    assert_type(c.QuantScheme(4, activations=c.Activations(8)).integers, tuple[int, int])


def models(folder: Path) -> nn.Module:
    model, task = c.load_pretrained("docs-lm"), c.load_task("language-reference")
    assert_type(task, Task)
    qat = c.prepare_qat(model, c.W4, skip=["lm_head"])
    assert_type(c.fit(qat, task.train, steps=1, teacher=model), History)
    assert_type(c.fit_blocks(qat, task.train, teacher=model), dict[str, History])
    converted = c.convert(qat)
    assert_type(converted, nn.Module)
    assert_type(c.save_quantized(converted, folder), Path)
    assert_type(c.load_quantized(folder), nn.Module)
    assert_type(c.export_onnx(converted, folder / "model.onnx"), Path)
    assert_type(c.export_gguf(converted, folder / "model.gguf"), Path)
    assert_type(c.export_executorch(converted, folder / "model.pte"), Path)
    assert_type(c.export_compressed_tensors(converted, folder), Path)
    assert_type(c.to_torchao(converted), nn.Module)
    assert_type(c.release_cache(converted), int)
    wrapped = c.QuantWrapper(model).prepare_qat(weight_bits=8)
    assert_type(wrapped.convert(), c.QuantWrapper)
    return converted


def results(model: nn.Module, task: Task, losses: DocumentLosses) -> "pd.DataFrame":
    assert_type(c.accuracy(model, task.test), c.Estimate)
    assert_type(c.perplexity(model, task.test), c.Estimate)
    assert_type(c.recovery(losses, losses, losses), Recovery)
    assert_type(c.model_bytes(model), int)
    assert_type(c.latency(lambda: model(next(iter(task.test)))).median_ms, float)
    return c.compare(model, task, [c.W4], ["absmax"], steps=1)
