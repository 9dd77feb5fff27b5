"""Known data sets, read from local files with the Hub's columns."""

import json

import pytest
from datasets import Dataset, DatasetDict

from companion import fit, load_pretrained, load_task
from companion.course.sources import MINILM
from companion.data.sets import KNOWN, NER, read_known
from companion.errors import SourceUnavailable
from companion.evaluation.metrics import METRICS

WORDS = ["a", "few", "plain", "words", "about", "nothing", "at", "all"]


def rows(name, number):
    """Rows as the data set's card shows them."""
    for i in range(number):
        text = f"text {i}: {' '.join(WORDS[: 2 + i % 6])}"
        yield {
            "sst2": {"idx": i, "sentence": text, "label": i % 2},
            "ag_news": {"text": text, "label": i % 4},
            "wikitext-2": {"text": text + ". " + " ".join(WORDS) * 40 if i % 2 else ""},
            "stsb": {"sentence1": text, "sentence2": text[::-1], "score": 1.0 if i % 2 else 0.2},
            "conll2003": {"id": str(i), "tokens": text.split(),
                          "ner_tags": [i % 9] * len(text.split())},
        }[name]  # fmt: skip


def write(folder, name, **sizes):
    for part, size in sizes.items():
        (folder / f"{part}.json").write_text("\n".join(json.dumps(row) for row in rows(name, size)))
    return folder


@pytest.mark.parametrize("name", KNOWN)
def test_known_data_sets_become_tasks(tmp_path, name):
    folder = write(tmp_path, name, train=120, validation=12, test=12)
    options = {"block_size": 64} if name == "wikitext-2" else {}
    task = load_task(name, folder=folder, batch_size=4, **options)
    kind = KNOWN[name].kind
    expected = {"language": "loss", "classification": "accuracy", "tagging": "span F1",
                "retrieval": "recall@1"}  # fmt: skip
    assert task.metric == expected[kind]
    if kind == "language":
        model = load_pretrained("docs-lm")
    else:
        heads = {"classification": "classification", "tagging": "tokens", "retrieval": "retrieval"}
        classes = len(task.classes) or None
        model = load_pretrained(MINILM, head=heads[kind], classes=classes)
    fit(model, task.train, steps=1, lr=1e-5, progress=False)
    measured = METRICS[task.metric].measure(model, task)
    assert measured.scores.value >= 0
    assert measured.scores.estimate().n == (6 if name in ("wikitext-2", "stsb") else 12)


def test_a_test_split_without_labels_is_not_measured_on(tmp_path):
    folder = write(tmp_path, "sst2", train=100, validation=7, test=9)
    parts = read_known("sst2", folder)
    assert [len(parts[part]) for part in ("train", "validation", "test")] == [95, 5, 7]
    assert not {text for text, _ in parts["train"]} & {text for text, _ in parts["validation"]}


def test_tags_are_names(tmp_path):
    parts = read_known("conll2003", write(tmp_path, "conll2003", train=30, validation=9, test=9))
    assert [tags[0] for _, tags in parts["test"]] == list(NER)


def test_the_hub_is_asked_for_what_the_name_stands_for(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return DatasetDict({part: Dataset.from_list(list(rows("wikitext-2", 8)))
                            for part in ("train", "validation", "test")})  # fmt: skip

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert len(read_known("wikitext-2")["test"]) == 4
    assert asked == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {})]


def test_what_cannot_be_read_says_why(tmp_path):
    with pytest.raises(SourceUnavailable, match="holds no file train"):
        read_known("sst2", tmp_path)
    write(tmp_path, "ag_news", train=40, validation=4)
    with pytest.raises(SourceUnavailable, match="no column 'sentence'"):
        read_known("sst2", tmp_path)
    with pytest.raises(SourceUnavailable, match="no split 'test'"):
        read_known("ag_news", tmp_path)
