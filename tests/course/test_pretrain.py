import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from companion import load_pretrained, load_task
from companion.cli import app as cli
from companion.course import pretrain, tasks
from companion.course.corpus import Corpus, docstrings
from companion.course.sources import find
from companion.errors import CheckpointError, NonFiniteLoss


@pytest.fixture(scope="module")
def little() -> Corpus:
    whole = docstrings(["networkx"], progress=False)
    return Corpus(whole.train[:200], whole.validation[:8], whole.test[:8], whole.versions)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(pretrain, "SHAPE", pretrain.SHAPE | {"num_hidden_layers": 1})


def test_writes_a_model_that_loads_and_says_how_it_was_made(little, tmp_path):
    report = pretrain.pretrain(tmp_path, steps=3, batch_size=2, corpus=little)
    again = load_pretrained(str(tmp_path))
    assert again.num_parameters() == report["parameters"]
    saved = json.loads((tmp_path / "training.json").read_text())
    assert saved["corpus_sha256"] == little.sha256
    assert [step for step, _ in saved["validation"]] == [0, 1, 2, 3]
    assert saved["tokens_seen"] == 3 * 2 * 256
    card = (tmp_path / "README.md").read_text()
    for what in (little.sha256, "Kneser-Ney", "perplexity", "licen", f"{report['steps']} steps"):
        assert what in card
    assert not (tmp_path / "run").exists()


def test_interrupted_it_goes_on_and_ends_at_the_same_weights(little, tmp_path, monkeypatch):
    real = pretrain.fit

    def train(folder, **changed):
        """Twelve steps, with checkpoints a fifth of them apart."""
        monkeypatch.setattr(pretrain, "fit", lambda *a, **k: real(*a, **{**k, **changed}))
        return pretrain.pretrain(tmp_path / folder, steps=12, batch_size=1, corpus=little)

    whole = train("whole", checkpoint_every=5)
    with pytest.raises(NonFiniteLoss):
        train("cut", checkpoint_every=5, schedule=Stop())
    assert (tmp_path / "cut" / "run").exists()
    again = train("cut", checkpoint_every=5, schedule=Stop(2))
    assert again["test_perplexity"] == whole["test_perplexity"]
    first, second = (load_file(tmp_path / d / "model.safetensors") for d in ("whole", "cut"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_folder_with_other_content_is_left_alone(little, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="did not write: choose another folder"):
        pretrain.pretrain(tmp_path, steps=1, corpus=little)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


class Stop:
    """The schedule of pre-training under a name of its own, failing late if told to."""

    def __init__(self, limit: float = 0.9) -> None:
        self.limit = limit

    def __call__(self, progress: float) -> float:
        if progress > self.limit:
            raise NonFiniteLoss("stopped")
        return pretrain.warmup_cosine(progress)


def test_shipped_model_beats_the_trigram_on_the_same_tokens():
    folder, _ = find("docs-lm")
    report = json.loads(Path(folder, "training.json").read_text())
    test, trigram = report["test_perplexity"], report["trigram_perplexity"]
    assert test["n"] == trigram["n"] > 1000
    assert test["high"] < trigram["low"]


def test_shipped_model_was_trained_on_the_text_of_this_machine():
    """The pinned packages give the corpus that the model card names."""
    folder, _ = find("docs-lm")
    report = json.loads(Path(folder, "training.json").read_text())
    assert docstrings(progress=False).sha256 == report["corpus_sha256"]


def test_other_text_is_announced(little, monkeypatch):
    monkeypatch.setattr(tasks, "docstrings", lambda progress: little)
    with pytest.warns(UserWarning, match="not those that docs-lm was pre-trained on"):
        load_task("docstrings", documents=5, block_size=32)


def test_command_reports_errors_in_one_line(monkeypatch, tmp_path):
    def fails(*args, **kwargs):
        raise ValueError("nothing to read")

    monkeypatch.setattr(pretrain, "pretrain", fails)
    result = CliRunner().invoke(cli.app, ["pretrain", str(tmp_path)])
    assert result.exit_code == 1
    assert result.output == "pretrain: nothing to read\n"
    assert "--bfloat16" in CliRunner().invoke(cli.app, ["pretrain", "--help"]).output
