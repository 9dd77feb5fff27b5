"""What a run is described by: equal for equal runs, and naming what differs."""

import json
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from companion import W2, W4, prepare_qat
from companion.training.fingerprint import (
    describe,
    describe_loader,
    describe_model,
    describe_optimizer,
    differences,
    hash_of,
)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))


def frozen() -> nn.Module:
    model = net()
    model[0].weight.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("there", "here", "named"),
    [
        (prepare_qat(net(), W4), prepare_qat(net(), W2), "weight_bits: 4 there, 2 here"),
        (prepare_qat(net(), W4), prepare_qat(net(), W4, "absmax"), "method: lsq there"),
        (prepare_qat(net(), W4), net(), "quantization: Quantization there"),
        (net(), frozen(), "0.weight: 32x32 float32 there, 32x32 float32 frozen here"),
        (net(), net().double(), "0.weight: 32x32 float32 there, 32x32 float64 here"),
    ],
)
def test_models_that_differ_are_told_apart(there, here, named):
    found = differences(describe_model(there), describe_model(here))
    assert any(named in line for line in found), found


def test_the_same_model_with_other_weights_is_the_same_run():
    other = net()
    nn.init.ones_(other[0].weight)
    assert differences(describe_model(net()), describe_model(other)) == []


def test_optimizers_are_described_by_their_settings():
    def described(**settings):
        optimizer = torch.optim.AdamW(net().parameters(), **settings)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return describe_optimizer(optimizer)

    assert differences(described(lr=0.1), described(lr=0.1)) == []
    assert differences(described(lr=0.1), described(lr=0.2)) == ["group 0.lr: 0.1 there, 0.2 here"]
    assert any("betas" in line for line in differences(described(), described(betas=(0.8, 0.9))))


class Stream(IterableDataset):
    def __iter__(self):
        return iter([torch.ones(2)])


def test_loaders_are_described_where_they_know_themselves():
    rows = torch.ones(10, 2)
    assert describe_loader(DataLoader(rows, 5)) != describe_loader(DataLoader(rows, 2))
    assert json.dumps(describe_loader(DataLoader(Stream(), 5)))  # has no length


def test_functions_are_named_without_an_address():
    for value in (test_the_same_model_with_other_weights_is_the_same_run, lambda x: x, object()):
        assert "0x" not in json.dumps(describe(value))
    sgd = partial(torch.optim.SGD, lr=0.1)
    assert (
        describe(sgd)
        == describe(partial(torch.optim.SGD, lr=0.1))
        != describe(partial(torch.optim.SGD, lr=0.2))
    )


def test_hashes_follow_the_values():
    x = torch.arange(6.0)
    assert hash_of({"x": x}) == hash_of({"x": x.clone()})
    for other in (x + 1, x.view(2, 3), x.double(), {"y": x}):
        assert hash_of({"x": x}) != hash_of(other if isinstance(other, dict) else {"x": other})
