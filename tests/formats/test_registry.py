"""Every format at once: what was trained is what each engine serves, or it is refused in a sentence."""

import os
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers as hf

from companion import W2, W4, QuantScheme, convert, fit, load_pretrained, load_task, prepare_qat
from companion.course.sources import load_tokenizer
from companion.errors import UnsupportedModel
from companion.formats import compressed_tensors, hub
from companion.formats.parity import parity
from companion.formats.registry import FORMATS, format_at, format_for
from companion.qat.packed import Packed
from companion.study.tables import scheme_name
from tests import tiny

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 32}
WITHOUT = {"executorch"} if find_spec("executorch") is None else set()
HERE = [pytest.param(form, marks=pytest.mark.skipif(
    form in WITHOUT, reason="there is no wheel of ExecuTorch for this machine")) for form in FORMATS]  # fmt: skip
UNSEEN = {
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, GROUPED),
    "gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, GROUPED),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config,
             {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "phi3": (hf.Phi3ForCausalLM, hf.Phi3Config, {**SMALL, "pad_token_id": 0}),
    "opt": (hf.OPTForCausalLM, hf.OPTConfig,
            {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
             "word_embed_proj_dim": 64, "max_position_embeddings": 64, "pad_token_id": 1}),
}  # fmt: skip
REFUSED = {("gemma3", "gguf"), ("gpt2", "gguf"), ("gpt2", "compressed-tensors"), ("phi3", "gguf"),
           ("opt", "gguf")}  # fmt: skip
LOGITS = {"companion": 0.0, "compressed-tensors": 1e-4, "onnx": 1e-4}
"""Most that a logit may be off: float32 sums in another order. llama.cpp rounds inputs instead."""
NATS = {"gguf": 5e-3, "executorch": 5e-2}
"""Most that an engine that rounds inputs may be away, on average over tokens. llama.cpp rounds them to 8
bits in blocks of 32; ExecuTorch a whole token in one range, where an outlier takes room from all."""


def scheme_for(form: str, scheme: QuantScheme) -> QuantScheme:
    """The scales that an engine's kernels take: ExecuTorch's are bfloat16."""
    return replace(scheme, scale_dtype=torch.bfloat16) if form == "executorch" else scheme


def exported(form: str, model, folder: Path, tokenizer=None) -> Path:
    path = folder / f"{form}{FORMATS[form].ending}"
    FORMATS[form].export(model, path, tokenizer)
    return path


def check(report, form: str) -> None:
    assert report.integers
    assert report.scales
    # ExecuTorch rounds a token's inputs over one range: where two tokens are nearly as likely they change
    # places, as two of these 17 do; how far that is from what was trained, the divergence says
    assert report.argmax > (0.75 if form == "executorch" else 0.9)
    if form in LOGITS:
        assert report.logits <= LOGITS[form]
        assert report.ours == report.theirs
    else:
        assert report.divergence < NATS[form]
        assert report.rounded < NATS[form] / 2


@cache
def trained(scheme: QuantScheme):
    """docs-lm after a few steps under rounding."""
    task = load_task("language-reference", batch_size=2, block_size=64)
    qat = prepare_qat(load_pretrained("docs-lm"), scheme, "absmax", embeddings=True)
    before = qat.model.layers[0].mlp.up_proj.weight.detach().clone()
    fit(qat, task.train, steps=3, lr=1e-3, progress=False)
    assert not torch.equal(before, qat.model.layers[0].mlp.up_proj.weight)
    return convert(qat)


def cases():
    """Every format at four bits and at two; an export for ExecuTorch takes a minute and more."""
    for here in HERE:
        for scheme in (W4, W2):
            (form,) = here.values
            slow = [pytest.mark.slow] if (form, scheme) == ("executorch", W2) else []
            name = f"{form}-{scheme_name(scheme)}"
            yield pytest.param(form, scheme, marks=[*here.marks, *slow], id=name)


@pytest.mark.parametrize(("form", "scheme"), cases())
def test_trained_exported_served(form, scheme, tmp_path):
    tokenizer, model = load_tokenizer("docs-lm"), trained(scheme_for(form, scheme))
    path = exported(form, model, tmp_path, tokenizer)
    assert format_at(path) == form
    prompt = tokenizer("The for statement is", return_tensors="pt").input_ids
    report = parity(model, path, prompt=prompt, max_new_tokens=12)
    check(report, form)
    assert report.layers == (30 if form == "executorch" else 29)  # there a tied table stands twice
    layer = [module for module in model.modules() if isinstance(module, Packed)][7]
    for stored, wrong in ((layer.integers, (False, True)), (layer.scale, (True, False))):
        kept = stored.clone()
        stored.view(-1)[5] = stored.view(-1)[5] + torch.ones((), dtype=stored.dtype)
        other = parity(model, path, served=model)  # of what the file holds
        stored.copy_(kept)
        assert (other.integers, other.scales) == wrong


