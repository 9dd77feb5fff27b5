"""Small plots side by side, one for each task. Floor 2 of the house. Built in chapter 12."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from companion.evaluate import Estimate
from companion.plots import COLOURS, LINES, MARKERS, STYLE


@dataclass(frozen=True)
class Panel:
    """What one small plot shows.

    Parameters
    ----------
    title, ylabel : str
    float_control : Estimate
        Drawn as a line with a band.
    baseline : float
        Drawn as a dotted line.
    arms : mapping of str to mapping of str to Estimate
        For each arm, its value under each scheme; an arm may lack some.
    """

    title: str
    ylabel: str
    float_control: Estimate
    baseline: float
    arms: Mapping[str, Mapping[str, Estimate]]


def panels(plots: Sequence[Panel], *, columns: int = 2) -> Figure:
    """Draw every task in a plot of its own: arms against schemes, with intervals.

    Parameters
    ----------
    plots : sequence of Panel
        All with the same arms. The space after the last holds the legend.
    columns : int

    Examples
    --------
    >>> e = Estimate(0.9, 0.8, 0.95, 100)
    >>> panels([Panel("topics", "accuracy", e, 0.5, {"QAT": {"W4": e, "W2": e}})])
    <Figure size 792x275 with 2 Axes>
    """
    rows = -(-(len(plots) + 1) // columns)
    with plt.rc_context(STYLE | {"font.size": 10}):
        fig, axes = plt.subplots(rows, columns, figsize=(7.2, 2.5 * rows), squeeze=False)
    for ax, panel in zip(axes.flat, plots, strict=False):
        control = panel.float_control
        ax.axhspan(control.low, control.high, color="0.85", zorder=0)
        ax.axhline(control.value, color="0.35", linewidth=1, label="float (band: 95 % interval)")
        ax.axhline(panel.baseline, color="black", linestyle=":", linewidth=1.2, label="baseline")
        schemes = list(dict.fromkeys(name for line in panel.arms.values() for name in line))
        for index, (label, line) in enumerate(panel.arms.items()):
            shift = 0.16 * (index - (len(panel.arms) - 1) / 2)
            value = np.array([e.value for e in line.values()])
            ends = np.array([[e.low, e.high] for e in line.values()]).T
            place = np.array([schemes.index(name) for name in line]) + shift
            ax.errorbar(place, value, yerr=np.abs(ends - value), capsize=3,
                        color=COLOURS[index], marker=MARKERS[index], linestyle=LINES[index],
                        markersize=5, linewidth=1, label=label)  # fmt: skip
        ax.set_xticks(range(len(schemes)), schemes, fontsize=8)
        ax.set_title(panel.title, fontsize=10)
        ax.set_ylabel(panel.ylabel)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    for ax in axes.flat[len(plots) :]:
        ax.axis("off")
    axes.flat[len(plots)].legend(handles, labels, loc="center", frameon=False)
    fig.tight_layout()
    plt.close(fig)
    return fig
