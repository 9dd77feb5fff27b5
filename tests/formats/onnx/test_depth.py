"""A deep model whose file was made from four of its layers holds what a trace of all of them holds."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx.numpy_helper import to_array
from torch import nn
from transformers import BertConfig, BertForTokenClassification, LlamaConfig, LlamaForCausalLM

from companion import W4, W8A8, convert, prepare_qat
from companion.formats.onnx import export
from companion.formats.onnx.depth import FEWEST, stack_of
from companion.formats.onnx.export import export_onnx, write_graph
from companion.formats.onnx.model import OnnxModel
from companion.formats.onnx.parity import read_integers

DEPTH = 7
SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": DEPTH, "intermediate_size": 64,
         "num_attention_heads": 4}  # fmt: skip
IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def llama(**others) -> nn.Module:
    config = LlamaConfig(**SHAPE | others, num_key_value_heads=2, max_position_embeddings=64)
    return trained(LlamaForCausalLM(config))


def bert() -> nn.Module:
    return trained(BertForTokenClassification(BertConfig(**SHAPE, num_labels=3)))


def trained(model: nn.Module) -> nn.Module:
    """No tensor equals another: a whole trace keeps equal ones once, and under one name."""
    torch.manual_seed(0)
    for tensor in model.parameters():
        tensor.data += 0.05 * torch.randn_like(tensor)
    return model.eval()


def was_repeated(path) -> bool:
    return any(node.name.endswith(f"_of_{DEPTH - 2}") for node in onnx.load(path).graph.node)


def operators(graph) -> Counter:
    """With what each is told and what it reads of the model; names of other values are free."""
    stored = {tensor.name for tensor in graph.initializer if "." in tensor.name}
    outside = stored | {x.name for x in (*graph.input, *graph.output)}
    return Counter(
        (node.op_type, tuple(sorted(str(a) for a in node.attribute)),
         tuple(name for name in (*node.input, *node.output) if name in outside))
        for node in graph.node
    )  # fmt: skip


def shape(place) -> tuple:
    """Free lengths by name: the past and the length are the length and the past."""
    dims = place.type.tensor_type.shape.dim
    return place.name, place.type.tensor_type.elem_type, [
        sorted(dim.dim_param.split(" + ")) if dim.dim_param else dim.dim_value for dim in dims
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "scheme"),
    [(llama, W4), (llama, W8A8), (llama, None), (bert, W4)],
    ids=["llama-W4", "llama-W8A8", "llama-float", "bert-W4"],
)
def test_the_file_is_that_of_a_whole_trace(tmp_path, monkeypatch, model, scheme):
    net = model()
    if scheme is not None:
        net = convert(prepare_qat(net, scheme, "absmax"))
    write = write_graph if scheme is None else export_onnx
    short = write(net, tmp_path / "short.onnx")
    monkeypatch.setattr(export, "stack_of", lambda module: None)
    whole = write(net, tmp_path / "whole.onnx")
    assert not was_repeated(whole)
    ours, theirs = (onnx.load(path).graph for path in (short, whole))
    assert [shape(x) for x in ours.input] == [shape(x) for x in theirs.input]
    assert [shape(x) for x in ours.output] == [shape(x) for x in theirs.output]
    assert operators(ours) == operators(theirs)
    tensors = [
        {t.name: to_array(t) for t in g.initializer if "." in t.name} for g in (ours, theirs)
    ]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(np.array_equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    a, b = (OnnxModel(path, threads=1)(IDS, torch.ones_like(IDS)).logits for path in (short, whole))
    assert torch.equal(a, b)
    # float matrices are transposed while they are traced, into constants without a name
    assert was_repeated(short) == (scheme is not None)


class Deep(nn.Module):
    """Layers in a row, in ways that one of them does not tell of the others."""

    def __init__(self, way: str, depth: int = DEPTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.layers = nn.ModuleList(nn.Linear(32, 32, bias=way != "plain") for _ in range(depth))
        if way == "shared":
            self.layers[5] = self.layers[1]

    def forward(self, x):
        seen, y = [x], x
        for number, layer in enumerate(self.layers):
            new = layer(x).tanh()
            x = new + x
            y = y + x
            if self.way == "swap" and number % 2 == 0:
                x = new
            if self.way == "late" and number == 5:
                x = x * 2
            if self.way == "number":
                x = x * (number + 1)
            if self.way == "back" and len(seen) > 2:
                x = x + seen[-2]
            seen.append(x)
        return sum(seen) if self.way == "all" else x + y


@pytest.mark.parametrize(
    "way", ["plain", "bias", "shared", "late", "number", "back", "all", "swap"]
)
def test_layers_that_are_not_alike_are_all_traced(tmp_path, way):
    """And where one stands for the others it does: what is served is what was converted."""
    model = convert(prepare_qat(Deep(way), W4, "absmax"))
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    path = export_onnx(model, tmp_path / "model.onnx", example=x)
    expected = model(x)
    # seven layers of sums of 32 products, of values up to the largest here
    assert (OnnxModel(path)(x) - expected).abs().max() < 1e-6 * expected.abs().max() * DEPTH
    assert was_repeated(path) == (way in ("plain", "bias"))
    assert set(read_integers(path)) == {f"layers.{i}" for i in range(DEPTH)} - (
        {"layers.1"} if way == "shared" else set()
    )


class Gain(nn.Module):
    """A linear layer times something that a tracer computes beforehand from a tensor."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.linear, self.gain, self.way = nn.Linear(32, 32), nn.Parameter(torch.zeros(32)), way

    def forward(self, x):
        return self.linear(x) * (
            1 + self.gain if self.way == "sum" else 1 + (self.gain > 2).float()
        )


class Gains(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Gain(way) for _ in range(DEPTH))
        self.layers[5].gain.data += 3

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("way", ["sum", "comparison"])
def test_what_was_computed_beforehand_from_a_layer_is_not_repeated(tmp_path, way):
    """One gain differs, of a layer that is not traced: nothing in the values of the others tells."""
    model = convert(prepare_qat(Gains(way), W4, "absmax"))
    path = export_onnx(model, tmp_path / "model.onnx", example=torch.ones(1, 32))
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    assert (OnnxModel(path)(x) - model(x)).abs().max() < 1e-5 * model(x).abs().max()


def test_a_config_that_lists_its_layers_is_believed():
    model = llama()
    assert stack_of(model).name == "model.layers"
    model.model.layers[4].mlp.boost = 2
    assert stack_of(model) is None
    del model.model.layers[4].mlp.boost
    model.config.kinds = ["full"] * DEPTH
    assert stack_of(model) is not None
    model.config.kinds = ["full"] * (DEPTH - 1) + ["sliding"]
    assert stack_of(model) is None


def test_few_layers_are_not_worth_it():
    assert stack_of(Deep("plain", FEWEST)) is not None
    assert stack_of(Deep("plain", FEWEST - 1)) is None
