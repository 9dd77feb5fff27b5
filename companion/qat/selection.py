"""Which layers of a model can be rounded, which stay as they are, and which models are refused.

Built in chapter 10.
"""

from __future__ import annotations

import copy
import dis
import inspect
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache, partial
from types import CodeType, FunctionType

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from companion.errors import SchemeError, UnsupportedModel, WrongStage
from companion.numerics.scheme import QuantScheme
from companion.qat.layers import FakeQuantEmbedding, FakeQuantLinear
from companion.qat.packed import Packed


@dataclass
class Quantization:
    """What was quantized in a model and what was not, and why: its attribute `quantization`.

    Parameters
    ----------
    scheme : QuantScheme
    method : str
    layers : list of str
        Names of the layers that are quantized.
    skipped : dict of str to str
        Every matrix that stayed in floating point, by the name of its layer or its own, with the
        reason. Vectors such as biases and norms are not listed: they always stay.

    Examples
    --------
    >>> from companion import W4
    >>> why = "a Conv2d, which prepare_qat does not round"
    >>> print(Quantization(W4, "lsq", ["head"], {"blocks.0.conv": why, "blocks.1.conv": why}))
    1 layers quantized (4 bits, group size 32, lsq); 2 stay in floating point:
      blocks.*.conv (2): a Conv2d, which prepare_qat does not round
    """

    scheme: QuantScheme
    method: str
    layers: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        alike: dict[tuple[str, str], list[str]] = {}  # the same layer of every block: one line
        for name, why in self.skipped.items():
            pattern, reason = (re.sub(r"(?<![^.])\d+(?![^.])", "*", text) for text in (name, why))
            alike.setdefault((pattern, reason), []).append(name)
        lines = [
            f"\n  {names[0]}: {self.skipped[names[0]]}"
            if len(names) == 1
            else f"\n  {pattern} ({len(names)}): {why}"
            for (pattern, why), names in alike.items()
        ]
        if len(lines) > _LINES:
            rest = len(self.skipped) - sum(len(names) for names in [*alike.values()][:_LINES])
            lines[_LINES:] = [f"\n  and {rest} more, in `quantization.skipped`"]
        return (
            f"{len(self.layers)} layers quantized ({self.scheme.weight_bits} bits, group size "
            f"{self.scheme.group_size or 'row'}, {self.method}); {len(self.skipped)} stay in "
            f"floating point{':' if lines else ''}{''.join(lines)}"
        )


_LINES = 20


def kind_of(module: nn.Module) -> str | None:
    """Name what can be quantized: "Linear", "Embedding", GPT-2's "Conv1D", or None.

    A subclass may compute with its weight in ways of its own. It counts if it computes what its
    base does, as Falcon's Linear class, or an embedding times a constant, as Gemma's: that is
    tried on a small copy with random weights, since a forward cannot be read off its name.
    """
    kind = type(module)
    if kind in (nn.Linear, nn.Embedding):
        return kind.__name__
    if kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers"):
        return "Conv1D"
    if isinstance(module, nn.Linear) and _adds_nothing(module, nn.Linear):
        same = kind.forward is nn.Linear.forward or _computes_linear(module)
        return "Linear" if same else None
    return "Embedding" if isinstance(module, nn.Embedding) and embedding_factor(module) else None


def embedding_factor(module: nn.Embedding) -> float | None:
    """Return the constant c of an embedding that looks up ``c * row``, None if it does not."""
    if type(module).forward is nn.Embedding.forward:
        return 1.0 if _adds_nothing(module, nn.Embedding) else None
    if not _adds_nothing(module, nn.Embedding):
        return None
    generator = torch.Generator().manual_seed(0)  # and not the user's random numbers
    ids, weight = torch.arange(8), torch.randn(8, 16, generator=generator).to(module.weight.dtype)
    scaled = _tried(module, weight, ids)
    if not isinstance(scaled, Tensor) or scaled.shape != weight.shape:
        return None
    # The constant as the module rounds it: an attribute, or what the values themselves tell.
    known = [v for v in (*vars(module).values(), *module.buffers(recurse=False))
             if isinstance(v, (int, float)) or (isinstance(v, Tensor) and v.dim() == 0)]  # fmt: skip
    ratio = (scaled.double() / weight.double()).median()
    for value in (*known, module.embedding_dim**0.5, ratio):
        exact = torch.as_tensor(value, dtype=torch.float64)
        for factor in (exact.float(), exact.to(weight.dtype).float()):
            if torch.equal((weight.float() * factor).to(weight.dtype), scaled):
                return float(factor)
    return None


