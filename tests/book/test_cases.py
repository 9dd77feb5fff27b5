"""Every published figure of chapter 17 has a primary source that the bibliography lists."""

import json
import re
from pathlib import Path

BOOK = Path(__file__).parents[2] / "book"
CASES = json.loads((BOOK / "case_studies.json").read_text())
COSTS = json.loads((BOOK / "case_costs.json").read_text())
PRIMARY = ("url", "arXiv", "booktitle", "journal")


def entries() -> dict[str, str]:
    parts = re.split(r"\n(?=@)", (BOOK / "references.bib").read_text())
    return {re.match(r"@\w+\{([^,]+),", part)[1]: part for part in parts if part.startswith("@")}


def test_every_case_names_where_it_was_published():
    known = entries()
    for case in CASES + COSTS:
        assert case["where"].strip()
        assert any(field in known[case["source"]] for field in PRIMARY), case["source"]


def test_every_cited_report_of_the_chapter_can_be_found():
    known = entries()
    text = (BOOK / "ch17_real_world.py").read_text() + (BOOK / "next.md").read_text()
    cited = set(re.findall(r"\{cite:[pt]\}`([^`]+)`", text))
    assert {case["source"] for case in CASES + COSTS} <= cited
    for key in cited:
        assert any(field in known[key] for field in PRIMARY), key


def test_figures_are_what_they_are_called():
    """A float model is the best row or close to it; a share outside this range is a typing error."""
    for case in CASES:
        damage = case["ptq"] - case["float"]
        assert damage > 0 if "ppl" in case["metric"] else damage < 0
        share = (case["ptq"] - case["qat"]) / damage
        assert -0.2 < share < 1.3, case
