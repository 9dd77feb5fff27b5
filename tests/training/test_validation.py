"""What is kept of validation, and that nothing of it reaches the training."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from companion import fit
from tests.training.test_fit import loader, model, weights


def test_the_weights_that_did_best_in_validation_come_back():
    trained, values, seen = model(), iter([3.0, 1.0, 2.0, 5.0]), []

    def validate(m):
        seen.append(weights(m))
        torch.randn(5)  # draws of the validation must not reach the training
        return next(values)

    history = fit(trained, loader(), steps=25, validate=validate, validate_every=10)
    assert history.validation == [[0, 3.0], [10, 1.0], [20, 2.0], [25, 5.0]]
    assert all(torch.equal(a, b) for a, b in zip(weights(trained), seen[1], strict=True))
    without = model()
    assert history.loss == fit(without, loader(), steps=25).loss


def test_modes_are_after_validation_what_they_were_before():
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    seen = []

    def validate(m):
        m.eval()
        return 1.0

    fit(net, loader(), steps=6, validate=validate, validate_every=2,
        at={0: lambda: seen.append(modes(net)), 2: net[1].eval, 4: lambda: seen.append(modes(net))})  # fmt: skip
    assert seen[0] == [True] * 5
    assert seen[1] == modes(net) == [True, True, False, True, True]  # frozen on purpose


def test_dropout_acts_after_a_validation_that_calls_eval():
    """The curve is that of a run without validation."""
    curve = fit(model(), loader(), steps=6).loss
    assert (
        fit(model(), loader(), steps=6, validate=lambda m: float(m.eval().training)).loss == curve
    )


def test_modes_come_back_when_validation_fails():
    net = model()
    with pytest.raises(ZeroDivisionError):
        fit(net, loader(), steps=2, validate=lambda m: 1 / m.eval().training)
    assert net.training


def modes(net: nn.Module) -> list[bool]:
    return [module.training for module in net.modules()]


def test_what_validation_draws_from_any_generator_does_not_reach_the_training():
    def loss_fn(m, batch):  # draws from all three
        return m(batch[0]).square().mean() * (random.random() + np.random.rand() + torch.rand(1))[0]

    def validate(m):
        random.seed(5), np.random.seed(5), torch.manual_seed(5)
        return 1.0

    curve = fit(model(), loader(), steps=6, loss_fn=loss_fn).loss
    assert fit(model(), loader(), steps=6, loss_fn=loss_fn, validate=validate,
               validate_every=2).loss == curve  # fmt: skip


def test_what_is_no_number_never_did_best():
    values, seen = iter([float("nan"), 2.0, float("nan"), 3.0]), []

    def validate(m):
        seen.append(weights(m))
        return next(values)

    trained = model()
    fit(trained, loader(), steps=6, validate=validate, validate_every=2)
    assert all(torch.equal(a, b) for a, b in zip(weights(trained), seen[1], strict=True))
