"""Which layers are found, which are left, and which models are refused."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.pytorch_utils import Conv1D

from companion import W4, QuantScheme, convert, prepare_qat
from companion.errors import SchemeError, UnsupportedModel
from companion.qat.selection import (
    Quantization,
    check_divisible,
    kind_of,
    matches,
    refuse_unseen_weights,
)


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj", True),
        ("model.layers.0.mlp.up_proj", "up_proj", True),
        ("model.layers.0.mlp.up_proj", "mlp", True),
        ("model.layers.0.mlp.up_proj", "layers.0", True),
        ("model.layers.0.mlp.up_proj", "layers.*.mlp", True),
        ("model.layers.10.mlp.up_proj", "layers.1", False),
        ("model.layers.0.mlp.up_proj", "proj", False),
        ("model.layers.0.mlp.up_proj", "*proj", True),
        ("lm_head", "lm_head", True),
        ("lm_head", "head", False),
        ("", "lm_head", False),
    ],
)
def test_patterns_match_whole_parts_of_names(name, pattern, expected):
    assert matches(name, pattern) is expected


def test_only_layers_whose_forward_is_known_are_taken():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert [kind_of(m) for m in (nn.Linear(2, 2), nn.Embedding(2, 2), Conv1D(2, 2))] == [
        "Linear", "Embedding", "Conv1D"]  # fmt: skip
    assert kind_of(Scaled(2, 2)) is None
    assert kind_of(nn.Conv1d(2, 2, 1)) is None
    assert kind_of(weight_norm(nn.Linear(2, 2))) is None
    prepared = prepare_qat(nn.Sequential(Scaled(32, 32), nn.Linear(32, 2)), W4)
    assert prepared.quantization.layers == ["1"]
    assert prepared.quantization.skipped == {"0": "Scaled is a subclass with a forward of its own"}


def test_divisors_are_common_to_all_chosen_layers():
    layers = {"a": nn.Linear(96, 5), "b": nn.Linear(80, 5), "c": nn.Linear(7, 5)}
    with pytest.raises(SchemeError, match=r"64 does not divide the 96 inputs of a \(and 1 more "
                                          r"layers\).*1, 2, 4, 8, 16, or None"):  # fmt: skip
        check_divisible(layers, ["a", "b"], QuantScheme(4, 64))
    check_divisible(layers, ["a", "b"], QuantScheme(4, 16))
    check_divisible(layers, ["a", "b", "c"], QuantScheme(4, None))


def test_the_inputs_of_conv1d_are_its_rows():
    layers = {"a": Conv1D(5, 64)}  # 64 inputs, 5 outputs
    check_divisible(layers, ["a"], QuantScheme(4, 64))
    with pytest.raises(SchemeError, match="the 48 inputs of 0"):
        prepare_qat(nn.Sequential(Conv1D(64, 48)), W4)


def test_encoder_layers_with_a_fast_path_are_refused_while_it_is_on():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 1)
    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(UnsupportedModel, match=r"layers\.0 .*set_fastpath_enabled\(False\) first"):
        prepare_qat(model, W4)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        prepared, x = prepare_qat(model, W4).eval(), torch.randn(2, 5, 64)
        assert prepared.quantization.layers == ["layers.0.linear1", "layers.0.linear2"]
        # without gradients, as converted: torch's attention takes another kernel with them
        prepared.requires_grad_(False)
        assert torch.equal(convert(prepared)(x), prepared(x))
        assert not torch.equal(model.eval()(x), prepared(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_fused_expert_weights_are_refused_unless_skipped():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up = nn.Parameter(torch.zeros(4, 8, 8))

    model = nn.ModuleDict({"attention": nn.Linear(32, 8), "experts": Experts()})
    with pytest.raises(UnsupportedModel, match=r"experts\.gate_up fuses the weights of 4 experts"):
        refuse_unseen_weights(model, ())
    refuse_unseen_weights(model, ("experts",))
    plain = nn.ParameterDict({"kernel": nn.Parameter(torch.zeros(4, 8, 8))})
    refuse_unseen_weights(plain, ())  # three dimensions alone are no experts


def test_the_report_reads_as_sentences():
    record = Quantization(W4, "absmax", ["a", "b"])
    assert str(record) == (
        "2 layers quantized (4 bits, group size 32, absmax); 0 stay in floating point"
    )
