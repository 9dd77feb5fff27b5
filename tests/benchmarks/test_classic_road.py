"""The claims of chapter 7, on the committed results of three seeds and on one small re-run."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.classic_road import MARGIN, POST_TRAINING, RATES, measure
from companion.evaluation.estimates import Paired, paired

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "classic_road.json"
CONTENT = json.loads(RESULTS.read_text())
WIDTHS = [8, 4, 2]


def compare(
    records: list[dict], first: tuple[str, int], second: tuple[str, int], rate: float = 0.02
) -> Paired:
    """Compare two arms in pairs, image by image, over all seeds."""

    def column(arm, bits, field="predictions"):
        chosen = [r for r in records if (r["arm"], r["bits"], r["lr"]) == (arm, bits, rate)]
        chosen.sort(key=lambda r: r["seed"])
        return np.array([int(c) for r in chosen for c in r[field]])

    return paired(column(*first), column(*second), column(*first, field="labels"))


def test_results_carry_their_provenance():
    assert set(CONTENT["provenance"]) == {"command", "settings", "versions", "machine", "date"}
    seeds = {r["seed"] for r in CONTENT["records"]}
    assert len(seeds) >= 3
    for record in CONTENT["records"]:
        predictions, labels = (np.array(list(record[k])) for k in ("predictions", "labels"))
        assert record["accuracy"] == pytest.approx(np.mean(predictions == labels))
        assert len(labels) == record["n"] == 596


def test_every_arm_has_every_rate_width_and_seed():
    found = {(r["lr"], r["arm"], r["bits"], r["seed"]) for r in CONTENT["records"]}
    assert len(found) == len(CONTENT["records"])
    rounded = [name for arm in (*POST_TRAINING, "qat") for name in (arm, f"{arm} fake")]
    cells = [(arm, bits) for arm in rounded for bits in WIDTHS] + [("float", 32), ("scratch", 32)]
    assert found == {(rate, *cell, seed) for rate in RATES for cell in cells for seed in range(3)}


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("arm", ["qat", "ptq"])
def test_int8_is_equivalent_to_its_float_control(arm, rate):
    difference = compare(CONTENT["records"], (arm, 8), ("float", 32), rate).difference
    assert -MARGIN < difference.low <= difference.high < MARGIN


@pytest.mark.parametrize(("arm", "bits"), [("qat", 2), ("qat", 4), ("ptq searched", 4)])
def test_at_the_better_rate_all_of_it_comes_back(arm, bits):
    difference = compare(CONTENT["records"], (arm, bits), ("float", 32)).difference
    assert -MARGIN < difference.low <= difference.high < MARGIN


def test_new_statistics_from_few_images_can_cost():
    pair = compare(CONTENT["records"], ("ptq batch norm", 8), ("float", 32), rate=0.001)
    assert pair.difference.high < 0


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("arm", POST_TRAINING)
def test_two_bit_qat_is_clearly_above_ptq_in_each_form(arm, rate):
    assert compare(CONTENT["records"], ("qat", 2), (arm, 2), rate).difference.low > 0


@pytest.mark.parametrize("rate", RATES)
def test_a_careful_rounding_is_clearly_above_a_plain_one_at_four_bits(rate):
    pair = compare(CONTENT["records"], ("ptq searched", 4), ("ptq", 4), rate)
    assert pair.difference.low > 0


def test_the_better_rate_is_better():
    accuracy = {rate: [r["accuracy"] for r in CONTENT["records"]
                       if (r["arm"], r["lr"]) == ("float", rate)] for rate in RATES}  # fmt: skip
    assert min(accuracy[0.02]) > max(accuracy[0.001])


def test_fine_tuning_is_clearly_above_from_scratch():
    """At the recipe's rate; at the better one these digits are learned from scratch as well."""
    records = CONTENT["records"]
    assert compare(records, ("float", 32), ("scratch", 32), rate=0.001).difference.low > 0
    assert compare(records, ("float", 32), ("scratch", 32), rate=0.02).difference.low < 0


def test_int8_is_faster_where_it_was_measured():
    for row in CONTENT["speed"]:
        assert row["int8_ms"] < row["float_ms"]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("arm", ["qat", "ptq searched"])
def test_fake_and_converted_predictions_agree(arm, bits, rate):
    result = compare(CONTENT["records"], (arm, bits), (f"{arm} fake", bits), rate)
    assert result.agreement >= (0.99 if arm == "qat" else 0.98)


def test_small_rerun_shows_the_same():
    records = measure(seeds=1, bits=(2,), steps=60, rates=(0.02,))
    assert compare(records, ("qat", 2), ("ptq", 2)).difference.low > 0.1
    assert compare(records, ("qat", 2), ("qat fake", 2)).agreement >= 0.98
    assert compare(records, ("ptq searched", 2), ("ptq", 2)).difference.low > 0
