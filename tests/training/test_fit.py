import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from companion import fit
from companion.errors import CheckpointError, EmptyLoader, NonFiniteLoss, NothingToTrain
from companion.training.checkpoint import CHECKPOINT
from companion.training.fit import SCHEDULES

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 3))


def loader(batch_size: int = 8, **options) -> DataLoader:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(60, 4, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size, shuffle=True, **options)


def weights(m: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in m.parameters()]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


def test_learns():
    history = fit(model(), loader(), steps=80, lr=0.01)
    assert len(history.loss) == len(history.learning_rate) == 80
    assert np.mean(history.loss[-10:]) < 0.6 * np.mean(history.loss[:10])


def test_is_the_loop_one_would_write():
    ours, theirs = model(), model()
    data = [(x, y) for x, y in loader()]
    fit(ours, data, steps=12, optimizer=SGD, schedule="constant", clip_norm=None)
    optimizer = SGD(theirs.parameters())
    for epoch in range(2):
        torch.manual_seed(epoch)
        for x, y in data[: 8 if epoch == 0 else 4]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(theirs(x), y).backward()
            optimizer.step()
    assert same(ours, theirs)


def test_same_seed_same_weights_other_seed_other_weights():
    runs = []
    for seed in (0, 0, 1):
        runs.append(m := model())
        fit(m, loader(), steps=10, seed=seed)
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_loader_with_its_own_generator_is_reproducible():
    shared = loader(generator=torch.Generator())
    first, second = model(), model()
    fit(first, shared, steps=10)
    fit(second, shared, steps=10)
    assert same(first, second)


def test_accumulation_equals_the_large_batch():
    small, large = model().eval(), model().eval()
    small[1] = large[1] = nn.Identity()
    x, y = loader(60).dataset.tensors
    options = {"steps": 5, "optimizer": SGD, "clip_norm": None}
    fit(small, [(x[:20], y[:20]), (x[20:40], y[20:40]), (x[40:], y[40:])], accumulate=3, **options)
    fit(large, [(x, y)], **options)
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(small), weights(large), strict=True)
    )


def test_schedules_start_at_one_and_follow_their_name():
    history = fit(model(), loader(), steps=10, lr=0.1, schedule="linear")
    assert history.learning_rate == pytest.approx([0.1 * (1 - i / 10) for i in range(10)])
    assert SCHEDULES["cosine"](0) == 1
    assert SCHEDULES["cosine"](1) == pytest.approx(0)
    history = fit(model(), loader(), steps=4, lr=0.1, schedule=lambda progress: 2.0)
    assert history.learning_rate == [0.2] * 4


def test_clipping_bounds_the_step():
    free, clipped = model(), model()
    start = weights(free)
    sgd = partial(torch.optim.SGD, lr=1.0)
    for m, norm in ((free, None), (clipped, 1e-3)):
        fit(m, loader(), steps=1, optimizer=sgd, clip_norm=norm)
    length = [
        torch.cat([(a - b).flatten() for a, b in zip(weights(m), start, strict=True)]).norm()
        for m in (free, clipped)
    ]
    assert length[1] == pytest.approx(1e-3, rel=1e-3)
    assert length[0] > 0.01


def test_actions_are_called_before_their_step():
    seen, m = [], model()
    fit(m, loader(), steps=5, at={2: lambda: seen.append(weights(m)), 0: lambda: seen.append(1)})
    reference = model()
    fit(reference, loader(), steps=2, schedule=lambda p: SCHEDULES["cosine"](p * 2 / 5))
    assert seen[0] == 1
    assert all(torch.equal(a, b) for a, b in zip(seen[1], weights(reference), strict=True))


