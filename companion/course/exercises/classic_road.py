"""The exercises of Part I: a reference solution for each, inputs to try, a hint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Exercise:
    """A reference solution, the inputs to try, and a hint for those who are stuck."""

    reference: Callable[..., Any]
    hint: str
    inputs: Sequence[tuple] = ((),)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _with_fake_quantizers() -> nn.Module:
    """A model that holds two fake quantizers of different classes, one of them nested."""
    ao = torch.ao.quantization
    inner = nn.Sequential(nn.Linear(2, 2), ao.FusedMovingAvgObsFakeQuantize())
    return nn.Sequential(ao.FakeQuantize(), inner, nn.ReLU())


def _half_trained() -> nn.Module:
    """A model of which only the second layer has received a gradient."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[1](torch.ones(1, 3)).sum().backward()
    return model


def _group_error(weight: Tensor, group_size: int) -> float:
    """Mean squared error of rounding to symmetric 4-bit integers, one scale per group."""
    rows = weight.reshape(-1, group_size)
    scale = rows.abs().amax(1, keepdim=True) / 7.5
    rounded = scale * (rows * (1 / scale)).round().clamp(-8, 7)
    return float((rounded - rows).square().mean())


def _steps(w: Tensor, scale: float, bits: int) -> tuple[Tensor, Tensor]:
    """Weights in steps of the grid, rounded, before and after clipping."""
    steps = torch.round(w * (1 / scale))
    return steps, steps.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _mask(w: Tensor, scale: float, bits: int) -> Tensor:
    steps, clipped = _steps(w, scale, bits)
    return (steps == clipped).float()


