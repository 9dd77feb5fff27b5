"""Batches in an order that a seed decides."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from companion import fit
from companion.errors import EmptyLoader
from companion.training.batches import batches

LOADER = DataLoader(
    TensorDataset(torch.arange(10.0)[:, None], torch.arange(10) % 2), 4, shuffle=True
)


def test_the_batches_are_those_that_fit_sees():
    seen = []

    def loss_fn(model, batch):
        seen.append(batch[0])
        return model(batch[0]).sum()

    fit(nn.Linear(1, 1), LOADER, steps=7, seed=3, loss_fn=loss_fn, progress=False)
    drawn = batches(LOADER, 7, seed=3)  # 3 batches a pass: more than two passes
    assert len(drawn) == 7
    assert all(torch.equal(a, b[0]) for a, b in zip(seen, drawn, strict=True))
    assert any(not torch.equal(a, b[0]) for a, b in zip(seen, batches(LOADER, 7, 4), strict=True))


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    batches(LOADER, 4)
    assert torch.equal(torch.rand(3), expected)


def test_empty_and_exhausted_loaders():
    with pytest.raises(EmptyLoader, match="the loader gave no batch"):
        batches([], 1)
    with pytest.raises(EmptyLoader, match="ran dry after 2 batches"):
        batches(iter([1, 2]), 3)