def test_own_loss_and_dict_batches():
    class Output:
        def __init__(self, loss):
            self.loss = loss

    class HuggingFaceLike(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return Output((self.w * x).square().sum())

    m = HuggingFaceLike()
    fit(m, [{"x": torch.ones(3)}], steps=30, lr=0.1)
    assert m.w.abs().max() < 0.5
    m = nn.Linear(1, 1)
    fit(m, [torch.ones(2, 1)], steps=30, lr=0.1, loss_fn=lambda m, b: m(b).square().mean())
    assert m(torch.ones(1, 1)).abs() < 0.3


def test_bar_is_shown_to_people_only(capsys, monkeypatch):
    fit(model(), loader(), steps=2, progress=False)
    assert capsys.readouterr().err == ""
    code = "import torch; from torch import nn; from companion import fit; " \
        "fit(nn.Linear(1, 2), [(torch.ones(1, 1), torch.tensor([0]))], steps=3)"  # fmt: skip
    for disabled, shown in (("1", False), ("", True)):  # empty counts as unset
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                             env={**os.environ, "TQDM_DISABLE": disabled}, check=True)  # fmt: skip
        assert ("fit:" in run.stderr) is shown


def test_nothing_trainable_is_an_error():
    frozen = model().requires_grad_(False)
    with pytest.raises(NothingToTrain, match="Train before convert"):
        fit(frozen, loader(), steps=1)


def test_gradient_that_reaches_nothing_is_an_error():
    class Detached(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    with pytest.raises(NothingToTrain, match="reached no parameter"):
        fit(Detached(4, 3), loader(), steps=1)


def test_optimizer_of_another_model_is_an_error():
    with pytest.raises(NothingToTrain, match="build it after prepare_qat"):
        fit(model(), loader(), steps=1, optimizer=SGD(model(1).parameters()))


def test_empty_and_exhausted_loaders_are_errors():
    with pytest.raises(EmptyLoader, match="no batch"):
        fit(model(), [], steps=1)
    with pytest.raises(EmptyLoader, match="ran dry after 8 batches"):
        fit(model(), iter(list(loader())), steps=20)


def test_non_finite_loss_names_its_step():
    data = list(loader())
    data[3] = (data[3][0] * float("nan"), data[3][1])
    with pytest.raises(NonFiniteLoss, match="nan at step 3"):
        fit(model(), data, steps=10)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"accumulate": 0}, {"checkpoint_every": 0}])
def test_counts_must_be_positive(bad):
    with pytest.raises(ValueError, match="at least 1"):
        fit(model(), loader(), **({"steps": 2} | bad))


@pytest.mark.parametrize("stop", [3, 8, 10, 17])
@pytest.mark.parametrize("optimizer", [None, SGD])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, stop, optimizer):
    options = {"steps": 20, "optimizer": optimizer, "accumulate": 2, "checkpoint_every": 1}
    whole = model()
    expected = fit(whole, loader(), **options)

    class Stop(Exception):
        pass

    def interrupt():
        raise Stop

    with pytest.raises(Stop):
        fit(model(), loader(), checkpoint_dir=tmp_path, at={stop: interrupt}, **options)
    resumed = model(seed=5)  # whatever it starts from
    history = fit(resumed, loader(), checkpoint_dir=tmp_path, resume=True, **options)
    assert same(whole, resumed)
    assert history == expected


KILLED = """
import sys, time
sys.path.insert(0, {root!r})
from tests.training.test_fit import *
fit(model(), loader(), steps=400, checkpoint_dir={folder!r}, checkpoint_every=1, resume=True,
    at={{300: lambda: time.sleep(60)}})
"""


def test_killed_at_any_moment_and_resumed_equals_uninterrupted(tmp_path):
    code = KILLED.format(root=str(Path(__file__).parents[2]), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code])
    while not (tmp_path / CHECKPOINT).exists():
        time.sleep(0.01)
    time.sleep(0.15)  # somewhere between two steps, or in the middle of a write
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole, resumed = model(), model()
    fit(whole, loader(), steps=400, at={300: lambda: None})
    fit(resumed, loader(), steps=400, checkpoint_dir=tmp_path, checkpoint_every=1, resume=True,
        at={300: lambda: None})  # fmt: skip
    assert same(whole, resumed)