def _wilson(k: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    centre = (k + z**2 / 2) / (n + z**2)
    half = z / (n + z**2) * np.sqrt(k * (n - k) / n + z**2 / 4)
    return float(centre - half), float(centre + half)


def _conv_and_bn(bias: bool, eps: float) -> tuple[nn.Module, nn.Module]:
    """A convolution and a batch norm in eval mode, with statistics that are not 0 and 1."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        conv, bn = nn.Conv2d(2, 3, 3, bias=bias), nn.BatchNorm2d(3, eps=eps).eval()
        conv.weight.copy_(_random(3, 2, 3, 3))
        if bias:
            conv.bias.copy_(_random(3))
        statistics = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
        for tensor, values in zip(statistics, _random(4, 3), strict=True):
            tensor.copy_(values)
        bn.running_var.abs_()
    return conv, bn


def _fold(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> Tensor:
    """Rows of the folded weight with the folded bias as one more column."""
    gain = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    bias = torch.zeros_like(gain) if conv.bias is None else conv.bias
    weight = (conv.weight.flatten(1) * gain[:, None]).detach()
    return torch.cat([weight, ((bias - bn.running_mean) * gain + bn.bias).detach()[:, None]], 1)


CLASSIC_ROAD: dict[str, Exercise] = {
    "ch01-count": Exercise(
        lambda model: sum(
            isinstance(m, torch.ao.quantization.FakeQuantizeBase) for m in model.modules()
        ),
        "walk through model.modules() and ask isinstance(..., FakeQuantizeBase).",
        [(_with_fake_quantizers(),), (nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()),)],
    ),
    "ch01-gradients": Exercise(
        lambda model: sum(p.grad is not None for p in model.parameters()),
        "a parameter that backward() reached has a .grad; the others have None.",
        [(_half_trained(),), (nn.Linear(2, 2),)],
    ),
    "ch02-split": Exercise(
        lambda labels, k: torch.cat([torch.nonzero(labels == c)[:k, 0] for c in labels.unique()]),
        "for each class in labels.unique(), take the first k positions where labels == c.",
        [
            (torch.tensor([2, 0, 1, 0, 2, 2, 1, 0]), 2),
            (torch.tensor([1, 1, 0, 1, 0]), 1),
            (torch.tensor([7, 5, 7, 5, 5]), 3),
        ],
    ),
    "ch02-share": Exercise(
        lambda model: (
            sum(
                p.numel()
                for m in model.modules()
                if isinstance(m, nn.Linear)
                for p in m.parameters()
            )
            / sum(p.numel() for p in model.parameters())
        ),
        "add up p.numel() over model.modules() that are nn.Linear, and divide by all of them.",
        [
            (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 5)),),
            (nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()),),
            (nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))),),
        ],
    ),
    "ch03-changed": Exercise(
        lambda model: sum(
            isinstance(m, nn.Conv2d) or (isinstance(m, nn.Linear) and type(m) is not nn.Linear)
            for m in model.modules()
        ),
        "call quantize_dynamic, then look at the classes in the model that it returns.",
        [
            (nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.Linear(4, 2)),),
            (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)),),
            (nn.TransformerEncoderLayer(d_model=8, nhead=2, dim_feedforward=8),),
        ],
    ),
    "ch03-bytes": Exercise(
        lambda inputs, outputs: (inputs + 4) / (4 * inputs + 4),
        "a weight takes 1 byte instead of 4; each output has a bias, which keeps its 4.",
        [(64, 32), (1, 10), (4096, 1024)],
    ),
    "ch04-levels": Exercise(
        lambda bits: 2**bits, "each bit doubles the number of patterns.", [(3,), (8,)]
    ),
    "ch04-scale": Exercise(
        lambda x, bits: float((x.max().clamp(min=0) - x.min().clamp(max=0)) / (2**bits - 1)),
        "widen the range to zero, then divide its length by the number of steps, 2**bits - 1.",
        [(_random(64), 4), (_random(64).abs() + 1, 8), (-_random(64).abs() - 1, 2)],
    ),
    "ch04-groups": Exercise(
        _group_error,
        "one group per row of weight.reshape(-1, group_size); scale = largest magnitude / 7.5.",
        [(_random(16, 64), 16), (_random(16, 64), 64), (10 * _random(8, 96), 32)],
    ),
    "ch05-fold": Exercise(
        _fold,
        "gain = bn.weight / sqrt(bn.running_var + bn.eps); the convolution's bias is shifted by "
        "the mean before the gain, and bn.bias comes after it.",
        [_conv_and_bn(False, 1e-5), _conv_and_bn(True, 1e-5), _conv_and_bn(True, 0.5)],
    ),
    "ch05-find": Exercise(
        lambda model: [
            name
            for name, m in model.named_modules()
            if isinstance(m, (torch.ao.quantization.QuantStub, torch.ao.quantization.DeQuantStub))
        ],
        "go through model.named_modules() and ask isinstance; return a list of names.",
        [
            (
                nn.Sequential(
                    torch.ao.quantization.QuantStub(),
                    nn.Sequential(nn.Linear(2, 2), torch.ao.quantization.DeQuantStub()),
                ),
            ),
            (nn.ModuleDict({"quant": nn.ReLU(), "enter": torch.ao.quantization.QuantStub()}),),
        ],
    ),
    "ch06-ste": Exercise(
        _mask,
        "round w * (1 / scale) and ask whether it lies from -2**(bits-1) to 2**(bits-1) - 1.",
        [
            (torch.tensor([-8.6, -8.4, -8.0, 0.0, 7.0, 7.4, 7.6]), 1.0, 4),
            (_random(64), 0.5, 2),
            (_random(8, 8), 0.1, 4),
        ],
    ),
    "ch06-latent": Exercise(
        lambda w, scale, bits, delta: int(
            (_steps(w, scale, bits)[1] != _steps(w + delta, scale, bits)[1]).sum()
        ),
        "round and clip w and w + delta, and count where the results differ.",
        [(_random(64), 0.5, 4, 0.125), (_random(64), 0.5, 4, 0.0), (_random(64), 0.25, 2, -0.25)],
    ),
    "ch07-wilson": Exercise(
        _wilson,
        "centre (k + z*z/2) / (n + z*z); half-width z / (n + z*z) * sqrt(k*(n-k)/n + z*z/4).",
        [(9, 10), (20, 20), (500, 600)],
    ),
    "ch07-disagree": Exercise(
        lambda first, second, labels: (
            int(((first == labels) & (second != labels)).sum()),
            int(((first != labels) & (second == labels)).sum()),
        ),
        "an example counts when exactly one of the two predictions equals its label.",
        [
            (np.array([0, 1, 2, 2]), np.array([0, 1, 1, 1]), np.array([0, 1, 2, 0])),
            (np.array([3, 3, 3, 3]), np.array([1, 2, 3, 0]), np.array([1, 2, 0, 3])),
        ],
    ),
}
