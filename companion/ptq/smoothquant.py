"""SmoothQuant: share outlying activations with the weights before both are rounded.

Built in chapter 11.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from companion.errors import EmptyLoader, NothingToQuantize


@torch.no_grad()
def smooth(
    model: nn.Module, loader: Iterable, *, strength: float = 0.5, batches: int = 4
) -> nn.Module:
    """Return a copy that computes the same, with outlying activations shared with the weights.

    Where a normalisation feeds Linear layers, its channel j is divided by
    ``max|x_j|**strength / max|w_j|**(1 - strength)`` and column j of those layers multiplied by
    it. Worth it where activations are rounded and some channels are far larger than others.

    Parameters
    ----------
    model : nn.Module
        Float; left as it is.
    loader : iterable of batches
        Calibration data.
    strength : float
        0 leaves the activations as they are, 1 makes all their channels alike.
    batches : int

    Returns
    -------
    nn.Module
        Still float: `prepare_qat` it, or convert it at once.

    Raises
    ------
    NothingToQuantize
        If no normalisation feeds Linear layers alone (post-norm encoders such as BERT, whose
        normalised output is also added further on).

    References
    ----------
    Xiao et al., "SmoothQuant: accurate and efficient post-training quantization for large
    language models", ICML 2023.

    Examples
    --------
    >>> model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    >>> x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    >>> torch.allclose(smooth(model, [(x, None)])(x), model(x), atol=1e-5)
    True
    """
    calibration = list(islice(loader, batches))
    if not calibration:
        raise EmptyLoader("the loader gave no batch to calibrate on: is the data set empty?")
    smoothed = copy.deepcopy(model).eval()
    pairs, largest = _norms_and_readers(smoothed, calibration)
    before, done = _output(run(smoothed, calibration[0])), 0
    for norm, readers in pairs.items():
        columns = torch.stack([layer.weight.abs().amax(0) for layer in readers]).amax(0)
        factor = largest[norm].clamp(min=1e-5) ** strength
        factor /= columns.clamp(min=1e-5) ** (1 - strength)
        _fold(norm, readers, factor)
        after = _output(run(smoothed, calibration[0]))
        if torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.abs().max())):
            done += 1
        else:  # someone else reads this output too, or the norm scales in a way of its own
            _fold(norm, readers, 1 / factor)
    if not done:
        raise NothingToQuantize(
            "no normalisation of this model feeds Linear layers alone, so there is nothing to "
            "smooth: round its activations per token instead, or skip the layers that suffer"
        )
    return smoothed.train(model.training)


def run(model: nn.Module, batch: Any) -> Any:
    """Run a model on the inputs of a batch, without its labels."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Mapping):
        left_out = ("labels", "document")
        return model(**{k: v.to(device) for k, v in batch.items() if k not in left_out})
    return model(batch[0].to(device))


def _norms_and_readers(model: nn.Module, calibration: list) -> tuple[dict, dict]:
    """Which Linear layers read the very output of which norm, and the largest value by channel."""
    owner: dict[int, tuple[nn.Module, Tensor]] = {}
    pairs: dict[nn.Module, list[nn.Linear]] = {}
    largest: dict[nn.Module, Tensor] = {}

    def wrote(module, _, output):
        owner[id(output)] = (module, output)  # holding it keeps its id from being used again
        peak = output.abs().flatten(0, -2).amax(0)
        largest[module] = torch.maximum(largest.get(module, peak), peak)

    def read(module, inputs):
        if id(inputs[0]) in owner:
            readers = pairs.setdefault(owner[id(inputs[0])][0], [])
            if module not in readers:
                readers.append(module)

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(read))
        elif isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() == 1:
            hooks.append(module.register_forward_hook(wrote))
    try:
        for batch in calibration:
            run(model, batch)
            owner.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return pairs, largest


def _fold(norm: nn.Module, readers: list[nn.Linear], factor: Tensor) -> None:
    norm.weight.div_(factor)
    if getattr(norm, "bias", None) is not None:
        norm.bias.div_(factor)
    for layer in readers:
        layer.weight.mul_(factor)


def _output(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output[0]
