"""Deep models from shallow traces: four layers are traced, and one of them is repeated for the rest.

Tracing takes time for each layer, and the layers of a language model differ in their tensors alone.
Whether that is so is checked three times: on the modules, on the operations of the whole model, and
on the traced graph. Where it is not, the whole model is traced; so are layers with matrices in
floating point, which the tracer transposes into constants. Built in chapter 15.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

if TYPE_CHECKING:
    import onnx_ir as ir

TRACED = 4
"""The first, two whose graphs are compared, and the last, with what follows it."""
FEWEST = 6
"""Layers from which on it is worth it."""
_PAST = re.compile(r"((?:past_key_values|present)\.)(\d+)(\..+)")


class Unlike(Exception):
    """The graphs of two layers differ in more than their tensors."""


@dataclass(frozen=True)
class Stack:
    """Layers that differ in their tensors, and in nothing else.

    Parameters
    ----------
    name : str
        Of the list, as in ``named_modules``.
    layers : nn.ModuleList
    tensors : mapping of str to Tensor
        Of all layers, by their names in the whole model.
    """

    name: str
    layers: nn.ModuleList
    tensors: Mapping[str, Tensor]


def stack_of(module: nn.Module) -> Stack | None:
    """Find the one list of layers that are alike, or None.

    Parameters
    ----------
    module : nn.Module

    Examples
    --------
    >>> deep = nn.Sequential(nn.ModuleList(nn.Linear(2, 2) for _ in range(6)))
    >>> stack_of(deep).name
    '0'
    >>> deep[0][3] = nn.Linear(2, 2, bias=False)
    >>> stack_of(deep) is None
    True
    """
    lists = [(name, layers) for name, layers in _outer_lists(module) if len(layers) >= FEWEST]
    if len(lists) != 1:
        return None
    name, layers = lists[0]
    everything = dict(_tensors(module))
    times = Counter(tensor.data_ptr() for tensor in everything.values())
    own = {full: tensor for full, tensor in everything.items() if full.startswith(f"{name}.")}
    shared = any(times[tensor.data_ptr()] > 1 for tensor in own.values())
    if shared or _told_by_number(module, len(layers)) or not _alike(layers):
        return None
    return Stack(name, layers, own)


@contextmanager
def shallow(stack: Stack) -> Iterator[None]:
    """Leave four layers in the list, filled with noise.

    Noise tells apart what is computed from the tensors of one layer and of another while the
    graph is simplified; equal tensors, such as the ones of an untrained norm, would be merged.

    Parameters
    ----------
    stack : Stack
    """
    before, noise = stack.layers._modules, torch.Generator().manual_seed(0)
    stack.layers._modules = {
        str(number): _filled(layer, noise) for number, layer in enumerate(stack.layers[:TRACED])
    }
    try:
        yield
    finally:
        stack.layers._modules = before


def operations(module: nn.Module, inputs: tuple) -> list[tuple]:
    """List what a module computes: operators, shapes and numbers, without the values of tensors.

    Parameters
    ----------
    module : nn.Module
    inputs : tuple

    Examples
    --------
    >>> [name for name, _ in operations(nn.Sequential(nn.Linear(2, 1), nn.ReLU()), (torch.ones(1, 2),))]
    ['aten.t.default', 'aten.addmm.default', 'aten.relu.default']
    """
    with torch.no_grad(), _Recorder() as recorder:
        module(*inputs)
    return recorder.found


def repeats(few: Sequence, many: Sequence, times: int) -> bool:
    """Whether the longer of two sequences is the shorter one, with its last period so often again.

    Parameters
    ----------
    few, many : sequence
    times : int

    Examples
    --------
    >>> repeats("a_bcbc_d", "a_bcbcbcbc_d", 2), repeats("a_bcbc_d", "a_bcbcbdbc_d", 2)
    (True, False)
    """
    more = len(many) - len(few)
    if more <= 0 or more % times:
        return False
    same = next((i for i, (a, b) in enumerate(zip(few, many)) if a != b), len(few))  # noqa: B905
    period = more // times
    start = same - period
    return (start >= 0 and many[start : same + more - period] == many[same : same + more]
            and many[same + more :] == few[same:])  # fmt: skip


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.lift_fresh.default:  # constants, of which caches make some
            given, _ = tree_flatten((args, kwargs or {}))
            self.found.append((str(func), [(x.shape, x.dtype) if isinstance(x, Tensor) else x
                                           for x in given]))  # fmt: skip
        return func(*args, **(kwargs or {}))


def deepen(graph: ir.Graph, stack: Stack, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Repeat a traced layer until the graph is as deep as the model, and fill in the tensors.

    Parameters
    ----------
    graph : onnx_ir.Graph
        Traced within `shallow`, without common subexpressions; changed in place.
    stack : Stack
    inputs, outputs : sequence of str
        Names of the whole model's, in their order.

    Raises
    ------
    Unlike
        If the graphs of the second and the third layer differ; then nothing was changed.
    """
    names, last = _Names(stack.name), len(stack.layers) - 1
    levels = _levels(graph, names)
    second, third = ([node for node in graph if levels[node] == number] for number in (1, 2))
    tail = [node for node in graph if levels[node] == TRACED - 1]
    follows = _matched(second, third, names)
    made = {value for node in third for value in node.outputs}
    _check_tail(tail, third, follows)
    _check_tensors(graph, stack.tensors, names)
    values = _by_name(graph)
    for value in list(values.values()):
        if names.number(value) == TRACED - 1:
            _rename(value, names.at(value.name, last), graph)
    before = {value: value for value in made}
    copies: list[ir.Node] = []
    for number in range(TRACED - 1, last):
        now = _Copied(before, follows, names, number, graph)
        copies += [now.node(node) for node in third]
        before = now.made
    for node in tail:
        for place, value in enumerate(node.inputs):
            if value in made:
                node.replace_input_with(place, before[value])
    graph.insert_before(tail[0], copies)
    graph.sort()
    values = _by_name(graph)
    graph.inputs[:] = [values[name] for name in inputs]
    graph.outputs[:] = [values[name] for name in outputs]
    _fill(graph, stack.tensors)


