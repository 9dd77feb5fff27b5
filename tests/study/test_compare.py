"""`compare`: what arms share, what is tuned, and what an interruption keeps."""

import json

import pytest
import torch
from torch import nn

from companion import QuantScheme, compare, prepare_qat
from companion.study.compare import trial
from companion.study.recipes import ARMS, Arm

SCHEME = QuantScheme(2, None)
QUICK = {"steps": 8, "seeds": 2, "rates": [1e-3], "progress": False}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 16), nn.ReLU(), nn.Linear(16, 5))


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
    compare(model(), "digits-5-9", [SCHEME], [spy(early)], **QUICK)
    compare(model(), "digits-5-9", [SCHEME], [spy(late, float_share=0.5)], **QUICK)
    early, late = early[6:], late[6:]  # after the six steps that the cost is timed with
    assert (len(early), len(late)) == (16, 8)
    assert late == early[4:8] + early[12:16]  # the second half of each seed's batches
    assert early[:8] != early[8:]


def test_control_is_the_float_model_on_the_same_batches():
    table = compare(model(), "digits-5-9", [SCHEME, QuantScheme(8, None)], ["absmax"], **QUICK)
    runs = table.attrs["runs"]
    control = [run for run in runs if run["method"] == "float"]
    assert [run["seed"] for run in control] == [0, 1]
    assert {run["training_tokens"] for run in runs} == {
        8 * 32 - 2 * 28
    }  # examples, two short batches
    eight = table.loc[("W8 row", "nearest")]
    assert abs(eight["difference"]) < 0.01 < table.loc[("W2 row", "nearest"), "difference"]
    assert (table["cost"] >= 1).all() or table["cost"].notna().all()
    assert table.loc[("W2 row", "absmax"), "bytes"] < 0.1 * control[0]["bytes"]


def test_rates_are_tuned_on_validation_only_and_can_be_passed_on(tmp_path):
    log = tmp_path / "log.json"
    rates = [1e-9, 3e-3]
    arguments = {"steps": 8, "seeds": 1, "tuning_steps": 6, "progress": False, "log": log}
    table = compare(
        model(), "digits-5-9", [SCHEME], ["absmax", "nearest-mse"], rates=rates, **arguments
    )
    assert table.attrs["rates"] == {"float": 3e-3, "absmax W2 row": 3e-3}
    stored = json.loads(log.read_text())
    trials = {key: run for key, run in stored.items() if key.endswith("validation")}
    assert len(trials) == 4  # two arms, two rates: post-training arms take the control's
    assert not any("total" in run for run in trials.values())
    again = compare(
        model(), "digits-5-9", [SCHEME], ["absmax"], rates=table.attrs["rates"], **arguments
    )
    assert again.loc[("W2 row", "absmax")].equals(table.loc[("W2 row", "absmax")])
    assert json.loads(log.read_text()) == stored


def test_goes_on_after_an_interruption(tmp_path, monkeypatch):
    log = tmp_path / "log.json"
    whole = compare(model(), "digits-5-9", [SCHEME], ["absmax"], **QUICK)

    def broken(model, scheme, task, skip):
        raise KeyboardInterrupt

    monkeypatch.setitem(ARMS, "absmax", Arm("absmax", broken))
    with pytest.raises(KeyboardInterrupt):
        compare(model(), "digits-5-9", [SCHEME], ["absmax"], log=log, **QUICK)
    kept = json.loads(log.read_text())
    assert len(kept) == 2  # the control and its rounding
    monkeypatch.undo()
    resumed = compare(model(), "digits-5-9", [SCHEME], ["absmax"], log=log, **QUICK)
    columns = ["value", "recovered", "recovered_low", "float"]
    assert resumed[columns].equals(whole[columns])
    assert kept.items() <= json.loads(log.read_text()).items()


def test_another_model_is_not_taken_for_the_logged_one(tmp_path):
    log = tmp_path / "log.json"
    first = compare(model(), "digits-5-9", [SCHEME], [], log=log, **QUICK)
    other = model()
    other[1].weight.data.mul_(2)
    second = compare(other, "digits-5-9", [SCHEME], [], log=log, **QUICK)
    assert first.loc[("W2 row", "nearest"), "value"] != second.loc[("W2 row", "nearest"), "value"]


def test_a_trial_is_the_run_that_tuning_does(tmp_path):
    log = tmp_path / "log.json"
    compare(model(), "digits-5-9", [SCHEME], ["delayed"], steps=8, seeds=0, rates=[1e-3, 2e-3],
            log=log, progress=False)  # fmt: skip
    alone = trial(model(), "digits-5-9", SCHEME, "delayed", steps=8, rate=1e-3, float_rate=2e-3,
                  progress=False)  # fmt: skip
    stored = [run for key, run in json.loads(log.read_text()).items() if "delayed" in key
              and "validation" in key and run["lr"] == 1e-3]  # fmt: skip
    assert stored[0]["validation_loss"] == alone["validation_loss"]
    assert "total" not in alone


def test_unknown_method():
    with pytest.raises(
        ValueError, match=r"'qlora' is unknown: choose from nearest, .*, or pass an Arm"
    ):
        compare(model(), "digits-5-9", [SCHEME], ["qlora"], **QUICK)
