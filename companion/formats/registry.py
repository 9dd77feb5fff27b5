"""The formats in which a converted model leaves: one entry each, with all that commands ask of it.

Built in chapter 15.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from companion.formats.compressed_tensors import (
    export_compressed_tensors,
    is_compressed_tensors,
    open_compressed_tensors,
    read_compressed_tensors,
)
from companion.formats.executorch.export import export_executorch
from companion.formats.executorch.model import ExecuTorchModel
from companion.formats.executorch.stored import read_executorch
from companion.formats.gguf import BLOCK, export_gguf, read_gguf
from companion.formats.hub import is_saved, load_quantized, read_folder, save_quantized
from companion.formats.llama_cpp import LlamaCppModel
from companion.formats.onnx.export import export_onnx
from companion.formats.onnx.model import OnnxModel
from companion.formats.onnx.stored import read_onnx, rounded_block
from companion.formats.served import Matrix
from companion.numerics.scheme import BLOCK8, W4A8, Activations

Rounding = tuple[Activations, int | None]
"""How an engine rounds the inputs of a layer, and in blocks of how many."""


@dataclass(frozen=True)
class Format:
    """One way out.

    Parameters
    ----------
    engine : str
        Who computes what is written.
    ending : str
        Of the file's name; empty for a folder.
    is_at : callable
        Whether a path holds this format.
    export : callable
        ``export(model, path, tokenizer, **options)`` writes a converted model, complete or not at
        all.
    read : callable
        ``read(path, model)`` gives a `Matrix` for each layer that is found.
    open : callable
        ``open(path)`` gives a model that the engine computes.
    rounds : callable
        ``rounds(path)`` says how the engine rounds a layer's inputs whatever was trained, or gives
        None where it takes them as they are.
    holds_tokenizer : bool
        Whether the tokenizer is inside of it; otherwise it belongs beside.
    """

    engine: str
    ending: str
    is_at: Callable[[Path], bool]
    export: Callable[..., Any]
    read: Callable[[Path, nn.Module], dict[str, Matrix]]
    open: Callable[[Path], nn.Module]
    rounds: Callable[[Path], Rounding | None] = lambda path: None
    holds_tokenizer: bool = False


def _by_blocks(length: int | None) -> Rounding | None:
    return None if length is None else (BLOCK8, length)


def _ends_in(ending: str) -> Callable[[Path], bool]:
    return lambda path: path.suffix == ending


FORMATS: dict[str, Format] = {
    "companion": Format(
        "PyTorch", "", is_saved,
        lambda model, path, tokenizer=None, **options: save_quantized(model, path, **options),
        read_folder, load_quantized,
    ),
    "compressed-tensors": Format(
        "transformers", "", is_compressed_tensors,
        lambda model, path, tokenizer=None, **options:
            export_compressed_tensors(model, path, **options),
        read_compressed_tensors, open_compressed_tensors,
    ),
    "onnx": Format(
        "ONNX Runtime", ".onnx", _ends_in(".onnx"),
        lambda model, path, tokenizer=None, **options: export_onnx(model, path, **options),
        read_onnx, OnnxModel, rounds=lambda path: _by_blocks(rounded_block(path)),
    ),
    "gguf": Format(
        "llama.cpp", ".gguf", _ends_in(".gguf"), export_gguf, read_gguf, LlamaCppModel,
        rounds=lambda path: _by_blocks(BLOCK), holds_tokenizer=True,
    ),
    "executorch": Format(
        "ExecuTorch", ".pte", _ends_in(".pte"),
        lambda model, path, tokenizer=None, **options: export_executorch(model, path, **options),
        read_executorch, ExecuTorchModel, rounds=lambda path: (W4A8.activations, None),
    ),
}  # fmt: skip
"""By the name that ``companion export --format`` takes. Another way out is another entry here."""


def format_at(path: str | Path) -> str | None:
    """Say which format a path holds, or None where it holds none of them.

    Parameters
    ----------
    path : path

    Examples
    --------
    >>> format_at("served/model.gguf"), format_at("docs-lm")
    ('gguf', None)
    """
    return next((name for name, form in FORMATS.items() if form.is_at(Path(path))), None)


def format_for(path: str | Path, asked: str = "auto") -> str:
    """Choose the format to write: the one that was asked for, or what the ending says.

    Parameters
    ----------
    path : path
        Of what is to be written.
    asked : str
        A name of `FORMATS`, or ``"auto"``.

    Raises
    ------
    ValueError
        If the ending says no format, or another one than was asked for.

    Examples
    --------
    >>> format_for("served/model.onnx"), format_for("served", "compressed-tensors")
    ('onnx', 'compressed-tensors')
    >>> format_for("served/model.pb")
    Traceback (most recent call last):
    ValueError: served/model.pb says no format: let its name end in .onnx or .gguf or ...
    """
    ending = Path(path).suffix
    endings = {form.ending: name for name, form in FORMATS.items() if form.ending}
    folders = [name for name, form in FORMATS.items() if not form.ending]
    if asked == "auto":
        if ending in endings:
            return endings[ending]
        raise ValueError(
            f"{path} says no format: let its name end in {' or '.join(endings)}, or choose a folder "
            f"with --format {' or '.join(folders)}"
        )
    if asked not in FORMATS:
        raise ValueError(f"format {asked!r} is unknown: choose auto, {', '.join(FORMATS)}")
    wanted = FORMATS[asked].ending
    if (wanted and ending != wanted) or (not wanted and ending in endings):
        needs = f"a name that ends in {wanted}" if wanted else "a folder"
        raise ValueError(f"{path} does not fit the format {asked}, which is {needs}")
    return asked