def _adds_nothing(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a subclass brings neither parameters, children nor methods that others may call."""
    harmless = {"forward", "reset_parameters", "extra_repr"}
    kinds = type(module).__mro__[: type(module).__mro__.index(base)]
    own = {name for kind in kinds for name, value in vars(kind).items()
           if not name.startswith("__") and (callable(value) or isinstance(value, property))}  # fmt: skip
    extra = {*module._parameters} - {"weight", "bias"}
    return own <= harmless and not extra and not module._modules


def _computes_linear(module: nn.Linear) -> bool:
    """Whether a forward of its own is that of nn.Linear, whatever the operators it is written in."""
    if set(vars(module)) - set(vars(nn.Linear(1, 1))) - _FROM_OTHERS:
        return False  # with state of its own it may compute something else tomorrow
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    bias = None if module.bias is None else weight[:, 0] - weight[:, 1]
    x = 10.0 ** torch.arange(-4, 4)[:, None, None] * torch.randn(2, 5, generator=generator).double()
    expected = F.linear(x, weight, bias)
    results = [_tried(module, weight, x, bias, training=mode) for mode in (True, False)]
    # in double precision: room for another order of the sum, none for another function
    return all(
        isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected, 1e-12)
        for y in results
    )


_FROM_OTHERS = {"_is_hf_initialized", "forward", "_old_forward", "_hf_hook"}
"""What transformers and Accelerate write on every layer; `check_forwards` looks at hooks."""


@torch.no_grad()
def _tried(
    module: nn.Module, weight: Tensor, x: Tensor, bias: Tensor | None = None, training: bool = False
) -> object:
    """What the forward of a module makes of an input, with other weights; None if it raises."""
    trial = copy.copy(module)
    trial._parameters = {"weight": nn.Parameter(weight)}
    if "bias" in module._parameters:
        trial._parameters["bias"] = None if bias is None else nn.Parameter(bias)
    if isinstance(module, nn.Embedding):
        trial.padding_idx = trial.max_norm = None
    trial.training = training
    try:
        return type(module).forward(trial, x)
    except Exception:  # it asks for something else, so it is something else
        return None


def choose_layers(
    model: nn.Module,
    targets: dict[str, nn.Module],
    skip: tuple[str, ...],
    embeddings: bool,
    record: Quantization,
) -> list[str]:
    """Decide layer by layer; tied layers share one fate. Every other matrix is recorded."""
    readers = read_past_forward(model)
    why: dict[str, str] = {}
    for name, module in targets.items():
        pattern = next((p for p in skip if matches(name, p)), None)
        if pattern is not None:
            why[name] = f"skipped by {pattern!r}"
        elif isinstance(module, nn.Embedding) and not embeddings:
            why[name] = "embedding (embeddings=False)"
        elif reason := _why_not(module):
            why[name] = reason
        elif module in readers:
            why[name] = f"{readers[module]} reads its weight past its forward"
    tied: dict[int, list[str]] = {}
    for name, module in targets.items():
        tied.setdefault(id(module._parameters.get("weight", module)), []).append(name)
    for names in tied.values():
        if kept := [name for name in names if name in why]:
            why |= {name: f"tied to {kept[0]}" for name in names if name not in why}
    record.skipped = {name: why[name] for name in targets if name in why}
    record.skipped |= _other_matrices(model, targets, skip)
    return [name for name in targets if name not in why]


def _why_not(module: nn.Module) -> str | None:
    weight = module._parameters.get("weight")
    if weight is None:
        return (
            "its weight is computed by a parametrization or a hook (weight_norm, spectral_norm, "
            "pruning): make it a plain parameter first"
        )
    if is_lazy(weight):
        return "it has no weight before its first batch: run one, then prepare_qat()"
    if getattr(module, "max_norm", None) is not None:
        return "max_norm rescales its rows whenever they are looked up"
    if kind_of(module) is None:
        base = nn.Linear if isinstance(module, nn.Linear) else nn.Embedding
        own = "methods" if type(module).forward is base.forward else "a forward"
        return f"{type(module).__name__} is a subclass with {own} of its own"
    return None


def _other_matrices(
    model: nn.Module, targets: dict[str, nn.Module], skip: tuple[str, ...]
) -> dict[str, str]:
    """Name the parameters of two and more dimensions outside the layers that could be rounded."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, ParametrizationList):
            continue  # its layer is listed
        for key, parameter in module.named_parameters(recurse=False):
            lazy = is_lazy(parameter)
            of_layer = name in targets and (lazy or key.startswith("weight"))
            if of_layer or not (lazy or parameter.dim() > 1):
                continue
            full = f"{name}.{key}".removeprefix(".")
            pattern = next((p for p in skip if matches(name, p)), None)
            article = "a" if key == "weight" else "a matrix of"
            reason = f"{article} {type(module).__name__}, which prepare_qat does not round"
            found[name if key == "weight" and name else full] = (
                reason if pattern is None else f"skipped by {pattern!r}"
            )
    return found


def read_past_forward(model: nn.Module) -> dict[nn.Module, str]:
    """Find modules whose weight another module computes with, and the class that does.

    Mamba multiplies by ``self.dt_proj.weight``, nn.MultiheadAttention by ``self.out_proj.weight``,
    a head of one's own by ``self.embedding.weight``: while training they would read the float
    weight, once converted the rounded one. Looked for in the instructions of each class, from its
    forward on, and not while the model runs: that needs no inputs, costs nothing afterwards, and
    sees the paths of other devices too. In doubt a layer counts as read: where a function takes
    the weight of something that is not named (``for layer in self.layers: layer.weight``), so
    does every layer that it names without calling it.

    Parameters
    ----------
    model : nn.Module

    Examples
    --------
    >>> attention = nn.MultiheadAttention(8, 2)
    >>> list(read_past_forward(attention).values())
    ['MultiheadAttention']
    """
    found: dict[nn.Module, str] = {}
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            continue  # reads on its fast path alone, see refuse_unseen_weights
        if getattr(module, "pretraining_tp", None) == 1:
            continue  # BLOOM reads slices only to imitate a model in several parts
        for path in _weights_read(type(module)):
            read: object = module
            for part in path:
                read = getattr(read, part, None)
            if isinstance(read, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
                found |= {child: type(module).__name__ for child in read.children()}
            elif isinstance(read, nn.Module):
                found[read] = type(module).__name__
    return found


@cache
def _weights_read(kind: type[nn.Module]) -> frozenset[tuple[str, ...]]:
    """Which ``self.a.b`` have their weight read by the forward of a class and what it calls."""
    paths: set[tuple[str, ...]] = set()
    todo, seen = ["forward"], set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for owner in kind.__mro__[: kind.__mro__.index(nn.Module)]:
            method = inspect.unwrap(vars(owner).get(name, len))
            if isinstance(method, FunctionType) and method.__code__.co_varnames:
                code = method.__code__
                paths.update(_reads(code, code.co_varnames[0], method.__globals__))
                todo.extend(code.co_names)
    return frozenset(paths)


_DESCRIBES = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_cuda",
              "is_meta", "data_ptr", "new_zeros", "new_empty", "new_ones", "new_full",
              "new_tensor"}  # fmt: skip
"""What may be asked of a weight without computing with its values."""


def _reads(code: CodeType, this: str, known: dict) -> Iterator[tuple[str, ...]]:
    steps = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "EXTENDED_ARG")]
    named, passed_on, unnamed = [], [], "weight" in code.co_consts
    place = 0
    while place < len(steps):
        step, start = steps[place], place
        place += 1
        path = []
        while place < len(steps) and steps[place].opname in ("LOAD_ATTR", "LOAD_METHOD"):
            path.append(steps[place].argval)
            place += 1
        if not path:
            function = known.get(step.argval) if step.opname == "LOAD_GLOBAL" else None
            unnamed |= isinstance(function, FunctionType) and _takes_weights(function)
            continue
        loaded = step.argval[-1] if isinstance(step.argval, tuple) else step.argval
        own = loaded == this and step.opname.startswith(("LOAD_FAST", "LOAD_DEREF"))
        last = steps[place - 1]
        if "weight" in path[own:]:
            end = path.index("weight", own)
            after = steps[place] if place < len(steps) else last
            tested = steps[start - 1].argval if start else None
            harmless = (
                (path[end + 1] in _DESCRIBES if end + 1 < len(path) else "NONE" in after.opname)
                or tested in ("isinstance", "hasattr", "type", "id")
                or (after.opname == "LOAD_CONST" and after.argval is None)
            )
            if not harmless and own:
                named.append(tuple(path[:end]))
            unnamed |= not harmless and not own
        elif own and last.opname != "LOAD_METHOD" and "NULL" not in last.argrepr:
            passed_on.append(tuple(path))  # and not called
    yield from named
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            unnamed |= "weight" in inner.co_names
            yield from _reads(inner, this, known)
    if unnamed:
        yield from passed_on


