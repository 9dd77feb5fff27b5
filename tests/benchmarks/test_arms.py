"""The studies: their arms do what they say, no control is void, rates are chosen inside."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from benchmarks import recovery, smollm2
from benchmarks.arms import (
    FLOAT,
    IMITATING_FLOAT,
    TUNING,
    W2,
    Arm,
    Budget,
    CapturableStep,
    Imitation,
    Job,
    Study,
)
from benchmarks.excerpts import Texts
from benchmarks.verdicts import judge
from companion import prepare_qat
from companion.study.tables import scheme_name
from companion.training.losses import distillation_loss

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STUDIES = [recovery, smollm2]
LENGTHS = {recovery: {*recovery.CURVE, *recovery.EQUAL.values()}, smollm2: {smollm2.LONG}}


def tiny(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.fixture
def study(tmp_path) -> Study:
    rows = torch.randint(3, 64, (40, 256), generator=torch.Generator().manual_seed(0))
    rows[:, ::2] = 5  # something to learn
    held_out = {part: rows[:8, :255].int() for part in ("validation", "test")}
    packages = {part: ["a"] * 8 for part in held_out}
    texts = Texts(dict.fromkeys((0, 1, 2, TUNING), rows), held_out, packages, "", {})
    budget = Budget((2e-5, 6e-5, 2e-4), (5e-5, 1.5e-4, 5e-4))
    return Study(tmp_path, texts, tiny(), torch.device("cpu"), math.inf, budget, small=True)


def test_imitation_is_the_distillation_loss():
    teacher, student = tiny(0).eval(), tiny(1)
    rows = torch.randint(3, 64, (2, 16))
    batch = {"input_ids": rows, "labels": rows}
    ours, theirs = Imitation(teacher)(student, batch), distillation_loss(teacher)(student, batch)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    assert float(ours) > 0.01


def test_capturable_steps_are_learned_steps():
    model = tiny()
    model.model.layers[0].mlp.up_proj.weight.data[:4] *= 1e-4  # groups that follow their weights
    rows, pair = torch.arange(3, 19)[None], []
    for method in (CapturableStep, "lsq"):
        prepared = prepare_qat(model, W2, method)
        assert prepared.model.layers[0].mlp.up_proj.quantizer.follows.any()
        prepared(rows, labels=rows).loss.backward()
        pair.append(
            {n: p.grad for n, p in prepared.named_parameters()} | {"": prepared(rows).logits}
        )
    assert all(torch.equal(pair[0][name], pair[1][name]) for name in pair[0])


ARMS = {job.arm for module in (smollm2, recovery) for job in module.jobs() if isinstance(job, Job)}


@pytest.mark.parametrize("arm", sorted(ARMS, key=lambda arm: arm.name), ids=lambda arm: arm.name)
def test_no_arm_and_no_control_is_void(arm, study):
    assert IMITATING_FLOAT in ARMS
    job = Job(arm, None if arm.method == "float" else W2)
    before = copy.deepcopy(study.start)
    record = study.run(job, 0, 1e-2, test=True)
    moved = [loss for _, loss in record["validation"]]
    if arm.start == "blocks":  # comes closer to a control that four steps have hardly trained
        assert moved[-1] != moved[0]
    else:
        assert moved[-1] < moved[0]  # what trains here learns, whatever it imitates
        assert record["loss"] < study.measure(study.start, "test").mean
    same = zip(before.parameters(), study.start.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)  # the next arm starts from the same


def test_a_run_is_done_once(study, monkeypatch):
    first = study.run(Job(FLOAT), 0, 1e-3, test=False)
    monkeypatch.setattr(study, "train", None)
    assert study.run(Job(FLOAT), 0, 1e-3, test=False) == first
    study.deadline = 0
    with pytest.raises(TimeoutError):
        study.run(Job(FLOAT), 1, 1e-3, test=False)


def test_a_cpu_with_bfloat16_trains_in_it_and_measures_in_float32(study, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for wanted in (True, False):
        budget = replace(study.budget, bfloat16=wanted)
        again = Study(study.work / str(wanted), study.texts, study.start, study.device, math.inf,
                      budget, small=True)  # fmt: skip
        seen = []
        hook = again.start.lm_head.register_forward_hook(
            lambda *a, seen=seen: seen.append(a[2].dtype)
        )
        record = again.run(Job(FLOAT), 0, 1e-3, test=False)
        hook.remove()
        assert record["machine"].split(",")[0].endswith(" in bfloat16") == wanted
        assert (torch.bfloat16 in seen) == wanted
        assert seen[-1] == torch.float32
        assert record["validation"][-1][1] < record["validation"][0][1]


@pytest.mark.parametrize(("best", "trials"), [(1.5e-4, 3), (5e-5, 4), (4.5e-3, 6)])
def test_rates_are_tried_until_the_best_is_inside(best, trials, study, monkeypatch):
    study.small, tried = False, []

    def run(job, draw, rate, test):
        tried.append(rate)
        return {"validation_loss": abs(math.log(rate / best))}

    monkeypatch.setattr(study, "run", run)
    assert study.tune(Job(Arm("lsq"), W2)) == pytest.approx(best, rel=0.2)
    assert len(tried) == trials


@pytest.mark.parametrize("module", STUDIES, ids=lambda module: module.__name__)
def test_what_was_measured_on_test_had_its_rate_chosen_inside(module):
    name = module.__name__.split(".")[-1]
    records = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())["records"]
    trials: dict[tuple, dict] = {}
    for record in records:
        if record["seed"] == TUNING:
            cell = trials.setdefault((record["scheme"], record["method"]), {})
            cell[record["lr"]] = record["validation_loss"]
    for record in records:
        if "loss" in record and record["lr"]:
            tried = trials[record["scheme"], record["method"]]
            best = min(tried, key=tried.get)
            assert record["lr"] == best, record["name"]
            assert len(tried) >= 3
            assert min(tried) < best < max(tried), record["name"]
            assert record["steps"] in LENGTHS[module] | {module.BUDGET.steps}
            assert sum(record["total"]) / sum(record["weight"]) == pytest.approx(
                record["loss"], 1e-4
            )
            assert len(record["total"]) >= 200


@pytest.mark.parametrize("module", STUDIES, ids=lambda module: module.__name__)
def test_what_is_announced_is_what_runs(module):
    """Every arm of a family is a job; every family stands in the file of hypotheses."""
    text = (BENCHMARKS / "hypotheses.md").read_text()
    jobs = [job for job in module.jobs() if isinstance(job, Job) and job.draws]
    known = {tuple(job.name.split(", ", 1)) for job in jobs}
    known |= {(scheme_name(job[1]), job[0].replace("ptq", "gptq"))
              for job in module.jobs() if isinstance(job, tuple)}  # fmt: skip
    for family, duels in module.FAMILIES.items():
        assert f"Family {family[0]}:" in text or f"**{family}: " in text
        for scheme, first, second in duels:
            for name in (*((first,) if isinstance(first, str) else first), second):
                assert (scheme, name) in known


def record(method: str, seed: int, losses, validation: float = 1.0) -> dict:
    return {"scheme": "W2 g32", "method": method, "seed": seed, "total": list(losses),
            "weight": [1] * len(losses), "validation_loss": validation, "steps": 100,
            "higher_is_better": False}  # fmt: skip


def test_verdicts_follow_the_rule():
    noise = np.random.default_rng(0).normal(size=(3, 200))
    records = [record("a", seed, 2 + noise[seed]) for seed in range(3)]
    records += [record("b", seed, 2.5 + noise[seed], 0.5) for seed in range(3)]
    records += [record("same", seed, 2.001 + noise[seed]) for seed in range(3)]
    records += [record("wild", seed, 2.05 + 0.1 * seed * noise[0]) for seed in range(3)]
    records += [record("unfinished", 0, noise[0])]
    families = {
        "X": [("W2 g32", "a", "b"), ("W2 g32", "b", "a"), ("W2 g32", "a", "same"),
              ("W2 g32", "a", "wild"), ("W2 g32", ("a", "b"), "same")],
        "Y": [("W2 g32", "a", "unfinished"), ("W2 g32", "a", "b")],
    }  # fmt: skip
    packages = ["p"] * 100 + ["q"] * 100
    longer = [record("a", 0, noise[0]) | {"steps": 600}]
    lines = judge(records + longer, packages, families, 100)
    assert [line["verdict"] for line in lines] == ["better", "worse", "tie", "undecided", "worse"]
    assert lines[-1]["first"] == "b"  # by validation
    assert {line["family"] for line in lines} == {"X"}  # the other is not complete
    assert lines[0]["difference"] == pytest.approx(0.5)
    assert lines[0]["low"] <= 0.5 <= lines[0]["high"]
    with pytest.raises(ValueError, match="two runs of one draw"):
        judge([*records, record("a", 0, noise[1])], packages, families, 100)
