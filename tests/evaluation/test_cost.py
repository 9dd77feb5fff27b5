from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from companion import W4, convert, latency, load_pretrained, model_bytes, prepare_qat
from companion.course.sources import find


def test_model_bytes_is_the_size_of_the_file(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert model_bytes(model) == (tmp_path / "model.safetensors").stat().st_size


def test_tied_tensors_count_once_as_in_the_file():
    float_model = load_pretrained("docs-lm")
    file = Path(find("docs-lm")[0], "model.safetensors").stat().st_size
    assert model_bytes(float_model) == pytest.approx(file, rel=1e-3)
    packed = convert(prepare_qat(float_model, W4, embeddings=True))
    assert 0.14 < model_bytes(packed) / model_bytes(float_model) < 0.15


@pytest.mark.parametrize("kind", [nn.Linear, nn.LSTM])
def test_model_bytes_opens_packed_integers(kind):
    from torch.ao.quantization import quantize_dynamic

    model = nn.Sequential(kind(256, 256))
    quantized = quantize_dynamic(model, {kind}, dtype=torch.qint8)
    assert 0.25 < model_bytes(quantized) / model_bytes(model) < 0.27


def test_latency_restores_threads_and_reports_them():
    before = torch.get_num_threads()
    result = latency(lambda: torch.ones(64, 64) @ torch.ones(64, 64), threads=1, min_seconds=0.02)
    assert result.threads == 1
    assert result.median_ms > 0
    assert result.runs >= 1
    assert torch.get_num_threads() == before
