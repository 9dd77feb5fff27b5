"""Speeds are medians, per phase, of models that take turns."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from companion.cli.bench import speeds
from companion.formats.onnx.model import OnnxModel


class Sleeper(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, input_ids, past_key_values=None, use_cache=True):
        time.sleep(self.seconds * input_ids.shape[1])
        return SimpleNamespace(logits=torch.zeros(1, input_ids.shape[1], 5), past_key_values=0)


def test_prompt_and_token_are_told_apart():
    found = speeds({"fast": Sleeper(0.002), "slow": Sleeper(0.01)}, prompt=4, tokens=3, rounds=3)
    assert found["fast"]["prefill"] > 3 * found["fast"]["decode"] > 3 * 2
    assert found["slow"]["decode"] > 3 * found["fast"]["decode"]


def test_a_prompt_that_fills_the_context_is_named(served_docs_lm):
    model, path = served_docs_lm
    full = model.config.max_position_embeddings - 1
    with pytest.raises(ValueError, match="shorter prompt"):
        speeds({"served": OnnxModel(path)}, prompt=full, tokens=3, rounds=1)


def test_served_models_are_timed_too(served_docs_lm):
    model, path = served_docs_lm
    found = speeds({"torch": model, "served": OnnxModel(path)}, prompt=8, tokens=3, rounds=1)
    assert all(ms > 0 for phases in found.values() for ms in phases.values())
