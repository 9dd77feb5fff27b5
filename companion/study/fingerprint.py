"""What a run depends on, in one short hash: data, weights, functions and settings, whole.

A log that outlives its process may only give back what the same run would give again. Built in
chapter 11.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from companion.data.task import Task
from companion.training.batches import forever
from companion.training.state import kept_rng

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, np.generic)
SOURCES = ("provenance", "name_or_path", "_name_or_path", "transformers_version", "training")
"""Where weights came from and what mode they are in: of no matter to a run."""
ENDLESS = 256
"""Batches that are read of training data that do not say how many they are."""


def fingerprint(*values: Any) -> str:
    """Hash values by their contents, so that equal ones hash alike in every process.

    Functions count with their code, what it names and what it encloses; modules with all their
    tensors, their settings and their classes' code; objects with their attributes.

    Examples
    --------
    >>> fingerprint({"a": 1, "b": [2.0]}) == fingerprint({"b": [2.0], "a": 1})
    True
    >>> bits = [lambda n=n: n for n in (2, 4)]
    >>> fingerprint(bits[0]) == fingerprint(bits[1])
    False
    """
    digest = hashlib.sha256()
    for part in _parts(values, (), []):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def of_task(task: Task) -> str:
    """Hash everything that training and measuring on a task reads: every batch of every split."""
    digests = [fingerprint(task.name, task.metric, task.classes)]
    for split in (task.train, task.validation, task.test):
        with kept_rng():
            digests += map(fingerprint, islice(forever(split, 0), _length(split)))
    return fingerprint(digests)


def _length(loader: Any) -> int:
    try:
        return len(loader)
    except TypeError:
        return ENDLESS


def _parts(value: Any, above: tuple, told: list) -> Iterator[bytes]:
    """The bytes that make a value what it is.

    `above` are the values that it is part of, `told` the functions met so far: both end a circle.
    """
    kind = type(value)
    yield f"{kind.__module__}.{kind.__qualname__}".encode()
    if isinstance(value, PLAIN):
        yield value if isinstance(value, bytes) else repr(value).encode()
    elif any(value is other for other in chain(above, told)):
        yield b"again"
    else:
        if isinstance(value, types.FunctionType):
            told.append(value)
        for inner in _inside(value):
            yield from _parts(inner, (*above, value), told)


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, Tensor):
        yield from _tensor(value)
    elif isinstance(value, np.ndarray):
        yield from (str(value.dtype), value.shape, np.ascontiguousarray(value).tobytes())
    elif isinstance(value, nn.Module):
        yield from _module(value)
    elif isinstance(value, Mapping):
        yield from ((key, value[key]) for key in sorted(value, key=fingerprint))
    elif isinstance(value, (set, frozenset)):
        yield from sorted(map(fingerprint, value))
    elif isinstance(value, (tuple, list, range)):
        yield from value
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, types.MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, types.FunctionType):
        yield from _function(value)
    elif isinstance(value, types.CodeType):
        yield from (value.co_code, value.co_names, value.co_varnames, value.co_consts)
    elif isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)):
        yield from (getattr(value, "__module__", ""), value.__name__)
    elif is_dataclass(value):
        yield from ((part.name, getattr(value, part.name)) for part in fields(value))
    else:  # never its repr, which may hold an address
        yield from sorted(getattr(value, "__dict__", {}).items())


def _tensor(value: Tensor) -> Iterator[Any]:
    yield from (value.dtype, tuple(value.shape))
    if hasattr(value, "__tensor_flatten__"):  # made of others, as torchao's are
        yield from (getattr(value, part) for part in value.__tensor_flatten__()[0])
    else:
        plain = value.detach().cpu()
        plain = plain.int_repr() if plain.is_quantized else plain
        yield plain.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _module(model: nn.Module) -> Iterator[Any]:
    for name, module in model.named_modules():
        settings = {key: entry for key, entry in vars(module).items()
                    if isinstance(entry, PLAIN) and key not in SOURCES and not key.startswith("_")}  # fmt: skip
        yield from (name, type(module), settings)
        yield getattr(inspect.unwrap(type(module).forward), "__code__", None)
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        yield from (name, tensor, tensor.requires_grad)
    yield from (item for item in model.state_dict().items() if not isinstance(item[1], Tensor))
    if hasattr(config := getattr(model, "config", None), "to_dict"):
        yield {key: entry for key, entry in config.to_dict().items() if key not in SOURCES}


def _function(function: types.FunctionType) -> Iterator[Any]:
    """Its code, its defaults, what it encloses, and what it reads of its own file."""
    yield from (function.__code__, function.__defaults__, function.__kwdefaults__)
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not yet filled
            yield None
    for name in sorted(_names(function.__code__)):
        found = function.__globals__.get(name)
        if isinstance(found, (*PLAIN, tuple)) or (
            isinstance(found, types.FunctionType) and found.__module__ == function.__module__
        ):
            yield from (name, found)
        else:
            yield (name, getattr(found, "__module__", ""), getattr(found, "__qualname__", ""))


def _names(code: types.CodeType) -> set[str]:
    inner = (_names(const) for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*inner)
