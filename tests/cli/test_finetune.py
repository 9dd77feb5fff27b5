"""One call from a name to a table and models; an interrupted one goes on."""

import json

import pytest
import torch

from companion import W2, W4, load_quantized
from companion.cli.finetune import LOG, RESULTS, finetune, report
from companion.course.sources import MINILM
from companion.errors import CheckpointError, UnsupportedModel
from companion.study import runs
from tests import tiny


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    path = tmp_path_factory.mktemp("notes") / "notes.txt"
    path.write_text("\n".join(tiny.TEXTS * 2))
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    tokenizer = tiny.byte_level()
    return tiny.saved(tmp_path_factory.mktemp("model"), tiny.gpt2(tokenizer, context=24), tokenizer)


def call(model, notes, folder, schemes=(W2,), methods=("lsq",), **options):
    return finetune(model, notes, schemes, methods, folder=folder, **{"steps": 2, **options},
                    progress=False)  # fmt: skip


def contents(folder) -> dict:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_it_goes_on_from_the_log_and_keeps_what_it_measured(model, notes, tmp_path, monkeypatch):
    table = call(model, notes, tmp_path)
    saved = json.loads((tmp_path / RESULTS).read_text())
    assert [run["method"] for run in saved["runs"]] == ["float", "nearest", "lsq"]
    assert saved["runs"] == table.attrs["runs"]
    kept = load_quantized(tmp_path / "W2-g32-lsq")
    assert kept.quantization.method == "lsq"
    assert (tmp_path / "W2-g32-lsq" / "tokenizer.json").exists()
    assert kept(input_ids=torch.tensor([[1, 2]])).logits.isfinite().all()

    def refuse(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(runs.Runs, "_train", refuse)
    assert call(model, notes, tmp_path).equals(table)
    assert report(table.attrs["runs"]).count("\n") == 4
    (tmp_path / LOG).unlink()
    with pytest.raises(AssertionError, match="trained again"):
        call(model, notes, tmp_path)


def test_blocks_follow_the_context_of_the_model(model, notes, tmp_path):
    """The tokenizer takes 64 tokens, the model 24, and blocks have 256 where they may."""
    call(model, notes, tmp_path / "out", steps=1)
    config = json.loads((tmp_path / "out" / "W2-g32-lsq" / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == 24
    with pytest.raises(ValueError, match="blocks of 25 tokens do not fit a model that takes 24"):
        call(model, notes, tmp_path / "other", block_size=25)
    assert not (tmp_path / "other").exists()


def test_schemes_and_methods_may_be_added_to_a_folder(model, notes, tmp_path):
    call(model, notes, tmp_path, steps=1)
    call(model, notes, tmp_path, (W2, W4), ("lsq", "absmax"), steps=1)
    models = {path.parent.name for path in tmp_path.glob("*/config.json")}
    assert models == {f"{scheme}-g32-{method}" for scheme in ("W2", "W4")
                      for method in ("nearest", "lsq", "absmax")}  # fmt: skip


@pytest.mark.parametrize(
    "others",
    [["config.json", "tokenizer.json"], ["W2-g32-lsq/config.json"], ["results.json"], ["log.json"],
     ["notes/a.txt"]],
)  # fmt: skip
def test_a_folder_with_other_content_is_left_alone(model, notes, tmp_path, others):
    for name in others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"mine": true}')
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="did not write: choose another folder"):
        call(model, notes, tmp_path)
    assert contents(tmp_path) == before


def test_a_file_in_the_place_of_the_folder_is_named(model, notes):
    with pytest.raises(CheckpointError, match="is a file: choose another folder"):
        call(model, notes, notes)


def test_a_folder_of_an_earlier_call_takes_only_what_belongs_to_it(model, notes, tmp_path):
    call(model, notes, tmp_path, steps=1)
    other = tmp_path / "W4-g32-lsq"
    other.mkdir()
    (other / "tokenizer.json").write_text("{}")
    mine = tmp_path / "my model"
    mine.mkdir()
    (mine / "config.json").write_text("{}")
    before = contents(tmp_path)
    for options, reason in (
        ({"steps": 2}, "with steps 1, not 2"),
        ({"rates": [0.5]}, r"with rates \[0.001\], not \[0.5\]"),
        ({"embeddings": True}, "with embeddings False, not True"),
        ({"block_size": 8}, "with block_size None, not 8"),
        ({"schemes": (W4,)}, "W4-g32-lsq was not written by finetune"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            call(model, notes, tmp_path, **{"steps": 1, **options})
    assert contents(tmp_path) == before
    call(model, notes, tmp_path, methods=("lsq", "absmax"), steps=1)
    assert contents(mine) == {"config.json": b"{}"}


def test_embeddings_are_rounded_on_request(model, notes, tmp_path):
    plain, rounded = (
        call(model, notes, tmp_path / str(e), embeddings=e, steps=1) for e in (False, True)
    )
    sizes = [table.loc[("W2 g32", "lsq"), "bytes"] for table in (plain, rounded)]
    assert sizes[1] < 0.5 * sizes[0]
    assert "transformer.wte" in load_quantized(tmp_path / "True" / "W2-g32-lsq").quantization.layers
    for methods, reason in ((("gptq",), "no rule for embeddings"), (("magic",), "is unknown")):
        with pytest.raises(ValueError, match=reason):
            call(model, notes, tmp_path / "no", methods=methods, embeddings=True)
    assert not (tmp_path / "no").exists()


def test_what_cannot_be_quantized_is_found_before_anything_is_written(notes, tmp_path):
    tokenizer = tiny.byte_level()
    odd = tiny.gpt2(tokenizer)
    odd.config.n_inner = 40
    folder = tiny.saved(tmp_path / "odd", type(odd)(odd.config), tokenizer)
    with pytest.raises(ValueError, match=r"40|group"):
        call(folder, notes, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_encoder_cannot_go_on_with_a_text(notes, tmp_path):
    with pytest.raises(UnsupportedModel, match="needs the tokenizer of a language model"):
        finetune(MINILM, notes, [W2], folder=tmp_path, steps=1, progress=False)
