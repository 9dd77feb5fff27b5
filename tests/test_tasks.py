import json
import re

import pandas
import pytest
import torch
from datasets import Dataset, DatasetDict

from companion import load_task
from companion.errors import SourceUnavailable
from companion.sources import load_tokenizer
from companion.text import IGNORED


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


def test_topics_hide_the_names_and_keep_the_splits_apart():
    task = load_task("topics")
    tokenizer = load_tokenizer("sentence-transformers/all-MiniLM-L6-v2")
    rows = {part: getattr(task, part).dataset.columns for part in ("train", "validation", "test")}
    assert torch.bincount(rows["train"]["labels"]).tolist() == [20] * len(task.classes)
    assert rows["train"]["input_ids"].shape == (20 * len(task.classes), 32)
    texts = {
        part: [tokenizer.decode(ids, skip_special_tokens=True) for ids in columns["input_ids"]]
        for part, columns in rows.items()
    }
    assert not set(texts["test"]) & set(texts["train"])
    assert all(len(re.findall(r"[a-z]+", text)) >= 3 for text in texts["train"] + texts["test"])
    for text in texts["train"] + texts["test"]:
        assert not re.search(r"numpy|pandas|scipy|sklearn|torch|sympy|networkx|matplotlib|hugging",
                             text)  # fmt: skip
    again = load_task("topics").train.dataset.columns["input_ids"]
    assert torch.equal(again, rows["train"]["input_ids"])
    assert task.classes[int(rows["test"]["labels"][0])] == "matplotlib"
