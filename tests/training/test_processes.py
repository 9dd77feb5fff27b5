"""`fit` in two processes: the curve of one, one writer, one bar; and a model that FSDP2 sharded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from companion import fit
from companion.data.biencoder import BiEncoder
from companion.errors import CheckpointError
from companion.training.checkpoint import CHECKPOINT
from companion.training.processes import Processes, count_rows, is_sharded, take_rows

SCRIPT = Path(__file__).parent / "two_processes.py"


def run(folder: Path, processes: int, environment: dict | None = None, **options):
    """Train in so many processes; return what each of them found, and what they printed."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(SCRIPT), str(folder / "result.json"), json.dumps(options)]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                        str(processes)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                   "TQDM_DISABLE": "", **(environment or {})}  # fmt: skip
    if processes > 1:
        environment.pop("RANK", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    if done.returncode:
        return done
    files = [folder / f"result.{rank}.json" for rank in range(processes)]
    return [json.loads(file.read_text()) for file in files], done.stderr


def differ(a: list, b: list) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def test_two_processes_have_the_curve_of_one_and_one_writer(tmp_path):
    options = {"teacher": True, "accumulate": 2, "validate": True, "checkpoint": True}
    (one,), _ = run(tmp_path / "one", 1, **options)
    (first, second), bars = run(tmp_path / "two", 2, **options)
    assert (one["processes"], first["processes"]) == (1, 2)  # told by torchrun alone
    assert len(one["loss"]) == 6
    assert differ(one["loss"], first["loss"]) < 1e-5
    assert first["loss"] == second["loss"]
    validation = [[v for _, v in found["validation"]] for found in (one, first)]
    assert len(validation[0]) == 4
    assert differ(*validation) < 1e-5
    assert first["norm"] == second["norm"] == pytest.approx(one["norm"], rel=1e-6)
    files = [sorted(p.name for p in (tmp_path / name / "run").iterdir()) for name in ("one", "two")]
    assert files == [[CHECKPOINT], [CHECKPOINT]]
    assert (one["written"], first["written"], second["written"]) == (3, 3, 0)
    assert bars.count("fit:   0%") == 1


@pytest.mark.parametrize("padded", [False, True])
def test_rows_weigh_by_what_they_score(tmp_path, padded):
    """Three rows, one for the first process and two for the second; some of them half empty."""
    (one,), _ = run(tmp_path / "one", 1, batch=3, steps=3, padded=padded)
    (two, _), _ = run(tmp_path / "two", 2, batch=3, steps=3, padded=padded)
    assert differ(one["loss"], two["loss"]) < 1e-5


def test_a_batch_smaller_than_the_processes_is_refused(tmp_path):
    failed = run(tmp_path, 2, batch=1)
    assert "a batch of 1 cannot be shared by 2 processes" in failed.stderr


def test_a_run_of_two_is_continued_by_two(tmp_path):
    """Killed after its checkpoint of step 4, the same command trains the last two steps."""
    (whole, _), _ = run(tmp_path, 2)
    failed = run(tmp_path, 2, checkpoint=True, fail_at=5)
    assert "failed on purpose" in failed.stderr
    assert (tmp_path / "run" / CHECKPOINT).exists()
    (first, second), _ = run(tmp_path, 2, checkpoint=True, resume=True)
    assert first["loss"] == second["loss"] == whole["loss"]
    assert (first["written"], first["norm"]) == (1, whole["norm"])


def test_fsdp2_trains_as_one_process_does(tmp_path):
    (one,), _ = run(tmp_path / "one", 1)
    (two, _), _ = run(tmp_path / "two", 2, shard=True)
    assert differ(one["loss"], two["loss"]) < 1e-5
    assert two["norm"] == pytest.approx(one["norm"], rel=1e-6)
    assert two["gathered"] == pytest.approx(one["norm"], rel=1e-6)  # as the chapter tells it
    assert two["converted"]
    (half, _), _ = run(tmp_path / "half", 2, {"ACCELERATE_MIXED_PRECISION": "bf16"}, shard=True)
    assert 1e-6 < differ(half["loss"], two["loss"]) < 0.2
    failed = run(tmp_path / "no", 2, shard=True, checkpoint=True)
    assert "a sharded model has no process that could write all of it" in failed.stderr


def test_precision_comes_from_the_launcher(tmp_path):
    """bfloat16 computes other losses, near those of float32; the weights stay in float32."""
    (full,), _ = run(tmp_path / "full", 1)
    (half,), _ = run(tmp_path / "half", 1, {"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert half["dtype"] == "torch.float32"
    assert 1e-6 < differ(full["loss"], half["loss"]) < 0.2


def test_alone_nothing_changes():
    alone = Processes(torch.device("cpu"))
    batch = {"x": torch.ones(3, 2)}
    assert (alone.count, alone.first) == (1, True)
    assert alone.share(batch) == (batch, 1.0)
    assert alone.mean(torch.tensor(0.1, dtype=torch.float64)) == 0.1
    assert not is_sharded(nn.Linear(2, 2))


def test_processes_that_would_train_for_themselves_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(
        "companion.training.processes._has_devices", lambda: True
    )  # so none is told "CPU"
    with pytest.raises(ValueError, match="3 processes were started, and Accelerate would train 1"):
        Processes(torch.device("cpu"))


def test_retrieval_is_not_shared(monkeypatch):
    alone = Processes(torch.device("cpu"))
    alone.count = 2
    with pytest.raises(ValueError, match="compares every query with every text"):
        alone.loss(BiEncoder(nn.Linear(1, 1)), lambda model, batch: None)


def test_a_batch_without_scored_tokens_weighs_nothing():
    """Its loss is the mean of nothing, which fit() names; no division fails before."""
    pair = Processes(torch.device("cpu"))
    pair.count = 2
    ids = torch.ones(2, 5, dtype=torch.int64)
    _, weight = pair.share({"input_ids": ids, "labels": torch.full_like(ids, -100)})
    assert weight == 0


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


def test_accelerate_may_not_shard(monkeypatch):
    from accelerate import Accelerator

    class Sharding:
        value = "FSDP"

    monkeypatch.setattr(Accelerator, "distributed_type", Sharding)
    with pytest.raises(ValueError, match="fully_shard"):
        fit(nn.Linear(1, 2), [(torch.ones(1, 1), torch.tensor([0]))], steps=1)


def test_a_sharded_model_is_not_written(monkeypatch, tmp_path):
    from companion.training import fit as train

    monkeypatch.setattr(train, "is_sharded", lambda model: True)
    with pytest.raises(CheckpointError, match="sharded"):
        fit(nn.Linear(1, 2), [(torch.ones(1, 1), torch.tensor([0]))], steps=1,
            checkpoint_dir=tmp_path)  # fmt: skip
