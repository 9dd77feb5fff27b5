"""Training under rounding: what is trained is what is converted, and something is trained."""

import copy

import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

from companion import W2, W4, W4A8, W8A8, QuantScheme, convert, fit, prepare_qat
from companion.errors import NothingToQuantize, SchemeError
from companion.qat.lora import lora_qat
from companion.qat.packed import Packed
from tests import tiny

TOKENIZER = tiny.byte_level()
IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": IDS}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def llama(**settings) -> nn.Module:
    return tiny.llama(TOKENIZER, **settings)


@pytest.mark.parametrize("scheme", [W4, W4A8], ids=["W4", "W4A8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_precision_is_converted_to_what_was_trained(dtype, scheme):
    """pytorch/ao#1964, #2060: prepare and convert chose scales in different precision, and in half
    precision the difference grew from layer to layer."""
    prepared = prepare_qat(llama().to(dtype), scheme).eval()
    with torch.no_grad():
        assert torch.equal(convert(prepared)(IDS).logits, prepared(IDS).logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integer_kernels_answer_as_the_simulation_does(dtype):
    """pytorch#108639, #95785: fake and real integers gave different results. Ours share every integer;
    what is left is the arithmetic around them, of the precision that the model is in."""
    prepared = prepare_qat(llama().to(dtype), W8A8).eval()
    with torch.no_grad():
        ours, kernel = prepared(IDS).logits.float(), convert(prepared)(IDS).logits.float()
    apart = (ours - kernel).abs().max() / ours.abs().max()
    assert apart < (1e-6 if dtype == torch.float32 else 2**-6)


def test_ties_are_rounded_alike_in_training_and_after():
    """pytorch/ao#229: dividing by the scale and multiplying by its inverse differ at half steps."""
    layer = nn.Linear(32, 1, bias=False)
    steps = torch.arange(-16, 16) / 2
    layer.weight.data = (0.3 * steps)[None].contiguous()  # every second weight lies on a half step
    prepared = prepare_qat(nn.Sequential(layer), QuantScheme(4), "absmax").eval()
    assert torch.equal(convert(prepared)(torch.eye(32)), prepared(torch.eye(32)))


@pytest.mark.parametrize("method", ["absmax", "mse", "lsq"])
def test_what_is_rounded_trains(method):
    """torchtune#2310: the loss stayed where it was, since no rounded weight had a gradient."""
    prepared = prepare_qat(llama(), W2, method)
    before = {n: p.detach().clone() for n, p in prepared.named_parameters()}
    loss = fit(prepared, [BATCH], steps=12, lr=1e-2, progress=False).loss
    assert loss[-1] < loss[0]
    assert not [n for n, p in prepared.named_parameters() if torch.equal(p, before[n])]


def test_nothing_passes_a_weight_beyond_the_range():
    """oneflow#8685: a value beyond the largest step of the grid kept the gradient of one inside."""
    layer = nn.Linear(32, 1, bias=False)
    nn.init.uniform_(layer.weight, -1, 1)
    prepared = prepare_qat(nn.Sequential(layer), QuantScheme(4), "lsq")
    (quantizer,) = [m.quantizer for m in prepared.modules() if hasattr(m, "quantizer")]
    edge = float(7 * quantizer.step.abs().max())
    weight = next(p for n, p in prepared.named_parameters() if n.endswith("weight"))
    with torch.no_grad():
        weight[0, 3] = 4 * edge
    prepared(torch.ones(1, 32)).sum().backward()
    assert weight.grad[0, 3] == 0
    assert (weight.grad[0, :3] != 0).any()


def test_conversion_leaves_no_float_matrix_behind():
    """pytorch/ao#1290: after convert every parameter was float32 as before."""
    q = convert(prepare_qat(llama(), W4, embeddings=True))
    assert not [n for n, p in q.named_parameters() if p.dim() > 1]
    assert all(m.integers.dtype == torch.uint8 for m in q.modules() if isinstance(m, Packed))


@pytest.mark.parametrize("value", [0.0, 1e-6, 1e-30])
@pytest.mark.parametrize("method", ["absmax", "mse", "lsq"])
def test_rows_of_zeros_and_whispers_stay_what_they_are(method, value):
    """coremltools#2853, lmdeploy#1786: a channel of zeros, or one too quiet for a float16 scale,
    became 0 / 0."""
    model = nn.Sequential(nn.Linear(64, 8))
    with torch.no_grad():
        model[0].weight[2] = value
        model[0].weight[3, :32] = value
    prepared = prepare_qat(model, QuantScheme(4, scale_dtype=torch.float16), method)
    q = convert(prepared.eval())
    rounded = q(torch.eye(64)) - q(torch.zeros(1, 64))
    assert rounded.isfinite().all()
    assert (rounded[:, 2].abs() <= 2 * abs(value)).all()
    prepared.train()(torch.randn(4, 64)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in prepared.parameters())


def test_a_width_that_groups_do_not_divide_is_refused_by_name():
    """torchchat#522: 288 inputs in groups of 256 ended in a traceback from a view."""
    with pytest.raises(SchemeError, match="288") as refused:
        prepare_qat(nn.Sequential(nn.Linear(288, 4)), QuantScheme(4, 256))
    assert "256" in str(refused.value)


def test_a_model_of_convolutions_is_not_waved_through():
    """pytorch/ao#4933: convolutions were left in floating point without a word."""
    with pytest.raises(NothingToQuantize, match="Conv2d"):
        prepare_qat(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), W4)


def test_hooks_that_move_tensors_do_not_hide_the_rounding():
    """transformers#40415: with Accelerate's hooks on the layers the swap was bypassed."""
    plain, hooked = llama(), llama()
    for layer in [m for m in hooked.modules() if isinstance(m, nn.Linear)]:
        add_hook_to_module(layer, AlignDevicesHook("cpu"))
    outputs = [prepare_qat(model, W2).eval()(IDS).logits for model in (plain, hooked)]
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], plain(IDS).logits)


