"""compressed-tensors: the same integers, opened by transformers; signs handled or refused."""

import json

import pytest
import torch
import transformers as hf
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from safetensors.torch import load_file
from torch import nn

from companion import W2, W3, W4, W4A8, W8, W8A8, Activations, QuantScheme, convert, prepare_qat
from companion.errors import UnsupportedModel, WrongStage
from companion.formats.compressed_tensors import export_compressed_tensors, words
from companion.formats.hub import CONFIG, GENERATION, INDEX, WEIGHTS
from companion.numerics.packing import unpack

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(2))
SMALL = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
         "num_attention_heads": 4}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 16}
MODELS = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, SMALL),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, GROUPED),
    "gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, GROUPED),
    "classifier": (hf.BertForSequenceClassification, hf.BertConfig, {**SMALL, "num_labels": 3}),
}  # fmt: skip
SCHEMES = [W4, W8, W3, W2, QuantScheme(4, None), QuantScheme(8, None), QuantScheme(5, 16)]
INT8 = QuantScheme(8, None, activations=Activations(8, "token", symmetric=True))


def made(name: str = "llama") -> hf.PreTrainedModel:
    kind, config, settings = MODELS[name]
    torch.manual_seed(0)
    return kind(config(**settings)).eval()


def open_(folder, name: str = "llama", **options) -> hf.PreTrainedModel:
    return MODELS[name][0].from_pretrained(folder, **options)


def turned(q: nn.Module) -> int:
    return sum(int((m.scale < 0).sum()) for m in q.modules() if hasattr(m, "integers"))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [7, 32, 61])
def test_words_are_those_of_the_package(bits, columns):
    generator = torch.Generator().manual_seed(columns)
    half = 2 ** (bits - 1)
    q = torch.randint(-half, half, (5, columns), generator=generator).to(torch.int8)
    ours, theirs = words(q, bits), pack_to_int32(q, bits)
    assert ours.shape == theirs.shape
    assert torch.equal(unpack_from_int32(ours, bits, q.shape), q)


