"""The older name, which the benchmark of served speed goes by, is the one of all formats."""

from companion.formats.onnx import parity as older
from companion.formats.onnx.stored import read_integers
from companion.formats.parity import Parity, parity


def test_it_is_the_same():
    assert (older.parity, older.Parity, older.read_integers) == (parity, Parity, read_integers)