@pytest.mark.slow
@pytest.mark.parametrize("form", HERE)
def test_smollm2_trained_exported_served(form, tmp_path):
    task = load_task("language-reference", batch_size=1, block_size=64,
                     tokenizer=load_tokenizer("smollm2"))  # fmt: skip
    qat = prepare_qat(load_pretrained("smollm2"), scheme_for(form, W4), "absmax", skip=["lm_head"])
    fit(qat, task.train, steps=2, lr=1e-4, progress=False)
    model, tokenizer = convert(qat), load_tokenizer("smollm2")
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    path = exported(form, model, tmp_path, tokenizer)
    check(parity(model, path, prompt=prompt, max_new_tokens=8), form)


@pytest.mark.parametrize("form", HERE)
@pytest.mark.parametrize("kind", UNSEEN)
def test_a_model_that_nobody_wrote_a_test_for(kind, form, tmp_path):
    tokenizer = tiny.byte_level()
    build, config, settings = UNSEEN[kind]
    torch.manual_seed(0)
    model = build(config(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=0,
                         **settings)).eval()  # fmt: skip
    model = convert(prepare_qat(model, scheme_for(form, W4), "absmax"))
    if (kind, form) in REFUSED:
        with pytest.raises(UnsupportedModel) as error:
            exported(form, model, tmp_path, tokenizer)
        assert ": use " in str(error.value)  # what to do instead
        assert "\n" not in str(error.value)
        assert not list(tmp_path.iterdir())
        return
    path = exported(form, model, tmp_path, tokenizer)
    prompt = tokenizer("the road of yellow bricks", return_tensors="pt").input_ids
    report = parity(model, path, prompt=prompt, max_new_tokens=6)
    assert report.integers
    assert report.scales
    assert report.divergence < NATS.get(form, 5e-3)
    assert report.logits <= LOGITS.get(form, 0.1)


def half_written(monkeypatch, form: str, error: BaseException) -> None:
    """Let the last writer of a format write a part of the file, and fail."""
    import gguf
    import onnx

    def safetensors(tensors, path, **more):
        Path(path).write_bytes(b"half")
        raise error

    def fail(*args, **more):
        raise error

    def executorch(self, file):
        file.write(b"half")
        raise error

    if form == "executorch":
        from executorch.exir import ExecutorchProgramManager

        monkeypatch.setattr(ExecutorchProgramManager, "write_to_file", executorch)
    elif form == "gguf":
        monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fail)
    elif form == "onnx":
        monkeypatch.setattr(onnx.checker, "check_model", fail)
    else:
        monkeypatch.setattr(hub, "save_file", safetensors)
        monkeypatch.setattr(compressed_tensors, "save_file", safetensors)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def stopped(monkeypatch, form: str, point: str, error: BaseException) -> None:
    """Let an export fail while it writes, while the disk takes it, or as it takes the old one's place."""

    def fail(*args, **more):
        raise error

    if point == "writing":
        half_written(monkeypatch, form, error)
    elif point == "syncing":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
        monkeypatch.setattr(Path, "rename", fail)


@pytest.mark.parametrize("form", HERE)
def test_what_fails_midway_leaves_nothing_half_written(form, tmp_path):
    tokenizer = tiny.byte_level()
    model = convert(prepare_qat(tiny.llama(tokenizer), scheme_for(form, W4), "absmax"))
    (tmp_path / "old").mkdir()
    exported(form, model, tmp_path / "old", tokenizer)
    before = contents(tmp_path)
    assert before
    full, ctrl_c = OSError("no space left"), KeyboardInterrupt()
    for point, error, folder in (  # beside an earlier export, and where there was nothing
        ("writing", full, "old"), ("writing", ctrl_c, "new"), ("syncing", full, "new"),
        ("replacing", ctrl_c, "old"),
    ):  # fmt: skip
        with pytest.MonkeyPatch.context() as patched:
            stopped(patched, form, point, error)
            with pytest.raises(type(error)):
                exported(form, model, tmp_path / folder, tokenizer)
        assert contents(tmp_path) == before, point
        assert not list((tmp_path / "new").rglob("*")), point


@pytest.mark.parametrize(
    ("path", "asked", "says"),
    [
        ("a.bin", "auto", "a.bin says no format: let its name end in .onnx or .gguf or .pte"),
        ("a", "auto", "--format companion or compressed-tensors"),
        ("a.onnx", "gguf", "does not fit the format gguf, which is a name that ends in .gguf"),
        ("a.pte", "onnx", "does not fit the format onnx, which is a name that ends in .onnx"),
        ("a.gguf", "companion", "does not fit the format companion, which is a folder"),
        ("a", "pickle", "format 'pickle' is unknown: choose auto, companion"),
    ],
)
def test_paths_and_formats_that_do_not_fit_are_refused(path, asked, says):
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        format_for(path, asked)
