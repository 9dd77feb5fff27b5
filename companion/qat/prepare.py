"""`prepare_qat` and `convert`: from a float model to one that trains rounded, to packed integers.

Built in chapter 10.

References
----------
Jacob et al., "Quantization and training of neural networks for efficient
integer-arithmetic-only inference", CVPR 2018.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterable
from types import MethodType

import torch
from torch import Tensor, nn

from companion.errors import (
    NothingToQuantize,
    SchemeError,
    UnknownLayer,
    WrongStage,
    expect,
    extra,
)
from companion.numerics.scheme import W8A8, QuantScheme
from companion.qat.calibration import input_squares
from companion.qat.layers import FakeQuantConv1D, FakeQuantEmbedding, FakeQuantLinear
from companion.qat.packed import (
    DynamicInt8Linear,
    Packed,
    QuantizedEmbedding,
    QuantizedLinear,
    record_parts,
)
from companion.qat.ranges import Absmax, fingerprint_of, make_quantizer
from companion.qat.selection import (
    Quantization,
    check_divisible,
    check_forwards,
    choose_layers,
    embedding_factor,
    is_adapter,
    kind_of,
    matches,
    refuse_adapters,
    refuse_compiled,
    refuse_computed_weights,
    refuse_quantized,
    refuse_unseen_weights,
)

logger = logging.getLogger(__name__)

_FAKE = {"Linear": FakeQuantLinear, "Conv1D": FakeQuantConv1D, "Embedding": FakeQuantEmbedding}


def prepare_qat(
    model: nn.Module,
    scheme: QuantScheme,
    method: str | type[Absmax] = "lsq",
    *,
    skip: Iterable[str] = (),
    embeddings: bool = False,
    inplace: bool = False,
    calibration: Iterable | None = None,
) -> nn.Module:
    """Return a copy of a model whose layers round their weights (and inputs) as they compute.

    The copy trains like any module; its parameters keep their names. What was swapped and what
    was not stands in its attribute `quantization`.

    Parameters
    ----------
    model : nn.Module
        Any model with nn.Linear or GPT-2's Conv1D layers; left as it is unless `inplace`.
    scheme : QuantScheme
        Such as the presets W4 or W8A8.
    method : {"absmax", "mse", "lsq", "absmax-torchao-gradient"} or subclass of Absmax
        How the range of the weights is chosen, from `companion.qat.ranges`. The default, learned
        step sizes, recovered more at three and two bits than ranges by absmax, at equal steps
        (chapter 11; benchmarks/results/recovery.json).
    skip : iterable of str
        Layers that stay in floating point: full names, last parts of names, names of blocks
        that contain them, or patterns with ``*``.
    embeddings : bool
        Also round embeddings. An output layer tied to an embedding then shares its rounded
        weight; otherwise both stay in floating point.
    inplace : bool
        Change `model` itself and return it, which takes no second copy of its weights. A model
        that is refused is left as it was.
    calibration : iterable of batches, optional
        Up to 16 batches as for `fit`, of which the labels are not looked at. The model runs on
        them before anything is rounded, and the search that "mse" and "lsq" start with then
        weighs each weight's error by the mean square of the inputs that it meets.

    Returns
    -------
    nn.Module

    Raises
    ------
    NothingToQuantize, UnknownLayer
        If no layer matches, or a pattern of `skip` matches none.
    SchemeError
        If the group size does not divide a layer's inputs, with the sizes that divide all; or
        if calibration is given to a method that searches no range.
    EmptyLoader
        If `calibration` gives no batch.
    WrongStage, UnsupportedModel
        If the model is prepared or quantized already, compiled, offloaded, holds fused expert
        weights or adapters, or a layer whose forward was replaced on the instance.

    Examples
    --------
    >>> from companion import W4, prepare_qat
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    >>> qat = prepare_qat(model, W4, skip=["2"])
    >>> print(qat.quantization)
    1 layers quantized (4 bits, group size 32, lsq); 1 stay in floating point:
      2: skipped by '2'
    """
    expect("prepare_qat", "model", model, nn.Module)
    expect("prepare_qat", "scheme", scheme, QuantScheme)
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    quantizer = make_quantizer(scheme, method)  # an unknown method is refused before all else
    takes = inspect.signature(type(quantizer)).parameters
    if calibration is not None and not (quantizer.searches and "importance" in takes):
        raise SchemeError(
            f"method {method!r} searches no range by importance, so calibration would change "
            "nothing: leave it out, or choose 'lsq' or 'mse'"
        )
    refuse_quantized(model)
    refuse_adapters(model)
    refuse_compiled(model)
    refuse_computed_weights(model)
    refuse_unseen_weights(model, skip)
    record = Quantization(scheme, method if isinstance(method, str) else method.__name__)
    targets = {
        name: module
        for name, module in model.named_modules()
        if kind_of(module) or isinstance(module, (nn.Linear, nn.Embedding))
    }
    unused = [p for p in skip if not any(matches(name, p) for name, _ in model.named_modules())]
    if unused:
        raise UnknownLayer(
            f"skip={unused[0]!r} matches no layer of this model; it has "
            f"{', '.join(list(targets)[:8]) or 'none that could be quantized'}"
        )
    chosen = choose_layers(model, targets, skip, embeddings, record)
    if not chosen:
        kinds = sorted({type(m).__name__ for m in model.modules() if not list(m.children())})
        raise NothingToQuantize(
            "no layer of this model would be quantized: prepare_qat rounds nn.Linear and Conv1D "
            f"layers, and this model is made of {', '.join(kinds)}"
            + (f" with skip={skip}" if skip else "")
            + "".join(f"; {name}: {why}" for name, why in [*record.skipped.items()][:3])
            + "; for convolutions use QuantWrapper" * any("Conv" in kind for kind in kinds)
        )
    check_forwards(model, chosen)
    check_divisible(targets, chosen, scheme)
    squares = {} if calibration is None else input_squares(model, chosen, calibration)
    importance = {name: squares.get(model.get_submodule(name).weight) for name in chosen}
    prepared = model if inplace else own_forward(copy.deepcopy(model))
    quantizers: dict[nn.Parameter, Absmax] = {}
    for name in chosen:  # nothing is changed before all of them are made
        module = prepared.get_submodule(name)
        if module.weight not in quantizers:
            matrix = (
                module.weight.t().contiguous() if kind_of(module) == "Conv1D" else module.weight
            )
            quantizer = make_quantizer(scheme, method, matrix, importance[name])
            quantizers[module.weight] = quantizer
            quantizer.fingerprint = fingerprint_of(module.weight)
            _check_finite(name, quantizer, matrix)
    registered: set[Absmax] = set()
    for name in chosen:
        module = prepared.get_submodule(name)
        if isinstance(module, nn.Embedding) and type(module) is not nn.Embedding:
            module.factor = embedding_factor(module)
        module.__class__ = _FAKE[kind_of(module)]
        if "_old_forward" in vars(module):  # Accelerate's hook calls what it found there
            module._old_forward = MethodType(type(module).forward, module)
        quantizer = quantizers[module.weight]
        if quantizer in registered:
            # Tied layers share their range too. It is registered once, so that no file has to
            # hold it under two names, which safetensors refuses.
            module.__dict__["quantizer"] = quantizer
        else:
            module.quantizer = quantizer
            registered.add(quantizer)
        record.layers.append(name)
    prepared.quantization = record
    logger.info("%s", record)
    return prepared


def convert(
    model: nn.Module,
    scheme: QuantScheme | None = None,
    *,
    inplace: bool = False,
    cache: bool = True,
) -> nn.Module:
    """Return a copy whose prepared layers keep packed integers and compute the same as before.

    The forward equals the prepared model's in eval mode bit for bit for weight-only schemes
    and simulated activations; W8A8 runs on an int8 kernel and agrees to about 1e-6 in float32,
    and in half precision to what its products leave of a number.

    Parameters
    ----------
    model : nn.Module
        From `prepare_qat`, usually trained since.
    scheme : QuantScheme, optional
        The scheme you expect; an error if the model was prepared with another.
    inplace : bool
        Convert `model` itself and return it; each weight is freed as soon as it is packed. A
        model that is refused is left as it was.
    cache : bool
        Keep the matrix that a layer dequantizes at its first forward, where the machine's memory
        allows: the model then runs as fast as in floating point, and takes its memory, too, until
        `release_cache`. False takes a few megabytes beyond the integers.

    Returns
    -------
    nn.Module
        In eval mode; no parameter of it requires a gradient.

    Raises
    ------
    WrongStage
        If the model was not prepared, was converted already or changed in between (resized
        embeddings, adapters that trained outside the rounding).
    SchemeError
        If it was prepared with another scheme, or its weights are no longer finite.

    Examples
    --------
    >>> import torch
    >>> from companion import W4, convert, prepare_qat
    >>> qat = prepare_qat(nn.Sequential(nn.Linear(64, 8)), W4)
    >>> x = torch.ones(1, 64)
    >>> torch.equal(convert(qat)(x), qat(x))
    True
    """
    expect("convert", "model", model, nn.Module)
    _refuse_adapters_outside(model)
    record = getattr(model, "quantization", None)
    if record is None or not any(isinstance(m, tuple(_FAKE.values())) for m in model.modules()):
        raise WrongStage(
            "convert() needs a model from prepare_qat(), "
            + ("and this one is converted already" if record else "and this one was not prepared")
        )
    if scheme is not None and scheme != record.scheme:
        raise SchemeError(f"the model was prepared with {record.scheme}, not with {scheme}")
    for name in record.layers:  # nothing is changed before all of them are known to be right
        layer = _prepared_layer(model, name)
        if not layer.quantizer.enabled:
            raise WrongStage(
                "the rounding of this model is paused, so nothing was trained under it: call "
                "companion.qat.prepare.start_rounding(model) and train on, or convert it as it is "
                "then"
            )
        _check_finite(name, layer.quantizer, layer.matrix)
    weights = {}  # of the model that stays: read from now on, so its copy needs no other ones
    if not inplace:
        weights = {id(p): p for p in (model.get_submodule(n).weight for n in record.layers)}
    converted = own_forward(model if inplace else copy.deepcopy(model, {**weights}))
    new: dict[nn.Module, nn.Module] = {}
    done: dict[int, Packed] = {}
    for name in record.layers:
        layer = converted.get_submodule(name)
        new[layer] = packed = empty_packed(layer, record.scheme)
        packed.cache = cache
        _keep_hooks(layer, packed)
        if id(layer.weight) in done:  # one copy for layers that share one
            tied = done[id(layer.weight)]
            packed.integers, packed.scale = tied.integers, tied.scale
        else:
            done[id(layer.weight)] = packed.store(layer)
        layer.weight = None  # freed here, where the caller has no use for it
    converted = replace_modules(converted, new)
    _copy_parameters(converted, weights)
    converted.quantization = record
    record_parts(converted)
    return converted.eval().requires_grad_(False)


def pause_rounding(model: nn.Module) -> None:
    """Let a prepared model compute in floating point until `start_rounding`.

    Its parameters are those that train under rounding, the learned steps among them: an optimizer
    that holds them needs no change in the middle of a run.

    Parameters
    ----------
    model : nn.Module
        From `prepare_qat`, with adapters or without.

    Raises
    ------
    WrongStage
        If no layer of the model rounds.

    Examples
    --------
    >>> from companion import W2, prepare_qat
    >>> model = nn.Sequential(nn.Linear(64, 8))
    >>> qat, x = prepare_qat(model, W2), torch.ones(1, 64)
    >>> pause_rounding(qat)
    >>> torch.equal(qat(x), model(x))
    True
    >>> start_rounding(qat)
    >>> torch.equal(qat(x), model(x))
    False
    """
    for layer in _rounded(model):
        layer.quantizer.enabled = False


def start_rounding(model: nn.Module, calibration: Iterable | None = None) -> None:
    """Round from now on, in ranges found anew for the weights of this moment.

    Frozen weights, such as those under adapters, keep the ranges that they were prepared with.

    With `fit`: ``at={75: partial(start_rounding, qat)}``; with a trainer of Hugging Face:
    ``QATCallback(start=0.75)``.

    Parameters
    ----------
    model : nn.Module
        From `prepare_qat`, usually paused by `pause_rounding`.
    calibration : iterable of batches, optional
        As in `prepare_qat`. The model runs on them unrounded.

    Raises
    ------
    WrongStage
        If no layer of the model rounds, or calibration is given to one with adapters.
    SchemeError
        If calibration is given to a method that searches no range.

    Examples
    --------
    >>> from companion import W2, prepare_qat
    >>> qat = prepare_qat(nn.Sequential(nn.Linear(64, 8)), W2)
    >>> pause_rounding(qat)
    >>> start_rounding(qat)
    >>> qat[0].quantizer.enabled
    True
    """
    layers = _rounded(model)
    squares: dict[nn.Parameter, Tensor] = {}
    if calibration is not None:
        if not all(layer.quantizer.searches for layer in layers):
            raise SchemeError("these ranges are not searched: leave calibration out")
        if any(is_adapter(module) for module in model.modules()):
            raise WrongStage(
                "under adapters the ranges stay as they were prepared: give calibration to lora_qat"
            )
        pause_rounding(model)
        names = [name for name, module in model.named_modules() if module in layers]
        squares = input_squares(model, names, calibration)
    for layer in layers:
        if calibration is not None or layer.weight.requires_grad:
            layer.quantizer.restart(layer.matrix.detach(), squares.get(layer.weight))
        layer.quantizer.enabled = True


def own_forward(model: nn.Module) -> nn.Module:
    """Take off what a trainer put around a model's forward, and return the model.

    TRL's keeps the model that it was made for: on a copy it would run that one, not the copy.

    Examples
    --------
    >>> model = nn.Linear(1, 1)
    >>> model.forward = model.forward  # a method of its own, as a trainer leaves it
    >>> "forward" in vars(own_forward(model))
    False
    """
    hooked = "_hf_hook" in vars(
        model
    )  # Accelerate's, without which an offloaded model has no weights
    forward = None if hooked else vars(model).get("forward")
    plain = inspect.unwrap(getattr(forward, "__func__", forward)) if forward else None
    if plain is not None and plain is inspect.unwrap(type(model).forward):
        del model.forward
        vars(model).pop("_original_forward", None)  # Accelerate's, for mixed precision
    return model


def _rounded(model: nn.Module) -> list[nn.Module]:
    layers = [m for m in model.modules() if isinstance(m, tuple(_FAKE.values()))]
    if not layers:
        raise WrongStage("no layer of this model rounds: call prepare_qat(model, scheme) first")
    return layers


def empty_packed(layer: nn.Module, scheme: QuantScheme) -> Packed:
    """Return the packed module of a layer's shape, still without its integers.

    Parameters
    ----------
    layer : nn.Module
        A Linear, Conv1D or embedding, float or fake-quantized.
    scheme : QuantScheme
    """
    rows, columns = layer.weight.shape
    shape = {"scheme": scheme, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Embedding):
        factor = getattr(layer, "factor", None)
        if not isinstance(layer, FakeQuantEmbedding) and type(layer) is not nn.Embedding:
            factor = 1.0  # a file is going to say
        factor = None if factor is None else torch.tensor(factor)
        return QuantizedEmbedding(rows, columns, factor=factor, **shape).to(layer.weight.device)
    if isinstance(layer, FakeQuantConv1D) or kind_of(layer) == "Conv1D":
        rows, columns = columns, rows
    kind = DynamicInt8Linear if _runs_on_int8_kernel(scheme) else QuantizedLinear
    return kind(rows, columns, bias=layer.bias, **shape).to(layer.weight.device)


def replace_modules(model: nn.Module, new: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put new modules in the place of old ones, under every name; return the model or its new self."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() drops repeats
            if child in new:
                setattr(parent, name, new[child])
    return new.get(model, model)


def _prepared_layer(model: nn.Module, name: str) -> nn.Module:
    try:
        layer: nn.Module | None = model.get_submodule(name)
    except AttributeError:
        layer = None
    if not isinstance(layer, tuple(_FAKE.values())):
        raise WrongStage(
            f"{name} is no longer the layer that prepare_qat() made (it is "
            f"{type(layer).__name__ if layer is not None else 'gone'}): change the model "
            "(resize_token_embeddings and the like) before prepare_qat()"
        )
    known = layer.quantizer.fingerprint
    if not layer.weight.requires_grad and known not in (None, fingerprint_of(layer.weight)):
        raise WrongStage(
            f"the weight of {name} changed while it was frozen, as it does when an adapter is "
            "merged that trained outside the rounding: rounding the sum moves what was learned. "
            "Train adapters inside, with companion.qat.lora.lora_qat(); if the change is meant, "
            "requires_grad_(True) first"
        )
    return layer


def _refuse_adapters_outside(model: nn.Module) -> None:
    """Name the way to the integers of a model with adapters; merging is exact for some only."""
    adapters = {name: m for name, m in model.named_modules() if is_adapter(m)}
    # PEFT's ParamWrapper adds to the parameter, so inside the rounding
    outside = [name for name, m in adapters.items() if hasattr(m, "base_layer")
               and type(m).__name__ != "ParamWrapper"
               and isinstance(m.base_layer, tuple(_FAKE.values()))]  # fmt: skip
    if outside:
        raise WrongStage(
            f"the adapter of {outside[0]} adds to what a rounded layer computes, and merging it "
            "would round the sum anew, which moves what was learned: train adapters inside the "
            "rounding, with companion.qat.lora.lora_qat(model, scheme); to accept the move, call "
            "merge_and_unload() and requires_grad_(True), and convert that"
        )
    if adapters:
        raise WrongStage(
            "convert() needs the model without its adapters: call merge_and_unload() first (for "
            "prompts get_base_model()), and convert what it returns"
        )


def _keep_hooks(layer: nn.Module, packed: nn.Module) -> None:
    """Let the new module run the hooks of the old one, Accelerate's among them."""
    for kind in ("_forward_hooks", "_forward_pre_hooks"):
        for name in (kind, f"{kind}_with_kwargs"):
            setattr(packed, name, getattr(layer, name))
    packed._forward_hooks_always_called = layer._forward_hooks_always_called
    if "_hf_hook" in vars(layer):
        with extra("distributed"):
            from accelerate.hooks import add_hook_to_module

        add_hook_to_module(packed, layer._hf_hook)


def _copy_parameters(model: nn.Module, shared: dict[int, nn.Parameter]) -> None:
    """Give the model its own of those parameters that another model has, too."""
    copies: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in shared:
                module._parameters[name] = copy.deepcopy(parameter, copies)


def _check_finite(name: str, quantizer: Absmax, matrix: Tensor) -> None:
    _, scale = quantizer.integers(matrix)
    if not (scale.isfinite().all() and matrix.isfinite().all()):
        raise SchemeError(
            f"the weights of {name} are too large for {scale.dtype} scales, or not finite: check "
            "the model, or choose scale_dtype=torch.float32"
        )


def _runs_on_int8_kernel(scheme: QuantScheme) -> bool:
    return scheme.activations == W8A8.activations and (
        scheme.weight_bits == 8 and scheme.group_size is None
    )
