import hashlib
import pickle

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10

from companion import load_task
from companion.errors import SourceUnavailable
from companion.files import cache_folder


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