def test_adapters_that_were_trained_under_rounding_merge_without_a_step():
    """transformers#31293, peft#1043, peft#2321: merged into four bits, an adapter that had been
    trained beside them was rounded for the first time, and answers changed."""
    prepared = lora_qat(llama(), W4, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    fit(prepared, [BATCH], steps=4, lr=1e-2, progress=False)
    with torch.no_grad():
        beside = prepared.eval()(IDS).logits
        assert torch.equal(convert(prepared.merge_and_unload())(IDS).logits, beside)


def test_merging_changes_the_base():
    """peft#2586: merged weights were those of the base, so the adapter was lost."""
    start = llama()
    adapted = lora_qat(start, W4, 4)
    fit(adapted, [BATCH], steps=8, lr=3e-2, progress=False)
    trained, untrained = convert(adapted.eval().merge_and_unload()), convert(prepare_qat(start, W4))
    layers = [{n: m.integers for n, m in q.named_modules() if isinstance(m, Packed)}
              for q in (trained, untrained)]  # fmt: skip
    assert [n for n in layers[1] if not torch.equal(layers[0][n], layers[1][n])]


def test_micro_batches_make_the_step_of_the_whole_batch():
    """transformers' and mlx-lm#1413's accumulation: a mean of means favoured short texts."""
    labels = IDS.clone()
    labels[1, 3:] = -100  # the second text has a quarter of the first one's tokens
    whole = [{"input_ids": IDS, "labels": labels}]
    micro = [{"input_ids": IDS[i : i + 1], "labels": labels[i : i + 1]} for i in range(2)]
    start = llama()
    trained = []
    for batches, count in ((whole, 1), (micro, 2)):
        model = prepare_qat(copy.deepcopy(start), W4, "absmax")
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        fit(model, batches, steps=1, accumulate=count, optimizer=optimizer, progress=False)
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*trained, atol=1e-6)