@pytest.mark.parametrize("embeddings", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@torch.no_grad()
def test_transformers_opens_the_same_integers(tmp_path, scheme, embeddings):
    q = convert(prepare_qat(made(), scheme, "absmax", embeddings=embeddings))
    export_compressed_tensors(q, tmp_path)
    layer, bits = q.model.layers[0].mlp.down_proj, 4 if scheme.weight_bits <= 4 else 8
    stored = load_file(tmp_path / WEIGHTS)
    theirs = unpack_from_int32(
        stored["model.layers.0.mlp.down_proj.weight_packed"], bits, torch.Size([64, 96])
    )
    assert torch.equal(theirs, unpack(layer.integers, scheme.weight_bits, 96))
    assert torch.equal(stored["model.layers.0.mlp.down_proj.weight_scale"], layer.scale)
    loaded = open_(tmp_path)
    assert torch.equal(loaded(IDS).logits, q(IDS).logits)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_other_architectures_open_too(tmp_path, name):
    q = convert(prepare_qat(made(name), W4, "absmax"))
    q.config.tie_word_embeddings = made(name).config.tie_word_embeddings
    export_compressed_tensors(q, tmp_path, max_shard_size="10KB")
    assert (tmp_path / INDEX).exists()
    assert (tmp_path / GENERATION).exists() == (name != "classifier")
    assert torch.allclose(open_(tmp_path, name)(IDS).logits, q(IDS).logits, atol=1e-5)
    export_compressed_tensors(q, tmp_path)
    assert not list(tmp_path.glob("model-*"))


@torch.no_grad()
def test_int8_inputs_by_token(tmp_path):
    with pytest.raises(UnsupportedModel, match=r"lm_head rounds its inputs.*skip=\['lm_head'\]"):
        export_compressed_tensors(convert(prepare_qat(made(), INT8)), tmp_path)
    q = convert(prepare_qat(made(), INT8, skip=["lm_head"]))
    export_compressed_tensors(q, tmp_path)
    group = json.loads((tmp_path / CONFIG).read_text())["quantization_config"]["config_groups"]
    assert group["group_0"]["format"] == "int-quantized"
    assert group["group_0"]["input_activations"]["strategy"] == "token"
    stored = load_file(tmp_path / WEIGHTS)["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(stored, unpack(q.model.layers[0].mlp.up_proj.integers, 8, 64))
    loaded = open_(tmp_path)
    logits = loaded(IDS).logits  # from here on its weights are unpacked
    x = torch.randn(2, 5, 64)
    x[..., 0] = 9  # the largest of each token is positive: no tie at the grid's lower end
    ours, theirs = (m.model.layers[0].mlp.up_proj(x) for m in (q, loaded))
    assert torch.equal(theirs, ours)
    plain = convert(prepare_qat(made(), QuantScheme(8, None), skip=["lm_head"]))
    error, effect = (logits - q(IDS).logits).abs(), (plain(IDS).logits - q(IDS).logits).abs()
    assert error.mean() < 0.5 * effect.mean()  # of rounding inputs at all


@torch.no_grad()
def test_a_bfloat16_model_agrees_within_its_rounding(tmp_path):
    q = convert(prepare_qat(made().bfloat16(), W4, "absmax"))
    export_compressed_tensors(q, tmp_path)
    loaded = open_(tmp_path)
    assert loaded.dtype == torch.bfloat16
    expected = q(IDS).logits
    assert (loaded(IDS).logits - expected).abs().max() < 2**-5 * expected.abs().max()


@torch.no_grad()
def test_turned_grids_in_a_wider_store(tmp_path):
    """Of two and three bits the opposite of the smallest integer fits four; of four it fits eight."""
    for scheme, options in ((W2, {}), (W3, {}), (W4, {"bits": 8})):
        q = convert(prepare_qat(made(), scheme, "mse"))
        assert turned(q) > 100
        export_compressed_tensors(q, tmp_path, **options)
        scales = [t for n, t in load_file(tmp_path / WEIGHTS).items() if n.endswith("weight_scale")]
        assert all((scale >= 0).all() for scale in scales)
        assert torch.equal(open_(tmp_path)(IDS).logits, q(IDS).logits)


@pytest.mark.parametrize("scheme", [W4, QuantScheme(4, None)], ids=str)
@torch.no_grad()
def test_turned_grids_of_four_bits_need_a_decision(tmp_path, scheme):
    q = convert(prepare_qat(made(), scheme, "mse"))
    with pytest.raises(
        UnsupportedModel, match=r"negative scale .*bits=8.*zero_points=True.*absmax"
    ):
        export_compressed_tensors(q, tmp_path)
    assert not list(tmp_path.iterdir())
    export_compressed_tensors(q, tmp_path, zero_points=True)
    layer, name = q.model.layers[0].mlp.up_proj, "model.layers.0.mlp.up_proj"
    stored = load_file(tmp_path / WEIGHTS)
    zero = stored[f"{name}.weight_zero_point"]
    zero = unpack_from_int32(zero, 4, layer.scale.shape, packed_dim=0)
    theirs = unpack_from_int32(stored[f"{name}.weight_packed"], 4, torch.Size([96, 64]))
    theirs = theirs.unflatten(-1, (layer.scale.shape[-1], -1)) - zero[..., None]
    values = theirs.float() * stored[f"{name}.weight_scale"][..., None].float()
    assert torch.equal(values.flatten(-2), layer.weight)
    options = {"quantization_config": hf.CompressedTensorsConfig(dequantize=True)}
    # which computes weights in the scales' float16
    assert torch.allclose(open_(tmp_path, **options)(IDS).logits, q(IDS).logits, atol=5e-3)


def test_a_group_that_spares_its_smallest_integer_changes_its_sign(tmp_path):
    q = convert(prepare_qat(made(), W4, "absmax"))
    for layer in q.modules():
        if hasattr(layer, "integers"):
            integers = unpack(layer.integers, 4, layer.columns)
            assert (integers == -8).any()
            groups = integers.unflatten(-1, (layer.scale.shape[-1], -1))
            layer.scale[~(groups == -8).any(-1)] *= -1
    assert turned(q) > 10
    export_compressed_tensors(q, tmp_path)
    with torch.no_grad():
        assert torch.equal(open_(tmp_path)(IDS).logits, q(IDS).logits)


def test_refusals(tmp_path):
    with pytest.raises(WrongStage, match="convert it first"):
        export_compressed_tensors(made(), tmp_path)
    with pytest.raises(UnsupportedModel, match=r"Sequential: use save_quantized"):
        export_compressed_tensors(
            convert(prepare_qat(nn.Sequential(nn.Linear(64, 8)), W4)), tmp_path
        )
    for scheme in (W8A8, W4A8):
        with pytest.raises(UnsupportedModel, match="not what this model was trained with"):
            export_compressed_tensors(convert(prepare_qat(made(), scheme)), tmp_path)
    config = hf.GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4)
    gpt2 = convert(prepare_qat(hf.GPT2LMHeadModel(config), W4))
    with pytest.raises(UnsupportedModel, match=r"c_attn is a Conv1D"):
        export_compressed_tensors(gpt2, tmp_path)
    with pytest.raises(ValueError, match="bits=4 cannot store 8-bit weights"):
        export_compressed_tensors(convert(prepare_qat(made(), W8)), tmp_path, bits=4)
    assert not list(tmp_path.iterdir())