class _Names:
    """Which layer a value of the graph belongs to by its name, and its name in another layer."""

    def __init__(self, stack: str) -> None:
        self._tensor = re.compile(rf"({re.escape(stack)}\.)(\d+)(\..+)")

    def _parts(self, name: str | None) -> re.Match | None:
        return self._tensor.fullmatch(name or "") or _PAST.fullmatch(name or "")

    def number(self, value: ir.Value) -> int:
        return self.number_of(value.name)

    def number_of(self, name: str | None) -> int:
        found = self._parts(name)
        return int(found[2]) if found else -1

    def at(self, name: str | None, number: int) -> str:
        found = self._parts(name)
        return f"{found[1]}{number}{found[3]}" if found else f"{name}_of_{number}"


class _Copied:
    """The copies of a layer's nodes for a deeper layer, which reads the one before it."""

    def __init__(
        self, before: Mapping, follows: Mapping, names: _Names, number: int, graph
    ) -> None:
        self._before, self._follows = before, follows
        self._names, self._number, self._graph = names, number, graph
        self.made: dict[ir.Value, ir.Value] = {}
        self._given: dict[str, ir.Value] = {}

    def _value(self, value: ir.Value | None) -> ir.Value | None:
        if value is None:
            return None
        if value in self.made:
            return self.made[value]
        if value in self._follows:
            return self._before[self._follows[value]]
        if value.producer() is not None or self._names.number(value) < 0:
            return value
        name = self._names.at(value.name, self._number)
        if name not in self._given:
            self._given[name] = _like(value, name)
            if value.is_initializer():
                self._given[name].const_value = value.const_value
                self._graph.register_initializer(self._given[name])
            else:
                self._graph.inputs.append(self._given[name])
        return self._given[name]

    def node(self, node: ir.Node) -> ir.Node:
        import onnx_ir as ir

        inputs = [self._value(value) for value in node.inputs]
        outputs = [_like(value, self._names.at(value.name, self._number)) for value in node.outputs]
        self.made |= dict(zip(node.outputs, outputs, strict=True))
        return ir.Node(node.domain, node.op_type, inputs, node.attributes.values(),
                       overload=node.overload, outputs=outputs, version=node.version,
                       name=f"{node.name}_of_{self._number}")  # fmt: skip


def _like(value: ir.Value, name: str) -> ir.Value:
    import onnx_ir as ir

    return ir.Value(name=name, shape=value.shape, type=value.type)


def _levels(graph: ir.Graph, names: _Names) -> dict[ir.Node, int]:
    """For each node the deepest layer whose tensors its answer depends on, -1 for none.

    The shape of any layer's keys may give the batch and the past to all of them.
    """
    levels: dict[ir.Node, int] = {}
    for node in graph:
        read = [value for value in node.inputs if value is not None]
        above = [levels[made] for value in read if (made := value.producer()) is not None]
        own = [] if node.op_type == "Shape" else [names.number(value) for value in read
                                                 if value.producer() is None]  # fmt: skip
        levels[node] = max([-1, *above, *own])
    return levels


def _matched(second: list[ir.Node], third: list[ir.Node], names: _Names) -> dict:
    """From each value of the second layer to that of the third, where their graphs are the same."""
    if len(second) != len(third) or not third:
        raise Unlike(f"{len(second)} operators in one layer, {len(third)} in the next")
    pairs = list(zip(second, third, strict=True))
    for one, other in pairs:
        if _kind(one) != _kind(other) or len(one.inputs) != len(other.inputs):
            raise Unlike(f"{one.name} is a {one.op_type} and {other.name} a {other.op_type}")
    follows = {
        a: b for one, other in pairs for a, b in zip(one.outputs, other.outputs, strict=True)
    }
    earlier: dict[ir.Value, ir.Value] = {}
    made = set(follows.values())
    for one, other in pairs:
        for a, b in zip(one.inputs, other.inputs, strict=True):
            if not _corresponds(a, b, follows, made, names, earlier):
                raise Unlike(f"{one.name} and {other.name} read what does not correspond")
    return follows


