"""Checks that hold become a tick; what does not hold, and what is no check, stays."""

import sys

from tests.book.notebooks import BOOK

sys.path.insert(0, str(BOOK / "_ext"))
from course_site.ticks import ticked


def test_a_run_of_checks_is_one_line_and_numbers_stay():
    text = "damage 0.02\nsame scales:   True\nsame integers: True\n\nn = 20\n"
    assert ticked(text) == [
        (["damage 0.02"], ""),
        (["same scales:   True", "same integers: True"], "same scales · same integers"),
        (["", "n = 20"], ""),
    ]


def test_an_output_with_anything_false_or_without_a_check_is_left():
    assert ticked("alone: True\nin the batch: False\n") is None
    assert ticked("True\n") is None
    assert ticked("8 bits: equal True, 218 values\n") is None
