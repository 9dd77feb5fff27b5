"""SmoothQuant: the same function before rounding, a smaller error after it."""

import pytest
import torch
from torch import nn

from companion import W4A8, Activations, QuantScheme, load_pretrained, load_task, prepare_qat
from companion.errors import EmptyLoader, NothingToQuantize
from companion.ptq.smoothquant import smooth

TENSOR = QuantScheme(8, None, activations=Activations(8, "tensor"))


def inputs(seed: int = 0, n: int = 128) -> torch.Tensor:
    return torch.randn(n, 64, generator=torch.Generator().manual_seed(seed))


def with_outliers() -> nn.Module:
    """A norm that makes one channel a hundred times larger, as large language models do."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 32))
    model[0].weight.data[5] = 100.0
    model[1].weight.data[:, 5] /= 100.0
    return model


def error(model: nn.Module, reference: nn.Module, scheme=TENSOR) -> float:
    rounded = prepare_qat(model, scheme).eval()
    return float((rounded(inputs(1)) - reference(inputs(1))).square().mean())


def test_same_function_and_much_less_error_after_rounding():
    model = with_outliers()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    smoothed = smooth(model, [(inputs(), None)])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.allclose(smoothed(inputs(1)), model(inputs(1)), atol=1e-4)
    assert error(smoothed, model) < 0.05 * error(model, model)


def test_factor_by_hand():
    """max|x|**strength / max|w|**(1 - strength), channel by channel."""
    model = with_outliers()
    x = inputs()
    largest = model[0](x).abs().amax(0)
    columns = model[1].weight.abs().amax(0)
    for strength in (0.5, 0.8):
        factor = largest**strength / columns ** (1 - strength)
        smoothed = smooth(model, [(x, None)], strength=strength)
        assert torch.allclose(smoothed[0].weight, model[0].weight / factor, rtol=1e-4)
        assert torch.allclose(smoothed[1].weight, model[1].weight * factor, rtol=1e-4)


class Residual(nn.Module):
    """Post-norm, as in BERT: the normalised output is also added further on."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(64), nn.Linear(64, 64)

    def forward(self, x):
        x = self.norm(x)
        return x + self.linear(x)


def test_an_output_with_another_reader_is_left_alone():
    torch.manual_seed(0)
    with pytest.raises(NothingToQuantize, match="feeds Linear layers alone"):
        smooth(Residual(), [(inputs(), None)])
    both = nn.Sequential(Residual(), *with_outliers())
    smoothed = smooth(both, [(inputs(), None)])
    assert torch.allclose(smoothed[0].norm.weight, both[0].norm.weight, rtol=1e-6)
    assert not torch.allclose(smoothed[1].weight, both[1].weight)
    assert torch.allclose(smoothed(inputs(1)), both(inputs(1)), atol=1e-3)


def test_docs_lm_smooths_every_norm_but_the_last():
    batch = next(iter(load_task("language-reference", batch_size=2).train))
    model = load_pretrained("docs-lm")
    smoothed = smooth(model, [batch])
    changed = [
        name
        for name, module in smoothed.named_modules()
        if name.endswith("norm")
        and not torch.allclose(module.weight, model.get_submodule(name).weight)
    ]
    assert len(changed) == 2 * len(model.model.layers)
    ids = {"input_ids": batch["input_ids"]}
    with torch.no_grad():
        assert torch.allclose(smoothed(**ids).logits, model(**ids).logits, atol=1e-3)
        prepare_qat(smoothed, W4A8)(**ids)


def test_empty_loader():
    with pytest.raises(EmptyLoader, match="calibrate"):
        smooth(with_outliers(), [])
