"""ExecuTorch: the trained integers in the file, and its runtime's answers beside the model's."""

from pathlib import Path

import pytest

reason = "there is no wheel of ExecuTorch for this machine"
pytest.importorskip("executorch.runtime", reason=reason)

import torch  # noqa: E402
import transformers as hf  # noqa: E402
from executorch.runtime import Method, Runtime  # noqa: E402
from torch import nn  # noqa: E402

from companion import (  # noqa: E402
    W4,
    W8,
    W8A8,
    QuantScheme,
    convert,
    export_executorch,
    load_pretrained,
    prepare_qat,
)
from companion.errors import UnsupportedModel, WrongStage  # noqa: E402
from companion.formats.executorch import export as ours  # noqa: E402
from companion.formats.executorch.export import as_served  # noqa: E402
from companion.formats.executorch.stored import read_integers  # noqa: E402
from companion.numerics.packing import unpack  # noqa: E402
from companion.qat.packed import QuantizedLinear  # noqa: E402

GROUPS = QuantScheme(4, 32, torch.bfloat16)
ROWS = QuantScheme(8, None)
IDS = torch.randint(10, 4000, (1, 24), generator=torch.Generator().manual_seed(0))
SMALL = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
         "num_attention_heads": 4}  # fmt: skip


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32, bias=False))


def method(path) -> Method:
    return Runtime.get().load_program(path).load_method("forward")


def run(method: Method, *inputs: torch.Tensor) -> torch.Tensor:
    return method.execute(list(inputs))[0].clone()  # its memory is written again


def multiplied(model: nn.Module) -> list[QuantizedLinear]:
    return [m for m in model.modules() if isinstance(m, QuantizedLinear)]


@pytest.fixture(scope="module")
def docs_lm(tmp_path_factory) -> tuple[nn.Module, Path]:
    """docs-lm with every matrix in four bits, and its file."""
    model = convert(prepare_qat(load_pretrained("docs-lm"), GROUPS, "absmax", embeddings=True))
    path = tmp_path_factory.mktemp("pte") / "docs-lm.pte"
    return model, export_executorch(model, path, max_length=64)


def test_docs_lm_keeps_its_integers_and_scales(docs_lm):
    model, path = docs_lm
    stored = [(integers.tolist(), scale.tolist()) for integers, scale in read_integers(path)]
    trained = [(unpack(layer.integers, 4, layer.columns).tolist(), layer.scale.tolist())
               for layer in multiplied(model)]  # fmt: skip
    assert len(stored) == 29
    assert sorted(stored) == sorted(trained)  # keys may come before queries
    assert path.stat().st_size < 0.25 * 13.64e6  # of the float model's bytes, the tied table twice


@torch.no_grad()
def test_docs_lm_answers_as_the_model_that_rounds_inputs_alike(docs_lm):
    """Within a tenth of what rounding the inputs changes at all, for most tokens.

    Not for all: where an input lies between two integers, a last bit decides (other texts show it).
    """
    model, path = docs_lm
    served, positions = method(path), torch.arange(24)
    alike = as_served(model)
    expected = alike(IDS).logits
    margin = 0.1 * (model(IDS).logits - expected).abs().mean()
    whole = run(served, IDS, positions)
    steps = [run(served, IDS[:, i : i + 1], positions[i : i + 1]) for i in range(24)]
    again = run(served, IDS[:, 6:13], positions[:7])  # position 0 begins a new text
    pairs = [
        (whole, expected),
        (torch.cat(steps, 1), expected),
        (again, alike(IDS[:, 6:13]).logits),
    ]
    for logits, wanted in pairs:
        assert (logits - wanted).abs().mean(-1).median() < margin


