"""SmoothQuant: the same function before rounding, a smaller error after it."""

import pytest
import torch
import transformers as tf
from torch import nn

from companion import W4A8, Activations, QuantScheme, load_pretrained, load_task, prepare_qat
from companion.errors import EmptyLoader, NothingToQuantize, UnsupportedModel, WrongStage
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


@pytest.mark.parametrize("activation", [nn.PReLU(), nn.PReLU(64)], ids=["one slope", "64 slopes"])
def test_prelu_is_no_norm(activation):
    torch.manual_seed(0)
    net = nn.Sequential(activation, nn.Linear(64, 8)).eval()
    # On negative inputs alone it is proportional to its weight, as a norm is.
    with pytest.raises(NothingToQuantize, match="no normalisation"):
        smooth(net, [(-inputs().abs(), None)])
    both = nn.Sequential(*with_outliers(), nn.PReLU(32), nn.Linear(32, 8)).eval()
    smoothed = smooth(both, [(inputs(), None)])
    assert torch.equal(smoothed[2].weight, both[2].weight)
    assert not torch.allclose(smoothed[0].weight, both[0].weight)
    assert torch.allclose(smoothed(inputs(1)), both(inputs(1)), atol=1e-4)  # sums of 64 products


class GemmaLike(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.5, 3, 64))

    def forward(self, x):
        return (1 + self.weight) * x / x.square().mean(-1, keepdim=True).sqrt()


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(64), nn.RMSNorm(64), nn.BatchNorm1d(64), nn.GroupNorm(4, 64), GemmaLike()],
    ids=lambda norm: type(norm).__name__,
)
def test_every_kind_of_norm_is_recognised(norm):
    torch.manual_seed(0)
    norm.weight.data[5] = 50.0
    net = nn.Sequential(norm, nn.Linear(64, 32)).eval()
    smoothed = smooth(net, [(inputs(), None)])
    largest = smoothed[0](inputs()).abs().amax(0)
    assert largest.max() / largest.median() < 0.5 * 50  # shared with the weights by its root
    assert torch.allclose(smoothed(inputs(1)), net(inputs(1)), atol=1e-3)  # values near 50


def test_batch_norm_whose_channels_are_not_what_linear_reads():
    with pytest.raises(NothingToQuantize):
        smooth(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(64, 8)), [(torch.randn(3, 5, 64), None)])
    with pytest.raises(NothingToQuantize):  # even if there are as many of them
        smooth(
            nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 8)), [(torch.randn(3, 64, 64), None)]
        )


class SharedNorm(nn.Module):
    """One norm, or two norms of one weight, before two layers."""

    def __init__(self, modules: int):
        super().__init__()
        self.first = self.second = nn.LayerNorm(64)
        if modules == 2:
            self.second = nn.LayerNorm(64)
            self.second.weight, self.second.bias = self.first.weight, self.first.bias
        self.first.weight.data[5] = 100.0
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.b(self.second(x + self.a(self.first(x))))


@pytest.mark.parametrize("modules", [1, 2])
def test_shared_norms_fold_into_all_their_readers(modules):
    torch.manual_seed(0)
    net = SharedNorm(modules)
    smoothed = smooth(net, [(inputs(), None)])
    assert smoothed.first.weight[5] < 50
    assert smoothed.second.weight is smoothed.first.weight
    largest = net(inputs(1)).abs().max()
    assert torch.allclose(smoothed(inputs(1)), net(inputs(1)), atol=1e-5 * float(largest))


def test_layers_with_one_weight_are_scaled_once():
    torch.manual_seed(0)
    net = SharedNorm(1)
    net.b.weight = net.a.weight
    smoothed = smooth(net, [(inputs(), None)])
    largest = net(inputs(1)).abs().max()
    assert torch.allclose(smoothed(inputs(1)), net(inputs(1)), atol=1e-5 * float(largest))


def test_a_faint_second_reader_counts():
    class Faint(Residual):
        def forward(self, x):
            x = self.norm(x)
            return self.linear(x) + 2e-3 * x

    with pytest.raises(NothingToQuantize):
        smooth(Faint(), [(inputs(), None)])


SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2}  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)),
        lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**SMALL, num_key_value_heads=2, head_dim=16)),
        lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(
                vocab_size=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2
            )
        ),
    ],
    ids=["llama", "gemma", "gpt2"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_language_models_compute_the_same(make, dtype):
    torch.manual_seed(0)
    model = make().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model = model.to(dtype)
    ids = torch.randint(3, 64, (2, 9))
    smoothed = smooth(model, [{"input_ids": ids, "labels": ids}])
    assert smoothed.dtype == dtype
    with torch.no_grad():
        one, two = (m.float()(ids).logits for m in (model, smoothed))
    # bfloat16 keeps eight bits; only Gemma's 1 + weight loses some of them.
    loss = 2**-8 if dtype == torch.bfloat16 and "Gemma" in type(model).__name__ else 1e-5
    assert (one - two).abs().max() < loss * 4 * one.abs().max()
    changed = [n for n, p in smoothed.named_parameters() if p.dim() == 1 and "bias" not in n
               and not torch.equal(p, model.get_parameter(n))]  # fmt: skip
    assert len(changed) == 2


def test_adapters_and_quantized_models_are_refused():
    from peft import LoraConfig, get_peft_model

    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL))
    batch = {"input_ids": torch.randint(3, 64, (2, 9))}
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["input_layernorm"])
    with pytest.raises(UnsupportedModel, match="merge_and_unload"):
        smooth(get_peft_model(model, config), [batch])
    with pytest.raises(WrongStage, match="prepared already"):
        smooth(prepare_qat(with_outliers(), TENSOR), [(inputs(), None)])


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(UnsupportedModel, match="not finite"):
        smooth(with_outliers(), [(inputs() * torch.nan, None)])


def test_plain_tensors_are_batches_too():
    net = with_outliers()
    pairs, plain = smooth(net, [(inputs(), None)]), smooth(net, [inputs()])
    assert torch.equal(pairs[0].weight, plain[0].weight)
