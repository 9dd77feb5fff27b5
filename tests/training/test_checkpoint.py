"""A run that was interrupted goes on as if nothing had been; another run is not taken for it."""

import copy
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from companion import W2, W4, fit, prepare_qat
from companion.errors import CheckpointError
from companion.training.checkpoint import CHECKPOINT
from companion.training.losses import default_loss, distillation_loss
from tests.training.test_fit import SGD, loader, model, same


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
fit(model(), loader(), steps=60, checkpoint_dir={folder!r}, checkpoint_every=1, resume=True,
    at={{40: lambda: time.sleep(60)}})
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
    fit(whole, loader(), steps=60, at={40: lambda: None})
    fit(resumed, loader(), steps=60, checkpoint_dir=tmp_path, checkpoint_every=1, resume=True,
        at={40: lambda: None})  # fmt: skip
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
    with pytest.raises(CheckpointError, match="not the checkpoint that was written"):
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


def test_nothing_in_the_file_is_an_address(tmp_path):
    """Which differs from process to process; settings are compared with those of another one."""
    fit(model(), loader(), steps=2, schedule=half, checkpoint_dir=tmp_path,
        loss_fn=partial(scaled, factor=Address()), optimizer=lambda p: SGD(p))  # fmt: skip
    assert b" at 0x" not in (tmp_path / CHECKPOINT).read_bytes()
    assert b"half" in (tmp_path / CHECKPOINT).read_bytes()


class Address:
    def __rmul__(self, other):
        return other


def half(progress: float) -> float:
    return 0.5


def scaled(model, batch, factor=1):
    return default_loss(model, batch) * factor


X = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3
FLOAT = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 3)).eval()


def data(size: int = 4, x: torch.Tensor = X) -> list:
    return list(zip(x.split(size), Y.split(size), strict=True))


def other_weights(module: nn.Module) -> nn.Module:
    changed = copy.deepcopy(module)
    changed[3].weight.data += 0.1
    return changed


def frozen(module: nn.Module) -> nn.Module:
    module[0].bias.requires_grad_(False)
    return module


SETTINGS = {"steps": 4, "checkpoint_every": 2, "progress": False}
CHANGES = {
    "scheme": ({"model": lambda: prepare_qat(FLOAT, W2)},
               r"model\.quantization\.scheme\.weight_bits: 4 there, 2 here"),
    "method": ({"model": lambda: prepare_qat(FLOAT, W4, "absmax")},
               r"model\.quantization\.method: lsq there, absmax here"),
    "layers": ({"model": lambda: prepare_qat(FLOAT, W4, skip=["3"])},
               r"model\.quantization\.layers\.3: rounded there, nothing here"),
    "no rounding": ({"model": lambda: copy.deepcopy(FLOAT)},
                    r"model\.quantization: Quantization there, None here"),
    "another model": ({"model": lambda: nn.Sequential(nn.Linear(64, 3))},
                      r"model\.tensors\.0\.weight: 32x64 float32 there, 3x64 float32 here"),
    "dtype": ({"model": lambda: prepare_qat(FLOAT, W4).bfloat16()},
              r"0\.weight: 32x64 float32 there, 32x64 bfloat16 here"),
    "frozen": ({"model": lambda: frozen(prepare_qat(FLOAT, W4))},
               r"0\.bias: 32 float32 there, 32 float32 frozen here"),
    "rate": ({"lr": 1e-3}, r"optimizer\.group 0\.lr: 0\.0005 there, 0\.001 here"),
    "decay": ({"weight_decay": 0.1}, r"weight_decay: 0\.01 there, 0\.1 here"),
    "optimizer": ({"optimizer": SGD}, r"optimizer\.class: AdamW there, SGD here"),
    "momenta": ({"optimizer": partial(torch.optim.AdamW, lr=5e-4, betas=(0.9, 0.99))},
                r"betas: \[0\.9, 0\.999\] there, \[0\.9, 0\.99\] here"),
    "schedule": ({"schedule": half}, "schedule: cosine there, half here"),
    "clipping": ({"clip_norm": None}, r"clip_norm: 1\.0 there, None here"),
    "accumulate": ({"accumulate": 2}, "accumulate: 1 there, 2 here"),
    "steps": ({"steps": 5}, "steps: 4 there, 5 here"),
    "seed": ({"seed": 1}, "seed: 0 there, 1 here"),
    "loss": ({"loss_fn": scaled}, "loss_fn: default_loss there, scaled here"),
    "teacher": ({"teacher": FLOAT}, "loss_fn: default_loss there, Distillation here"),
    "validation": ({"validate": half}, r"validate: None there, \['half', 50\] here"),
    "batch size": ({"loader": data(6)}, "batches a pass: 3 there, 2 here"),
    "data": ({"loader": data(x=X + 1)}, "first batch: [0-9a-f]+ there, [0-9a-f]+ here"),
    "order": ({"loader": data()[::-1]}, "first batch: [0-9a-f]+ there, [0-9a-f]+ here"),
}  # fmt: skip


