"""A converted model in tensors and plain values, and back: what every saved folder is made of.

The folders themselves are `companion.formats.hub`'s. Built in chapter 10.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from companion.errors import UnsupportedModel
from companion.numerics.packing import narrowest
from companion.numerics.scheme import QuantScheme
from companion.qat.packed import Packed, record_parts
from companion.qat.prepare import empty_packed, replace_modules
from companion.qat.selection import Quantization


def describe(
    model: nn.Module, state: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Take a converted model apart: tensors of distinct memory, and what these do not say.

    Nothing is rounded: a large float32 parameter comes in 16 bits where these hold all its
    values, such as an embedding of a bfloat16 checkpoint that was not trained.

    Parameters
    ----------
    model : nn.Module
        From `convert`.
    state : mapping of str to Tensor, optional
        Its state dict, where it had to be gathered from several processes.

    Returns
    -------
    tensors : dict of str to Tensor
        Under the names of its state dict, tied ones once.
    description : dict
        Values that JSON keeps.

    Examples
    --------
    >>> from companion import W4, convert, prepare_qat
    >>> tensors, description = describe(convert(prepare_qat(nn.Sequential(nn.Linear(64, 8)), W4)))
    >>> sorted(tensors), description["computes"]
    (['0.bias', '0.integers', '0.scale'], {'0': 'float32'})
    """
    record: Quantization = model.quantization
    state = model.state_dict() if state is None else state
    tensors, aliases = _distinct(state)
    computes = {name: tensor.dtype for name, tensor in tensors.items()}
    parameters = {name for name, _ in model.named_parameters()}
    tensors |= {name: narrowest(tensors[name]) for name in tensors if name in parameters}
    packed = {n: m for n, m in model.named_modules() if isinstance(m, Packed)}
    config = getattr(model, "config", None)
    return tensors, {
        "class": type(model).__name__,
        "scheme": record.scheme.to_dict(),
        "method": record.method,
        "layers": list(record.layers),
        "skipped": dict(record.skipped),
        "aliases": aliases,
        # what state_dict() does not say: the types it computes in, and its attention kernel
        "dtype": _name(_main_dtype(model)),
        "computes": {name: _name(module.dtype) for name, module in packed.items()},
        "buffers": {n: _name(b.dtype) for n, b in model.named_buffers() if n not in state},
        "narrowed": {n: _name(computes[n]) for n, t in tensors.items() if t.dtype != computes[n]},
        "attention": getattr(config, "_attn_implementation", None),
    }


def renamed(description: dict[str, Any], rename: Callable[[str], str | None]) -> dict[str, Any]:
    """Describe the same layers and tensors by other names.

    Parameters
    ----------
    description : dict
        From `describe`.
    rename : callable
        Takes the name of a module or tensor; None leaves out what stands under it.

    Examples
    --------
    >>> old = {"layers": ["encoder.up", "head"], "aliases": {}, "skipped": {}, "computes": {},
    ...        "buffers": {}, "narrowed": {}}
    >>> renamed(old, {"encoder.up": "up"}.get)["layers"]
    ['up']
    """
    tables = {
        key: {rename(n): v for n, v in description.get(key, {}).items() if rename(n) is not None}
        for key in ("skipped", "computes", "buffers", "narrowed", "aliases")
    }
    pairs = {name: rename(first) for name, first in tables["aliases"].items()}
    tables["aliases"] = {name: first for name, first in pairs.items() if first is not None}
    layers = [rename(name) for name in description["layers"]]
    return {**description, **tables, "layers": [name for name in layers if name is not None]}


def replace_layers(model: nn.Module, description: dict[str, Any], *, cache: bool = True):
    """Put empty packed layers in the place of a float model's; return the model or its new self.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    description : dict
        From `describe`.
    cache : bool
        As in `companion.convert`.
    """
    scheme = QuantScheme.from_dict(description["scheme"])
    new = {}
    for name in description["layers"]:
        layer = model.get_submodule(name)
        new[layer] = packed = empty_packed(layer, scheme)
        packed.dtype = getattr(torch, description["computes"][name])
        packed.cache = cache
    return replace_modules(model, new)


def fill(
    model: nn.Module, description: dict[str, Any], tensors: dict[str, Tensor], *, cache: bool = True
) -> nn.Module:
    """Build the described model anew in a copy of a float one, whose weights are left out.

    Parameters
    ----------
    model : nn.Module
        Of the same architecture; left as it is.
    description, tensors
        From `describe`.
    cache : bool
        As in `companion.convert`.

    Returns
    -------
    nn.Module
        In eval mode.

    Raises
    ------
    UnsupportedModel
        If `model` is of another architecture.

    Examples
    --------
    >>> from companion import W4, convert, prepare_qat
    >>> model, x = nn.Sequential(nn.Linear(64, 8)), torch.ones(1, 64)
    >>> q = convert(prepare_qat(model, W4))
    >>> tensors, description = describe(q)
    >>> torch.equal(fill(model, description, tensors)(x), q(x))
    True
    """
    model = _without_weights(model)
    try:
        model = replace_layers(model, description, cache=cache)
        wide = {n: t.to(getattr(torch, description["narrowed"].get(n, _name(t.dtype))))
                for n, t in tensors.items()}  # fmt: skip
        aliases = {name: wide[first] for name, first in description["aliases"].items()}
        model.load_state_dict(wide | aliases, assign=True)  # keeps types
        return finish(model, description)
    except (AttributeError, KeyError, RuntimeError, ValueError, NotImplementedError) as error:
        raise UnsupportedModel(
            f"the model given does not fit the file, which holds a {description['class']}: "
            f"{' '.join(str(error).split())}"
        ) from None


