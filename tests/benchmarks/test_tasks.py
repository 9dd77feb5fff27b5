"""The claims of chapter 12, held against the committed results; one small cell begun anew."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks.tasks import IMITATION, LANGUAGE, STUDIES, TUNED, best_post_training
from companion import load_task
from companion.evaluation.estimates import Scores
from companion.study.compare import trial
from companion.study.tables import Results, worse

CONTENT = json.loads(
    (Path(__file__).parents[2] / "benchmarks" / "results" / "tasks.json").read_text()
)
TASKS = (LANGUAGE, *STUDIES)
QAT = {LANGUAGE: "default"} | {task: method.name for task, (_, _, method, *_) in STUDIES.items()}
TRAINED = ("W4 g32", "W3 row", "W2 g32", "W2 row")
SEEDS = CONTENT["provenance"]["settings"]["seeds"]


def runs(task, scheme, method):
    found = [run for run in CONTENT["runs"]
             if (run["task"], run["scheme"], run["method"]) == (task, scheme, method)]  # fmt: skip
    return sorted(found, key=lambda run: run["seed"])


def gain(task, scheme):
    """By how much QAT is better than the best post-training method, paired."""
    best = best_post_training(CONTENT["runs"], task, scheme)
    return worse(Results(runs(task, scheme, best)), Results(runs(task, scheme, QAT[task])))


@pytest.mark.parametrize("task", TASKS)
def test_every_arm_has_every_seed_and_the_same_steps(task):
    assert SEEDS >= 3
    arms = [("float", "float")]
    arms += [(scheme, method) for scheme in TRAINED for method in ("nearest", "gptq", QAT[task])]
    for scheme, method in arms:
        found = runs(task, scheme, method)
        assert [run["seed"] for run in found] == list(range(SEEDS))
        assert {run["steps"] for run in found} == {runs(task, "float", "float")[0]["steps"]}


@pytest.mark.parametrize("task", TASKS)
def test_float_model_is_clearly_better_than_the_baseline(task):
    control = runs(task, "float", "float")
    baseline = CONTENT["baselines"][task] | {"higher_is_better": control[0]["higher_is_better"]}
    assert worse(Results([baseline] * SEEDS), Results(control)).low > 0


def damage(task, scheme, method):
    """By how much the float control is better, paired."""
    return worse(Results(runs(task, scheme, method)), Results(runs(task, "float", "float")))


def lead(task, found):
    base = CONTENT["baselines"][task]["value"]
    control = Results(runs(task, "float", "float")).seeds.mean()
    return (Results(found).seeds.mean() - base) / (control - base)


@pytest.mark.parametrize("task", TASKS)
def test_many_bits_cost_nothing_that_can_be_told(task):
    for scheme in ("W8A8 row", "W4 g32"):
        if runs(task, scheme, "nearest"):
            loss = damage(task, scheme, best_post_training(CONTENT["runs"], task, scheme))
            assert loss.low <= 0 <= loss.high


def test_which_tasks_are_fragile():
    left = {task: lead(task, runs(task, "W2 row", "nearest")) for task in TASKS}
    assert left["cloze"] > 0.5
    assert max(value for task, value in left.items() if task != "cloze") < left["cloze"]
    assert {task for task, value in left.items() if value < 0} == {
        "topics", "summaries", "code-words"}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_gptq_returns_most_of_what_rounding_lost(task):
    nearest, gptq = (Results(runs(task, "W2 row", m)).seeds.mean() for m in ("nearest", "gptq"))
    control = Results(runs(task, "float", "float")).seeds.mean()
    share = (nearest - gptq) / (nearest - control)
    assert share > (0.3 if task == "cloze" else 0.5)
    assert worse(Results(runs(task, "W2 row", "nearest")),
                 Results(runs(task, "W2 row", QAT[task]))).low > 0  # fmt: skip


ABOVE = {(LANGUAGE, "W3 row"), (LANGUAGE, "W2 g32")} | {
    (task, "W2 row") for task in (LANGUAGE, "cloze", "code-words")
}


@pytest.mark.parametrize("scheme", TRAINED)
@pytest.mark.parametrize("task", TASKS)
def test_where_training_pays_and_where_it_ties(task, scheme):
    found = gain(task, scheme)
    assert found.high > 0  # nowhere clearly below
    assert (found.low > 0) == ((task, scheme) in ABOVE)


def test_the_language_model_had_four_times_the_steps():
    steps = {task: runs(task, "float", "float")[0]["steps"] for task in TASKS}
    assert steps[LANGUAGE] == 4 * steps["topics"] == 4 * steps["summaries"]


def test_records_follow_from_the_runs():
    known = {(run["task"], run["scheme"], run["method"], run["seed"]):
             Scores(np.array(run["total"]), np.array(run["weight"])) for run in CONTENT["runs"]}  # fmt: skip
    assert len(CONTENT["records"]) == len(known)
    for record in CONTENT["records"]:
        task, scheme, method, seed = (record[k] for k in ("task", "scheme", "method", "seed"))
        estimate = known[task, scheme, method, seed].estimate()
        assert record["value"] == pytest.approx(estimate.value)
        assert (record["low"], record["high"], record["n"]) == (
            pytest.approx(estimate.low), pytest.approx(estimate.high), estimate.n)  # fmt: skip
        assert record["baseline"] == CONTENT["baselines"][task]["value"]
        if method == "float":
            continue
        best = best_post_training(CONTENT["runs"], task, scheme)
        others = {
            "float": ("float", "float"),
            "ptq": (scheme, "nearest"),
            "best_ptq": (scheme, best),
        }
        for key, of in others.items():
            assert record[key] == pytest.approx(known[task, *of, seed].value)
        if record["ptq"] != record["float"]:
            share = (record["ptq"] - record["qat"]) / (record["ptq"] - record["float"])
            assert record["recovered"] == pytest.approx(share)


def test_rates_were_judged_on_validation_with_equal_trials():
    levers = CONTENT["levers"]
    assert {lever["seed"] for lever in levers} == {100}  # none of the seeds of the table
    assert all("total" not in lever for lever in levers)
    trials = Counter((lever["task"], lever["method"]) for lever in levers)
    assert set(trials) == {(task, m) for task in STUDIES for m in ("float", QAT[task])}
    assert set(trials.values()) == {2}


def test_a_small_cell_begins_and_goes_on_alike():
    """A trial of QAT on the cloze task: the stored loss before the first step, and less after."""
    (stored,) = (lever for lever in CONTENT["levers"]
                 if (lever["task"], lever["method"], lever["lr"]) == ("cloze", IMITATION.name, 1e-3))  # fmt: skip
    model, _, _, _, options = STUDIES["cloze"]
    again = trial(model, load_task("cloze", **options), TUNED, IMITATION, steps=3,
                  rate=stored["lr"], progress=False)  # fmt: skip
    # a mean of some thousand float32 losses near 3, summed in another order by other kernels; and
    # the searched start of a learned step may fall on a neighbour where two errors agree that far
    assert again["validation"][0] == [0, pytest.approx(stored["validation"][0][1], rel=1e-4)]
    assert again["validation_loss"] < again["validation"][0][1] - 0.02
    assert (again["bytes"], again["float_steps"]) == (stored["bytes"], stored["float_steps"])
