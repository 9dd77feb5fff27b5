import json

import pandas
import pytest
import torch
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader

from companion import load_task
from companion.course.corpus import docstrings
from companion.course.sources import load_tokenizer
from companion.data.text import IGNORED
from companion.errors import SourceUnavailable
from companion.evaluation.metrics import METRICS


def test_unknown_task_names_the_known_ones():
    with pytest.raises(ValueError, match="digits-0-4, digits-5-9, cifar10"):
        load_task("mnist")


PARAGRAPHS = [f"Paragraph {i} says that {i} plus {i} is {2 * i}. " * 8 for i in range(20)]


def write_text(path):
    path.write_text("\n\n".join(PARAGRAPHS))


def write_json(path):
    path.write_text("\n".join(json.dumps({"text": text, "n": 1}) for text in PARAGRAPHS))


def write_csv(path):
    pandas.DataFrame({"text": PARAGRAPHS}).to_csv(path)


def write_parquet(path):
    pandas.DataFrame({"body": PARAGRAPHS}).to_parquet(path)


@pytest.mark.parametrize(
    ("name", "write", "options"),
    [
        ("a.txt", write_text, {}),
        ("a.json", write_json, {}),
        ("a.jsonl", write_json, {}),
        ("a.csv", write_csv, {}),
        ("a.parquet", write_parquet, {"text_column": "body"}),
    ],
)
def test_local_files_become_language_tasks(tmp_path, name, write, options):
    write(tmp_path / name)
    task = load_task(str(tmp_path / name), block_size=32, batch_size=2, **options)
    batch = next(iter(task.train))
    assert batch["input_ids"].shape == (2, 32)
    assert torch.equal(batch["input_ids"], batch["labels"])
    tokenizer = load_tokenizer()
    for loader, n in ((task.validation, 2), (task.test, 2)):
        rows = loader.dataset.columns
        assert len(rows["document"].unique()) == n
        first = rows["labels"][rows["document"] == 0]
        text = tokenizer.decode(first[first != IGNORED])
        assert any(text.split() == paragraph.split() for paragraph in PARAGRAPHS)


def test_a_hub_data_set_keeps_its_own_splits(monkeypatch):
    splits = {
        part: Dataset.from_dict({"text": [f"{part} {text}" for text in PARAGRAPHS]})
        for part in ("train", "validation", "test")
    }
    asked = []

    def load_dataset(name, config):
        asked.append((name, config))
        return DatasetDict(splits)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    task = load_task("owner/name", config="small", block_size=16)
    assert asked == [("owner/name", "small")]
    assert len(task.test.dataset.columns["document"].unique()) == 20


def test_data_that_cannot_be_used_says_why(tmp_path):
    write_json(tmp_path / "a.json")
    with pytest.raises(ValueError, match="text_column, one of text, n"):
        load_task(str(tmp_path / "a.json"), text_column="body")
    (tmp_path / "short.txt").write_text("One.\n\nTwo.")
    with pytest.raises(SourceUnavailable, match="fewer than 10"):
        load_task(str(tmp_path / "short.txt"))
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(ValueError, match=r"must end in \.txt"):
        load_task(str(tmp_path / "a.pdf"))
    with pytest.raises(SourceUnavailable, match="nobody/nothing could not be read"):
        load_task("nobody/nothing")


def test_language_tasks_use_the_text_they_name():
    task = load_task("docstrings", documents=30, progress=False)
    assert len(task.test.dataset.columns["document"].unique()) == 30
    assert "torch" in task.source
    reference = load_task("language-reference", block_size=128, batch_size=3)
    assert next(iter(reference.train))["input_ids"].shape == (3, 128)
    assert task.classes == reference.classes == ()


def test_tasks_on_text_say_what_they_measure():
    metrics = {"topics": "accuracy", "code-words": "span F1", "summaries": "recall@1",
               "cloze": "right choices", "language-reference": "loss"}  # fmt: skip
    for name, metric in metrics.items():
        task = load_task(name)
        assert (task.name, task.metric) == (name, metric)
        assert metric in METRICS
        assert "python" in task.source.lower() or "torch" in task.source


