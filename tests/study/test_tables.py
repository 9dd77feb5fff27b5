"""From runs to shares with intervals: arithmetic by hand, coverage by simulation."""

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from companion import W4, W4A8, W8A8, Activations, QuantScheme, recovery
from companion.evaluation.language import DocumentLosses
from companion.study.tables import (
    Results,
    across_seeds,
    difference,
    recovered,
    scheme_name,
    tabulate,
)

TOKENS = [100, 50, 10]


def run(method, seed, scale, scheme="W2 g32", **extra):
    return {"scheme": "float" if method == "float" else scheme, "method": method, "seed": seed,
            "total": [scale * n for n in TOKENS], "weight": TOKENS, "metric": "loss",
            "higher_is_better": False, "steps": 4, "float_steps": 0,
            "lr": 1e-3, "bytes": 10, "training_tokens": 40, "cost": 1.5} | extra  # fmt: skip


def as_run(total, weight, higher_is_better=False):
    return {"total": list(total), "weight": list(weight), "higher_is_better": higher_is_better}


def test_short_names_stay_short():
    names = ["float", "W4 g32", "W2 row", "W8A8 row", "W4A8 g32", "W4A8 g64", "W8A2 row"]
    schemes = [None, W4, QuantScheme(2, None), W8A8, W4A8,
               QuantScheme(4, 64, activations=Activations(8)),
               QuantScheme(8, None, activations=Activations(2))]  # fmt: skip
    assert [scheme_name(scheme) for scheme in schemes] == names


def test_no_two_schemes_share_a_name():
    """Every field of a scheme and of its activations is in the name where it is unusual."""
    formats = [None] + [
        Activations(bits, granularity, symmetric, used)
        for bits in (2, 8)
        for granularity in ("token", "tensor", "block")
        for symmetric in (True, False)
        for used in (None, (0, 3), (-1, 1))
    ]
    schemes = [
        QuantScheme(bits, size, dtype, activations)
        for bits in (2, 4, 8)
        for size in (None, 32, 64)
        for dtype in (torch.float16, torch.bfloat16, torch.float32)
        for activations in formats
    ]
    names = {scheme_name(scheme) for scheme in schemes}
    assert len(names) == len(set(schemes)) == len(schemes)
    assert not any("/" in name for name in names)  # they become names of folders
    assert {f.name for f in fields(QuantScheme)} | {f.name for f in fields(Activations)} == {
        "weight_bits", "group_size", "scale_dtype", "activations",
        "bits", "granularity", "symmetric", "range"}, "give the new field values above"  # fmt: skip


def test_shares_by_hand():
    runs = [
        run(method, seed, loss + 0.1 * seed)
        for seed in range(2)
        for method, loss in (("float", 3.0), ("nearest", 4.0), ("good", 3.1), ("worse", 4.5))
    ]
    table = tabulate(runs)
    assert list(table.index) == [("W2 g32", m) for m in ("nearest", "good", "worse")]
    good = table.loc[("W2 g32", "good")]
    assert good["recovered"] == pytest.approx(0.9)
    assert good["recovered_low"] == pytest.approx(0.9)  # both arms moved alike from seed to seed
    assert good["damage"] == pytest.approx(1.0)
    assert good["float"] == pytest.approx(3.05)
    assert table.loc[("W2 g32", "worse"), "recovered"] == pytest.approx(-0.5)
    assert table["seeds"].tolist() == [2, 2, 2]
    assert np.isnan(table.loc[("W2 g32", "nearest"), "recovered"])
    assert tabulate(table.attrs["runs"]).equals(table)


@pytest.mark.filterwarnings("error")
def test_a_resample_without_damage_has_no_share():
    hit = np.arange(100)
    control, nearest = (
        Results([as_run((hit < right).astype(float), np.ones(100), higher_is_better=True)])
        for right in (90, 86)
    )
    lost = nearest.resampled() - control.resampled()
    assert (lost == 0).any()
    share = recovered(control, nearest, control)
    assert (share.low, share.value, share.high) == (1, 1, 1)


