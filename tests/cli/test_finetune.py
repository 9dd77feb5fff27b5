"""One call from a name to a table and models; an interrupted one goes on."""

import json

import pytest
import torch

from companion import W2, load_quantized
from companion.cli.finetune import LOG, RESULTS, finetune, report
from companion.course.sources import MINILM
from companion.errors import UnsupportedModel
from companion.study import runs


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    path = tmp_path_factory.mktemp("notes") / "notes.txt"
    path.write_text("\n\n".join(f"Note {i}: round {i} to a grid of {i} steps." for i in range(60)))
    return str(path)


def call(notes, folder):
    return finetune("docs-lm", notes, [W2], ["lsq"], folder=folder, steps=2, progress=False)


def test_it_goes_on_from_the_log_and_keeps_what_it_measured(notes, tmp_path, monkeypatch):
    table = call(notes, tmp_path)
    saved = json.loads((tmp_path / RESULTS).read_text())
    assert [run["method"] for run in saved["runs"]] == ["float", "nearest", "lsq"]
    assert saved["runs"] == table.attrs["runs"]
    model = load_quantized(tmp_path / "W2-g32-lsq")
    assert model.quantization.method == "lsq"
    assert (tmp_path / "W2-g32-lsq" / "tokenizer.json").exists()
    assert model(input_ids=torch.tensor([[1, 2]])).logits.isfinite().all()

    def refuse(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(runs.Runs, "_train", refuse)
    assert call(notes, tmp_path).equals(table)
    assert report(table.attrs["runs"]).count("\n") == 4
    (tmp_path / LOG).unlink()
    with pytest.raises(AssertionError, match="trained again"):
        call(notes, tmp_path)


def test_an_encoder_cannot_go_on_with_a_text(notes, tmp_path):
    with pytest.raises(UnsupportedModel, match="needs the tokenizer of a language model"):
        finetune(MINILM, notes, [W2], folder=tmp_path, steps=1, progress=False)
