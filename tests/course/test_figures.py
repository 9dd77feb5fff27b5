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