def test_topics_are_padded_alike_and_drawn_as_they_always_were():
    task = load_task("topics")
    torch.manual_seed(0)
    labels = torch.cat([batch["labels"] for batch in task.train])
    torch.manual_seed(0)
    rows = [row["labels"] for row in task.train.dataset]
    plain = torch.cat(list(DataLoader(rows, 16, shuffle=True)))
    assert torch.equal(labels, plain)
    assert {batch["input_ids"].shape[1] for batch in task.train} == {32}
    assert task.classes[int(next(iter(task.test))["labels"][0])] == "matplotlib"


def test_cloze_trains_on_what_docs_lm_has_read():
    task = load_task("cloze", questions=5)
    assert len(next(iter(task.test))["labels"]) == 20
    tokenizer, read = load_tokenizer(), docstrings(progress=False).train
    text = tokenizer.decode(task.train.dataset[0]["input_ids"])
    assert any(document[:60] in text for document in read[::9])


@pytest.fixture
def reviews(tmp_path):
    """A file that could be read in two ways."""
    rows = [{"text": f"It is {('bad', 'good')[i % 2]}. {text}", "label": ("bad", "good")[i % 2]}
            for i, text in enumerate(PARAGRAPHS * 2)]  # fmt: skip
    path = tmp_path / "reviews.csv"
    pandas.DataFrame(rows).to_csv(path, index=False)
    return str(path)


def test_texts_with_labels_become_a_classification(reviews):
    task = load_task(reviews, batch_size=4, model="docs-lm")
    assert (task.metric, task.classes) == ("accuracy", ("bad", "good"))
    batch, tokenizer = next(iter(task.train)), load_tokenizer()
    assert batch["labels"].shape == (4,)
    for ids, label in zip(batch["input_ids"], batch["labels"], strict=True):
        assert tokenizer.decode(ids).count(task.classes[label]) == 1
    assert load_task(reviews).train.dataset[0]["input_ids"][0] == 101  # MiniLM's by default
    assert next(iter(load_task(reviews, max_length=7).test))["input_ids"].shape[1] == 7


def test_what_a_file_is_can_be_asked_for(reviews):
    plain = load_task(reviews, kind="language", block_size=16)
    assert (plain.metric, plain.classes) == ("loss", ())
    renamed = pandas.read_csv(reviews).rename(columns={"text": "body", "label": "mood"})
    renamed.assign(prompt="a", completion="b").to_csv(reviews, index=False)
    asked = {"text_column": "body", "label_column": "mood"}
    assert load_task(reviews, **asked).classes == ("bad", "good")
    assert load_task(reviews, text_column="body", block_size=16).metric == "loss"
    answers = load_task(reviews).train.dataset[0]["labels"]
    assert sum(label != IGNORED for label in answers) == 2  # "b", and the end of the turn
    for options, remedy in (
        ({"kind": "poem"}, "kind 'poem' is unknown: choose one of language, chat, classification"),
        ({"kind": "chat", "text_column": "body"}, "has no option 'text_column'"),
        (
            {"kind": "language", "text_column": "body", "label_column": "mood"},
            "no option 'label_column'",
        ),
        ({"kind": "chat", "block_size": 8}, "has no option 'block_size'"),
        ({"label_column": "no"}, "no column 'text'"),
    ):
        with pytest.raises(ValueError, match=remedy):
            load_task(reviews, **options)


def test_a_model_names_its_tokenizer():
    task = load_task("topics", model="docs-lm")
    text = load_tokenizer("docs-lm").decode(task.test.dataset[0]["input_ids"])
    assert "library" in text or "matplotlib" not in text
    assert task.test.dataset[0]["input_ids"] != load_task("topics").test.dataset[0]["input_ids"]
    with pytest.raises(ValueError, match="give one of them"):
        load_task("topics", model="docs-lm", tokenizer=load_tokenizer())
    with pytest.raises(ValueError, match="has no option 'model'"):
        load_task("digits-5-9", model="docs-lm")


@pytest.mark.parametrize("name", ["docstring-summaries", "docstring-json"])
def test_chats_of_docstrings_are_tasks(name):
    task = load_task(name, examples=20)
    assert (task.metric, task.name) == ("loss", name)
    assert "torch" in task.source
    assert len(task.train.dataset) == 20
    assert len(task.test.dataset) >= 300
    assert max(len(row["input_ids"]) for row in task.test.dataset) <= 1024
