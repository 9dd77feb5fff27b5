import pytest

from companion.course import check
from companion.course.check import EXERCISES


@pytest.mark.parametrize("name", EXERCISES)
def test_reference_passes_and_others_do_not(name, capsys):
    check.check(name, EXERCISES[name].reference)
    assert capsys.readouterr().out == f"{name}: correct\n"
    for wrong in (lambda *args: ..., lambda *args: None, lambda *args: 12345.678, -1):
        check.check(name, wrong)
        out = capsys.readouterr().out
        assert out.startswith(f"{name}: not yet.")
        assert f"Hint: {EXERCISES[name].hint}" in out


def test_unknown_exercise_names_the_known():
    with pytest.raises(KeyError, match="ch04-scale"):
        check.check("ch99-nothing", 1)