def test_actions_are_repeated_on_resume(tmp_path):
    calls = []
    options = {"steps": 6, "checkpoint_dir": tmp_path, "checkpoint_every": 2, "resume": True}
    fit(model(), loader(), at={1: lambda: calls.append("first")}, **options)
    fit(model(), loader(), at={1: lambda: calls.append("again")}, **options)
    assert calls == ["first", "again"]


def test_checkpoint_is_one_file_without_pickle(tmp_path):
    fit(model(), loader(), steps=3, checkpoint_dir=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT]
    content = (tmp_path / CHECKPOINT).read_bytes()
    header = int.from_bytes(content[:8], "little")
    assert content[8:9] == b"{"
    assert header < len(content)


def test_checkpoint_is_neither_overwritten_nor_mistaken(tmp_path):
    fit(model(), loader(), steps=3, checkpoint_dir=tmp_path)
    with pytest.raises(CheckpointError, match="resume=True"):
        fit(model(), loader(), steps=3, checkpoint_dir=tmp_path)
    with pytest.raises(CheckpointError, match="seed: 0 there, 1 here"):
        fit(model(), loader(), steps=3, seed=1, checkpoint_dir=tmp_path, resume=True)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        fit(model(), loader(), steps=3, checkpoint_dir=tmp_path, resume=True)


def test_tied_weights_are_saved(tmp_path):
    def tied():
        m = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
        m[2].weight = m[0].weight
        return m

    data = [(torch.eye(3), torch.arange(3))]
    first, second = tied(), tied()
    fit(first, data, steps=4, checkpoint_dir=tmp_path)
    fit(second, data, steps=4, checkpoint_dir=tmp_path, resume=True)
    assert same(first, second)
    assert second[2].weight is second[0].weight


def test_the_weights_that_did_best_in_validation_come_back():
    trained, values, seen = model(), iter([3.0, 1.0, 2.0, 5.0]), []

    def validate(m):
        seen.append(weights(m))
        torch.randn(5)  # draws of the validation must not reach the training
        return next(values)

    history = fit(trained, loader(), steps=25, validate=validate, validate_every=10)
    assert history.validation == [[0, 3.0], [10, 1.0], [20, 2.0], [25, 5.0]]
    assert all(torch.equal(a, b) for a, b in zip(weights(trained), seen[1], strict=True))
    without = model()
    assert history.loss == fit(without, loader(), steps=25).loss


def test_best_weights_survive_an_interruption(tmp_path):
    def validate(m):
        return float((m[0].weight - 0.3).square().sum())  # best somewhere on the way

    whole, cut = model(), model()
    options = {"steps": 40, "validate": validate, "validate_every": 5, "optimizer": SGD}
    expected = fit(whole, loader(), **options)
    options |= {"checkpoint_dir": tmp_path, "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        fit(cut, loader(), **options, at={23: interrupt})
    again = model()
    history = fit(again, loader(), **options, resume=True)
    assert history.validation == expected.validation
    assert same(whole, again)


def interrupt():
    raise KeyboardInterrupt


def test_a_schedule_is_known_by_its_name_in_another_process(tmp_path):
    """Its address, which differs from process to process, is no part of a run's identity."""
    fit(model(), loader(), steps=2, schedule=half, checkpoint_dir=tmp_path)
    (tmp_path / CHECKPOINT).read_bytes().index(b'"schedule')
    assert b" at 0x" not in (tmp_path / CHECKPOINT).read_bytes()


def half(progress: float) -> float:
    return 0.5


def test_documents_of_a_batch_are_not_handed_to_the_model():
    class Language(nn.Linear):
        def forward(self, input_ids, labels):
            return type("Output", (), {"loss": super().forward(input_ids).square().mean()})

    batch = {"input_ids": torch.ones(2, 4), "labels": torch.ones(2), "document": torch.ones(2)}
    assert len(fit(Language(4, 1), [batch], steps=2).loss) == 2
