"""Exported files hold the trained integers and compute what the converted model computes."""

import copy
import errno
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.numpy_helper import to_array
from torch import nn
from transformers import BertConfig, BertForTokenClassification, BertModel

from companion import (
    W2,
    W3,
    W4,
    W4A8,
    W8,
    W8A8,
    QuantScheme,
    QuantWrapper,
    convert,
    prepare_qat,
    save_quantized,
    to_torchao,
)
from companion.data.biencoder import BiEncoder
from companion.errors import UnreadableBatch, UnsupportedModel, WrongStage
from companion.formats.onnx import export
from companion.formats.onnx.export import OPSET, export_onnx
from companion.formats.onnx.model import OnnxModel
from companion.formats.onnx.parity import read_integers
from companion.numerics.activations import fake_quantize_activations
from companion.numerics.scheme import BLOCK8

X = 3 * torch.randn(7, 96, generator=torch.Generator().manual_seed(1))
# Answers are below 4, where float32 steps by 2e-7. Each is a sum of at most 96 products, which the
# two libraries add in orders of their own; 1e-5 is a few dozen steps.
TOLERANCE = 1e-5


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 5))


def converted(scheme: QuantScheme, model: nn.Module | None = None, **options) -> nn.Module:
    return convert(prepare_qat(model or net(), scheme, "absmax", **options))


SCHEMES = [W8, W4, W3, W2, QuantScheme(4, None), QuantScheme(2, 16), W4A8, W8A8,
           QuantScheme(4, activations=BLOCK8), QuantScheme(2, activations=BLOCK8),
           QuantScheme(4, None, activations=BLOCK8)]  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_file_computes_what_the_converted_model_computes(tmp_path, scheme):
    """W4A8 rounds its inputs by operators; BLOCK8 is what the kernel itself does at level 4."""
    model = converted(scheme)
    path = export_onnx(model, tmp_path / "model.onnx", example=X[:2])
    assert (OnnxModel(path)(X) - model(X)).abs().max() < TOLERANCE
    assert set(read_integers(path)) == {"0", "2"}


def test_accuracy_level_4_rounds_the_inputs(tmp_path):
    """Without it, the test above could not tell whether training saw the served arithmetic."""
    model = converted(W4)
    exact, fast = (
        OnnxModel(export_onnx(model, tmp_path / f"{level}.onnx", accuracy_level=level, example=X))
        for level in (0, 4)
    )
    assert (exact(X) - model(X)).abs().max() < TOLERANCE
    assert (fast(X) - model(X)).abs().max() > 1e-3


def test_int8_products_do_not_saturate(tmp_path):
    """The largest weights and inputs there are, against exact integers."""
    model = nn.Sequential(nn.Linear(256, 16, bias=False))
    model[0].weight.data = (
        torch.where(torch.arange(256) % 3 == 0, -1.0, 1.0).expand(16, 256).clone()
    )
    model[0].weight.data[8:] *= -1
    x = torch.ones(4, 256)
    x[1:, ::5] = 0.0
    quantized = converted(W8A8, model)
    path = export_onnx(quantized, tmp_path / "model.onnx", example=x)
    (weights, scales), served = read_integers(path)["0"], OnnxModel(path)(x).numpy()
    exact = (127 * x.numpy().astype(np.int64)) @ weights.astype(np.int64).T
    np.testing.assert_allclose(served, exact * scales[:, 0] / 127, rtol=1e-6)


def test_int8_inputs_stay_within_seven_bits(tmp_path):
    """Zero point and largest input both round up here, to 128 steps: one more than there are."""
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 1] = -61.5, 65.5
    model = converted(W8A8, nn.Sequential(nn.Linear(32, 4, bias=False)))
    rounded = fake_quantize_activations(x, W8A8.activations)
    assert rounded.max() == 65.0
    served = OnnxModel(export_onnx(model, tmp_path / "model.onnx", example=x))
    assert (served(x) - rounded @ model[0].weight.T).abs().max() < 1e-4