def _takes_weights(function: FunctionType) -> bool:
    return "weight" in function.__code__.co_names and not function.__module__.startswith("torch.")


def check_forwards(model: nn.Module, chosen: list[str]) -> None:
    """Raise where a forward stands on the instance and would not lead to the rounded layer.

    The hooks of Accelerate stand there too; those that leave the weight in its place are kept. So
    are methods of blocks, which a copy of the model takes along; functions that hold the block
    they were made for would go on calling that one.
    """
    for name in chosen:
        module = model.get_submodule(name)
        if module.weight.is_meta:
            raise UnsupportedModel(
                f"{name} holds no values (its weight is on the meta device, offloaded by Accelerate "
                "or not loaded yet): load the model without offloading, then prepare_qat()"
            )
        if "forward" in vars(module) and not _hooked_by_accelerate(module):
            raise _replaced(name)
        parts = name.split(".")
        for depth in range(len(parts)):
            block = ".".join(parts[:depth])
            if _holds_a_module(vars(model.get_submodule(block)).get("forward")):
                raise _replaced(block or "the model")


def _replaced(name: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the forward of {name} was replaced on the instance, so rounding its weights would do "
        f"nothing: undo that (for Accelerate, remove_hook_from_module), or skip={[name]}"
    )


def _holds_a_module(function: object) -> bool:
    """Whether a function (no method, which copies follow) has a module among its variables."""
    function = function.func if isinstance(function, partial) else function
    if not isinstance(function, FunctionType):
        return False
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    held += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return any(
        isinstance(getattr(value, "__self__", value), nn.Module) or _holds_a_module(value)
        for value in held
    )