@pytest.mark.parametrize(
    ("scheme", "chosen"),
    [(GROUPS, "absmax"), (ROWS, "lsq"), (QuantScheme(3, 32, torch.bfloat16), "mse"),
     (QuantScheme(5, None), "mse")],
    ids=str,
)  # fmt: skip
@torch.no_grad()
def test_values_are_the_trained_ones_in_every_width(tmp_path, scheme, chosen):
    """Where a scale is negative, it and its integers change their signs."""
    q = convert(prepare_qat(layers(), scheme, chosen))
    assert (chosen != "mse") or any((layer.scale < 0).any() for layer in multiplied(q))
    x = torch.randn(5, 64)
    path = export_executorch(q, tmp_path / "model.pte", example=x)
    for (integers, scale), layer in zip(read_integers(path), multiplied(q), strict=True):
        groups = integers.unflatten(-1, (scale.shape[1], -1)) * scale[..., None]
        assert torch.equal(groups.flatten(-2), layer.weight)
        assert (scale > 0).all()
    answer, expected = run(method(path), x), as_served(q)(x)
    assert (answer - expected).abs().max() < 0.01 * (q(x) - expected).abs().max()


@torch.no_grad()
def test_an_encoder_reads_padded_texts_of_another_length(tmp_path):
    torch.manual_seed(0)
    bert = hf.BertForSequenceClassification(hf.BertConfig(**SMALL, num_labels=3)).eval()
    q = convert(prepare_qat(bert, GROUPS, "absmax", embeddings=True))
    served = method(export_executorch(q, tmp_path / "bert.pte", max_length=16))
    ids, mask = IDS[:, :9] % 96, torch.tensor([[1] * 6 + [0] * 3])
    expected = as_served(q)(input_ids=ids, attention_mask=mask).logits
    assert torch.allclose(run(served, ids, mask, torch.zeros_like(ids)), expected, atol=1e-5)


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    q = convert(prepare_qat(layers(), GROUPS, "absmax"))
    monkeypatch.setattr(ours, "_run_once", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_executorch(q, tmp_path / "model.pte", example=torch.ones(1, 64))
    assert not list(tmp_path.iterdir())


def test_scales_are_rounded_only_when_asked():
    q = convert(prepare_qat(layers(), W4, "absmax"))
    with pytest.raises(UnsupportedModel, match=r"bfloat16 does not hold.*scale_dtype.*scales="):
        as_served(q)
    for theirs, layer in zip(
        multiplied(as_served(q, scales="bfloat16")), multiplied(q), strict=True
    ):
        assert torch.equal(theirs.integers, layer.integers)
        assert ((theirs.scale.float() / layer.scale.float() - 1).abs() <= 2**-8).all()


def test_refusals(tmp_path):
    def refused(error, match, model, **options):
        with pytest.raises(error, match=match):
            export_executorch(model, tmp_path / "model.pte", **options)

    refused(WrongStage, "convert it first", layers())
    for scheme, match in (
        (W8, r"0 has 8-bit weights in groups of 32.*QuantScheme\(8, None\)"),
        (W8A8, "rounds its inputs in another way than XNNPACK"),
        (QuantScheme(4, 16, torch.bfloat16), "blocks are multiples of 32"),
    ):
        refused(UnsupportedModel, match, convert(prepare_qat(layers(), scheme, "absmax")))
    negative = convert(prepare_qat(layers(), GROUPS, "mse"))
    refused(UnsupportedModel, r'negative scale and use the integer -8.*method="absmax"', negative)
    t5 = hf.T5ForConditionalGeneration(hf.T5Config(
        vocab_size=96, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4))  # fmt: skip
    refused(UnsupportedModel, "is an encoder-decoder", convert(prepare_qat(t5, GROUPS, "absmax")))
    llama = convert(prepare_qat(hf.LlamaForCausalLM(hf.LlamaConfig(
        **SMALL, max_position_embeddings=32)), GROUPS, "absmax"))  # fmt: skip
    refused(ValueError, "choose 4 to 32 tokens", llama, max_length=64)
    refused(ValueError, "'exact' or 'bfloat16'", llama, scales="float16")
    assert not list(tmp_path.iterdir())