def finish(model: nn.Module, description: dict[str, Any]) -> nn.Module:
    """Tie what shares memory, give buffers their types, and leave the record of what was rounded.

    Parameters
    ----------
    model : nn.Module
        With the described packed layers, filled; changed in place.
    description : dict
        From `describe`.

    Returns
    -------
    nn.Module
        `model`, in eval mode.

    Raises
    ------
    ValueError
        If a tensor has no values yet.
    """
    for name, first in description["aliases"].items():
        _share(model, name, first)
    for name, dtype in description["buffers"].items():
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, key, getattr(module, key).to(dtype=getattr(torch, dtype)))
    left = [n for n, t in chain(model.named_parameters(), model.named_buffers()) if t.is_meta]
    if left:
        raise ValueError(f"{left[0]} is not in the file")
    scheme = QuantScheme.from_dict(description["scheme"])
    model.quantization = Quantization(
        scheme, description["method"], description["layers"], description["skipped"]
    )
    record_parts(model)
    return model.eval().requires_grad_(False)


def refuse_foreign(model: nn.Module, call: str) -> None:
    """Raise where a model was converted, and not by `convert`.

    Parameters
    ----------
    model : nn.Module
    call : str
        Who asks, for the message.

    Raises
    ------
    UnsupportedModel
        If its integers are those of `QuantWrapper` or torchao, or adapters stand beside them.
    """
    if any(isinstance(getattr(module, "base_layer", None), Packed) for module in model.modules()):
        raise UnsupportedModel(
            f"{call}() cannot take this model, since adapters stand beside its integers: save them by "
            "the PeftModel's own save_pretrained(), and the base without them"
        )
    classic = ("torch.ao.nn", "companion.classic")
    if any(type(module).__module__.startswith(classic) for module in model.modules()):
        raise UnsupportedModel(
            f"{call}() cannot take this model, since the integers of QuantWrapper live in PyTorch's "
            "own int8 kernels: keep the weights of the prepared wrapper and convert() them again, "
            "or train with companion.prepare_qat() instead"
        )
    kinds = {type(parameter.data) for parameter in model.parameters()}
    if any(kind.__module__.startswith("torchao") for kind in kinds):
        raise UnsupportedModel(
            f"{call}() cannot take this model, since its weights are tensors of torchao: give the "
            "model that convert() returned, before to_torchao()"
        )


@torch.no_grad()
def keep_types(model: nn.Module, start: nn.Module) -> nn.Module:
    """Round what stayed in floating point to the 16 bits that it came in, in place.

    Weights of a bfloat16 checkpoint are trained in float32. Rounded back, they take the
    checkpoint's bytes again when they are saved; they are computed with in float32 as before.

    Parameters
    ----------
    model : nn.Module
        From `convert`, after training.
    start : nn.Module
        The float model as it was loaded. Only its large tensors count whose values all fit in 16
        bits.

    Returns
    -------
    nn.Module
        `model`.

    Examples
    --------
    >>> start, trained = nn.Linear(64, 64).bfloat16().float(), nn.Linear(64, 64)
    >>> weight = keep_types(trained, start).weight
    >>> torch.equal(weight, weight.bfloat16().float())
    True
    """
    came = {name: narrowest(p.detach()).dtype for name, p in start.named_parameters()}
    for name, parameter in model.named_parameters():
        if name in came and came[name].itemsize < parameter.dtype.itemsize:
            parameter.copy_(parameter.to(came[name]))
    return model


def _without_weights(model: nn.Module) -> nn.Module:
    """Copy a model but for its parameters, which are going to be replaced."""
    return copy.deepcopy(model, {id(p): _shape_only(p) for p in model.parameters()})


def _shape_only(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)


def _share(model: nn.Module, name: str, first: str) -> None:
    """Put the parameter or buffer of one name under another one, too."""
    (owner, _, key), (origin, _, source) = name.rpartition("."), first.rpartition(".")
    module, tensor = model.get_submodule(owner), getattr(model.get_submodule(origin), source)
    tensors = module._parameters if isinstance(tensor, nn.Parameter) else module._buffers
    tensors[key] = tensor


def _distinct(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Keep one of the names that share a tensor; the format refuses shared memory."""
    first: dict[tuple, str] = {}
    tensors, aliases = {}, {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.dtype)
        if tensor.numel() and place in first:
            aliases[name] = first[place]
        else:
            first[place] = name
            tensors[name] = tensor.detach()
    return tensors, aliases


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _main_dtype(model: nn.Module) -> torch.dtype:
    """The type it computes in, as transformers counts it: that of the first float parameter."""
    floats = (p.dtype for p in model.parameters() if p.is_floating_point())
    packed = (m.dtype for m in model.modules() if isinstance(m, Packed))
    return next(chain(floats, packed))