def _hooked_by_accelerate(module: nn.Module) -> bool:
    state = vars(module)
    kept = getattr(state.get("_old_forward"), "__func__", None) is type(module).forward
    return "_hf_hook" in state and kept and isinstance(state["forward"], partial)


def matches(name: str, pattern: str) -> bool:
    """Whether a layer's name, its end, or a block around it fits a pattern."""
    return any(fnmatch(f".{name}.", f"*.{pattern}.{end}") for end in ("", "*"))


def check_divisible(targets: dict[str, nn.Module], chosen: list[str], scheme: QuantScheme) -> None:
    """Raise where the group size does not divide a layer's inputs, and offer sizes that do."""
    columns = {
        name: targets[name].weight.shape[int(kind_of(targets[name]) != "Conv1D")] for name in chosen
    }
    size = scheme.group_size
    wrong = [name for name, n in columns.items() if size is not None and n % size]
    if wrong:
        common = math.gcd(*columns.values())
        fits = [s for s in range(1, common + 1) if common % s == 0][-6:]
        raise SchemeError(
            f"group_size {size} does not divide the {columns[wrong[0]]} inputs of {wrong[0]}"
            f"{f' (and {len(wrong) - 1} more layers)' if len(wrong) > 1 else ''}; for all layers it "
            f"could be {', '.join(map(str, fits))}, or None for one scale per row"
        )


