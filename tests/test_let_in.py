"""Nothing is let in: no code in a file is run, no path leads out of a folder, no network is asked."""

import json
import os
import pickle
import socket
import time
import zipfile
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import nn

from companion import W4, convert, load_pretrained, load_quantized, prepare_qat, save_quantized
from companion.data.chat import render
from companion.data.sets import read_tables
from companion.errors import CheckpointError, DamagedFile, SourceUnavailable, UnsupportedModel
from companion.formats.compressed_tensors import (
    export_compressed_tensors,
    hashes_of,
    open_compressed_tensors,
    read_compressed_tensors,
)
from companion.formats.gguf import read_gguf
from companion.formats.hub import _hash
from companion.formats.llama_cpp import LlamaCppModel
from companion.formats.onnx.model import OnnxModel
from companion.formats.onnx.stored import read_onnx
from companion.qat.lora import lora_qat
from companion.study.runs import Log
from companion.training.checkpoint import read_checkpoint
from companion.training.teacher import Answers
from tests.tiny import byte_level, llama, saved

REFUSED = (DamagedFile, CheckpointError, SourceUnavailable, UnsupportedModel, ValueError)


class Mark:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.fixture
def mark(tmp_path) -> Path:
    return tmp_path / "it was run"


@pytest.fixture
def poison(mark) -> bytes:
    data = pickle.dumps(Mark(mark))
    pickle.loads(data)
    assert mark.exists()  # the file does harm where somebody opens it
    mark.rmdir()
    return data


def torch_file(path: Path, mark: Path) -> None:
    """As torch.save writes it, with the pickle inside of an archive."""
    torch.save({"lm_head.weight": Mark(mark)}, path)
    assert zipfile.is_zipfile(path)


READERS = {
    "model.safetensors": lambda path: load_quantized(path.parent),
    "model.gguf": lambda path: LlamaCppModel(path),
    "other.gguf": lambda path: read_gguf(path, llama(byte_level())),
    "model.onnx": lambda path: OnnxModel(path),
    "other.onnx": lambda path: read_onnx(path, nn.Identity()),
    "checkpoint.safetensors": read_checkpoint,
    "00000.safetensors": lambda path: Answers(path.parent),
    "log.json": lambda path: Log(path),
    "texts.txt": lambda path: read_tables(str(path)),
    "texts.jsonl": lambda path: read_tables(str(path)),
    "texts.csv": lambda path: read_tables(str(path)),
    "texts.parquet": lambda path: read_tables(str(path)),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["pickle", "torch.save"])
def test_a_pickle_is_refused_and_not_run(name, kind, tmp_path, poison, mark):
    folder = tmp_path / "given"
    folder.mkdir()
    if name == "model.safetensors":
        save_quantized(convert(prepare_qat(llama(byte_level()), W4, "absmax")), folder)
    path = folder / name
    path.write_bytes(poison) if kind == "pickle" else torch_file(path, mark)
    if name == "model.safetensors":
        fit_hashes(folder)
    with pytest.raises(REFUSED):
        READERS[name](path)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin", "model.pt"])
def test_pickles_beside_or_instead_of_weights_are_not_looked_at(name, tmp_path, mark):
    tokenizer = byte_level()
    folder = Path(saved(tmp_path / "given", llama(tokenizer), tokenizer))
    (folder / "model.safetensors").unlink()
    torch_file(folder / name, mark)
    with pytest.raises(SourceUnavailable):
        load_pretrained(str(folder))
    assert not mark.exists()


def test_a_pickled_adapter_is_not_run(tmp_path, mark):
    model = llama(byte_level())
    adapted = lora_qat(model, W4, 2)
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch_file(tmp_path / "adapter" / "adapter_model.bin", mark)
    with pytest.raises(SourceUnavailable, match="holds no adapter_model"):
        lora_qat(model, W4, tmp_path / "adapter")
    assert not mark.exists()


def test_a_saved_folder_that_lists_a_pickle_is_refused(tmp_path, mark):
    folder = save_quantized(
        convert(prepare_qat(llama(byte_level()), W4, "absmax")), tmp_path / "given"
    )
    (folder / "model.safetensors").unlink()
    torch_file(folder / "pytorch_model.bin", mark)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["sha256"] = {"pytorch_model.bin": ""}
    (folder / "config.json").write_text(json.dumps(config))
    fit_hashes(folder)
    with pytest.raises(DamagedFile):
        load_quantized(folder)
    assert not mark.exists()


def fit_hashes(folder: Path) -> None:
    """Make the hashes of a folder fit what lies there, as someone would who means harm."""
    from companion.files import sha256

    config = json.loads((folder / "config.json").read_text())
    told = config["quantization_config"]
    told["sha256"] = {name: sha256(folder / name) for name in told["sha256"]
                      if (folder / name).is_file()}  # fmt: skip
    told.pop("config_sha256")
    told["config_sha256"] = _hash(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_no_network_in_tests():
    with pytest.raises(OSError, match="without a network"):
        socket.create_connection(("127.0.0.1", 9))


CODE = "import os\nos.mkdir({mark!r})\nfrom transformers import LlamaForCausalLM as Ours, LlamaConfig as OurConfig\n"
"""What a repository with code of its own brings along."""


def with_code(folder: Path, mark: Path) -> None:
    """Ask in every settings file for code that lies beside it."""
    (folder / "ours.py").write_text(CODE.format(mark=str(mark)))
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        path = folder / name
        if path.exists():
            config = json.loads(path.read_text())
            config["auto_map"] = {"AutoConfig": "ours.OurConfig", "AutoModelForCausalLM": "ours.Ours",
                                  "AutoTokenizer": ["ours.Ours", "ours.Ours"]}  # fmt: skip
            path.write_text(json.dumps(config))


@pytest.mark.parametrize("known", [True, False])
def test_code_that_comes_with_a_model_is_not_run(known, tmp_path, mark, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever is asked says yes
    tokenizer = byte_level()
    folder = Path(saved(tmp_path / "given", llama(tokenizer), tokenizer))
    with_code(folder, mark)
    if not known:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "never-heard-of"}))
        with pytest.raises(UnsupportedModel, match="code"):
            load_pretrained(str(folder))
    else:  # transformers knows the class itself, and takes its own
        assert type(load_pretrained(str(folder))).__module__.startswith("transformers.")
    assert not mark.exists()


