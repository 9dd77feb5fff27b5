"""Every engine's model answers to the same names."""

import inspect

import pytest

from companion.formats.executorch.model import ExecuTorchModel
from companion.formats.llama_cpp import LlamaCppModel
from companion.formats.onnx.model import OnnxModel
from companion.formats.served import ServedModel


@pytest.mark.parametrize("kind", [OnnxModel, LlamaCppModel, ExecuTorchModel])
def test_engines_are_asked_alike(kind):
    assert issubclass(kind, ServedModel)
    asked = inspect.signature(ServedModel.generate).parameters
    taken = inspect.signature(kind.generate).parameters
    assert {name: taken[name].default for name in asked} == {n: p.default for n, p in asked.items()}
    assert isinstance(vars(kind)["vocabulary"], property)