def _corresponds(a, b, follows: Mapping, made: set, names: _Names, earlier: dict) -> bool:
    """Whether what the second layer reads is to it what the third reads to the third."""
    if a is None or b is None or a in follows or b in made:
        return a is b or (a in follows and follows[a] is b)
    if b in follows:  # what the layer before has computed: always the same of it
        return a.producer() is not None and earlier.setdefault(b, a) is a
    if names.number(a) == 1 and a.producer() is None:
        return b.producer() is None and b.name == names.at(a.name, 2)
    return a is b or _equal_constants(a, b)


def _equal_constants(a: ir.Value, b: ir.Value) -> bool:
    one, other = a.const_value, b.const_value
    return (one is not None and other is not None and one.dtype == other.dtype
            and one.shape == other.shape and one.tobytes() == other.tobytes())  # fmt: skip


def _kind(node: ir.Node) -> tuple:
    """All that one node can differ in from another, but for what it reads."""
    attributes = {name: (found.type, found.value) for name, found in node.attributes.items()}
    return node.op_identifier(), len(node.outputs), attributes


def _check_tail(tail: list[ir.Node], third: list[ir.Node], follows: Mapping) -> None:
    """The last layer, with what follows it, reads of the third what that reads of the second."""
    made = set(follows.values())
    handed_on = {follows[x] for node in third for x in node.inputs if x in follows}
    read = [x for node in tail for x in node.inputs]
    if not tail or handed_on != {x for x in read if x in made} or any(x in follows for x in read):
        raise Unlike("the last layer, or what follows it, reads something else of the one before")


def _check_tensors(graph: ir.Graph, tensors: Mapping[str, Tensor], names: _Names) -> None:
    """What is not in the graph went into a constant, with the value it had while it was traced."""
    middle = {name for name in tensors if names.number_of(name) in (1, 2)}
    if missing := sorted(middle - set(graph.initializers)):
        raise Unlike(f"{missing[0]} was computed with while it was traced")


def _by_name(graph: ir.Graph) -> dict[str, ir.Value]:
    made = (value for node in graph for value in node.outputs)
    return {value.name: value for value in (*graph.inputs, *graph.initializers.values(), *made)}


def _rename(value: ir.Value, name: str, graph: ir.Graph) -> None:
    stored = graph.initializers.pop(value.name) if value.is_initializer() else None
    value.name = name
    if stored is not None:
        graph.register_initializer(stored)


def _fill(graph: ir.Graph, tensors: Mapping[str, Tensor]) -> None:
    """The model's tensors in place of the noise that was traced."""
    from onnx_ir.tensor_adapters import TorchTensor

    for name, value in graph.initializers.items():
        if name in tensors:
            value.const_value = TorchTensor(tensors[name].detach(), name=name)


def _outer_lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """Lists of layers that are part of no other list."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield prefix + name, child
        else:
            yield from _outer_lists(child, f"{prefix}{name}.")


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _told_by_number(module: nn.Module, count: int) -> bool:
    """Whether a config lists something for each layer, and not the same for all."""
    configs = {id(found): found for part in module.modules()
               if (found := getattr(part, "config", None)) is not None}  # fmt: skip
    lists = (value for config in configs.values() for value in getattr(config, "__dict__", {}).values()
             if isinstance(value, (list, tuple)) and len(value) == count)  # fmt: skip
    return any(len(list(groupby(value))) > 1 for value in lists)


def _alike(layers: nn.ModuleList) -> bool:
    """Whether layers differ in nothing but values of tensors, and a number of their own."""
    traits = [_traits(layer) for layer in layers]
    if any(found.keys() != traits[0].keys() for found in traits):
        return False
    return all(
        all(_same(found[key], traits[0][key]) for found in traits)
        or [found[key] for found in traits] == list(range(len(traits)))
        for key in traits[0]
    )


def _traits(layer: nn.Module) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, part in layer.named_modules():
        found[name] = type(part)
        for attribute, value in vars(part).items():
            if attribute in ("_parameters", "_buffers"):
                value = {key: None if x is None else (x.shape, x.dtype) for key, x in value.items()}
            if attribute != "_modules":
                found[f"{name}:{attribute}"] = value
    return found


def _same(one: object, other: object) -> bool:
    try:
        return one is other or (type(one) is type(other) and bool(one == other))
    except (RuntimeError, TypeError, ValueError):  # tensors and arrays have no single answer
        return False


def _filled(layer: nn.Module, noise: torch.Generator) -> nn.Module:
    """A copy of a layer with other tensors of the same shapes."""
    return copy.deepcopy(layer, {id(x): _noise(x, noise) for _, x in _tensors(layer)})


def _noise(tensor: Tensor, noise: torch.Generator) -> Tensor:
    drawn = torch.randint(1, 100, tensor.shape, generator=noise)
    if tensor.is_floating_point():
        drawn = torch.rand(tensor.shape, generator=noise)
    filled = drawn.to(tensor.dtype)
    return (
        nn.Parameter(filled, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else filled
    )
