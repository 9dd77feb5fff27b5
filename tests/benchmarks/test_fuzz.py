"""A short fuzz of the readers that answer in milliseconds; all of them: python -m benchmarks.fuzz."""

import gguf
import pytest

from benchmarks import fuzz

QUICK = {"saved folder, model given": 40, "packed tensors": 40, "gguf": 10, "onnx, read": 40,
         "checkpoint": 5, "results log": 20, "chat.jsonl": 25, "texts and labels": 20}  # fmt: skip


def test_two_hundred_mutations_meet_no_fault(tmp_path):
    faults = []
    for name, inputs in QUICK.items():
        base = tmp_path / name
        base.mkdir()
        fuzz.READERS[name].build(base)
        rng = fuzz.random.Random(0)
        wanted = fuzz.digest(fuzz.READERS[name].load(base, rng))
        found = [fuzz.one(name, number, base, wanted) for number in range(inputs)]
        faults += [(name, line) for line in found if line["outcome"] not in fuzz.GOOD]
        assert any(line["outcome"] == "refused" for line in found), name
    assert sum(QUICK.values()) == 200
    assert not faults


def test_a_silent_wrong_load_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("companion.formats.gguf.is_sealed", lambda path: None)
    fuzz.READERS["gguf"].build(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "model.gguf").rename(tmp_path / "base" / "model.gguf")
    wanted = fuzz.digest(fuzz.read_gguf(tmp_path / "base", fuzz.random.Random(0)))
    tensors = gguf.GGUFReader(tmp_path / "base" / "model.gguf").tensors
    (matrix,) = (tensor for tensor in tensors if tensor.name == "output.weight")

    def flipped(data: bytes, rng, *_) -> tuple[bytes, str]:
        """One bit of the matrix that is stored last."""
        place = rng.randrange(matrix.data_offset, matrix.data_offset + matrix.n_bytes)
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :], "flip"

    monkeypatch.setattr(fuzz, "mutate", flipped)
    found = [fuzz.one("gguf", number, tmp_path / "base", wanted)["outcome"] for number in range(8)]
    assert set(found) == {"silent", "other"}


@pytest.mark.parametrize("name", ["a.json", "a.safetensors", "a.gguf", "a.txt"])
def test_mutations_are_those_of_the_seed(name):
    data = b'\x18\x00\x00\x00\x00\x00\x00\x00{"a": {"b": [1, "x"]}}   ' if "safe" in name else (
        b'{"a": {"b": [1, "x"]}, "c": null, "d": "e"}')  # fmt: skip
    first, second = (
        [fuzz.mutate(data, fuzz.random.Random(i), name) for i in range(50)] for _ in "ab"
    )
    assert first == second
    assert len({changed for changed, _ in first}) > 20