def test_code_that_comes_with_a_saved_folder_is_not_run(tmp_path, mark, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    model = convert(prepare_qat(llama(byte_level()), W4, "absmax"))
    folder = save_quantized(model, tmp_path / "given")
    with_code(folder, mark)
    fit_hashes(folder)
    with pytest.raises(UnsupportedModel, match="code"):
        load_quantized(folder)
    other = export_compressed_tensors(model, tmp_path / "other")
    with_code(other, mark)
    config = json.loads((other / "config.json").read_text())
    config["companion_sha256"] = hashes_of(other, config)
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="code"):
        open_compressed_tensors(other)
    assert not mark.exists()


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors", ".."]
)
def test_names_that_lead_out_of_a_folder_are_refused(name, tmp_path):
    folder = save_quantized(
        convert(prepare_qat(llama(byte_level()), W4, "absmax")), tmp_path / "given"
    )
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    config = json.loads((folder / "config.json").read_text())
    told = config["quantization_config"]
    told["sha256"] = {name: told["sha256"]["model.safetensors"]}
    told.pop("config_sha256")
    told["config_sha256"] = _hash(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DamagedFile, match="was not written by"):
        load_quantized(folder)


@pytest.mark.parametrize("load", [load_quantized, tf.AutoModelForCausalLM.from_pretrained])
def test_an_index_that_names_files_elsewhere_is_refused(load, tmp_path):
    model = convert(prepare_qat(llama(byte_level()), W4, "absmax"))
    folder = save_quantized(model, tmp_path / "given", max_shard_size="4KB")
    other = save_quantized(model, tmp_path / "other", max_shard_size="4KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {
        key: f"../{other.name}/{file}" for key, file in index["weight_map"].items()
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    fit_hashes(folder)
    with pytest.raises((DamagedFile, OSError)):
        load(folder)


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/stdin", "."])
def test_a_link_to_what_is_no_file_is_refused(target, tmp_path):
    folder = save_quantized(
        convert(prepare_qat(llama(byte_level()), W4, "absmax")), tmp_path / "given"
    )
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(target)
    with pytest.raises(DamagedFile, match="missing"):
        load_quantized(folder)
    for name, read in (("a.onnx", OnnxModel), ("a.gguf", LlamaCppModel)):
        (tmp_path / name).symlink_to(target)
        with pytest.raises(DamagedFile, match="missing"):
            read(tmp_path / name)


def test_an_onnx_file_reads_no_tensors_from_elsewhere(tmp_path):
    import onnx
    from onnx.external_data_helper import set_external_data

    from companion import export_onnx

    (tmp_path / "in").mkdir()
    q = convert(prepare_qat(nn.Sequential(nn.Linear(64, 8)), W4))
    path = export_onnx(q, tmp_path / "in" / "model.onnx", example=torch.ones(1, 64))
    (tmp_path / "secret").write_bytes(b"s" * 4096)
    model = onnx.load(path)
    tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    set_external_data(tensor, "../secret", 0, len(tensor.raw_data))
    tensor.ClearField("raw_data")
    del model.metadata_props[:]  # and the seal with it
    model.metadata_props.add(key="companion", value="{}")
    path.write_bytes(model.SerializeToString())
    for read in (OnnxModel, lambda path: read_onnx(path, q)):
        with pytest.raises(DamagedFile):
            read(path)


HOSTILE = {
    "globals": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "function": "{{ raise_exception.__globals__['__builtins__']['__import__']('os').mkdir(MARK) }}",
    "method": "{{ messages.append.__self__.__class__.__base__.__subclasses__()[0] }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "import": "{% import 'os' as os %}{{ os.mkdir(MARK) }}",
    "include": "{% include '/etc/passwd' %}",
    "change": "{{ messages.append({'role': 'system', 'content': 'obey'}) }}",
    "loop": "{% for i in range(10 ** 9) %}{{ i }}{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_chat_template_reaches_nothing(name, mark):
    tokenizer = byte_level()
    tokenizer.chat_template = HOSTILE[name].replace("MARK", repr(str(mark)))
    messages = [{"role": "user", "content": "who are you"}]
    started = time.monotonic()
    with pytest.raises(UnsupportedModel, match="chat template"):
        render(messages, tokenizer)
    assert time.monotonic() - started < 10
    assert not mark.exists()
    assert messages == [{"role": "user", "content": "who are you"}]


def test_read_compressed_tensors_takes_what_was_written(tmp_path):
    model = convert(prepare_qat(llama(byte_level()), W4, "absmax"))
    folder = export_compressed_tensors(model, tmp_path / "a")
    assert read_compressed_tensors(folder, model)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    for read in (lambda f: read_compressed_tensors(f, model), open_compressed_tensors):
        with pytest.raises(DamagedFile, match="hash differs"):
            read(folder)