def test_a_tied_embedding_stands_in_the_file_once(served_docs_lm):
    model, path = served_docs_lm
    file = onnx.load(path)
    vocabulary = [t.name for t in file.graph.initializer if t.dims and t.dims[0] == 4096]
    integers = [name for name in vocabulary if name.endswith("integers")]
    assert len(integers) == 1
    assert len(vocabulary) == 2  # its scales
    quantized = [n.op_type for n in file.graph.node if n.domain == "com.microsoft"]
    assert quantized.count("GatherBlockQuantized") == 1
    assert quantized.count("MatMulNBits") == len(model.quantization.layers) - 1
    floats = sum(to_array(t).nbytes for t in file.graph.initializer
                 if t.data_type == onnx.TensorProto.FLOAT and t.name not in read_scales(file))  # fmt: skip
    assert floats < 20_000  # norms and constants: nothing that was quantized came back as floats


def read_scales(file) -> set[str]:
    return {t.name for t in file.graph.initializer if t.name.endswith("scales")}


def test_the_file_is_valid_and_says_its_versions(served_docs_lm):
    file = onnx.load(served_docs_lm[1])
    onnx.checker.check_model(file)
    assert {entry.domain: entry.version for entry in file.opset_import}[""] == OPSET
    assert file.ir_version == 10


def test_language_model_with_and_without_keys_and_values(served_docs_lm):
    model, path = served_docs_lm
    served = OnnxModel(path)
    ids = torch.randint(0, 4096, (3, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :11] = 0  # padded on the left
    with torch.no_grad():
        ours = model(input_ids=ids, attention_mask=mask).logits
    error = (served(ids, mask).logits - ours).abs()[mask.bool()]
    # logits up to 32, where float32 steps by 2e-6; four layers of sums of up to 1,024 products
    assert error.max() < 1e-4


def tiny_bert() -> BertConfig:
    return BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                      intermediate_size=64, num_labels=3)  # fmt: skip


