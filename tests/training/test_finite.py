"""Losses that are no numbers: float16 is named where it is computed in, and only there."""

import pytest
import torch
from torch import nn

from companion import fit
from companion.errors import NonFiniteLoss
from companion.training.losses import default_loss

BATCH = (torch.full((2, 4), 300.0), torch.tensor([0, 1]))


def loud() -> nn.Linear:
    layer = nn.Linear(4, 2)
    layer.weight.data.fill_(100.0)
    return layer


def autocast(model, batch):
    with torch.autocast("cpu", dtype=torch.float16):
        logits = model(batch[0])
    return nn.functional.cross_entropy(logits, batch[1])


@pytest.mark.parametrize("where", ["model", "loss", "around"])
def test_float16_is_named(where):
    layer, batch = loud(), BATCH
    if where == "model":
        layer, batch = layer.half(), (BATCH[0].half(), BATCH[1])
    loss_fn = autocast if where == "loss" else default_loss
    around = torch.autocast("cpu", dtype=torch.float16, enabled=where == "around")
    with (
        around,
        pytest.raises(NonFiniteLoss, match=r"nan at step 0, computed in float16.*bfloat16"),
    ):
        fit(layer, [batch], steps=1, loss_fn=loss_fn)


def test_float16_of_a_frozen_part_is_named():
    net = nn.Sequential(loud().half().requires_grad_(False), Widen(), nn.Linear(2, 2))
    with pytest.raises(NonFiniteLoss, match="computed in float16"):
        fit(net, [(BATCH[0].half(), BATCH[1])], steps=1)


class Widen(nn.Module):
    def forward(self, x):
        return x.float()


def test_other_numbers_are_not_accused():
    layer = loud()
    layer.weight.data.fill_(torch.inf)
    with pytest.raises(NonFiniteLoss, match="nan at step 0: lower the learning rate"):
        fit(layer, [BATCH], steps=1)


@pytest.mark.parametrize("half", [False, True])
def test_a_gradient_that_is_no_number_is_noticed_before_the_weights_are(half):
    """The derivative of a root at 0: the loss is finite, and every weight would be lost."""
    layer = nn.Linear(2, 2, bias=False)
    layer = layer.half() if half else layer
    start = layer.weight.detach().clone()
    x = torch.zeros(1, 2, dtype=layer.weight.dtype)
    with pytest.raises(NonFiniteLoss, match="gradient is nan at step 0.*" + "float16" * half):
        fit(layer, [x], steps=1, loss_fn=lambda m, x: m(x).sum().sqrt())
    assert torch.equal(layer.weight, start)
