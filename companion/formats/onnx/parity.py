"""The older place of what now serves every format: `parity`, and the reader of ONNX files.

Built in chapter 15.
"""

from companion.formats.onnx.stored import read_integers
from companion.formats.parity import Parity, parity

__all__ = ["Parity", "parity", "read_integers"]
