"""GGUF files: transformers and llama.cpp read the integers and scales that were trained."""

import copy

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from benchmarks.engines import LlamaCpp
from companion import QuantScheme, convert, load_pretrained, prepare_qat
from companion.course.sources import load_tokenizer
from companion.errors import UnsupportedModel, WrongStage
from companion.formats.gguf import export_gguf
from companion.numerics.packing import unpack
from companion.numerics.scheme import BLOCK8, W4A8
from companion.qat.packed import Packed
from companion.study.tables import scheme_name

gguf = pytest.importorskip("gguf")
SHAPE = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
CONFIGS = {
    "llama": transformers.LlamaConfig(**SHAPE, rope_theta=5e5, rms_norm_eps=1e-5),
    "llama, tied": transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": transformers.Qwen2Config(**SHAPE),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=128),  # what transformers takes for granted
}
SCHEMES = [QuantScheme(4), QuantScheme(2), QuantScheme(3, None), QuantScheme(8),
           QuantScheme(4, 64), QuantScheme(4, activations=BLOCK8)]  # fmt: skip


def quantized(config, scheme: QuantScheme = SCHEMES[0], **options) -> nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # biases and norms with something in them
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return convert(prepare_qat(model, scheme, "mse", **options))


def floats_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every weight in floating point, under the name that it has in a float model."""
    found = {f"{n}.weight": m.weight for n, m in model.named_modules() if isinstance(m, Packed)}
    stored = (".integers", ".scale")
    return found | {n: t for n, t in model.state_dict().items() if not n.endswith(stored)}


@pytest.mark.parametrize("scheme", SCHEMES, ids=scheme_name)
@pytest.mark.parametrize("kind", CONFIGS)
def test_transformers_reads_every_weight_back(kind, scheme, tmp_path):
    model = quantized(CONFIGS[kind], scheme)
    export_gguf(model, tmp_path / "model.gguf")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    theirs = again.state_dict()
    for name, ours in floats_of(model).items():
        assert torch.equal(ours, theirs[name]), name
    ids = torch.arange(3, 12)[None]
    if scheme.activations is None:
        assert torch.allclose(model(ids).logits, again(ids).logits, atol=1e-5)


def test_integers_and_scales_stand_in_the_blocks(tmp_path):
    model = quantized(CONFIGS["qwen2"], QuantScheme(4))
    path = export_gguf(model, tmp_path / "model.gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    layer = model.model.layers[1].mlp.down_proj
    blocks = tensors["blk.1.ffn_down.weight"].data.reshape(64, 4, 18)
    halves = blocks[..., 2:]
    integers = np.concatenate([halves & 15, halves >> 4], -1).astype(np.int8) - 8
    assert np.array_equal(integers.reshape(64, 128), unpack(layer.integers, 4, 128).numpy())
    scale = blocks[..., :2].copy().view(np.float16)[..., 0]
    assert np.array_equal(scale, layer.scale.numpy())
    assert (scale < 0).any()  # the search turns some groups around, and llama.cpp stores that


def test_rounded_embeddings_and_a_tied_head_stand_in_the_file_once(tmp_path):
    model = quantized(CONFIGS["llama, tied"], embeddings=True)
    tensors = {t.name: t for t in gguf.GGUFReader(export_gguf(model, tmp_path / "m.gguf")).tensors}
    assert tensors["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.Q4_0
    assert "output.weight" not in tensors


def test_floats_are_exact_unless_asked(tmp_path):
    model = quantized(CONFIGS["llama"])
    kinds = {}
    for floats in ("exact", "F16"):
        path = export_gguf(model, tmp_path / floats, floats=floats)
        kinds[floats] = {t.name: t.tensor_type for t in gguf.GGUFReader(path).tensors}
    kind = gguf.GGMLQuantizationType
    assert kinds["exact"]["token_embd.weight"] == kind.F32
    assert kinds["F16"]["token_embd.weight"] == kind.F16
    assert kinds["F16"]["output_norm.weight"] == kind.F32
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data.half().float()
    path = export_gguf(model, tmp_path / "again.gguf")
    assert {t.name: t.tensor_type for t in gguf.GGUFReader(path).tensors}[
        "token_embd.weight"
    ] == kind.F16
    with pytest.raises(ValueError, match="'exact' or 'F16'"):
        export_gguf(model, path, floats="BF16")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.config.__setattr__("model_type", "gemma3_text"), "kinds llama"),
        (lambda m: m.config.rope_parameters.update(rope_type="yarn"), "'yarn'"),
        (lambda m: m.model.layers[0].add_module("more", nn.Linear(2, 2)), "no place for"),
    ],
)
def test_what_llama_cpp_does_not_know_is_refused(change, says, tmp_path):
    model = quantized(copy.deepcopy(CONFIGS["llama"]))
    change(model)
    with pytest.raises(UnsupportedModel, match=says):
        export_gguf(model, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("scheme", "says"),
    [
        (QuantScheme(4, 16), "groups of 16"),
        (W4A8, "rounds its inputs"),
        (QuantScheme(4, scale_dtype=torch.float32), "float16 does not hold"),
    ],
)
def test_schemes_without_blocks_are_refused(scheme, says, tmp_path):
    with pytest.raises(UnsupportedModel, match=says):
        export_gguf(quantized(CONFIGS["llama"], scheme), tmp_path / "model.gguf")


def test_only_converted_models_are_written(tmp_path):
    with pytest.raises(WrongStage):
        export_gguf(transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]), tmp_path / "m")


def test_the_tokenizer_is_named_as_llama_cpp_knows_it(tmp_path):
    tokenizer = load_tokenizer("docs-lm")
    model = convert(prepare_qat(load_pretrained("docs-lm"), QuantScheme(4), "absmax"))
    path = export_gguf(model, tmp_path / "model.gguf", tokenizer)
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert [tokens.index(token) for token in tokenizer.tokenize("Return a list.")] == tokenizer(
        "Return a list.", add_special_tokens=False
    )["input_ids"]
    again = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    text = "def f(x):\n    return x ** 2  # naïve"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_llama_cpp_answers_as_the_model_does(bits, tmp_path):
    """Up to what it rounds on the way: inputs to 8 bits by blocks, keys and values to float16."""
    tokenizer, start = load_tokenizer("docs-lm"), load_pretrained("docs-lm")
    model = convert(prepare_qat(start, QuantScheme(bits, activations=BLOCK8), "mse"))
    served = LlamaCpp(export_gguf(model, tmp_path / "model.gguf", tokenizer), threads=1)
    text = "The function returns a list of the names that were found in the module, or None."
    ids = [0, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    theirs = served.log_probabilities(ids, 1)
    with torch.no_grad():
        ours = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).numpy()
    divergence = (np.exp(ours) * (ours - theirs)).sum(-1)
    assert divergence.mean() < 5e-4  # nats a token; rounding to 8 bits alone costs docs-lm more


def test_other_tokenizers_are_refused(tmp_path):
    model = quantized(CONFIGS["llama"])
    tokenizer = load_tokenizer("sentence-transformers/all-MiniLM-L6-v2")
    with pytest.raises(UnsupportedModel, match="byte-level BPE"):
        export_gguf(model, tmp_path / "model.gguf", tokenizer)
