"""The figures of deployment show what they are given."""

from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle

from companion.course.figures import COLOURS, bars_with_limits, byte_by_byte, stacked_bars


def test_two_numbers_stand_above_the_byte_that_they_share():
    ax = byte_by_byte({"integer": ["1", "-2", "3", "0"], "byte": ["0x69", "0x8b"]}).axes[0]
    boxes = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    assert len(boxes) == 6
    assert boxes[4].get_width() > 1.9 * boxes[0].get_width()
    places = {text.get_text(): text.get_position() for text in ax.texts}
    assert places["1"][0] < places["0x69"][0] < places["-2"][0]
    assert places["integer"][1] > places["byte"][1]


def test_each_bar_has_its_own_limit():
    figure = bars_with_limits(
        {"a": 50.0, "b": 9.0}, {"b": 5.0, "a": 30.0}, xlabel="ms", limit="least"
    )
    (ax,) = figure.axes
    assert [bar.get_width() for bar in ax.patches] == [50.0, 9.0]
    marks = ax.collections[0]
    assert [float(segment[0][0]) for segment in marks.get_segments()] == [30.0, 5.0]
    assert tuple(marks.get_color()[0]) == to_rgba(COLOURS[1])
    low, high = ax.get_xlim()
    assert low < 5.0
    assert high > 50.0
    assert ax.get_legend().get_texts()[0].get_text() == "least"


def test_parts_of_a_bar_stand_end_to_end():
    figure = stacked_bars({"a": {"x": 1.0, "y": 2.0}, "b": {"x": 3.0, "y": 0.5}}, xlabel="bytes")
    (ax,) = figure.axes
    spans = [(bar.get_x(), bar.get_width()) for bar in ax.patches]
    assert spans == [(0, 1.0), (0, 3.0), (1.0, 2.0), (3.0, 0.5)]
    assert [text.get_text() for text in ax.texts] == [" 3", " 3.5"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["x", "y"]
