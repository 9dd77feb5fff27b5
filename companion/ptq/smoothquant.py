"""SmoothQuant: share outlying activations with the weights before both are rounded.

Built in chapter 11.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from companion.errors import EmptyLoader, NothingToQuantize, UnsupportedModel
from companion.evaluation.forward import run
from companion.qat.selection import kind_of, refuse_quantized


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
    EmptyLoader, UnsupportedModel, WrongStage
        If there is no batch, it holds values that are not finite, or the model carries adapters
        or is quantized already.

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
    refuse_quantized(model)
    if any(type(module).__module__.split(".")[0] == "peft" for module in model.modules()):
        raise UnsupportedModel(
            "smooth() changes weights that the adapters of this model were made for: smooth the "
            "model before get_peft_model(), or call merge_and_unload() first"
        )
    calibration = [_in_float32(batch) for batch in islice(loader, batches)]
    if not calibration:
        raise EmptyLoader("the loader gave no batch to calibrate on: is the data set empty?")
    smoothed = copy.deepcopy(model).eval().float()
    half = any(p.is_floating_point() and p.itemsize < 4 for p in model.parameters())
    before, done = _output(run(smoothed, calibration[0])), 0
    for place in _places(smoothed, calibration):
        if not _computes_the_same(smoothed, place, calibration[0], before):
            continue  # someone else reads this output too
        columns = torch.stack([_matrix(layer).abs().amax(0) for layer in place.readers]).amax(0)
        factor = place.largest.clamp(min=1e-5) ** strength
        factor /= columns.clamp(min=1e-5) ** (1 - strength)
        if half:  # weights of eight or eleven bits keep them all under powers of two alone
            factor = 2.0 ** factor.log2().round()
        place.fold(factor)
        done += 1
    if not done:
        raise NothingToQuantize(
            "no normalisation of this model feeds Linear layers alone, so there is nothing to "
            "smooth: round its activations per token instead, or skip the layers that suffer"
        )
    for tensor, original in zip(_tensors(smoothed), _tensors(model), strict=True):
        tensor.data = tensor.data.to(original.dtype)
    return smoothed.train(model.training)


@dataclass
class _Place:
    """A normalisation (several, if they share a weight) and the layers that read its output.

    Its output is proportional to `weight + offset`, apart from the bias.
    """

    norms: list[nn.Module]
    offset: float
    largest: Tensor
    readers: list[nn.Module] = field(default_factory=list)

    def fold(self, factor: Tensor) -> None:
        for weight in _distinct(norm.weight for norm in self.norms):
            weight.add_(self.offset).div_(factor).sub_(self.offset)
        for bias in _distinct(getattr(norm, "bias", None) for norm in self.norms):
            bias.div_(factor)
        for weight in _distinct(_matrix(layer) for layer in self.readers):
            weight.mul_(factor)


def _places(model: nn.Module, calibration: list) -> list[_Place]:
    """Find which layers read the very output of which norm, and its largest value by channel."""
    owner: dict[int, tuple[_Place, Tensor]] = {}
    places: dict[int, _Place | None] = {}

    def wrote(module, inputs, output):
        if isinstance(output, Tensor) and not output.isfinite().all():
            raise UnsupportedModel(
                "the calibration batches give activations that are not finite: check the data"
            )
        key = id(module.weight)
        if key not in places or (places[key] and module not in places[key].norms):
            offset = _offset_of(module, inputs, output)
            if offset is None or (places.get(key) and places[key].offset != offset):
                places[key] = None
            elif key in places:
                places[key].norms.append(module)
            else:
                places[key] = _Place([module], offset, torch.zeros_like(module.weight))
        if (place := places[key]) is not None:
            owner[id(output)] = (place, output)  # holding it keeps its id from being used again
            peak = output.abs().flatten(0, -2).amax(0)
            place.largest = torch.maximum(place.largest, peak)

    def read(module, inputs):
        if inputs and id(inputs[0]) in owner:
            place = owner[id(inputs[0])][0]
            if not any(module is reader for reader in place.readers):
                place.readers.append(module)

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Linear) or kind_of(module) == "Conv1D":
            hooks.append(module.register_forward_pre_hook(read))
        elif getattr(module._parameters.get("weight"), "ndim", 0) == 1:
            hooks.append(module.register_forward_hook(wrote))
    try:
        for batch in calibration:
            run(model, batch)
            owner.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return [place for place in places.values() if place is not None and place.readers]


def _offset_of(module: nn.Module, inputs: tuple, output: Any) -> float | None:
    """Return o if the output is (weight + o) times something without the weight, plus the bias.

    That holds for LayerNorm, RMSNorm, GroupNorm and BatchNorm with o = 0, for Gemma's norms with
    o = 1. It does not hold for PReLU, whose weight leaves positive inputs as they are.
    """
    given = inputs[0] if len(inputs) == 1 else None
    if not all(
        isinstance(x, Tensor) and x.shape[-1:] == module.weight.shape for x in (given, output)
    ):
        return None
    probe = torch.randn(given.shape, generator=torch.Generator().manual_seed(0)).to(given)
    factor = _powers_of_two(module.weight)
    kept = [tensor.clone() for tensor in module.parameters()]
    forward = type(module).forward  # not the hooks, which are at work
    before = [forward(module, x) for x in (given, probe)]
    try:
        for offset in (0.0, 1.0):
            _Place([module], offset, factor).fold(factor)
            after = [forward(module, x) * factor for x in (given, probe)]
            for tensor, value in zip(module.parameters(), kept, strict=True):
                tensor.copy_(value)
            if all(map(_close, before, after)):
                return offset
    finally:
        for tensor, value in zip(module.parameters(), kept, strict=True):
            tensor.copy_(value)
    return None


def _computes_the_same(model: nn.Module, place: _Place, batch: Any, before: Tensor) -> bool:
    """Fold strong factors in and out again: powers of two, so that only another reader differs."""
    factor = _powers_of_two(place.largest)
    kept = [(norm.weight, norm.weight.clone()) for norm in place.norms]
    place.fold(factor)
    after = _output(run(model, batch))
    place.fold(1 / factor)
    for weight, value in kept:
        weight.copy_(value)  # 1 + weight does not come back to the last bit
    return _close(before, after)


def _powers_of_two(like: Tensor) -> Tensor:
    return 2.0 ** (torch.arange(like.numel(), device=like.device) % 5 - 2)


def _close(before: Tensor, after: Tensor) -> bool:
    """Equal but for rounding in float32, of Gemma's 1 + weight above all."""
    return torch.allclose(before, after, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


def _matrix(layer: nn.Module) -> Tensor:
    """View a weight as (out_features, in_features); GPT-2's Conv1D keeps it transposed."""
    return layer.weight.t() if kind_of(layer) == "Conv1D" else layer.weight


def _distinct(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    return list({t.data_ptr(): t for t in tensors if t is not None}.values())


def _tensors(model: nn.Module) -> Iterable[Tensor]:
    return chain(model.parameters(), model.buffers())


def _in_float32(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.float() if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {key: _in_float32(value) for key, value in batch.items()}
    return tuple(map(_in_float32, batch)) if isinstance(batch, (tuple, list)) else batch


def _output(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output[0]
