"""The claims of chapter 7, on the committed results of three seeds and on one small re-run."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.classic_road import measure
from companion.evaluation.estimates import Paired, paired

MARGIN = 0.02  # fixed before the results were looked at
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "classic_road.json"
CONTENT = json.loads(RESULTS.read_text())
WIDTHS = [8, 4, 2]


def compare(records: list[dict], first: tuple[str, int], second: tuple[str, int]) -> Paired:
    """Compare two arms in pairs, image by image, over all seeds."""

    def column(arm, bits, field="predictions"):
        chosen = [r for r in records if (r["arm"], r["bits"]) == (arm, bits)]
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


def test_int8_qat_is_not_below_its_float_control():
    assert compare(CONTENT["records"], ("qat", 8), ("float", 32)).difference.low > -MARGIN


def test_two_bit_qat_is_clearly_above_ptq():
    assert compare(CONTENT["records"], ("qat", 2), ("ptq", 2)).difference.low > 0


def test_fine_tuning_is_clearly_above_from_scratch():
    assert compare(CONTENT["records"], ("float", 32), ("scratch", 32)).difference.low > 0


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("arm", ["qat", "ptq"])
def test_fake_and_converted_predictions_agree(arm, bits):
    result = compare(CONTENT["records"], (arm, bits), (f"{arm} fake", bits))
    assert result.agreement >= 0.99


def test_small_rerun_shows_the_same():
    records = measure(seeds=1, bits=(2,), steps=60)
    assert compare(records, ("qat", 2), ("ptq", 2)).difference.low > 0.1
    assert compare(records, ("qat", 2), ("qat fake", 2)).agreement >= 0.98