def test_where_more_is_better_the_damage_is_what_was_lost():
    ones, hit = [1.0] * 100, np.arange(100)
    runs = [
        run(method, 0, 0.0, weight=ones, total=list((hit < right).astype(float)), metric="accuracy",
            higher_is_better=True)
        for method, right in (("float", 90), ("nearest", 50), ("good", 80), ("worse", 45))
    ]  # fmt: skip
    table = tabulate(runs).loc["W2 g32"]
    assert table["damage"].tolist() == pytest.approx([0.4] * 3)
    assert table.loc["good", "damage_low"] > 0
    assert table["recovered"].tolist()[1:] == pytest.approx([0.75, -0.125])
    assert table.loc["good", "difference"] == pytest.approx(-0.1)
    assert table.loc["good", "value_low"] < table.loc["good", "value"] == pytest.approx(0.8)
    better = [dict(r, total=list((hit < 95).astype(float))) if r["method"] == "nearest" else r
              for r in runs]  # fmt: skip
    assert tabulate(better)["recovered"].isna().all()


def test_an_f1_score_may_weigh_what_each_run_answers():
    runs = [as_run([2.0, 0.0], weight, True) for weight in ([2.0, 1.0], [3.0, 2.0])]
    assert Results(runs).seeds.tolist() == pytest.approx([2 / 3, 2 / 5])


def test_no_damage_nothing_to_recover():
    arms = {"float": 3.0, "nearest": 3.0, "good": 2.9}
    table = tabulate([run(method, 0, loss) for method, loss in arms.items()])
    assert np.isnan(table.loc[("W2 g32", "good"), "recovered"])
    assert table.loc[("W2 g32", "good"), "difference"] == pytest.approx(-0.1)


def test_one_seed_gives_the_interval_of_recovery():
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 200, 40)
    arms = [rng.normal(mean, 0.3, 40) * tokens for mean in (3.0, 4.0, 3.2)]
    expected = recovery(*(DocumentLosses(loss, tokens) for loss in arms)).share
    ours = recovered(*(Results([as_run(loss, tokens)]) for loss in arms))
    assert ours.value == pytest.approx(expected.value)
    assert (ours.low, ours.high) == pytest.approx((expected.low, expected.high))


def test_seeds_widen_the_interval():
    def arm(*scales):
        return Results([as_run(s * np.array(TOKENS), TOKENS) for s in scales])

    control, nearest = arm(3.0, 3.0, 3.0), arm(4.0, 4.0, 4.0)
    calm, wild = arm(3.1, 3.1, 3.1), arm(3.0, 3.1, 3.2)
    narrow, wide = (recovered(control, nearest, a) for a in (calm, wild))
    assert narrow.value == pytest.approx(wide.value)
    assert narrow.high - narrow.low < 1e-9
    assert (wide.high - wide.low) / 2 == pytest.approx(4.303 * 0.1 / 3**0.5, rel=0.02)
    # a share is a ratio: noise of its denominator counts as well
    noisy = recovered(control, arm(3.9, 4.0, 4.1), calm)
    assert noisy.high - noisy.low > 0.03


