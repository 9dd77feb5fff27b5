"""From the runs of a study to one tidy table: what rounding cost, and what came back.

Floor 3 of the house. Built in chapter 11.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from companion.evaluate import RESAMPLES, TAILS, Estimate
from companion.scheme import QuantScheme

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
        noise = stats.t(seeds - 1).ppf((np.arange(len(draws)) + 0.5) / len(draws))
        draws = draws + error * np.random.default_rng(1).permutation(noise)
    else:
        method = "bootstrap over examples, one seed"
    low, high = np.quantile(draws, TAILS)
    return Estimate(float(np.mean(values)), float(low), float(high), n, method)


class Losses:
    """Losses of one arm on the same test documents, over several seeds.

    Parameters
    ----------
    runs : sequence of dict
        Each with ``loss`` and ``tokens`` per document.
    """

    def __init__(self, runs: Sequence[dict]) -> None:
        self.loss = np.array([run["loss"] for run in runs])  # (seeds, documents)
        self.tokens = np.array(runs[0]["tokens"])
        if any(run["tokens"] != runs[0]["tokens"] for run in runs):
            raise ValueError("the runs were not measured on the same documents")

    @property
    def seeds(self) -> np.ndarray:
        """Mean loss per token of each seed, shape (seeds,)."""
        return self.loss.sum(1) / self.tokens.sum()

    def resampled(self) -> np.ndarray:
        """Bootstrap of the mean over seeds; equal draws for arms on equal documents."""
        n = len(self.tokens)
        counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
        return (counts @ self.loss.mean(0)) / (counts @ self.tokens)


def difference(first: Losses, second: Losses) -> Estimate:
    """Mean loss of the first arm minus the second, paired by document and by seed, in nats."""
    draws = first.resampled() - second.resampled()
    return across_seeds(draws, first.seeds - second.seeds, len(first.tokens))


def recovered(control: Losses, nearest: Losses, arm: Losses) -> Estimate | None:
    """Share of the damage of rounding that an arm took back, over all seeds.

    Parameters
    ----------
    control, nearest, arm : Losses
        The float control, that control rounded to nearest, and the arm, on the same documents
        and seeds.

    Returns
    -------
    Estimate or None
        None ("nothing to recover") where the damage is not clearly above zero.
    """
    if difference(nearest, control).low <= 0:
        return None
    left, damage = arm.seeds - control.seeds, nearest.seeds - control.seeds
    share = 1 - left.mean() / damage.mean()
    # What each seed adds to a ratio of means, to first order; their mean is the share itself.
    seeds = 1 - (left - (1 - share) * (damage - damage.mean())) / damage.mean()
    draws = (nearest.resampled() - arm.resampled()) / (nearest.resampled() - control.resampled())
    return across_seeds(draws, seeds, len(arm.tokens))


def tabulate(runs: Sequence[dict]) -> pd.DataFrame:
    """Gather the runs of one model on one task into a row for each scheme and method.

    Parameters
    ----------
    runs : sequence of dict
        As in ``compare(...).attrs["runs"]``, or "runs" of a results file.

    Returns
    -------
    pandas.DataFrame
        Indexed by scheme and method, in the order of the runs. Losses are means per token (or
        example) in nats; ``..._low`` and ``..._high`` bound 95 % intervals; ``recovered`` is
        NaN where there was nothing to recover; ``cost`` is training time over the control's;
        ``bytes`` is the whole file. `attrs` keeps the runs.
    """
    import pandas as pd

    cells: dict[tuple[str, str], list[dict]] = {}
    for run in runs:
        cells.setdefault((run["scheme"], run["method"]), []).append(run)
    control = Losses(cells["float", "float"]) if cells else None
    rows = {}
    for (scheme, method), found in cells.items():
        if method == "float":
            continue
        arm, nearest = Losses(found), Losses(cells[scheme, "nearest"])
        share = None if method == "nearest" else recovered(control, nearest, arm)
        damage, left = difference(nearest, control), difference(arm, control)
        rows[scheme, method] = {
            "float": control.seeds.mean(),
            "nearest": nearest.seeds.mean(),
            "loss": arm.seeds.mean(),
            **_columns("damage", damage),
            **_columns("difference", left),
            **_columns("recovered", share),
            "seeds": len(found),
            "n": len(arm.tokens),
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