def start(folder: Path, **changes) -> Path:
    """Train a run, or continue what the folder holds, with some settings changed."""
    options = {"model": lambda: prepare_qat(FLOAT, W4), "loader": data(), **SETTINGS, **changes}
    fit(options.pop("model")(), options.pop("loader"), checkpoint_dir=folder, **options)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return start(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("change", CHANGES)
def test_another_run_is_refused_by_what_differs(run, change):
    changes, message = CHANGES[change]
    with pytest.raises(CheckpointError, match=message):
        start(run, resume=True, **changes)


def test_the_same_run_from_other_weights_is_continued(run):
    start(run, resume=True, checkpoint_every=1, model=lambda: prepare_qat(other_weights(FLOAT), W4))


@pytest.mark.parametrize(("there", "here", "message"), [
    ({"teacher": FLOAT}, {"teacher": other_weights(FLOAT)}, r"loss_fn\.teacher\.weights"),
    ({"loss_fn": distillation_loss(FLOAT, 1.0)}, {"loss_fn": distillation_loss(FLOAT, 2.0)},
     r"loss_fn\.temperature: 1\.0 there, 2\.0 here"),
    ({"loss_fn": partial(scaled, factor=2)}, {"loss_fn": partial(scaled, factor=3)},
     r"loss_fn\.factor: 2 there, 3 here"),
    ({"optimizer": partial(torch.optim.SGD, lr=0.1)},
     {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9)}, "momentum: 0 there, 0.9 here"),
])  # fmt: skip
def test_another_teacher_or_partial_is_another_run(tmp_path, there, here, message):
    start(tmp_path, **there)
    start(tmp_path, resume=True, **copy.deepcopy(there))
    with pytest.raises(CheckpointError, match=message):
        start(tmp_path, resume=True, **here)


def test_loaders_are_compared_by_batch_size(tmp_path):
    options = {"steps": 2, "checkpoint_dir": tmp_path}
    fit(model(), loader(8), **options)
    with pytest.raises(CheckpointError, match=r"loader\.batch size: 8 there, 10 here"):
        fit(model(), loader(10), resume=True, **options)


def test_the_classic_road_is_told_apart_by_its_integers(tmp_path):
    """Whose modules keep their bits outside the state dict."""
    from companion import QuantWrapper

    def prepared(bits):
        return QuantWrapper(copy.deepcopy(FLOAT)).prepare_qat(weight_bits=bits)

    options = {"steps": 2, "checkpoint_dir": tmp_path}
    fit(prepared(8), data(), **options)
    with pytest.raises(CheckpointError, match=r'"quant_min": -128.*there, nothing here'):
        fit(prepared(4), data(), resume=True, **options)


def test_a_checkpoint_of_before_or_of_others_is_named(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / CHECKPOINT
    save_file({"x": torch.ones(1)}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="cannot be read"):
        start(tmp_path, resume=True)


def test_a_folder_that_cannot_be_one_is_noticed_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="name another"):
        start(tmp_path / "file")


def test_a_validation_that_fails_does_not_lose_the_steps_before_it(tmp_path):
    """Its value is asked for again on resume."""
    calls = []

    def validate(m):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return float(m[0].weight.square().sum())

    options = {"validate": validate, "validate_every": 2, "checkpoint_every": 50}
    with pytest.raises(MemoryError):
        start(tmp_path, **options)
    trained = prepare_qat(FLOAT, W4)
    history = fit(trained, data(), checkpoint_dir=tmp_path, resume=True, **SETTINGS | options)
    assert [done for done, _ in history.validation] == [0, 2, 4]
    assert len(history.loss) == 4
    assert len(calls) == 4


def test_ctrl_c_writes_a_checkpoint_that_continues_bit_for_bit(tmp_path):
    options = {"steps": 20, "checkpoint_every": 50}
    whole = model()
    expected = fit(whole, loader(), **options)
    options |= {"checkpoint_dir": tmp_path}
    with pytest.raises(KeyboardInterrupt, match="continues after step 8"):
        fit(model(), loader(), loss_fn=interrupting(7), **options)
    resumed = model(1)
    history = fit(resumed, loader(), loss_fn=interrupting(99), resume=True, **options)
    assert history == expected
    assert same(whole, resumed)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def interrupting(step: int):
    calls = []

    def loss_fn(m, batch):
        calls.append(1)
        if len(calls) == step + 1:
            signal.raise_signal(signal.SIGINT)  # as the terminal does, in the middle of a step
        return default_loss(m, batch)

    return loss_fn
