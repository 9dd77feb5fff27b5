"""What makes a run this run and no other, in words that a checkpoint keeps and an error names.

Built in chapter 2.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLED = 2**16  # elements of a tensor that its hash reads at most, spread evenly
_NOTHING = "nothing"


def describe_model(model: nn.Module) -> dict:
    """Describe a model by its class, its tensors and how it is rounded, not by its weights.

    Examples
    --------
    >>> describe_model(nn.Linear(3, 2, bias=False))["tensors"]
    {'weight': '2x3 float32'}
    """
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    tensors = {}
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            shape, dtype = "x".join(map(str, value.shape)), describe(value.dtype)
            tensors[name] = f"{shape} {dtype}{' frozen' if name in frozen else ''}".strip()
    record = getattr(model, "quantization", None)
    return {
        "class": type(model).__qualname__,
        "quantization": _describe_record(record) if is_dataclass(record) else describe(record),
        "rounding": {} if record is not None else dict(Counter(_rounding(model))),
        "tensors": tensors,
    }


def describe_optimizer(optimizer: torch.optim.Optimizer) -> dict:
    """Describe an optimizer by its class and the settings of its groups at the start."""
    described: dict[str, Any] = {"class": type(optimizer).__qualname__}
    for number, group in enumerate(optimizer.param_groups):
        settings = {name: describe(value) for name, value in group.items()}
        settings["lr"] = settings.pop("initial_lr")
        described[f"group {number}"] = settings | {"params": len(group["params"])}
    return described


def describe_loader(loader: Iterable) -> dict:
    """Describe a loader by its length and batch size, where it knows them."""
    try:
        length = len(loader) if isinstance(loader, Sized) else None
    except TypeError:  # a DataLoader over a stream
        length = None
    return {"batches a pass": length, "batch size": getattr(loader, "batch_size", None)}


def describe(value: Any) -> Any:
    """Describe a setting: numbers and text as they are, functions by their names.

    Examples
    --------
    >>> describe(partial(torch.optim.SGD, lr=0.1))
    {'function': 'SGD', 'lr': 0.1}
    >>> describe([(0.9, 0.999), torch.float32, None])
    [[0.9, 0.999], 'float32', None]
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, nn.Module):
        return {"class": type(value).__qualname__, "weights": hash_of(value.state_dict())}
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else hash_of(value)
    if isinstance(value, partial):
        given = {str(place): describe(argument) for place, argument in enumerate(value.args)}
        given |= {name: describe(argument) for name, argument in value.keywords.items()}
        return {"function": describe(value.func)} | given
    if isinstance(value, (torch.dtype, torch.device, torch.qscheme)):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return {str(key): describe(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(entry) for entry in value]
    if is_dataclass(value) and not isinstance(value, type):
        parts = {part.name: describe(getattr(value, part.name)) for part in fields(value)}
        return {"class": type(value).__qualname__} | parts
    return getattr(value, "__qualname__", type(value).__qualname__)  # no address: it changes


def hash_of(value: Any) -> str:
    """Hash tensors, numbers and text, however nested; of large tensors 65,536 elements.

    Examples
    --------
    >>> hash_of({"x": torch.zeros(2)}) == hash_of({"x": torch.zeros(2)}) != hash_of(torch.ones(2))
    True
    """
    digest = hashlib.sha256()
    for part in _bytes(value):
        digest.update(part)
    return digest.hexdigest()[:16]


def differences(there: Any, here: Any) -> list[str]:
    """Name what differs between two descriptions, as "what: old there, new here".

    Examples
    --------
    >>> differences({"seed": 0, "optimizer": {"lr": 0.1}}, {"seed": 0, "optimizer": {"lr": 0.2}})
    ['optimizer.lr: 0.1 there, 0.2 here']
    """
    return [
        f"{name}: {_short(old)} there, {_short(new)} here"
        for name, old, new in _leaves(
            "", json.loads(json.dumps(there)), json.loads(json.dumps(here))
        )
        if old != new
    ]


def _leaves(name: str, there: Any, here: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in there | here:
            inner = f"{name}.{key}" if name else key
            yield from _leaves(inner, there.get(key, _NOTHING), here.get(key, _NOTHING))
    else:
        yield name, there, here


def _short(value: Any) -> Any:
    return value.get("class", value) if isinstance(value, dict) else value


def _describe_record(record: Any) -> dict:
    """The record of `prepare_qat`, without why layers were left out, which is prose."""
    described = {part.name: getattr(record, part.name) for part in fields(record)}
    described.pop("skipped", None)
    layers = described.pop("layers", [])
    return (
        {"class": type(record).__qualname__}
        | describe(described)
        | {"layers": dict.fromkeys(layers, "rounded")}
    )


def _rounding(model: nn.Module) -> Iterator[str]:
    """The settings of every module that rounds: schemes, ranges of integers, dtypes."""
    for module in model.modules():
        name = type(module).__qualname__
        if "quant" not in name.lower() and not is_dataclass(getattr(module, "scheme", None)):
            continue
        settings = {
            key: describe(value)
            for key, value in vars(module).items()
            if key in ("quant_min", "quant_max", "dtype", "qscheme") or is_dataclass(value)
        }
        if settings:
            yield f"{name} {json.dumps(settings)}"


def _bytes(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        if value.layout is torch.strided and not value.is_quantized and value.device.type != "meta":
            flat = value.detach().reshape(-1)
            flat = flat[:: -(-flat.numel() // _SAMPLED) or 1].cpu().contiguous()
            yield flat.view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield str(key).encode()
            yield from _bytes(entry)
    elif isinstance(value, (list, tuple)):
        yield f"{len(value)} parts".encode()
        for entry in value:
            yield from _bytes(entry)
    elif value is None or isinstance(value, (bool, int, float, str, bytes)):
        yield repr(value).encode()
    else:
        yield type(value).__qualname__.encode()
