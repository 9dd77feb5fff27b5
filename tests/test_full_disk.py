"""A full disk and a read-only folder: one line, and the previous file is as it was.

The full disk is RLIMIT_FSIZE (a file that would grow beyond it is refused by the
kernel, as on a full disk, wherever in the file the limit falls). A folder that cannot be written to is one
whose place is taken by a file, since tests may run as root, whom no permission stops.
"""

import resource
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from companion import W2, W4, compare, convert, export_onnx, fit, fit_blocks, prepare_qat
from companion import save_quantized as save
from companion.data.task import Task
from companion.formats.compressed_tensors import export_compressed_tensors
from companion.formats.gguf import export_gguf
from companion.training.teacher import store_teacher
from tests.tiny import byte_level, llama


def converted() -> nn.Module:
    return convert(prepare_qat(llama(byte_level()), W4, "absmax"))


def toy() -> tuple[nn.Module, list]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(2)))
    return model, [(torch.randn(8, 32), torch.arange(8))]


def write_fit(folder: Path) -> None:
    model, batches = toy()
    fit(prepare_qat(model, W2), batches, steps=4, checkpoint_dir=folder, checkpoint_every=2,
        resume=True, progress=False)  # fmt: skip


def write_blocks(folder: Path) -> None:
    model, batches = toy()
    fit_blocks(prepare_qat(model, W2), batches, teacher=model, steps=2, checkpoint_dir=folder,
               resume=True, progress=False)  # fmt: skip


def write_log(folder: Path) -> None:
    model, batches = toy()
    task = Task("toy", batches, batches, batches, classes=tuple("abcdefgh"), source="")
    compare(model, task, [W2], ["absmax"], steps=1, seeds=1, rates=[1e-3], progress=False,
            log=folder / "log.json", models=folder / "models")  # fmt: skip


def write_answers(folder: Path) -> None:
    model = llama(byte_level())
    ids = torch.arange(3, 35)[None]
    store_teacher(model, [{"input_ids": ids, "labels": ids}], folder, progress=False)


WRITERS = {
    "save_quantized": lambda folder: save(converted(), folder),
    "save_quantized, several files": lambda folder: save(converted(), folder, max_shard_size="4KB"),
    "compressed-tensors": lambda folder: export_compressed_tensors(converted(), folder),
    "gguf": lambda folder: export_gguf(converted(), folder / "model.gguf"),
    "onnx": lambda folder: export_onnx(
        convert(prepare_qat(toy()[0], W4)), folder / "model.onnx", example=torch.ones(1, 32)
    ),
    "fit": write_fit,
    "fit_blocks": write_blocks,
    "compare": write_log,
    "store_teacher": write_answers,
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def said_of(task, most: int | None = None) -> tuple[str, str] | None:
    """Kind and text of the error, with at most so many bytes in a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        if most is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
        task()
    except Exception as error:
        return type(error).__name__, str(error).strip()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    return None


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_full_disk_is_one_line_and_the_previous_file_stays(name, share, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine.txt").write_text("of somebody else")
    trial = tmp_path / "trial"
    trial.mkdir()
    assert said_of(lambda: WRITERS[name](trial)) is None
    most = max(len(data) for data in contents(trial).values())
    before = {**contents(folder)}
    if name in ("save_quantized", "compressed-tensors", "gguf", "onnx"):
        assert said_of(lambda: WRITERS[name](folder)) is None
        before = contents(folder)
    said = said_of(lambda: WRITERS[name](folder), int(share * most))
    assert said, "nothing was refused"
    assert said[1]
    assert "\n" not in said[1]
    after = contents(folder)
    assert {path: after[path] for path in before} == before
    assert not [path for path in after if "partial" in path or "export" in path]
    assert said_of(lambda: WRITERS[name](folder)) is None  # with room again, all is well


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_cannot_be_made_is_one_line(name, tmp_path):
    place = tmp_path / "out"
    place.write_text("a file")
    said = said_of(lambda: WRITERS[name](place))
    assert said[0] in ("CheckpointError", "NotADirectoryError", "FileExistsError"), said
    assert "\n" not in said[1]
    assert "out" in said[1]
    assert place.read_text() == "a file"
