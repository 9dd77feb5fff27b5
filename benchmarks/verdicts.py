"""The comparisons that benchmarks/hypotheses.md announces, judged by the rule it states."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.arms import SEEDS
from companion.study.tables import Results, holm, p_value, worse

LEVEL, TIE = 0.05, 0.01
"""Of a whole family; differences in nats below the second are ties whatever their interval."""
Duel = tuple[str, str | tuple[str, ...], str]
"""Scheme, first arm (of several, the one that is best on validation), second arm."""
Families = dict[str, Sequence[Duel]]


def judge(
    records: Sequence[dict], packages: Sequence[str], families: Families, steps: int
) -> list[dict]:
    """Judge every family whose runs are complete.

    Parameters
    ----------
    records : sequence of dict
        Those with ``total`` were measured on test.
    packages : sequence of str
        Of each test document: documents are resampled within their packages.
    families : dict
    steps : int
        Of the runs that are compared; longer ones are looked at elsewhere.

    Returns
    -------
    list of dict
        ``difference`` is by how many nats a token the second arm is worse than the first, with
        its 95 % interval; ``p`` is adjusted by Holm's method within the family.
    """
    cells: dict[tuple[str, str], list[dict]] = {}
    for record in sorted(records, key=lambda record: record["seed"]):
        if "total" in record and record["steps"] == steps:
            cells.setdefault((record["scheme"], record["method"]), []).append(record)
    complete = {c: runs for c, runs in cells.items() if [r["seed"] for r in runs] == [*SEEDS]}
    for cell, runs in cells.items():
        if len({run["seed"] for run in runs}) < len(runs):
            raise ValueError(f"{cell} has two runs of one draw: leave out what is not to count")
    lines = []
    for family, duels in families.items():
        found = []
        for scheme, candidates, second in duels:
            names = (candidates,) if isinstance(candidates, str) else candidates
            if any((scheme, name) not in complete for name in (*names, second)):
                continue
            first = min(names, key=lambda name: _validation(complete[scheme, name]))
            arms = [Results(complete[scheme, name], packages) for name in (first, second)]
            lead = worse(arms[1], arms[0])
            found.append({"family": family, "scheme": scheme, "first": first, "second": second,
                          "difference": lead.value, "low": lead.low, "high": lead.high,
                          "n": lead.n, "p": p_value(*arms)})  # fmt: skip
        if len(found) == len(duels):
            for line, p in zip(found, holm([line["p"] for line in found]), strict=True):
                lines.append(line | {"p": p, "verdict": _verdict(line["difference"], p)})
    return lines


def _validation(runs: Sequence[dict]) -> float:
    return sum(run["validation_loss"] for run in runs) / len(runs)


def _verdict(difference: float, p: float) -> str:
    if abs(difference) < TIE:
        return "tie"
    if p >= LEVEL:
        return "undecided"
    return "better" if difference > 0 else "worse"
