"""What decays and what does not."""

import pytest
import torch
from torch import nn

from companion import W2, fit, prepare_qat
from companion.training.optimizer import parameter_groups


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 32)
        self.conv = nn.Conv1d(4, 4, 1)
        self.norm = nn.LayerNorm((4, 32))  # a weight of two dimensions
        self.rms = nn.RMSNorm(32)
        self.linear = nn.Linear(32, 8)
        self.head = nn.Linear(32, 8, bias=False)
        self.head.weight = self.embedding.weight
        self.table_bias = nn.Parameter(torch.zeros(8, 8))
        self.scale = nn.Parameter(torch.ones(8, 2))  # a learned range, as torchao names it
        self.temperature = nn.Parameter(torch.tensor(1.0))


def names(model: nn.Module, decay: float = 0.1) -> dict[float, set[str]]:
    known = {parameter: name for name, parameter in model.named_parameters()}
    return {group["weight_decay"]: {known[p] for p in group["params"]}
            for group in parameter_groups(model, decay)}  # fmt: skip


def test_matrices_decay():
    model = Net()
    decays = {"embedding.weight", "conv.weight", "linear.weight"}
    assert names(model) == {0.1: decays, 0.0: set(dict(model.named_parameters())) - decays}
    assert sum(len(group["params"]) for group in parameter_groups(model, 0.1)) == 11  # tied: once


@pytest.mark.parametrize("method", ["lsq", "mse"])
def test_learned_steps_do_not_decay(method):
    prepared = prepare_qat(Net(), W2, method, embeddings=True)
    found = names(prepared)
    assert {"embedding.weight", "linear.weight"} <= found[0.1]
    steps = {name for name, _ in prepared.named_parameters() if "quantizer" in name}
    assert bool(steps) == (method == "lsq")
    assert steps <= found[0.0]


def test_only_what_trains_and_no_empty_group():
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    assert names(layer) == {0.1: {"weight"}}
    assert parameter_groups(layer.requires_grad_(False)) == []


def test_fit_pulls_matrices_towards_0_and_nothing_else():
    """Without a gradient AdamW only decays: each matrix to (1 - lr * decay) of itself, a step."""
    model = prepare_qat(nn.Sequential(nn.Linear(32, 4), nn.LayerNorm(4)), W2)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = (torch.ones(4, 32), torch.tensor([0, 1, 2, 3]))
    fit(model, [batch], steps=1, lr=0.1, weight_decay=0.5, progress=False,
        loss_fn=lambda m, b: sum(p.sum() for p in m.parameters()) * 0)  # fmt: skip
    for name, parameter in model.named_parameters():
        expected = start[name] * (0.95 if name == "0.weight" else 1)
        assert torch.allclose(parameter, expected, rtol=2**-22, atol=0), name  # two roundings


def test_a_callable_gets_a_plain_list():
    seen = []

    def make(parameters):
        seen.extend(parameters)
        return torch.optim.SGD(parameters, lr=0.1)

    layer = nn.Linear(2, 2)
    fit(layer, [(torch.eye(2), torch.tensor([0, 1]))], steps=1, optimizer=make, progress=False)
    assert [id(p) for p in seen] == [id(p) for p in layer.parameters()]