def refuse_quantized(model: nn.Module) -> None:
    """Raise if a layer is prepared, converted or quantized by someone else already."""
    for name, module in model.named_modules():
        kind = type(module)
        if isinstance(module, (FakeQuantLinear, FakeQuantEmbedding)) or hasattr(
            module, "weight_fake_quantizer"
        ):
            raise WrongStage(f"this model is prepared already ({name}): train it, then convert()")
        if isinstance(module, Packed):
            raise WrongStage(f"this model is converted already ({name}): prepare the float model")
        weight = getattr(module, "weight", None)
        quantized = kind.__module__.startswith("torch.ao.nn") or hasattr(module, "qweight")
        if isinstance(weight, torch.Tensor):
            quantized |= type(weight.data) is not torch.Tensor or not weight.is_floating_point()
        if quantized:
            raise UnsupportedModel(
                f"{name or 'the model'} ({kind.__name__}) holds quantized weights already, which do "
                "not train: load the model in floating point and prepare that"
            )


def is_adapter(module: nn.Module) -> bool:
    """Whether a module is PEFT's: an adapted layer, a wrapped model, prompts."""
    return type(module).__module__.startswith("peft.")


def refuse_adapters(model: nn.Module) -> None:
    """Raise if a model carries adapters, which would be rounded apart from what they add to."""
    for name, module in model.named_modules():
        if name and is_adapter(module) and hasattr(module, "base_layer"):
            raise UnsupportedModel(
                f"{name} carries an adapter ({type(module).__name__}), and adapters rounded apart "
                "from their layer cannot be merged exactly: merge_and_unload() first, or give the "
                "model without adapters to companion.qat.lora.lora_qat(), which trains them inside "
                "the rounding"
            )
    for name, module in model.named_modules():
        if is_adapter(module):
            raise UnsupportedModel(
                f"{name or 'the model'} ({type(module).__name__}) belongs to PEFT: prepare its "
                "get_base_model(), and add adapters or prompts to what comes out"
            )


def refuse_computed_weights(model: nn.Module) -> None:
    """Raise for weights that a hook computes and leaves on the module: such a model has no copy."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and (
                not value.is_leaf or f"{key}_orig" in module._parameters
            ):
                raise UnsupportedModel(
                    f"{name}.{key}".removeprefix(".") + " is computed by a hook (weight_norm, "
                    "spectral_norm, pruning), and such a model cannot be copied: make it a "
                    "parameter again first (remove_weight_norm, prune.remove and the like)"
                )


def refuse_compiled(model: nn.Module) -> None:
    """Raise if a part is compiled: it would go on computing with the layers it was compiled from."""
    for name, module in model.named_modules():
        if "_orig_mod" in module._modules:
            raise UnsupportedModel(
                f"{name or 'the model'} was compiled by torch.compile: prepare the model as it was "
                "before (its _orig_mod), and compile what prepare_qat() returns"
            )


def refuse_unseen_weights(model: nn.Module, skip: tuple[str, ...]) -> None:
    """Refuse blocks that compute with weights no swapped layer would round."""
    for name, module in model.named_modules():
        if any(matches(name, p) for p in skip):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{key}"
            if is_lazy(parameter):
                continue
            if parameter.dim() == 3 and "expert" in f"{full} {type(module).__name__}".lower():
                raise UnsupportedModel(
                    f"{full} fuses the weights of {parameter.shape[0]} experts into one tensor of "
                    f"shape {tuple(parameter.shape)}, which prepare_qat cannot round: leave it in "
                    f"floating point with skip=[{name!r}], or '*.{name.split('.')[-1]}' for all layers"
                )
        if (
            isinstance(module, nn.TransformerEncoderLayer)
            and torch.backends.mha.get_fastpath_enabled()
        ):
            raise UnsupportedModel(
                f"{name} (nn.TransformerEncoderLayer) bypasses its Linear layers in eval mode: call "
                "torch.backends.mha.set_fastpath_enabled(False) first, or skip it"
            )
