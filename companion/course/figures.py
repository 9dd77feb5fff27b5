"""Every figure of the book, drawn from plain results: one message each, readable in grey.

Each function returns a matplotlib Figure that a notebook shows when it
is the last value of a cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from companion.errors import extra

with extra("course"):
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from companion.evaluation.estimates import Estimate

# Okabe and Ito's palette: told apart by readers with any common colour vision.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
LINES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1))]
STYLE = {
    "figure.dpi": 110,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def curves(
    series: Mapping[str, Sequence[float] | Mapping[float, float]],
    *,
    xlabel: str,
    ylabel: str,
    x: Sequence[float] | None = None,
    log_y: bool = False,
    title: str = "",
) -> Figure:
    """Draw lines on one pair of axes, such as training losses or errors against bits.

    Parameters
    ----------
    series : mapping of label to values
        A sequence is drawn against 0, 1, 2, ...; a mapping against its keys, with markers.
    xlabel, ylabel : str
    x : sequence of float, optional
        Where the values of all sequences stand instead.
    log_y : bool
    title : str
        The finding. With one, the legend stands between it and the plot.

    Examples
    --------
    >>> curves({"float": [2.0, 1.0]}, xlabel="step", ylabel="loss")
    <Figure size 715x407 with 1 Axes>
    """
    fig, ax = _axes()
    for index, (label, values) in enumerate(series.items()):
        sparse = isinstance(values, Mapping)
        places = list(values) if sparse else range(len(values)) if x is None else x
        y = list(values.values()) if sparse else values
        ax.plot(places, y, color=COLOURS[index], linestyle=LINES[index], label=label,
                marker=MARKERS[index] if sparse else None)  # fmt: skip
        if sparse:
            ax.set_xticks(places)
        elif x is None:
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if log_y:
        ax.set_yscale("log")
    return _finish(fig, ax, xlabel, ylabel, legend=len(series) > 1, title=title)


def bars(values: Mapping[str, float], *, xlabel: str, form: str = "{:.1f}") -> Figure:
    """Draw labelled horizontal bars, each with its number at its end.

    Examples
    --------
    >>> bars({"before": 46.8, "after": 46.8}, xlabel="MB")
    <Figure size 715x220 with 1 Axes>
    """
    fig, ax = _axes(height=0.8 + 0.6 * len(values))
    drawn = ax.barh(list(values), list(values.values()), color=COLOURS[0], height=0.6)
    ax.bar_label(drawn, [form.format(v) for v in values.values()], padding=4)
    ax.invert_yaxis()
    ax.margins(x=0.15)
    ax.grid(axis="y", visible=False)
    return _finish(fig, ax, xlabel, "")


def estimates(results: Mapping[str, Estimate], *, xlabel: str) -> Figure:
    """Draw measured values as points with their 95 % intervals, one row each.

    Examples
    --------
    >>> from companion import Estimate
    >>> estimates({"float": Estimate(0.9, 0.8, 0.95, 100)}, xlabel="accuracy")
    <Figure size 715x154 with 1 Axes>
    """
    fig, ax = _axes(height=0.8 + 0.6 * len(results))
    for row, e in enumerate(results.values()):
        ax.errorbar(e.value, row, xerr=[[e.value - e.low], [e.high - e.value]], capsize=4,
                    color=COLOURS[row % 7], marker=MARKERS[row % 7], linestyle="")  # fmt: skip
        ax.annotate(f"{e.value:.3f}", (e.value, row), (0, 8), textcoords="offset points",
                    ha="center", fontsize=9)  # fmt: skip
    ax.set_yticks(range(len(results)), list(results))
    ax.set_ylim(len(results) - 0.4, -0.8)
    return _finish(fig, ax, f"{xlabel} (95 % interval)", "")


def estimates_by_bits(
    results: Mapping[str, Mapping[int, Estimate]],
    *,
    ylabel: str,
    reference: tuple[str, Estimate] | None = None,
) -> Figure:
    """Draw estimates against weight bits, one line per method, with a float reference band.

    Examples
    --------
    >>> from companion import Estimate
    >>> e = Estimate(0.9, 0.8, 0.95, 100)
    >>> estimates_by_bits({"PTQ": {8: e, 2: e}}, ylabel="accuracy", reference=("float", e))
    <Figure size 715x407 with 1 Axes>
    """
    fig, ax = _axes()
    widths = sorted({bits for line in results.values() for bits in line}, reverse=True)
    if reference:
        label, e = reference
        ax.axhspan(e.low, e.high, color="0.85", zorder=0)
        ax.axhline(e.value, color="0.35", linewidth=1, label=f"{label} (band: 95 % interval)")
    for index, (label, line) in enumerate(results.items()):
        shift = 0.06 * (index - (len(results) - 1) / 2)
        x = [widths.index(bits) + shift for bits in line]
        value = np.array([e.value for e in line.values()])
        spread = [value - [e.low for e in line.values()], [e.high for e in line.values()] - value]
        ax.errorbar(x, value, yerr=np.abs(spread), color=COLOURS[index], capsize=4, label=label,
                    marker=MARKERS[index], linestyle=LINES[index])  # fmt: skip
    ax.set_xticks(range(len(widths)), [str(w) for w in widths])
    return _finish(fig, ax, "bits per weight", ylabel, legend=True)


def heatmap(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    xlabel: str,
    ylabel: str,
    form: str = "{:.1f}",
    title: str = "",
) -> Figure:
    """Draw a table as shaded cells, the larger the darker, each with its number in it.

    Parameters
    ----------
    values : ndarray, shape (rows, columns)
    rows, columns : sequence of str
        Labels, the first row on top.
    xlabel, ylabel : str
    form : str
        How a number is written.
    title : str
        The finding.

    Examples
    --------
    >>> heatmap(np.eye(2), ["0", "1"], ["q", "k"], xlabel="layer", ylabel="block")
    <Figure size 715x231 with 1 Axes>
    """
    many = len(rows) > 12  # low rows on a narrow page: a phone shows it half as large
    fig, ax = _axes(5.0, 1.2 + 0.22 * len(rows)) if many else _axes(height=1.1 + 0.5 * len(rows))
    values = np.asarray(values)
    ax.imshow(values, cmap="Greys", aspect="auto", vmin=min(0.0, values.min()))
    middle = (min(0.0, values.min()) + values.max()) / 2
    for (row, column), value in np.ndenumerate(values):
        ax.text(column, row, form.format(value), ha="center", va="center",
                color="white" if value > middle else "black",
                fontsize=9 if many else None)  # fmt: skip
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows, fontsize=9 if many else None)
    ax.grid(visible=False)
    return _finish(fig, ax, xlabel, ylabel, title=title)


def images(batch: np.ndarray, titles: Sequence[str]) -> Figure:
    """Show a row of grey images, each with a title.

    Parameters
    ----------
    batch : ndarray, shape (n, height, width)
    titles : sequence of str

    Examples
    --------
    >>> images(np.zeros((2, 4, 4)), ["5", "6"])
    <Figure size 715x165 with 2 Axes>
    """
    with plt.rc_context(STYLE | {"axes.grid": False}):
        fig, axes = plt.subplots(1, len(batch), figsize=(6.5, 1.5), squeeze=False)
    for ax, image, title in zip(axes[0], batch, titles, strict=True):
        ax.imshow(image, cmap="gray_r")
        ax.set_title(title)
        ax.axis("off")
    fig.tight_layout()
    plt.close(fig)
    return fig


def histogram(
    values: np.ndarray, *, xlabel: str, marks: Mapping[str, Sequence[float]] | None = None
) -> Figure:
    """Show how values are spread, with marked positions such as grid points or a range.

    Examples
    --------
    >>> histogram(np.arange(9.0), xlabel="weight", marks={"grid": [0.0, 4.0, 8.0]})
    <Figure size 715x407 with 1 Axes>
    """
    fig, ax = _axes()
    ax.hist(np.ravel(values), bins=80, color="0.7")
    for index, (label, positions) in enumerate((marks or {}).items()):
        for first, position in enumerate(positions):
            ax.axvline(position, color=COLOURS[index], linestyle=LINES[index], linewidth=1.2,
                       label=label if first == 0 else None)  # fmt: skip
    ax.grid(visible=False)
    return _finish(fig, ax, xlabel, "how many", legend=bool(marks))


def staircase(x: np.ndarray, rounded: np.ndarray, gradient: np.ndarray | None = None) -> Figure:
    """Draw rounding as a staircase beside the identity and, below it, the gradient it is given.

    Parameters
    ----------
    x, rounded : ndarray, shape (n,)
    gradient : ndarray, shape (n,), optional
        Straight-through gradient at each x.

    Examples
    --------
    >>> x = np.linspace(-1, 1, 5)
    >>> staircase(x, np.round(x), np.ones(5))
    <Figure size 715x550 with 2 Axes>
    """
    rows = 1 if gradient is None else 2
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(rows, 1, figsize=(6.5, 3.7 if rows == 1 else 5), sharex=True,
                                 squeeze=False, height_ratios=[2, 1][:rows])  # fmt: skip
    top = axes[0][0]
    top.plot(x, x, color="0.5", linestyle=":", label="before rounding")
    top.plot(x, rounded, color=COLOURS[0], label="after rounding")
    top.set_ylabel("value")
    top.legend(frameon=False)
    if gradient is not None:
        low = axes[1][0]
        low.plot(x, gradient, color=COLOURS[1], label="straight-through gradient")
        low.plot(x, np.zeros_like(x), color="0.5", linestyle=":", label="true gradient")
        low.set_ylabel("gradient")
        low.legend(frameon=False)
    axes[-1][0].set_xlabel("weight")
    fig.tight_layout()
    plt.close(fig)
    return fig


def scatter(x: np.ndarray, y: np.ndarray, *, xlabel: str, ylabel: str) -> Figure:
    """Draw pairs of numbers with the line on which they would be equal.

    Examples
    --------
    >>> scatter(np.arange(3), np.arange(3), xlabel="trained scale", ylabel="converted scale")
    <Figure size 495x495 with 1 Axes>
    """
    fig, ax = _axes(width=4.5, height=4.5)
    ends = [min(np.min(x), np.min(y)), max(np.max(x), np.max(y))]
    ax.plot(ends, ends, color="0.5", linestyle=":", label="equal")
    ax.plot(x, y, "o", color=COLOURS[0], markersize=4, alpha=0.6)
    return _finish(fig, ax, xlabel, ylabel, legend=True)


def _axes(width: float = 6.5, height: float = 3.7) -> tuple[Figure, Axes]:
    with plt.rc_context(STYLE):
        return plt.subplots(figsize=(width, height))


def _finish(
    fig: Figure, ax: Axes, xlabel: str, ylabel: str, legend: bool = False, title: str = ""
) -> Figure:
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    if title:
        _title(ax, title, legend)
    elif legend:
        ax.legend(frameon=False)
    fig.tight_layout()
    plt.close(fig)  # shown by being a cell's value, so that it is not shown twice
    return fig


def _title(ax: Axes, title: str, legend: bool) -> None:
    """Put the finding above the plot and, where there is one, the legend between the two."""
    lines = 0
    if legend:
        columns = 2
        lines = -(-len(ax.get_legend_handles_labels()[1]) // columns)
        ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns,
                  fontsize=10, columnspacing=1.2, borderaxespad=0.2)  # fmt: skip
    ax.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=8 + 18 * lines)


def damage_by_bits(
    plots: Mapping[str, Mapping[str, Mapping[int, Estimate]]], *, title: str, ylabel: str
) -> Figure:
    """Draw what rounding costs against weight bits, one plot below the other, on one scale.

    The scale is logarithmic above a hundredth and linear below it, where intervals reach zero.

    Parameters
    ----------
    plots : mapping of str to mapping of str to mapping of int to Estimate
        By plot, by line, by bits. A line may lack bits, and a plot may lack lines.
    title : str
        The finding.
    ylabel : str

    Examples
    --------
    >>> from companion import Estimate
    >>> e = Estimate(0.3, 0.2, 0.4, 200)
    >>> lines = {"rows": {"nearest": {8: e, 4: e}}}
    >>> damage_by_bits(lines, title="It hurts", ylabel="nats").axes[0].get_ylabel()
    'nats'
    """
    names = list(dict.fromkeys(name for lines in plots.values() for name in lines))
    widths = sorted({b for lines in plots.values() for line in lines.values() for b in line})[::-1]
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(len(plots), 1, figsize=(5.2, 0.55 + 2.5 * len(plots)),
                                 sharex=True, sharey=True, squeeze=False)  # fmt: skip
    for ax, (name, lines) in zip(axes[:, 0], plots.items(), strict=True):
        for label, line in lines.items():
            index = names.index(label)
            place = [widths.index(b) + 0.05 * (index - (len(names) - 1) / 2) for b in line]
            value = np.array([e.value for e in line.values()])
            ends = np.array([[e.low, e.high] for e in line.values()]).T
            ax.errorbar(place, value, yerr=np.abs(ends - value), color=COLOURS[index], capsize=3,
                        marker=MARKERS[index], linestyle=LINES[index], markersize=5,
                        label=label)  # fmt: skip
        ax.set_yscale("symlog", linthresh=0.01, linscale=0.6)
        ax.set_yticks([0, 0.01, 0.1, 1, 10], ["0", "0.01", "0.1", "1", "10"])
        ax.minorticks_off()
        ax.set_ylabel(ylabel)
        ax.text(0.02, 0.96, name, transform=ax.transAxes, va="top", fontweight="bold")
    axes[-1, 0].set_xticks(range(len(widths)), [str(w) for w in widths])
    axes[-1, 0].set_xlabel("bits per weight, without its scale")
    _title(axes[0, 0], title, legend=True)
    fig.tight_layout()
    plt.close(fig)
    return fig


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
    >>> from companion import Estimate
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


def read_and_scored(tokens: Sequence[str], scored: Sequence[bool]) -> Figure:
    """Draw a text token by token, those that are learned in colour, the others in grey.

    Parameters
    ----------
    tokens : sequence of str
        A line break is drawn as an arrow.
    scored : sequence of bool
        Of the same length.

    Examples
    --------
    >>> read_and_scored(["Who", "?", "Dorothy", "."], [False, False, True, True])
    <Figure size 715x77 with 1 Axes>
    """
    shown = [token.replace("\n", "\u21b5") for token in tokens]
    places, line, at, most = [], 0, 0.0, 46.0
    for text in shown:
        width = max(len(text), 1) + 1.0
        if at + width > most:
            line, at = line + 1, 0.0
        places.append((line, at, width))
        at += width + 0.3
    with plt.rc_context(STYLE | {"axes.grid": False}):
        fig, ax = plt.subplots(figsize=(6.5, 0.3 + 0.4 * (line + 1)))
    for text, counts, (row, start, width) in zip(shown, scored, places, strict=True):
        ax.add_patch(Rectangle((start, -row - 0.9), width, 0.8, linewidth=1.6 if counts else 0.8,
                               facecolor="#CFE3F1" if counts else "0.95",
                               edgecolor=COLOURS[0] if counts else "0.7"))  # fmt: skip
        ax.text(start + width / 2, -row - 0.5, text, ha="center", va="center", fontsize=10,
                family="monospace", color="black" if counts else "0.35")  # fmt: skip
    ax.set_xlim(-0.3, most)
    ax.set_ylim(-(line + 1) - 0.05, 0.05)
    ax.axis("off")
    fig.tight_layout(pad=0.2)
    plt.close(fig)
    return fig


def trade(points: Mapping[str, tuple[float, float]], *, xlabel: str, ylabel: str) -> Figure:
    """Draw named points against two measures, such as what was won and what was forgotten.

    Parameters
    ----------
    points : mapping of str to (x, y)
    xlabel, ylabel : str

    Examples
    --------
    >>> won = {"float": (2.5, 0.1), "rounded": (3.0, 0.8)}
    >>> len(trade(won, xlabel="loss", ylabel="forgotten").axes[0].lines)
    2
    """
    fig, ax = _axes()
    for index, (name, (x, y)) in enumerate(points.items()):
        ax.plot([x], [y], linestyle="none", marker=MARKERS[index % len(MARKERS)], markersize=9,
                color=COLOURS[index % len(COLOURS)], label=name, clip_on=False)  # fmt: skip
    ax.margins(0.12)
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=10)
    return _finish(fig, ax, xlabel, ylabel)


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
