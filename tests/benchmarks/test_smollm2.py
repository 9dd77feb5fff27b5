"""What is told of SmolLM2, held against the committed records."""

import json
from pathlib import Path

import pytest

from benchmarks.arms import SEEDS
from companion.study.tables import Results, worse

ROOT = Path(__file__).parents[2]
CONTENT = json.loads((ROOT / "benchmarks" / "results" / "smollm2.json").read_text())
PACKAGES = CONTENT["packages"]
LEARNED, TORCHAO, FLOAT = "lsq calibrated, labels, first", "torchao, labels, first", "float"


def arm(scheme: str, method: str) -> Results:
    """Runs of the budget's steps that were measured on test, one a draw."""
    found = [r for r in CONTENT["records"] if "total" in r and r["steps"] == 100
             and (r["scheme"], r["method"]) == (scheme, method)]  # fmt: skip
    assert [run["seed"] for run in sorted(found, key=lambda run: run["seed"])] == [*SEEDS]
    return Results(found, PACKAGES)


def test_at_two_bits_learned_steps_are_ahead_of_torchao_with_intervals_apart():
    learned, torchao = arm("W2 g32", LEARNED), arm("W2 g32", TORCHAO)
    assert learned.estimate().high < torchao.estimate().low
    assert worse(torchao, learned).low > 1


def test_readme_says_what_the_records_say():
    readme = " ".join((ROOT / "README.md").read_text().split())
    learned, torchao = arm("W2 g32", LEARNED), arm("W2 g32", TORCHAO)
    lead = worse(torchao, learned)
    ends = [arm.estimate().value for arm in (learned, torchao, arm("float", FLOAT))]
    assert (
        "end at {:.2f} nats a token, torchao's QAT at {:.2f}, floating point at {:.2f}".format(
            *ends
        )
        in readme
    )
    assert f"ahead by {lead.value:.2f} [{lead.low:.2f}, {lead.high:.2f}]" in readme
    assert f"{len(PACKAGES)} test excerpts: learned" in readme


@pytest.mark.parametrize("draw", SEEDS)
def test_every_draw_says_so(draw):
    ends = {r["method"]: r["loss"] for r in CONTENT["records"]
            if "total" in r and r["scheme"] == "W2 g32" and r["seed"] == draw}  # fmt: skip
    assert ends[LEARNED] + 1 < ends[TORCHAO]
