"""From the runs of a study to one tidy table: what rounding cost, and what came back.

Built in chapter 11.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from companion.errors import extra
from companion.evaluation.estimates import TAILS, Estimate, Scores, resampled
from companion.numerics.scheme import W8A8, Activations, QuantScheme

if TYPE_CHECKING:
    import pandas as pd


def scheme_name(scheme: QuantScheme | None) -> str:
    """Name a scheme so that no two share it: "W4 g32", "W8A8 row", and what else is unusual.

    Usual are float16 scales and, where activations are rounded, one asymmetric range for each
    token; for "W8A8 row" what `companion.W8A8` has. Every field that differs is added.

    Examples
    --------
    >>> scheme_name(QuantScheme(2, None)), scheme_name(None)
    ('W2 row', 'float')
    >>> scheme_name(QuantScheme(8, None, activations=Activations(2, "tensor", symmetric=True)))
    'W8A2 row granularity=tensor symmetric=True'
    """
    if scheme is None:
        return "float"
    rounded = scheme.activations
    group = "row" if scheme.group_size is None else f"g{scheme.group_size}"
    name = f"W{scheme.weight_bits}{f'A{rounded.bits}' if rounded else ''} {group}"
    usual = W8A8 if name == "W8A8 row" else QuantScheme(
        scheme.weight_bits, scheme.group_size, activations=rounded and Activations(rounded.bits)
    )  # fmt: skip
    ours, theirs = (_flat(each.to_dict()) for each in (scheme, usual))
    return " ".join([name, *(f"{key}={ours[key]}" for key in ours if ours[key] != theirs[key])])


def _flat(described: dict) -> dict[str, str]:
    """The fields of a scheme and of its activations, as text without spaces."""
    activations = described.pop("activations") or {}
    fields = described | activations
    return {key: "..".join(map(str, value)) if isinstance(value, list) else str(value)
            for key, value in fields.items()}  # fmt: skip


def across_seeds(draws: np.ndarray, values: Sequence[float], n: int) -> Estimate:
    """Join two sources of doubt: which examples were drawn, and which seed the run had.

    Parameters
    ----------
    draws : ndarray, shape (resamples,)
        Bootstrap over examples of the mean over seeds.
    values : sequence of float
        The value of each seed, on all examples.
    n : int
        Number of examples.

    Returns
    -------
    Estimate
        Mean over seeds. Its interval adds Student's t noise of the standard error over seeds
        to the bootstrap draws; one seed alone adds none, and the method says so.

    Examples
    --------
    >>> one = across_seeds(np.full(10_000, 0.5), [0.5, 0.5, 0.5], n=20)
    >>> print(one)
    0.500 [0.500, 0.500] (n = 20)
    >>> wide = across_seeds(np.full(10_000, 0.5), [0.4, 0.5, 0.6], n=20)
    >>> abs((wide.high - wide.low) / 2 - 4.303 * 0.1 / 3**0.5) < 0.02
    True
    """
    seeds = len(values)
    doubt = f"t over {seeds} seeds" if seeds > 1 else "one seed"
    low, high = np.quantile(_with_seeds(draws, values), TAILS)
    return Estimate(
        float(np.mean(values)), float(low), float(high), n, f"bootstrap over examples, {doubt}"
    )


def _with_seeds(draws: np.ndarray, values: Sequence[float]) -> np.ndarray:
    """Add the noise of the mean over seeds to bootstrap draws."""
    seeds = len(values)
    if seeds == 1:
        return draws
    with extra("study"):
        from scipy import stats
    noise = stats.t(seeds - 1).ppf((np.arange(len(draws)) + 0.5) / len(draws))
    error = float(np.std(values, ddof=1)) / np.sqrt(seeds)
    return draws + error * np.random.default_rng(1).permutation(noise)


class Results:
    """What one arm scored on the same test examples, over several seeds.

    Parameters
    ----------
    runs : sequence of dict
        Each with ``total`` and ``weight`` per example, as in `companion.evaluation.estimates.Scores`, and
        ``higher_is_better``.
    strata : sequence, optional
        The topic of each example, where they are to be resampled within their topics.
    """

    def __init__(self, runs: Sequence[dict], strata: Sequence | None = None) -> None:
        self.scores = [Scores(np.array(run["total"]), np.array(run["weight"])) for run in runs]
        self.sign = -1 if runs[0]["higher_is_better"] else 1
        self.n, self.strata = len(runs[0]["total"]), strata
        self._draws: np.ndarray | None = None
        first = self.scores[0].weight
        for weight in (scores.weight for scores in self.scores):
            # an F1 score weighs what a model answers; a loss weighs the same tokens in every run
            if len(weight) != self.n or (self.sign > 0 and not np.array_equal(weight, first)):
                raise ValueError("the runs were not measured on the same examples")

    @property
    def seeds(self) -> np.ndarray:
        """The metric of each seed, shape (seeds,)."""
        return np.array([scores.value for scores in self.scores])

    def resampled(self) -> np.ndarray:
        """Bootstrap of the mean over seeds; equal draws for arms on equal examples."""
        if self._draws is None:
            self._draws = np.mean(resampled(self.scores, 0, self.strata), axis=0)
        return self._draws

    def estimate(self) -> Estimate:
        """The mean over seeds, with doubt about examples and seeds."""
        return across_seeds(self.resampled(), self.seeds, self.n)


def difference(first: Results, second: Results) -> Estimate:
    """The first arm's metric minus the second's, paired by example and by seed."""
    draws = first.resampled() - second.resampled()
    return across_seeds(draws, first.seeds - second.seeds, first.n)


def worse(first: Results, second: Results) -> Estimate:
    """By how much the first arm is worse than the second, whichever way the metric points."""
    draws = first.sign * (first.resampled() - second.resampled())
    return across_seeds(draws, first.sign * (first.seeds - second.seeds), first.n)


def p_value(first: Results, second: Results) -> float:
    """Two-sided p-value of no difference between two arms, by the draws behind `difference`.

    Examples
    --------
    >>> runs = [{"total": [loss, loss + 1], "weight": [1, 1], "higher_is_better": False}
    ...         for loss in (2.0, 3.0)]
    >>> p_value(*(Results([run]) for run in runs)) < 0.001
    True
    """
    draws = _with_seeds(first.resampled() - second.resampled(), first.seeds - second.seeds)
    tail = min((draws <= 0).mean(), (draws >= 0).mean())
    return float(min(1.0, 2 * max(tail, 1 / len(draws))))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of a family of comparisons for their number.

    References
    ----------
    Holm, "A simple sequentially rejective multiple test procedure", 1979.

    Examples
    --------
    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values)
    scaled = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return adjusted.tolist()


def recovered(control: Results, nearest: Results, arm: Results) -> Estimate | None:
    """Share of the damage of rounding that an arm took back, over all seeds.

    Parameters
    ----------
    control, nearest, arm : Results
        The float control, that control rounded to nearest, and the arm, on the same examples
        and seeds.

    Returns
    -------
    Estimate or None
        None ("nothing to recover") where the damage is not clearly above zero.
    """
    if worse(nearest, control).low <= 0:
        return None
    left, damage = arm.seeds - control.seeds, nearest.seeds - control.seeds
    share = 1 - left.mean() / damage.mean()
    # What each seed adds to a ratio of means, to first order; their mean is the share itself.
    seeds = 1 - (left - (1 - share) * (damage - damage.mean())) / damage.mean()
    back = nearest.resampled() - arm.resampled()
    lost = nearest.resampled() - control.resampled()
    damaged = lost != 0  # a resample without damage has no share
    return across_seeds(back[damaged] / lost[damaged], seeds, arm.n)


def tabulate(runs: Sequence[dict], strata: Sequence | None = None) -> pd.DataFrame:
    """Gather the runs of one model on one task into a row for each scheme and method.

    Parameters
    ----------
    runs : sequence of dict
        As in ``compare(...).attrs["runs"]``, or "runs" of a results file.
    strata : sequence, optional
        The topic of each test example: intervals then come from resampling within topics.

    Returns
    -------
    pandas.DataFrame
        Indexed by scheme and method, in the order of the runs. ``float`` (the control),
        ``nearest`` (the control rounded) and ``value`` (the arm) are in the task's metric: for
        language models, nats per token. ``damage`` is how much worse rounding to nearest made
        the control, ``difference`` the arm minus the control; ``..._low`` and ``..._high``
        bound 95 % intervals; ``recovered`` is NaN where there was nothing to recover; ``cost``
        is training time over the control's, NaN where it was not measured; ``bytes`` is the whole
        file. `attrs` keeps the runs.

    Raises
    ------
    ValueError
        If the runs are not those of one comparison: of several models or tasks, twice the same
        seed, arms with other seeds than the control, or no control at all.
    """
    with extra("study"):
        import pandas as pd

    cells = gather(runs)
    results = {cell: Results(found, strata) for cell, found in cells.items()}
    rows = {}
    for (scheme, method), found in cells.items():
        if method == "float":
            continue
        arm, nearest, control = (results[cell] for cell in (
            (scheme, method), (scheme, "nearest"), ("float", "float")))  # fmt: skip
        share = None if method == "nearest" else recovered(control, nearest, arm)
        damage, left = worse(nearest, control), difference(arm, control)
        rows[scheme, method] = {
            "float": control.seeds.mean(),
            "nearest": nearest.seeds.mean(),
            **_columns("value", arm.estimate()),
            **_columns("damage", damage),
            **_columns("difference", left),
            **_columns("recovered", share),
            "seeds": len(found),
            "n": arm.n,
            **{key: found[0][key] for key in ("steps", "float_steps", "lr")},
            "bytes": found[0].get("bytes", np.nan),
            "training_tokens": found[0]["training_tokens"],
            "cost": found[0].get("cost", np.nan),
        }
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index = pd.MultiIndex.from_tuples(rows, names=["scheme", "method"])
    table.attrs["runs"] = list(runs)
    return table


def gather(runs: Sequence[dict]) -> dict[tuple[str, str], list[dict]]:
    """Sort the runs of one comparison by scheme and method, and each cell's by seed.

    Raises
    ------
    ValueError
        As `tabulate` does.

    Examples
    --------
    >>> run = {"model": "m", "task": "t", "steps": 9, "lr": 1e-3}
    >>> runs = [run | {"scheme": "float", "method": "float", "seed": seed} for seed in (1, 0)]
    >>> [run["seed"] for run in gather(runs)["float", "float"]]
    [0, 1]
    """
    cells: dict[tuple[str, str], list[dict]] = {}
    for run in runs:
        found = cells.setdefault((run["scheme"], run["method"]), [])
        if run not in found:  # comparisons that are joined share their controls
            found.append(run)
    for found in cells.values():
        found.sort(key=lambda run: run["seed"])
    control = cells.get(("float", "float"), [])
    for (scheme, method), found in cells.items():
        name = f"{method} at {scheme}"
        if not control or (method != "float" and (scheme, "nearest") not in cells):
            raise ValueError(
                f"{name} has nothing to be compared to: keep the runs of the float control, and of "
                "nearest at the same scheme"
            )
        for what in ("model", "task", "metric", "steps", "comparison"):
            _same(what, [control[0], *found], "tabulate those of one comparison at a time")
        for what in ("float_steps", "lr", "recipe"):
            _same(what, found, f"two recipes are called {name}, give each a name of its own")
        seeds, expected = ([run["seed"] for run in part] for part in (found, control))
        if len(set(seeds)) < len(seeds) or seeds != expected:
            raise ValueError(
                f"{name} has the seeds {seeds}, and the control {expected}: every arm needs each "
                "seed of the control once"
            )
    return cells


def _same(what: str, runs: Sequence[dict], remedy: str) -> None:
    kinds = sorted({str(run.get(what)) for run in runs})
    if len(kinds) > 1:
        raise ValueError(f"the runs differ in {what} ({', '.join(kinds)}): {remedy}")


def _columns(name: str, estimate: Estimate | None) -> dict[str, float]:
    values = (np.nan,) * 3 if estimate is None else (estimate.value, estimate.low, estimate.high)
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))
