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