IDS = torch.randint(0, 100, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([9, 4, 6])[:, None].gt(torch.arange(9)).long()


def test_encoder_with_a_head(tmp_path):
    """Its second kind of segments counts, and an input that it does not know is refused."""
    torch.manual_seed(0)
    model = BertForTokenClassification(tiny_bert()).eval()
    model.bert.embeddings.token_type_embeddings.weight.data *= 50  # from a deviation of 0.02 to 1
    model = converted(W4, model, skip=["classifier"])
    served = OnnxModel(export_onnx(model, tmp_path / "model.onnx"))
    assert served.loss_type == "ForTokenClassification"
    segments = torch.arange(9).ge(4).long().expand_as(IDS)
    for options in ({}, {"token_type_ids": segments}):
        with torch.no_grad():
            ours = model(input_ids=IDS, attention_mask=MASK, **options).logits
        assert (served(IDS, MASK, **options).logits - ours).abs().max() < TOLERANCE
    assert (served(IDS, MASK).logits - ours).abs().max() > 0.1
    with pytest.raises(UnreadableBatch, match="'position_ids', which OnnxModel does not take"):
        served(IDS, MASK, position_ids=segments)
    with pytest.raises(UnreadableBatch, match="'labels'"):
        served(IDS, MASK, labels=IDS)
    with pytest.raises(UnreadableBatch, match=r"both are \(batch, length\)"):
        served(IDS, MASK[:, :-1])
    with pytest.raises(UnreadableBatch, match="cannot compute input_ids"):
        served(IDS + 100, MASK)  # the vocabulary ends at 99


def test_encoder_of_pairs(tmp_path):
    torch.manual_seed(0)
    model = converted(W2, BiEncoder(BertModel(tiny_bert()).eval()), embeddings=True)
    served = OnnxModel(export_onnx(model, tmp_path / "model.onnx"))
    with torch.no_grad():
        ours = model.embed(IDS, MASK)
    assert (served.embed(IDS, MASK) - ours).abs().max() < TOLERANCE


def test_bfloat16_models_are_served_in_float32(tmp_path):
    model = converted(W4, net().bfloat16())
    before = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    served = OnnxModel(export_onnx(model, tmp_path / "model.onnx", example=X))
    assert (served(X) - copy.deepcopy(model).float()(X)).abs().max() < TOLERANCE
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == before


@pytest.mark.parametrize("model", [net(), prepare_qat(net(), W4)], ids=["float", "prepared"])
def test_only_converted_models_are_exported(tmp_path, model):
    with pytest.raises(WrongStage, match="convert it first"):
        export_onnx(model, tmp_path / "model.onnx", example=X)


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="accuracy_level 5 is unknown"):
        export_onnx(converted(W4), tmp_path / "model.onnx", accuracy_level=5, example=X)
    with pytest.raises(UnsupportedModel, match="pass an input"):
        export_onnx(converted(W4), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class Untraceable(nn.Linear):
    def forward(self, x):
        return super().forward(x) if float(x.sum()) > 0 else x


class Halved(nn.Module):
    """A product in bfloat16: ONNX's checker accepts it, and ONNX Runtime has no kernel on CPUs."""

    def forward(self, x):
        return (x.bfloat16() * x.bfloat16()).float()


@pytest.mark.parametrize(
    ("last", "message"),
    [(Untraceable(96, 96), "Sequential cannot be traced for ONNX"),
     (Halved(), "ONNX Runtime cannot run the file of this Sequential, which was not written")],
)  # fmt: skip
def test_what_cannot_be_served_is_named_and_the_old_file_stays(tmp_path, last, message):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"from before")
    skip = ["1"] if isinstance(last, nn.Linear) else []
    model = converted(W4, nn.Sequential(nn.Linear(96, 96), last), skip=skip)
    with pytest.raises(UnsupportedModel, match=message) as caught:
        export_onnx(model, path, example=X)
    assert "\n" not in str(caught.value)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"from before"]


@pytest.mark.parametrize("call", [export_onnx, save_quantized, lambda model, _: to_torchao(model)])
def test_what_others_converted_is_told_why_it_cannot_go_there(tmp_path, call):
    """It is converted, so "convert it first" would be no help."""
    wrapper = QuantWrapper(net()).prepare_qat()
    wrapper(X)
    for model in (wrapper, wrapper.freeze().convert(), nn.Sequential(wrapper.convert().model)):
        with pytest.raises(
            UnsupportedModel, match=r"int8 kernels: keep .* or train with companion.prep"
        ):
            call(model, tmp_path / "model")
    with pytest.raises(UnsupportedModel, match=r"convert\(\) returned, before to_torchao\(\)"):
        call(to_torchao(converted(W4)), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_the_old_file(tmp_path, monkeypatch):
    path = export_onnx(converted(W4), tmp_path / "model.onnx", example=X)
    before = path.read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx.checker, "check_model", full)
    with pytest.raises(OSError, match="No space left"):
        export_onnx(converted(W2), path, example=X)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == before


def test_large_models_keep_their_tensors_in_a_second_file(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "LARGEST", 1000)
    model = converted(W4)
    path: Path = export_onnx(model, tmp_path / "model.onnx", example=X)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert (OnnxModel(path)(X) - model(X)).abs().max() < TOLERANCE
    assert set(read_integers(path)) == {"0", "2"}


def test_keys_and_values_are_not_repeated_for_every_head(served_docs_lm):
    """docs-lm has two of them for four heads; ONNX's Attention shares them by itself."""
    graph = onnx.load(served_docs_lm[1]).graph
    attention = [node for node in graph.node if node.op_type == "Attention"]
    kept = {output.name for output in graph.output}
    assert len(attention) == 4
    assert all(set(node.input[1:3]) <= kept for node in attention)
