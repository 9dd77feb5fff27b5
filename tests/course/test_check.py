import pytest

from companion.course import check
from companion.course.check import EXERCISES


@pytest.mark.parametrize("name", EXERCISES)
def test_reference_passes_and_others_do_not(name, capsys):
    check.check(name, EXERCISES[name].reference)
    assert capsys.readouterr().out == f"{name}: correct\n"
    for wrong in (lambda *args: 12345.678, lambda *args: "text", -1):
        check.check(name, wrong)
        out = capsys.readouterr().out
        assert out.startswith(f"{name}: not yet.")
        assert f"Hint: {EXERCISES[name].hint}" in out


def test_unknown_exercise_names_the_known():
    with pytest.raises(KeyError, match="ch04-scale"):
        check.check("ch99-nothing", 1)


@pytest.mark.parametrize(
    "untouched",
    [
        ...,
        None,
        lambda *args: ...,
        lambda *args: None,
        lambda *args: (..., 1),
        lambda *args: 2 * ...,
    ],
    ids=["dots", "none", "returns-dots", "returns-none", "half", "computes"],
)
def test_an_untouched_exercise_gives_nothing_away(untouched, capsys):
    for name in EXERCISES:
        check.check(name, untouched)
        out = capsys.readouterr().out
        assert out == f"{name}: not yet. Replace the ... in the cell above.\n"


def test_an_error_of_the_readers_own_is_theirs_to_see():
    with pytest.raises(TypeError, match="unsupported operand"):
        check.check("ch04-levels", lambda bits: bits + "1")
