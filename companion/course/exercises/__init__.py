"""The exercises of the book, by part: a reference solution for each, inputs to try, a hint."""

from companion.course.exercises.classic_road import CLASSIC_ROAD, Exercise
from companion.course.exercises.language_models import LANGUAGE_MODELS

EXERCISES = CLASSIC_ROAD | LANGUAGE_MODELS

__all__ = ["EXERCISES", "Exercise"]
