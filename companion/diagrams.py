"""Figures of Part IV: a block of weights down to its bytes, speeds beside limits, parts of memory.

Floor 2 of the house. Built in chapters 14 and 15.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from companion.plots import COLOURS, STYLE


def byte_by_byte(rows: Mapping[str, Sequence[str]]) -> Figure:
    """Draw stages of a few numbers as rows of boxes, one below the other.

    Parameters
    ----------
    rows : mapping of str to sequence of str
        What stands in the boxes of each row. A row with fewer boxes has wider ones: two numbers
        that share a byte stand above one box.

    Examples
    --------
    >>> byte_by_byte({"integer": ["1", "-2"], "byte": ["0x69"]})
    <Figure size 792x165 with 1 Axes>
    """
    longest = max(len(boxes) for boxes in rows.values())
    with plt.rc_context(STYLE | {"axes.grid": False}):
        fig, ax = plt.subplots(figsize=(7.2, 0.75 * len(rows)))
    for row, (name, boxes) in enumerate(rows.items()):
        width = longest / len(boxes)
        for column, text in enumerate(boxes):
            colour = str(0.97 - 0.07 * (row % 2))
            ax.add_patch(Rectangle((column * width + 0.04, -row - 0.85), width - 0.08, 0.7,
                                   facecolor=colour, edgecolor="0.4"))  # fmt: skip
            ax.text((column + 0.5) * width, -row - 0.5, text, ha="center", va="center",
                    family="monospace")  # fmt: skip
        ax.text(-0.15, -row - 0.5, name, ha="right", va="center")
    ax.set_xlim(-0.33 * longest, longest)
    ax.set_ylim(-len(rows), 0)
    ax.axis("off")
    fig.tight_layout(pad=0.2)
    plt.close(fig)
    return fig


def stacked_bars(values: Mapping[str, Mapping[str, float]], *, xlabel: str) -> Figure:
    """Draw bars that are made of parts, one below the other.

    Parameters
    ----------
    values : mapping of str to mapping of str to float
        By bar, then by part; all bars have the same parts.
    xlabel : str

    Examples
    --------
    >>> stacked_bars({"float": {"weights": 4, "rest": 12}, "int4": {"weights": 1, "rest": 0}},
    ...              xlabel="bytes")
    <Figure size 792x231 with 1 Axes>
    """
    with plt.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=(7.2, 1.2 + 0.45 * len(values)))
    left = np.zeros(len(values))
    for part, colour, hatch in zip(
        next(iter(values.values())), COLOURS, ("", "//", "..", "\\\\"), strict=False
    ):
        widths = np.array([bar[part] for bar in values.values()])
        ax.barh(list(values), widths, left=left, height=0.6, color=colour, label=part,
                hatch=hatch, edgecolor="white")  # fmt: skip
        left = left + widths
    for row, total in enumerate(left):
        ax.text(total, row, f" {total:.3g}", va="center")
    ax.set_xlim(0, 1.1 * left.max())
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(xlabel)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
    fig.tight_layout()
    plt.close(fig)
    return fig


def bars_with_limits(
    values: Mapping[str, float], limits: Mapping[str, float], *, xlabel: str, limit: str
) -> Figure:
    """Draw bars on a logarithmic axis, and across each of them the least that it could be.

    Parameters
    ----------
    values, limits : mapping of str to float
        Above zero, with the same names.
    xlabel, limit : str
        What the bars and the marks are.

    Examples
    --------
    >>> bars_with_limits({"float32": 50.0, "int4": 9.0}, {"float32": 30.0, "int4": 5.0},
    ...                  xlabel="milliseconds", limit="least time")
    <Figure size 792x231 with 1 Axes>
    """
    with plt.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=(7.2, 1.2 + 0.45 * len(values)))
    places = np.arange(len(values))
    drawn = ax.barh(places, list(values.values()), color=COLOURS[0], height=0.6)
    ax.bar_label(drawn, [f"{value:.3g}" for value in values.values()], padding=4)
    least = [limits[name] for name in values]
    ax.vlines(least, places - 0.4, places + 0.4, color=COLOURS[1], linewidth=3, label=limit)
    ax.set_xscale("log")
    ax.set_xlim(min(least) / 2, 2.5 * max(values.values()))
    ax.set_yticks(places, list(values))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(xlabel)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0))
    fig.tight_layout()
    plt.close(fig)
    return fig
