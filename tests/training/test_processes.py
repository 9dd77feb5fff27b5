"""`fit` in two processes: the curve of one, one writer, one bar; and a model that FSDP2 sharded.

Three launches of two processes train all scenarios; what one process finds is computed here.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from companion import fit
from companion.data.biencoder import BiEncoder
from companion.errors import CheckpointError
from companion.training.batches import count_rows, take_rows
from companion.training.checkpoint import CHECKPOINT
from companion.training.losses import count_scored, default_loss
from companion.training.processes import Launched, Processes, is_sharded, join
from tests.training.two_processes import train

SCRIPT = Path(__file__).parent / "two_processes.py"
TOGETHER = {
    "everything": {"teacher": True, "accumulate": 2, "validate": True, "checkpoint": True},
    "rows": {"batch": 3},  # one for the first process and two for the second
    "padded": {"batch": 3, "padded": True},
    "accumulated": {"batch": 3, "padded": True, "accumulate": 3},
    "bare": {"batch": 2, "bare": True},  # nothing to score for the first process
    "small": {"batch": 1},
    "sharded": {"shard": True},
    "sharded and kept": {"shard": True, "checkpoint": True},
}
# Losses are means of at least 16 terms from sums of 32 products: 32 * 2**-23 = 4e-6 of their size
# if every rounding goes the same way. Between AVX512, AVX2 and the default (ATen's, oneDNN's and
# MKL's), one thread and two, no loss differed by more than 1e-7. Processes that weighed equally
# moved them by 1e-2 and more.
CLOSE = 4e-6


def launch(folder: Path, scenarios: dict, environment: dict | None = None, torchrun: bool = False):
    """Train scenarios in two processes; return what each of them found, None if they failed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                   "TQDM_DISABLE": "", **(environment or {})}  # fmt: skip
    command = [str(SCRIPT), str(folder / "result.json"), json.dumps(scenarios)]
    if torchrun:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run([sys.executable, *torchrun, *command], env=environment, timeout=300)
        codes = [done.returncode]
    else:  # what torchrun tells its processes, without another one that imports torch
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        running = [
            subprocess.Popen(
                [sys.executable, *command],
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(2)
        ]
        codes = [process.wait(timeout=300) for process in running]
    assert codes == [0] * len(codes)
    return [json.loads((folder / f"result.{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder) -> list[dict]:
    interrupted = {"checkpoint": True, "fail_at": 3, "folder": "run"}
    return launch(folder, {**TOGETHER, "whole": {}, "interrupted": interrupted}, torchrun=True)


@pytest.fixture(scope="module")
def resumed(two, folder) -> list[dict]:
    return launch(folder, {"run": {"checkpoint": True, "resume": True}})


@pytest.fixture(scope="module")
def half(resumed, folder) -> list[dict]:
    scenarios = {
        "whole": {},
        "sharded": {"shard": True},
        "run": {"checkpoint": True, "resume": True},
    }
    return launch(folder, scenarios, {"ACCELERATE_MIXED_PRECISION": "bf16"})


@pytest.mark.parametrize("name", ["everything", "rows", "padded", "accumulated", "bare", "sharded"])
def test_two_processes_have_the_curve_of_one(two, tmp_path, name):
    one = train(tmp_path, **{**TOGETHER[name], "shard": False})
    first, second = (found[name] for found in two)
    assert len(one["loss"]) == 4
    assert first["loss"] == pytest.approx(one["loss"], rel=CLOSE)
    assert first["validation"] == pytest.approx(one["validation"], rel=CLOSE)
    assert first["moved"] == pytest.approx(one["moved"], rel=CLOSE)
    for what in ("loss", "validation", "moved"):
        assert first[what] == second[what]


def test_only_the_first_writes_and_shows_a_bar(two, folder):
    first, second = (found["everything"] for found in two)
    assert len(first["validation"]) == 3
    assert [first["written"], second["written"]] == [2, 0]
    assert [first["bars"], second["bars"]] == [1, 0]
    assert [path.name for path in (folder / "everything").iterdir()] == [CHECKPOINT]


def test_a_batch_smaller_than_the_processes_is_refused(two):
    assert "a batch of 1 cannot be shared by 2 processes" in two[0]["small"]["error"]


def test_a_run_of_two_is_continued_by_two(two, resumed):
    """Failed after its checkpoint of step 2, the same command trains the last two steps."""
    assert "failed on purpose" in two[0]["interrupted"]["error"]
    first, second = (found["run"] for found in resumed)
    whole = two[0]["whole"]
    assert first["loss"] == second["loss"] == whole["loss"]
    assert [first["written"], first["moved"]] == [1, whole["moved"]]


def test_fsdp2_gathers_and_converts_and_is_not_written(two):
    found = two[0]["sharded"]
    assert found["gathered"] == pytest.approx(found["moved"], rel=CLOSE)  # as the chapter tells it
    assert found["converted"]
    message = two[0]["sharded and kept"]["error"]
    assert "a sharded model has no process that could write all of it" in message


@pytest.mark.parametrize("name", ["whole", "sharded"])
def test_precision_comes_from_the_launcher(two, half, name):
    """bfloat16 keeps 8 bits of a product: losses differ, by up to 2**-8 of logits below 5."""
    assert half[0][name]["dtype"] == "torch.float32"
    apart = max(
        abs(a - b) for a, b in zip(half[0][name]["loss"], two[0][name]["loss"], strict=True)
    )
    assert 1e-5 < apart < 5 * 2**-8


def test_a_run_is_not_continued_in_another_precision(half):
    assert "precision: no there, bf16 here" in half[0]["run"]["error"]


ALONE = """
import sys, torch
from torch import nn
from companion.training.fit import fit
print("torch.distributed.tensor" in sys.modules)

def trained():
    torch.manual_seed(0)
    model = nn.Linear(8, 2)
    fit(model, [(torch.eye(8), torch.arange(8) % 2)], steps=3, lr=0.1)
    return model.weight

first = trained()
print("accelerate" in sys.modules)
from accelerate import Accelerator
print(Accelerator(mixed_precision="bf16").mixed_precision, torch.equal(trained(), first))
"""


def test_alone_fit_neither_asks_nor_tells_accelerate():
    """Its state is of the whole process; and a bar is shown to people (an empty variable is unset)."""
    run = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True,
                         env={**os.environ, "TQDM_DISABLE": ""}, check=True)  # fmt: skip
    assert run.stdout.splitlines() == ["False", "False", "bf16 True"]
    assert run.stderr.count("fit:   0%") == 2


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps its state for the whole process: not for the tests that follow."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_one_process_that_was_launched_has_the_precision_of_its_launcher(
    two, tmp_path, monkeypatch, fresh_accelerate
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    found = train(tmp_path)
    assert (
        max(abs(a - b) for a, b in zip(found["loss"], two[0]["whole"]["loss"], strict=True)) > 1e-5
    )


def test_alone_nothing_changes():
    alone = join(torch.device("cpu"))
    assert type(alone) is Processes
    batch = {"x": torch.ones(3, 2)}
    assert (alone.count, alone.first) == (1, True)
    assert alone.share([batch], count_rows) == [(batch, 1.0)]
    assert alone.mean(torch.tensor(0.1, dtype=torch.float64)) == 0.1
    assert not is_sharded(nn.Linear(2, 2))


def test_processes_that_would_train_for_themselves_are_refused(monkeypatch, fresh_accelerate):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(
        "companion.training.processes._has_devices", lambda: True
    )  # so none is told "CPU"
    with pytest.raises(ValueError, match="3 processes were started, and Accelerate would train 1"):
        join(torch.device("cpu"))


def test_retrieval_is_not_shared(fresh_accelerate):
    pair = Launched(torch.device("cpu"))
    pair.count = 2
    with pytest.raises(ValueError, match="compares every query with every text"):
        pair.loss(BiEncoder(nn.Linear(1, 1)), lambda model, batch: None)


def test_what_is_not_scored_weighs_nothing():
    ids = torch.ones(2, 5, dtype=torch.int64)
    bare = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    scored = bare | {"labels": ids}
    alone = Processes(torch.device("cpu"))
    count = lambda batch: count_scored(default_loss, nn.Identity(), batch)  # noqa: E731
    assert alone.share([bare, scored], count) == [(scored, 1.0)]
    assert alone.share([bare], count) == []


def test_rows_are_found_beside_what_has_none():
    batch = {"names": ["a", "b", "c"], "scale": torch.tensor(2.0), "positions": torch.ones(1, 5),
             "input_ids": torch.ones(3, 5), "empty": None}  # fmt: skip
    assert count_rows(batch) == 3
    part = take_rows(batch, 3, slice(2, 3))
    assert part["names"] == ["c"]
    assert part["input_ids"].shape == (1, 5)
    assert part["positions"].shape == (1, 5)
    assert part["scale"] == 2.0
    assert part["empty"] is None
    with pytest.raises(ValueError, match="without tensors"):
        count_rows({"a": None})


def test_a_checkpoint_that_only_one_machine_has_is_noticed(monkeypatch, tmp_path):
    layer, data = nn.Linear(1, 2), [(torch.ones(1, 1), torch.tensor([0]))]
    fit(layer, data, steps=2, checkpoint_dir=tmp_path, progress=False)
    monkeypatch.setattr(Processes, "mean", lambda self, value: value.item() / 2)  # of two
    with pytest.raises(CheckpointError, match="a folder that all machines share"):
        fit(layer, data, steps=2, checkpoint_dir=tmp_path, resume=True, progress=False)


def test_accelerate_may_not_shard(monkeypatch, fresh_accelerate):
    from accelerate import Accelerator

    class Sharding:
        value = "FSDP"

    monkeypatch.setattr(Accelerator, "distributed_type", Sharding)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(ValueError, match="fully_shard"):
        fit(nn.Linear(1, 2), [(torch.ones(1, 1), torch.tensor([0]))], steps=1)
