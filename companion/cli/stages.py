"""A model at any stage by its name: from the Hub, fine-tuned and saved, or exported.

Built in chapter 14.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from companion.course.models import load_pretrained
from companion.course.sources import load_tokenizer
from companion.errors import SourceUnavailable
from companion.formats.onnx.model import OnnxModel
from companion.qat.saved import CONFIG, KEY, load_quantized


def open_model(name: str, *, head: str | None = None, classes: int | None = None) -> nn.Module:
    """Open an exported file, a folder of `save_quantized`, or what `load_pretrained` takes.

    Parameters
    ----------
    name : str
    head, classes
        As in `load_pretrained`; saved and exported models have theirs.

    Returns
    -------
    nn.Module
        In eval mode.

    Examples
    --------
    >>> open_model("docs-lm").num_parameters()
    3410176
    """
    if name.endswith(".onnx"):
        return OnnxModel(name)
    if is_quantized(name):
        return load_quantized(name)
    return load_pretrained(name, head=head, classes=classes).eval()


def is_quantized(name: str) -> bool:
    """Whether a folder was written by `save_quantized`."""
    config = Path(name, CONFIG)
    try:
        return config.is_file() and KEY in json.loads(config.read_text())
    except ValueError:
        return False


def open_tokenizer(name: str):
    """Load the tokenizer of a model: for an exported file, the one that lies beside it.

    Parameters
    ----------
    name : str
        As in `open_model`.

    Raises
    ------
    SourceUnavailable
        If there is none.
    """
    folder = str(Path(name).parent) if name.endswith(".onnx") else name
    try:
        return load_tokenizer(folder)
    except (OSError, ValueError):
        raise SourceUnavailable(
            f"no tokenizer was found for {name}: tokenizer.json belongs beside the model's file"
        ) from None
