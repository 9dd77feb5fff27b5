"""Every test runs as if without a network."""

import socket
from pathlib import Path

import pytest
from torch import nn

from companion import W4, convert, load_pretrained, prepare_qat
from companion.formats.onnx.export import export_onnx


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args, **kwargs):
        raise OSError("tests run without a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def served_docs_lm(tmp_path_factory) -> tuple[nn.Module, Path]:
    """docs-lm with every matrix in four bits, converted, and the file it is served from."""
    model = convert(prepare_qat(load_pretrained("docs-lm"), W4, "mse", embeddings=True))
    return model, export_onnx(model, tmp_path_factory.mktemp("served") / "model.onnx")
