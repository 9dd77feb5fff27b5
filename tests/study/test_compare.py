"""`compare`: what arms share, what is tuned, and what an interruption keeps."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from companion import Activations, QuantScheme, compare, load_quantized, prepare_qat
from companion.data.task import Task
from companion.errors import CheckpointError, SchemeError
from companion.study import runs
from companion.study.compare import trial
from companion.study.recipes import ARMS, NEAREST, Arm

SCHEME = QuantScheme(2, None)
QUICK = {"steps": 8, "seeds": 2, "rates": [1e-2], "progress": False}
ONCE = QUICK | {"seeds": 1}


def results(text: str) -> dict:
    """What a log holds, without its seal."""
    return {key: value for key, value in json.loads(text).items() if key != "sha256"}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 4))


def data(seed: int, n: int = 64) -> TensorDataset:
    """Four clouds of points."""
    labels = torch.arange(n) % 4
    noise = torch.randn(n, 32, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(2 * torch.eye(4, 32)[labels] + noise, labels)


def task(batch_size: int = 16, **changed) -> Task:
    splits = {"train": DataLoader(data(0), batch_size, shuffle=True),
              "validation": DataLoader(data(1), 64), "test": DataLoader(data(2), 64)}  # fmt: skip
    return replace(Task("clouds", **splits, classes=("a", "b", "c", "d"), source=""), **changed)


def spy(seen: list, **kwargs) -> Arm:
    """An arm that notes the batches it trains on."""

    def prepare(model, scheme, task, skip):
        prepared = prepare_qat(model, scheme)
        prepared[0].register_forward_pre_hook(
            lambda module, inputs: seen.append(float(inputs[0].sum())) if module.training else None
        )
        return prepared

    return Arm("spy", prepare, **kwargs)


def test_arms_share_start_batches_and_steps():
    early, late = [], []
    compare(model(), task(), [SCHEME], [spy(early)], **QUICK)
    compare(model(), task(), [SCHEME], [spy(late, float_share=0.5)], **QUICK)
    early, late = early[6:], late[6:]  # after the six steps that the cost is timed with
    assert (len(early), len(late)) == (16, 8)
    assert late == early[4:8] + early[12:16]  # the second half of each seed's batches
    assert early[:8] != early[8:]


def test_control_is_the_float_model_on_the_same_batches(tmp_path):
    log = tmp_path / "log.json"
    table = compare(model(), task(), [SCHEME, QuantScheme(8, None)], ["absmax", "delayed"],
                    log=log, **QUICK)  # fmt: skip
    found = table.attrs["runs"]
    control = [run for run in found if run["method"] == "float"]
    assert [run["seed"] for run in control] == [0, 1]
    assert {run["training_tokens"] for run in found} == {8 * 16}
    eight = table.loc[("W8 row", "nearest")]
    assert abs(eight["difference"]) < 0.01 < table.loc[("W2 row", "nearest"), "difference"]
    assert table.loc[("W2 row", "absmax"), "bytes"] < 0.2 * control[0]["bytes"]
    # every arm's time: its float steps count 1, the others what was timed for it and its scheme
    assert (table.xs("nearest", level="method")["cost"] == 1.0).all()
    timed = {key: ratio for key, ratio in results(log.read_text()).items()
             if key.endswith("cost")}  # fmt: skip
    assert len(timed) == 4
    for method, share in (("absmax", 0), ("delayed", 0.75)):
        ratios = [ratio for key, ratio in timed.items() if key.startswith(method)]
        assert table.xs(method, level="method")["cost"].tolist() == [
            share + (1 - share) * ratio for ratio in ratios
        ]


def test_schemes_that_differ_anywhere_have_rows_rates_and_models_of_their_own(tmp_path):
    schemes = [
        QuantScheme(8, None, activations=Activations(2, granularity, symmetric))
        for granularity in ("token", "tensor")
        for symmetric in (False, True)
    ]
    schemes += [QuantScheme(4), QuantScheme(4, scale_dtype=torch.float32)]
    log, models = tmp_path / "log.json", tmp_path / "models"
    table = compare(model(), task(), [*schemes, schemes[0]], ["absmax"], log=log, models=models,
                    steps=4, seeds=1, rates=[1e-3, 1e-2], progress=False)  # fmt: skip
    assert len(table) == 2 * len(schemes)
    assert (table["seeds"] == 1).all()
    assert len(table.attrs["rates"]) == 1 + len(schemes)
    by_activations = table.xs("nearest", level="method")["value"][:4]
    assert by_activations.nunique() == 4
    saved = [load_quantized(folder, model()) for folder in sorted(models.glob("*-absmax"))]
    assert {m.quantization.scheme for m in saved} == set(schemes)
    assert "W4 g32" in table.index.get_level_values("scheme")


def test_rates_are_tuned_on_validation_only_and_can_be_passed_on(tmp_path):
    log = tmp_path / "log.json"
    rates = [1e-9, 1e-2]
    arguments = {"steps": 8, "seeds": 1, "tuning_steps": 6, "progress": False, "log": log}
    table = compare(model(), task(), [SCHEME], ["absmax", "nearest-mse"], rates=rates, **arguments)
    assert table.attrs["rates"] == {"float": 1e-2, "absmax W2 row": 1e-2}
    stored = results(log.read_text())
    trials = {key: run for key, run in stored.items() if key.endswith("validation")}
    assert len(trials) == 4  # two arms, two rates: post-training arms take the control's
    assert not any("total" in run for run in trials.values())
    again = compare(model(), task(), [SCHEME], ["absmax"], rates=table.attrs["rates"], **arguments)
    assert again.loc[("W2 row", "absmax")].equals(table.loc[("W2 row", "absmax")])
    assert results(log.read_text()) == stored


def test_goes_on_after_an_interruption(tmp_path, monkeypatch):
    log = tmp_path / "log.json"
    whole = compare(model(), task(), [SCHEME], ["absmax"], **QUICK)

    def broken(model, scheme, task, skip):
        raise KeyboardInterrupt

    monkeypatch.setitem(ARMS, "absmax", Arm("absmax", broken))
    with pytest.raises(KeyboardInterrupt):
        compare(model(), task(), [SCHEME], ["absmax"], log=log, **QUICK)
    kept = results(log.read_text())
    assert len(kept) == 2  # the control and its rounding
    monkeypatch.undo()
    resumed = compare(model(), task(), [SCHEME], ["absmax"], log=log, **QUICK)
    columns = ["value", "recovered", "recovered_low", "float"]
    assert resumed[columns].equals(whole[columns])
    assert kept.items() <= results(log.read_text()).items()


# what makes a run another run


def last_weight() -> nn.Module:
    other = model()
    other[0].weight.data[-1, -1] += 1.0  # element 8,191 of its tensor
    return other


def frozen() -> nn.Module:
    other = model()
    other[0].weight.requires_grad_(False)
    return other


def other_function() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 256), nn.Tanh(), nn.Linear(256, 4))


OTHERS = {
    "batch size": (model, lambda: task(4), {}),
    "training data": (model, lambda: task(train=DataLoader(data(7), 16)), {}),
    "validation data": (model, lambda: task(validation=DataLoader(data(7), 64)), {}),
    "test data": (model, lambda: task(test=DataLoader(data(7), 64)), {}),
    "test labels": (model, lambda: task(test=DataLoader(
        TensorDataset(data(2).tensors[0], (data(2).tensors[1] + 1) % 4), 64)), {}),
    "one weight": (last_weight, task, {}),
    "what is frozen": (frozen, task, {}),
    "activation function": (other_function, task, {}),
    "skip": (model, task, {"skip": "2"}),
    "steps": (model, task, {"steps": 7}),
    "rate": (model, task, {"rates": [2e-2]}),
}  # fmt: skip


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    log = tmp_path_factory.mktemp("study") / "log.json"
    compare(model(), task(), [SCHEME], ["absmax"], log=log, **ONCE)
    return log.read_text()


@pytest.mark.parametrize("what", OTHERS)
def test_a_log_gives_nothing_to_another_run(what, logged, tmp_path):
    start, other, changed = OTHERS[what]
    log = tmp_path / "log.json"
    log.write_text(logged)
    arguments = ONCE | changed
    resumed = compare(start(), other(), [SCHEME], ["absmax"], log=log, **arguments)
    alone = compare(start(), other(), [SCHEME], ["absmax"], **arguments)
    assert resumed["value"].tolist() == alone["value"].tolist()
    kept, grown = results(logged), results(log.read_text())
    assert kept.items() <= grown.items()
    assert sum(key.endswith("test") for key in grown) == 2 * 3  # control, nearest, absmax


def test_the_same_run_in_another_process_is_found_again(logged, tmp_path, monkeypatch):
    log = tmp_path / "log.json"
    log.write_text(logged)
    monkeypatch.setattr(runs.Runs, "_train", None)  # nothing is trained
    compare(model(), task(), [SCHEME], ["absmax"], log=log, **ONCE)
    monkeypatch.setattr(torch, "__version__", "99.0")
    with pytest.raises(TypeError, match="not callable"):
        compare(model(), task(), [SCHEME], ["absmax"], log=log, **ONCE)


def test_arms_of_one_name_are_told_apart_by_what_they_do(tmp_path):
    log = tmp_path / "log.json"

    def arm(method):
        return Arm("mine", lambda model, scheme, task, skip: prepare_qat(model, scheme, method))

    values = [
        compare(model(), task(), [SCHEME], [made], log=log, **ONCE).loc[("W2 row", "mine"), "value"]
        for made in (arm("absmax"), arm("mse"), replace(arm("absmax"), float_share=0.5),
                     replace(arm("absmax"), distil=True))
    ]  # fmt: skip
    assert len(set(values)) == 4
    again = compare(model(), task(), [SCHEME], [arm("absmax")], log=log, **ONCE)
    assert again.loc[("W2 row", "mine"), "value"] == values[0]


def test_two_arms_of_one_name_are_refused_and_one_named_twice_is_one_row():
    mine = Arm("lsq", lambda model, scheme, task, skip: prepare_qat(model, scheme, "lsq"))
    for methods in (["lsq", mine], [replace(mine, name="nearest")], [replace(mine, name="float")]):
        with pytest.raises(ValueError, match="two different arms are called"):
            compare(model(), task(), [SCHEME], methods, **ONCE)
    table = compare(model(), task(), [SCHEME, SCHEME], ["absmax", NEAREST, "absmax"], **ONCE)
    assert table["seeds"].tolist() == [1, 1]
    assert len(compare(model(), task(), SCHEME, "absmax", **ONCE)) == 2


def test_an_arm_may_change_the_model_that_it_is_given():
    def spoil(model, scheme, task, skip):
        for parameter in model.parameters():
            parameter.data.zero_()
        return prepare_qat(model, scheme, "absmax")

    columns = ["float", "value"]
    clean = compare(model(), task(), [SCHEME], ["nearest-mse"], **QUICK)
    spoiled = compare(model(), task(), [SCHEME], [
        Arm("early", spoil), Arm("late", spoil, float_share=1.0), "nearest-mse"], **QUICK)  # fmt: skip
    both = [("W2 row", "nearest"), ("W2 row", "nearest-mse")]
    assert spoiled.loc[both, columns].equals(clean.loc[both, columns])


# models that are kept


def test_a_model_that_is_lost_or_of_another_run_is_trained_again(tmp_path):
    log, models = tmp_path / "log.json", tmp_path / "models"
    arguments = ONCE | {"log": log}
    compare(model(), task(), [SCHEME], ["absmax"], **arguments)
    compare(model(), task(), [SCHEME], ["absmax"], models=models, **arguments)
    folder = models / "W2-row-absmax"
    first = load_quantized(folder, model())
    assert sorted(path.name for path in models.iterdir()) == ["W2-row-absmax", "W2-row-nearest"]

    (folder / "config.json").unlink()
    (folder / "run.json").unlink()
    (folder / "model.safetensors").unlink()
    compare(model(), task(), [SCHEME], ["absmax"], models=models, **arguments)
    again = load_quantized(folder, model())
    assert all(torch.equal(a, b) for a, b in zip(
        first.state_dict().values(), again.state_dict().values(), strict=True))  # fmt: skip

    compare(model(), task(4), [SCHEME], ["absmax"], models=models, **arguments)
    assert not torch.equal(load_quantized(folder, model())[0].integers, first[0].integers)
    compare(model(), task(), [SCHEME], ["absmax"], models=models, **arguments)
    assert torch.equal(load_quantized(folder, model())[0].integers, first[0].integers)


def test_folders_of_other_origin_are_not_written_over(tmp_path):
    folder = tmp_path / "W2-row-absmax"
    folder.mkdir()
    (folder / "model.safetensors").write_text("dear to somebody")
    with pytest.raises(CheckpointError, match="no comparison wrote"):
        compare(model(), task(), [SCHEME], ["absmax"], models=tmp_path, **ONCE)
    assert (folder / "model.safetensors").read_text() == "dear to somebody"
    assert not (tmp_path / "W2-row-nearest").exists()
    with pytest.raises(ValueError, match="seeds be at least 1"):
        compare(model(), task(), [SCHEME], ["absmax"], models=tmp_path, **ONCE | {"seeds": 0})


def test_a_trial_is_the_run_that_tuning_does(tmp_path):
    log = tmp_path / "log.json"
    table = compare(model(), task(), [SCHEME], ["delayed"], steps=8, seeds=0, rates=[1e-3, 2e-3],
                    log=log, progress=False)  # fmt: skip
    assert table.empty
    rates = table.attrs["rates"]
    alone = trial(model(), task(), SCHEME, "delayed", steps=8, rate=1e-3,
                  float_rate=rates["float"], progress=False)  # fmt: skip
    stored = [run for key, run in results(log.read_text()).items() if "delayed" in key
              and "validation" in key and run["lr"] == 1e-3]  # fmt: skip
    assert stored[0]["validation_loss"] == alone["validation_loss"]
    assert "total" not in alone


@pytest.mark.parametrize(
    ("schemes", "methods", "rates", "error", "message"),
    [
        ([SCHEME], ["qlora"], [1e-3], ValueError, r"'qlora' is unknown: choose from nearest, "),
        ([SCHEME], [prepare_qat], [1e-3], ValueError, "is unknown: choose from nearest, "),
        (["W2"], ["absmax"], [1e-3], SchemeError, "'W2' is no scheme: .*parse_scheme"),
        ([SCHEME], ["absmax"], [], ValueError, "no learning rate"),
        ([SCHEME], ["absmax"], {"float": 1e-3}, ValueError, "lack 'absmax W2 row'"),
    ],
)
def test_what_cannot_be_compared_is_named_at_once(schemes, methods, rates, error, message):
    with pytest.raises(error, match=message):
        compare(model(), task(), schemes, methods, **ONCE | {"rates": rates})


def test_what_stays_float_takes_the_bytes_of_a_bfloat16_checkpoint(tmp_path):
    start = model().bfloat16().float()
    table = compare(start, task(), SCHEME, "lsq", skip=["0"], models=tmp_path, **ONCE)
    (file,) = tmp_path.glob("*lsq*/model.safetensors")
    kept = load_file(file)["0.weight"]
    assert kept.dtype == torch.bfloat16
    assert not torch.equal(kept, start[0].weight.bfloat16())  # it was trained
    run = next(r for r in table.attrs["runs"] if r["method"] == "lsq")
    assert run["bytes"] == pytest.approx(file.stat().st_size, abs=64)  # the file's own metadata
