import io

import matplotlib.pyplot as plt
import numpy as np
import pytest

from companion import Estimate
from companion.course import figures as plots

E = Estimate(0.9, 0.85, 0.93, 100)


@pytest.mark.parametrize(
    "figure",
    [
        plots.curves({"a": [1, 2], "b": {2: 1.0, 4: 0.1}}, xlabel="x", ylabel="y", log_y=True),
        plots.bars({"a": 1.0, "b": 2.0}, xlabel="MB"),
        plots.estimates({"a": E, "b": E}, xlabel="accuracy"),
        plots.estimates_by_bits({"PTQ": {8: E, 2: E}}, ylabel="y", reference=("float", E)),
        plots.histogram(np.arange(9.0), xlabel="w", marks={"grid": [1, 2]}),
        plots.scatter(np.arange(3), np.arange(3), xlabel="x", ylabel="y"),
        plots.staircase(np.arange(3), np.arange(3), np.ones(3)),
        plots.heatmap(np.eye(2), ["0", "1"], ["q", "k"], xlabel="layer", ylabel="block"),
        plots.trade({"a": (1.0, 0.2), "b": (2.0, 0.1)}, xlabel="x", ylabel="y"),
        plots.damage_by_bits({"rows": {"a": {8: E, 2: E}, "b": {4: E}}}, title="t", ylabel="y"),
    ],
)
def test_figures_are_labelled_and_draw(figure):
    axes = figure.axes
    assert axes[-1].get_xlabel()
    assert any(ax.get_ylabel() or ax.get_yticklabels() for ax in axes)
    figure.savefig(buffer := io.BytesIO(), format="png")
    assert buffer.tell() > 5000
    assert plt.get_fignums() == []  # closed: a notebook shows it once


def test_points_stand_where_the_estimates_are():
    figure = plots.estimates_by_bits({"PTQ": {8: E, 2: Estimate(0.5, 0.4, 0.6, 9)}}, ylabel="y")
    line = figure.axes[0].lines[0]
    assert line.get_ydata().tolist() == [0.9, 0.5]
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["8", "2"]


def test_bars_carry_their_numbers():
    texts = [t.get_text() for t in plots.bars({"a": 46.84}, xlabel="MB").axes[0].texts]
    assert texts == ["46.8"]


def test_scored_tokens_stand_out_and_long_texts_wrap():
    words = ["word"] * 30 + ["\n"]
    axes = plots.read_and_scored(words, [False] * 30 + [True]).axes[0]
    edges = [box.get_edgecolor() for box in axes.patches]
    assert len(set(edges[:30])) == 1
    assert edges[30] != edges[0]
    assert axes.texts[-1].get_text() == "↵"
    assert len({text.get_position()[1] for text in axes.texts}) > 2
    ends = [box.get_x() + box.get_width() for box in axes.patches]
    assert max(ends) <= axes.get_xlim()[1]


def test_images_show_each_with_its_title():
    figure = plots.images(np.zeros((3, 8, 8)), ["5", "6", "7"])
    assert [ax.get_title() for ax in figure.axes] == ["5", "6", "7"]


def test_a_heatmap_writes_its_numbers_readably():
    figure = plots.heatmap(
        np.array([[0.0, 2.0], [1.5, -0.5]]), ["0", "1"], ["q", "k"], xlabel="x", ylabel="y"
    )
    axes = figure.axes[0]
    texts = {t.get_text(): t.get_color() for t in axes.texts}
    assert texts == {"0.0": "black", "2.0": "white", "1.5": "white", "-0.5": "black"}
    assert [t.get_position() for t in axes.texts][2] == (0, 1)  # second row, first column
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0", "1"]


def test_a_titled_figure_has_its_legend_above_the_data():
    two = {"a": [1.0, 2.0], "b": [2.0, 1.0]}
    for figure in (
        plots.curves(two, xlabel="x", ylabel="y", title="The finding"),
        plots.damage_by_bits({"rows": {"a": {8: E}, "b": {8: E}}}, title="The finding", ylabel="y"),
    ):
        axes = figure.axes[0]
        assert axes.get_title(loc="left") == "The finding"
        figure.canvas.draw()
        legend, title = axes.get_legend().get_window_extent(), axes._left_title.get_window_extent()
        assert axes.get_window_extent().y1 <= legend.y0 < legend.y1 <= title.y0 + 1


def test_damage_stands_at_its_bits_and_may_have_gaps():
    low = Estimate(0.001, -0.001, 0.002, 9)
    figure = plots.damage_by_bits(
        {"groups": {"a": {8: low, 2: E}, "b": {4: E}}, "rows": {"b": {8: E}}}, title="t", ylabel="y"
    )
    first, second = figure.axes
    assert [line.get_ydata().tolist() for line in first.lines[::3]] == [[0.001, 0.9], [0.9]]
    assert [round(x) for x in first.lines[3].get_xdata()] == [1]  # the second of 8, 4, 2
    assert [t.get_text() for t in second.get_xticklabels()] == ["8", "4", "2"]
    assert first.lines[3].get_color() == second.lines[0].get_color()


def test_a_tall_heatmap_stays_narrow():
    tall = plots.heatmap(np.eye(30)[:, :7], [str(i) for i in range(30)], list("abcdefg"),
                         xlabel="x", ylabel="y", title="t")  # fmt: skip
    assert tall.get_size_inches()[0] < 6
    assert tall.axes[0].get_title(loc="left") == "t"
