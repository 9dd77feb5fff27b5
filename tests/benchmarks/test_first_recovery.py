"""The claims of chapter 10 on the committed results of several seeds, and one small cell re-run."""

import json

import numpy as np
import pytest

from benchmarks.first_recovery import RATES, SCHEMES, train
from benchmarks.provenance import RESULTS
from companion import W2, convert, load_task, prepare_qat
from companion.evaluation.language import DocumentLosses, document_losses, loss_difference, recovery

CONTENT = json.loads((RESULTS / "first_recovery.json").read_text())
RECORDS = CONTENT["records"]
SEEDS = range(3)


def losses(arm: str, scheme: str, seed: int) -> DocumentLosses:
    (found,) = (r for r in RECORDS if (r["arm"], r["scheme"], r["seed"]) == (arm, scheme, seed))
    return DocumentLosses(np.array(found["loss"]), np.array(found["tokens"]))


def arms(scheme: str, seed: int) -> tuple[DocumentLosses, DocumentLosses, DocumentLosses]:
    return (
        losses("control", "float", seed),
        losses("ptq", scheme, seed),
        losses("qat", scheme, seed),
    )


def test_every_arm_had_the_same_number_of_trials_and_seeds():
    for scheme in ("float", *SCHEMES):
        trials = [r for r in RECORDS if r["arm"] == "tuning" and r["scheme"] == scheme]
        assert sorted(r["lr"] for r in trials) == sorted(RATES)
        best = min(trials, key=lambda r: r["validation_loss"])["lr"]
        arm = "control" if scheme == "float" else "qat"
        chosen = [r["lr"] for r in RECORDS if (r["arm"], r["scheme"]) == (arm, scheme)]
        assert chosen == [best] * len(SEEDS)


def test_two_bits_recover_at_least_four_fifths_of_the_damage():
    seeds = [arms("W2", seed) for seed in SEEDS]
    mean = [
        DocumentLosses(np.mean([run.loss for run in arm], axis=0), arm[0].tokens)
        for arm in zip(*seeds, strict=True)
    ]
    found = recovery(*mean)
    assert found.share.value >= 0.8, str(found)
    assert found.share.low > 0.7
    for each in seeds:
        assert recovery(*each).damage.low > 0.1
        assert recovery(*each).share.value > 0.75


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_never_ends_worse_than_rounding(scheme):
    for seed in SEEDS:
        _, ptq, qat = arms(scheme, seed)
        assert loss_difference(qat, ptq).low < 0


def test_damage_grows_as_bits_fall():
    for seed in SEEDS:
        damage = {name: recovery(*arms(name, seed)).damage.value for name in SCHEMES}
        assert damage["W2"] > damage["W3"] > damage["W4"]


def test_a_small_cell_run_again_shows_the_same():
    task = load_task("language-reference")
    rates = {r["scheme"]: r["lr"] for r in RECORDS if r["arm"] in ("control", "qat")}
    control, _ = train(None, rates["float"], seed=0, steps=30, task=task)
    qat, _ = train(W2, rates["W2"], seed=0, steps=30, task=task)
    rounded = convert(prepare_qat(control, W2, "absmax"))
    found = recovery(*(document_losses(m, task.test) for m in (control, rounded, convert(qat))))
    assert found.damage.low > 0.1
    assert found.share.low > 0.4
