"""One plot for each task."""

from companion.course.figures import Panel, panels
from companion.evaluation.estimates import Estimate


def test_every_task_has_its_plot_and_the_rest_is_the_legend():
    e, low = Estimate(0.9, 0.8, 0.95, 100), Estimate(0.2, 0.1, 0.4, 100)
    plots = [
        Panel(
            f"task {i}",
            "accuracy",
            e,
            0.5,
            {"PTQ": {"W4": e, "W2": low}, "QAT": {"W4": e, "W2": e}},
        )
        for i in range(5)
    ]
    figure = panels(plots)
    assert len(figure.axes) == 6
    assert [ax.get_title() for ax in figure.axes[:5]] == [p.title for p in plots]
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["W4", "W2"]
    legend = figure.axes[5].get_legend()
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["float (band: 95 % interval)", "baseline", "PTQ", "QAT"]
    heights = [line.get_ydata()[0] for line in figure.axes[0].lines]
    assert 0.5 in heights
    assert 0.9 in heights


def test_an_arm_that_lacks_a_scheme_keeps_the_places_of_the_others():
    e, low = Estimate(0.9, 0.8, 0.95, 100), Estimate(0.2, 0.1, 0.4, 100)
    arms = {"PTQ": {"W8A8": e, "W4": e, "W2": low}, "QAT": {"W2": e}}
    ax = panels([Panel("topics", "accuracy", e, 0.5, arms)]).axes[0]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["W8A8", "W4", "W2"]
    assert list(ax.get_xticks()) == [0, 1, 2]
    post, trained = (bars.lines[0].get_xdata() for bars in ax.containers)
    assert [round(float(x)) for x in (*post, *trained)] == [0, 1, 2, 2]
    assert trained[0] > post[2]  # side by side
