import hashlib
import json
import pickle

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset, DatasetDict
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10

from companion import load_task
from companion.errors import SourceUnavailable
from companion.files import cache_folder
from companion.sources import load_tokenizer
from companion.text import IGNORED


def content(loader):
    data = loader.dataset
    images = torch.stack([data[i][0] for i in range(len(data))])
    return images, np.array([int(data[i][1]) for i in range(len(data))])


@pytest.mark.parametrize(
    ("name", "sizes"), [("digits-0-4", (601, 100, 200)), ("digits-5-9", (100, 100, 596))]
)
def test_splits_are_fixed_and_share_no_image(name, sizes):
    task = load_task(name)
    parts = [content(loader)[0] for loader in (task.train, task.validation, task.test)]
    assert tuple(map(len, parts)) == sizes
    seen = [{image.numpy().tobytes() for image in part} for part in parts]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]
    again = content(load_task(name).test)[0]
    assert torch.equal(parts[2], again)


def test_the_two_digit_tasks_share_no_class():
    lower, upper = load_task("digits-0-4"), load_task("digits-5-9")
    assert lower.classes == ("0", "1", "2", "3", "4")
    assert upper.classes == ("5", "6", "7", "8", "9")


def test_labels_belong_to_their_images():
    scans = load_digits()
    truth = {(scan / 8 - 1).astype(np.float32).tobytes(): digit
             for scan, digit in zip(scans.images, scans.target, strict=True)}  # fmt: skip
    task = load_task("digits-5-9")
    images, labels = content(task.test)
    small = torch.nn.functional.interpolate(images[:, :1], size=(8, 8), mode="area")
    nearest = {key: np.frombuffer(key, np.float32).reshape(8, 8) for key in truth}
    for image, label in list(zip(small[:, 0].numpy(), labels, strict=True))[:40]:
        key = min(nearest, key=lambda k: np.abs(nearest[k] - image).sum())
        assert int(task.classes[label]) == truth[key]


def test_few_labels_are_balanced_and_more_can_be_had():
    _, labels = content(load_task("digits-5-9").train)
    assert np.bincount(labels).tolist() == [20] * 5
    _, labels = content(load_task("digits-5-9", labels_per_class=3).train)
    assert np.bincount(labels).tolist() == [3] * 5
    everything = load_task("digits-5-9", labels_per_class=None)
    assert len(everything.train.dataset) == 200
    assert torch.equal(content(everything.test)[0], content(load_task("digits-5-9").test)[0])


def test_images_have_the_form_resnet_expects():
    images, _ = next(iter(load_task("digits-0-4", batch_size=4).train))
    assert images.shape == (4, 3, 32, 32)
    assert -1 <= images.min() < images.max() <= 1
    assert torch.equal(images[:, 0], images[:, 2])


def test_unknown_task_names_the_known_ones():
    with pytest.raises(ValueError, match="digits-0-4, digits-5-9, cifar10"):
        load_task("mnist")


def test_cifar10_without_a_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(SourceUnavailable, match="digits-5-9"):
        load_task("cifar10")


def test_cifar10_reads_the_real_format(tmp_path, monkeypatch):
    """A small archive in CIFAR-10's own layout goes through torchvision's own reader."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    folder = cache_folder() / CIFAR10.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        entry = {"data": rng.integers(0, 256, (210, 3072), dtype=np.uint8), "labels": [3] * 210}
        (folder / name).write_bytes(pickle.dumps(entry))
    names = [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]
    meta = pickle.dumps({"label_names": names})
    (folder / CIFAR10.meta["filename"]).write_bytes(meta)
    monkeypatch.setitem(CIFAR10.meta, "md5", hashlib.md5(meta).hexdigest())
    task = load_task("cifar10", batch_size=5)
    images, labels = next(iter(task.train))
    assert images.shape == (5, 3, 32, 32)
    assert task.classes[int(labels[0])] == "cat"
    assert [len(part.dataset) for part in (task.train, task.validation, task.test)] == [
        50,
        1000,
        210,
    ]


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
