"""From the runs of a study to one tidy table: what rounding cost, and what came back.

Built in chapter 11.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from companion.errors import extra
from companion.evaluation.estimates import TAILS, Estimate, Scores
from companion.numerics.scheme import QuantScheme

if TYPE_CHECKING:
    import pandas as pd


def scheme_name(scheme: QuantScheme | None) -> str:
    """Short name of a scheme, such as "W4 g32", "W2 row" or "W8A8 row".

    Examples
    --------
    >>> scheme_name(QuantScheme(2, None)), scheme_name(None)
    ('W2 row', 'float')
    """
    if scheme is None:
        return "float"
    group = "row" if scheme.group_size is None else f"g{scheme.group_size}"
    activations = f"A{scheme.activations.bits}" if scheme.activations else ""
    return f"W{scheme.weight_bits}{activations} {group}"


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
    method = f"bootstrap over examples, t over {seeds} seeds"
    if seeds > 1:
        error = float(np.std(values, ddof=1)) / np.sqrt(seeds)
        with extra("study"):
            from scipy import stats
        noise = stats.t(seeds - 1).ppf((np.arange(len(draws)) + 0.5) / len(draws))
        draws = draws + error * np.random.default_rng(1).permutation(noise)
    else:
        method = "bootstrap over examples, one seed"
    low, high = np.quantile(draws, TAILS)
    return Estimate(float(np.mean(values)), float(low), float(high), n, method)


class Results:
    """What one arm scored on the same test examples, over several seeds.

    Parameters
    ----------
    runs : sequence of dict
        Each with ``total`` and ``weight`` per example, as in `companion.evaluation.estimates.Scores`, and
        ``higher_is_better``.
    """

    def __init__(self, runs: Sequence[dict]) -> None:
        self.scores = [Scores(np.array(run["total"]), np.array(run["weight"])) for run in runs]
        self.sign = -1 if runs[0]["higher_is_better"] else 1
        self.n = len(runs[0]["total"])
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
        return np.mean([scores.resampled() for scores in self.scores], axis=0)

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


def tabulate(runs: Sequence[dict]) -> pd.DataFrame:
    """Gather the runs of one model on one task into a row for each scheme and method.

    Parameters
    ----------
    runs : sequence of dict
        As in ``compare(...).attrs["runs"]``, or "runs" of a results file.

    Returns
    -------
    pandas.DataFrame
        Indexed by scheme and method, in the order of the runs. ``float`` (the control),
        ``nearest`` (the control rounded) and ``value`` (the arm) are in the task's metric: for
        language models, nats per token. ``damage`` is how much worse rounding to nearest made
        the control, ``difference`` the arm minus the control; ``..._low`` and ``..._high``
        bound 95 % intervals; ``recovered`` is NaN where there was nothing to recover; ``cost``
        is training time over the control's; ``bytes`` is the whole file. `attrs` keeps the
        runs.
    """
    with extra("study"):
        import pandas as pd

    cells: dict[tuple[str, str], list[dict]] = {}
    for run in runs:
        cells.setdefault((run["scheme"], run["method"]), []).append(run)
    control = Results(cells["float", "float"]) if cells else None
    rows = {}
    for (scheme, method), found in cells.items():
        if method == "float":
            continue
        arm, nearest = Results(found), Results(cells[scheme, "nearest"])
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
            **{key: found[0][key] for key in ("steps", "float_steps", "lr", "bytes")},
            "training_tokens": found[0]["training_tokens"],
            "cost": found[0]["cost"],
        }
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index = pd.MultiIndex.from_tuples(rows, names=["scheme", "method"])
    table.attrs["runs"] = list(runs)
    return table


def _columns(name: str, estimate: Estimate | None) -> dict[str, float]:
    values = (np.nan,) * 3 if estimate is None else (estimate.value, estimate.low, estimate.high)
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))
