"""Ranges searched with an eye on the inputs: what is measured, and what the search makes of it."""

import copy

import pytest
import torch
import transformers
from torch import nn

from companion import W3, QuantScheme, convert, fit, prepare_qat
from companion.errors import EmptyLoader, SchemeError, UnsupportedModel
from companion.qat.calibration import DAMPING, input_squares
from companion.qat.ranges import LearnedStepSize, best_ratio


def loud(rows: int, columns: int) -> torch.Tensor:
    """Inputs of which a few channels are far larger than the others."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    x[:, ::16] *= 30
    return x


def damped(squares: torch.Tensor) -> torch.Tensor:
    return squares + DAMPING * squares.mean()


def test_the_mean_square_of_all_batches_by_hand():
    model, x = nn.Sequential(nn.Linear(32, 8)), loud(64, 32)
    batches = [(x[:16], None), (x[16:], None)]
    [found] = input_squares(model, ["0"], batches).values()
    assert torch.allclose(found, damped(x.square().mean(0)), rtol=1e-5)
    [first] = input_squares(model, ["0"], batches, batches=1).values()
    assert torch.allclose(first, damped(x[:16].square().mean(0)), rtol=1e-5)


@pytest.mark.parametrize("method", ["mse", "lsq"])
@pytest.mark.parametrize("size", [32, None])
def test_what_meets_large_inputs_is_rounded_better(method, size):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 48)), loud(256, 64)
    before, scheme = copy.deepcopy(model.state_dict()), QuantScheme(3, size)
    plain = prepare_qat(model, scheme, method)
    seeing = prepare_qat(model, scheme, method, calibration=[(x, None)])
    error = [float((m(x) - model(x)).square().mean()) for m in (seeing, plain)]
    assert error[0] < 0.7 * error[1]
    groups = plain[0].quantizer.groups(model[0].weight)
    importance = damped(x.square().mean(0)).view(-1, size or 64)
    ratio = best_ratio(groups, scheme, importance)
    absmax = prepare_qat(model, scheme, "absmax")[0].quantizer.scale(groups)
    chosen = seeing[0].quantizer.scale(groups).float() / absmax.float()
    assert torch.allclose(chosen, ratio, rtol=2e-3)  # scales are stored in half precision
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert set(seeing.state_dict()) == set(plain.state_dict())  # nothing more is saved
    assert torch.equal(convert(seeing)(x), seeing.eval()(x))


def test_conv1d_is_the_linear_layer_that_it_stands_for():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    conv, linear, x = Conv1D(8, 64), nn.Linear(64, 8), loud(128, 64)
    linear.weight.data.copy_(conv.weight.t())
    linear.bias.data.copy_(conv.bias)
    pair = [prepare_qat(nn.Sequential(m), W3, calibration=[(x, None)]) for m in (conv, linear)]
    assert torch.allclose(*(m(x) for m in pair), rtol=1e-4, atol=1e-4)


def test_a_language_model_with_tied_words():
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).train()
    batches = [{"input_ids": torch.randint(3, 64, (2, 16)), "labels": torch.zeros(2, 16)}] * 3
    qat = prepare_qat(model, W3, embeddings=True, calibration=batches)
    assert model.training
    assert qat.training
    head = qat.lm_head.quantizer
    assert head is qat.model.embed_tokens.quantizer
    plain = prepare_qat(model, W3, embeddings=True)
    assert not torch.equal(head.first, plain.lm_head.quantizer.first)  # the head's inputs count
    rows = torch.randint(3, 64, (4, 16))
    history = fit(qat, [{"input_ids": rows, "labels": rows}], steps=4, lr=1e-2, progress=False)
    assert history.loss[-1] < history.loss[0]


def test_layers_that_meet_nothing_and_channels_that_are_silent():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.used(x)

    model, x = Half(), loud(8, 32)
    x[:, :8] = 0
    qat, plain = prepare_qat(model, W3, calibration=[x]), prepare_qat(model, W3)
    assert torch.equal(qat.unused.quantizer.first, plain.unused.quantizer.first)
    assert qat.used.quantizer.first.isfinite().all()
    silent = prepare_qat(model, W3, calibration=[torch.zeros(8, 32)])
    assert torch.equal(silent.used.quantizer.first, plain.used.quantizer.first)


def test_what_is_masked_does_not_count():
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    rows = torch.randint(3, 64, (2, 8))
    padded = {"input_ids": torch.cat([rows, torch.zeros(2, 40, dtype=torch.int64)], 1),
              "attention_mask": torch.cat([torch.ones(2, 8), torch.zeros(2, 40)], 1).long()}  # fmt: skip
    name = "model.layers.0.mlp.down_proj"
    found = [next(iter(input_squares(model, [name], [batch]).values()))
             for batch in ({"input_ids": rows}, padded)]  # fmt: skip
    assert torch.allclose(*found, rtol=1e-4)


class OnesOwn(LearnedStepSize):
    """A method whose constructor knows of no importance."""

    def __init__(self, scheme, weight=None):
        super().__init__(scheme, weight)


class WithMore(LearnedStepSize):
    """One whose third argument is its own."""

    def __init__(self, scheme, weight=None, clip=1.0):
        assert clip == 1.0
        super().__init__(scheme, weight)


def test_what_would_change_nothing_or_cannot_be_measured_is_refused():
    model, x = nn.Sequential(nn.Linear(32, 8)), torch.randn(4, 32)
    with pytest.raises(SchemeError, match="calibration would change nothing"):
        prepare_qat(model, W3, "absmax", calibration=[x])
    for method in (OnesOwn, WithMore):
        with pytest.raises(SchemeError, match="calibration would change nothing"):
            prepare_qat(model, W3, method, calibration=[x])
        assert isinstance(prepare_qat(model, W3, method)[0].quantizer, method)
    with pytest.raises(EmptyLoader):
        prepare_qat(model, W3, calibration=[])
    with pytest.raises(UnsupportedModel, match="0 meets inputs that are not finite"):
        prepare_qat(model, W3, inplace=True, calibration=[x / 0])
    assert type(model[0]) is nn.Linear
