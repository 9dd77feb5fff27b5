"""A quantized model leaves by its name, is compared with what arrived, and is opened from there."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from companion import W4, QuantScheme, convert, prepare_qat, save_quantized
from companion.cli import app as cli
from companion.cli.chat import chat
from companion.cli.stages import open_model, open_tokenizer, save_tokenizer
from companion.formats.compressed_tensors import export_compressed_tensors
from companion.formats.registry import FORMATS
from tests.cli.test_chat import talking

runner = CliRunner()
NAMES = {"companion": "again", "compressed-tensors": "vllm", "onnx": "served/m.onnx",
         "gguf": "served/m.gguf", "executorch": "served/m.pte"}  # fmt: skip
if find_spec("executorch") is None:  # there is no wheel for Macs with Intel's processors
    del NAMES["executorch"]


def run(*arguments, code: int = 0):
    result = runner.invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny chat model, its scales such as every format holds, and what was exported of it."""
    folder, (model, tokenizer) = tmp_path_factory.mktemp("cli"), talking()
    scheme = QuantScheme(4, 32, torch.bfloat16)
    q = convert(prepare_qat(model, scheme, "absmax", skip=["lm_head"]))
    save_quantized(q, folder / "w4")
    save_tokenizer(tokenizer, folder / "w4")
    for form, name in NAMES.items():
        asked = ["--format", form] if not FORMATS[form].ending else []
        said = run("export", folder / "w4", folder / name, "--accuracy-level", 0, *asked).stdout
        assert said.startswith(f"written to {folder / name}: 0.")
    (folder / "notes.txt").write_text("\n".join(["the road of yellow bricks leads to a city"] * 40))
    return folder


@pytest.mark.parametrize("form", NAMES)
def test_the_report_of_every_format(folder, form):
    lines = run("parity", folder / NAMES[form], "--reference", folder / "w4", "--prompt", "the road",
                "--max-new-tokens", 5).stdout.splitlines()  # fmt: skip
    assert lines[0].startswith(f"{folder / NAMES[form]} ({form}, {FORMATS[form].engine}) beside")
    assert lines[1].split()[:2] == ["integers", "equal"]
    assert lines[2].split()[:2] == ["scales", "equal"]
    assert any(line.startswith("divergence") for line in lines)
    assert "'the road' goes on" in lines
    assert lines[-1].startswith("The file holds the integers and scales that were trained")


def test_another_model_ends_with_exit_code_1(folder, tmp_path):
    other = convert(prepare_qat(talking()[0], W4, "mse", skip=["lm_head"]))
    save_quantized(other, tmp_path)
    save_tokenizer(talking()[1], tmp_path)
    said = run("parity", folder / NAMES["onnx"], "--reference", tmp_path, code=1).stdout
    assert "NOT equal" in said
    assert said.strip().endswith("its integers and scales are not those that were trained.")


def test_a_changed_file_ends_with_exit_code_1(folder, tmp_path):
    q = open_model(str(folder / "w4"))
    export_compressed_tensors(q, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("weight_packed"))
    tensors[name][0, 0] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    refused = run("parity", tmp_path, "--reference", folder / "w4", code=1)
    assert "their hash differs" in " ".join(refused.output.split())
    config = json.loads(
        (tmp_path / "config.json").read_text()
    )  # as others write it, without hashes
    del config["companion_sha256"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = run("parity", tmp_path, "--reference", folder / "w4", code=1).stdout
    assert "its integers are not those" in said


def test_the_metric_on_request_and_a_folder_as_its_own_reference(folder):
    said = run("parity", folder / "w4", "--task", folder / "notes.txt", "--block-size", 16).stdout
    assert "loss, served minus trained" in said
    assert "(n = " in said


def test_what_is_missing_or_does_not_fit_is_said_in_one_line(folder, tmp_path):
    for arguments, says in (
        (["parity", folder / NAMES["onnx"]], "pass --reference"),
        (["parity", tmp_path / "no.onnx", "--reference", folder / "w4"], "no.onnx"),
        (["parity", folder / "notes.txt", "--reference", folder / "w4"], "none of the formats"),
        (["export", folder / "w4", tmp_path / "a.bin"], "says no format"),
        (["export", folder / "w4", tmp_path / "a", "--format", "magic"], "'magic' is unknown"),
        (
            ["export", folder / "w4", folder / "w4", "--format", "companion"],
            "choose another folder",
        ),
    ):
        result = run(*arguments, code=1)
        (line,) = result.stderr.strip().splitlines()
        assert line.startswith(f"{arguments[0]}: ")
        assert says in line
        assert "--traceback" not in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", [form for form in NAMES if form != "companion"])
def test_what_was_exported_is_talked_to_and_measured_like_a_folder(folder, form):
    def heard(name):
        pieces: list[str] = []
        chat(str(folder / name), ["the road"], pieces.append, print, max_new_tokens=3)
        return "".join(pieces)

    answer = heard(NAMES[form])
    assert answer.strip()
    if form not in (
        "gguf",
        "executorch",
    ):  # whose inputs are rounded, which moves what this wild model says
        assert answer == heard("w4")
    losses = [float(run("evaluate", folder / name, "--task", folder / "notes.txt", "--block-size", 8)
                    .stdout.split()[1]) for name in ("w4", NAMES[form])]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    result = runner.invoke(cli.app, ["finetune", str(folder / NAMES[form])])
    assert "is quantized already" in result.stderr


def test_a_gguf_file_brings_its_tokenizer(folder):
    ours, theirs = (open_tokenizer(str(folder / name)) for name in ("w4", NAMES["gguf"]))
    text = "the road of yellow bricks"
    assert theirs(text).input_ids == ours(text).input_ids
    assert theirs.chat_template == ours.chat_template
    assert theirs.model_max_length == ours.model_max_length == 64
    model = open_model(str(folder / NAMES["gguf"]))
    found = run("bench", folder / "w4", folder / NAMES["gguf"], "--prompt", 6, "--tokens", 2,
                "--rounds", 1).stdout  # fmt: skip
    assert "prompt" in found.splitlines()[1]
    assert model.description.context == 64