def test_intervals_of_means_over_seeds_cover():
    """Of intervals over three noisy seeds about 95 % hold the truth; without t, far fewer."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        values = rng.normal(0.0, 1.0, 3)
        estimate = across_seeds(np.full(2000, values.mean()), values, n=3)
        hits += estimate.low <= 0 <= estimate.high
    assert 0.92 < hits / 400 < 0.98


def test_intervals_of_a_study_cover():
    """Documents of packages that differ, three draws of the training text, two arms in pairs."""
    rng = np.random.default_rng(0)
    packages = np.repeat(["a", "b", "c"], [12, 18, 30])
    of_package = np.repeat([0.0, 0.3, -0.2], [12, 18, 30])  # how much more one arm gains there
    truth, weight, hits, runs, wide = 0.1 + of_package.mean(), rng.integers(190, 256, 60), 0, 120, 0
    for _ in range(runs):
        own = 0.1 + of_package + rng.normal(0, 0.1, 60)  # of each document
        noise = rng.normal(0, 0.02, (3, 1)) + rng.normal(0, 0.05, (3, 60))  # of each draw
        base = rng.normal(3.0, 0.5, 60)
        pair = ([as_run(loss * weight, weight) for loss in losses]
                for losses in (base + own + noise, base + np.zeros((3, 60))))  # fmt: skip
        first, second = (Results(found, packages) for found in pair)
        estimate = difference(first, second)
        hits += estimate.low <= truth <= estimate.high
        wide += estimate.high - estimate.low
    assert 0.9 < hits / runs <= 1  # t of three draws is a severe judge, never a lenient one
    assert wide / runs < 0.2  # and yet the interval says something
    plain = difference(Results(first_runs(first)), Results(first_runs(second)))
    assert plain.high - plain.low > estimate.high - estimate.low  # strata take their share out


def first_runs(results):
    return [as_run(scores.total, scores.weight) for scores in results.scores]


def arms(seeds=(0,), **more):
    return [run(method, seed, loss, **more) for seed in seeds
            for method, loss in (("float", 3.0), ("nearest", 4.0), ("good", 3.1))]  # fmt: skip


def test_runs_that_are_joined_share_their_controls():
    joined = arms() + [r if r["method"] != "good" else r | {"method": "new"} for r in arms()]
    table = tabulate(joined)
    assert table["seeds"].tolist() == [1, 1, 1]
    assert table.loc[("W2 g32", "new")].equals(table.loc[("W2 g32", "good")])


def test_seeds_are_paired_by_their_number_and_not_by_their_place():
    """The float control of each seed stands against the same seed's arms."""
    runs = [run(method, seed, loss + seed) for seed in range(3)
            for method, loss in (("float", 3.0), ("nearest", 4.0), ("good", 3.1))]  # fmt: skip
    turned = sorted(runs, key=lambda r: r["seed"] * (1 if r["method"] == "good" else -1))
    expected, found = tabulate(runs), tabulate(turned)
    assert found.loc[("W2 g32", "good")].equals(expected.loc[("W2 g32", "good")])


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([*arms(), run("good", 0, 3.2)], r"seeds \[0, 0\], and the control \[0\]"),
        ([*arms(), run("good", 1, 3.2)], r"seeds \[0, 1\], and the control \[0\]"),
        (arms((0, 1, 2))[:-1], r"seeds \[0, 1\], and the control \[0, 1, 2\]"),
        ([*arms(), run("good", 0, 3.2, recipe="b")], "differ in recipe"),
        ([*arms((0, 1))[:-1], run("good", 1, 3.1, lr=0.01)], "two recipes are called good at W2"),
        (arms() + arms(scheme="W4 g32", steps=8)[1:], r"differ in steps \(4, 8\)"),
        (arms() + arms(scheme="W4 g32", model="other")[1:], "differ in model"),
        (arms() + arms(scheme="W4 g32", task="other")[1:], "differ in task"),
        (arms() + arms(scheme="W4 g32", comparison="other")[1:], "differ in comparison"),
        (arms()[1:], "nothing to be compared to"),
        ([*arms(), run("good", 0, 3.1, scheme="W4 g32")], "nothing to be compared to"),
    ],
)
def test_runs_of_several_comparisons_are_not_mixed_up(runs, message):
    with pytest.raises(ValueError, match=message):
        tabulate(runs)


PUBLISHED = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*.json"))


SETTINGS = (
    "model", "task", "scheme", "method", "arm", "bits", "seed", "steps", "lr", "lever", "range",
    "start", "teacher", "share_of_divergence", "engine", "precision", "phase", "tokens", "case",
    "draw", "rate", "target", "step_rate", "what", "row", "reader", "job", "format",
)  # fmt: skip


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_no_published_table_mixes_runs_up(path):
    """Each row has one recipe and each seed once, and the files of before are still read."""
    content = json.loads(path.read_text())
    records = content["records"]
    settings = [{key: value for key, value in r.items() if key in SETTINGS} for r in records]
    for setting, record in zip(settings, records, strict=True):
        setting["part"] = record.get("part", "").split(" ")[
            0
        ]  # of the damage map: what is measured
    assert all(first not in settings[:place] for place, first in enumerate(settings))
    studies = {}
    served = path.stem == "deployed_speed"  # whose runs are those of a program, not of a study
    for one in content.get("runs", []) if not served else []:
        studies.setdefault((one["model"], one["task"]), []).append(one)
    for runs in studies.values():
        table = tabulate(runs)
        assert len(runs) == (len(table) + 1) * table["seeds"].iloc[0]
        assert (table["seeds"] == content["provenance"]["settings"]["seeds"]).all()


def test_other_documents_are_refused():
    for other in ([1, 2, 3], [100, 50]):
        with pytest.raises(ValueError, match="same examples"):
            Results([run("float", 0, 3.0), run("float", 1, 3.0, weight=other, total=other)])
    a = Results([run("float", 0, 3.0)])
    assert difference(a, a).value == 0
