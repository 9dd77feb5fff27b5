"""The package's own errors: each message says what went wrong and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten
from typing import Any


class SchemeError(ValueError):
    """A number format that cannot exist, such as nine-bit weights in an int8 container."""


class NothingToQuantize(ValueError):
    """The model holds no layer that the requested quantization could change."""


class UnsupportedModel(ValueError):
    """The model computes something that the requested road cannot carry."""


class UnsupportedBackend(ValueError):
    """This build of PyTorch has no such quantized engine."""


class WrongStage(RuntimeError):
    """A call out of order: prepare, then train, then freeze, then convert."""


class NothingToTrain(RuntimeError):
    """Training would silently do nothing: no parameter can receive a gradient."""


class EmptyLoader(ValueError):
    """The loader gave no batch."""


class UnreadableBatch(ValueError):
    """A batch that says too little to be measured on, or more than the model takes."""


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite."""


class CheckpointError(RuntimeError):
    """A checkpoint that does not fit this run, or would be overwritten by it."""


class SourceUnavailable(RuntimeError):
    """A model or data set could not be had from any of the sources that were tried."""


class UnknownLayer(ValueError):
    """A name or pattern that matches no layer of the model."""


class DamagedFile(RuntimeError):
    """A saved model whose bytes are not those that were written."""


class DataWarning(UserWarning):
    """Something about the data that a result rests on; the command line shows it, too."""


class MissingExtra(ImportError):
    """A package that only some rooms of this one need is not installed."""


def expect(call: str, name: str, value: object, kind: Any) -> None:
    """Refuse an argument of a wrong type in one sentence.

    Parameters
    ----------
    call, name : str
        Of the function and of its parameter.
    value : object
    kind : type or union of types
        What it takes.

    Raises
    ------
    TypeError

    Examples
    --------
    >>> expect("fit", "steps", "many", int)
    Traceback (most recent call last):
    TypeError: fit() takes int as steps, not str
    """
    if not isinstance(value, kind):
        wanted = getattr(kind, "__name__", str(kind)) if isinstance(kind, type) else str(kind)
        wanted = wanted.replace("pathlib._local.", "").replace("pathlib.", "")
        raise TypeError(f"{call}() takes {wanted} as {name}, not {type(value).__name__}")


@contextmanager
def readable(
    path: object, remedy: str = "copy it again", kind: type[Exception] = DamagedFile
) -> Iterator[None]:
    """Turn whatever a damaged or hostile file sets off into one line; the package's errors pass.

    Parameters
    ----------
    path : path
        What is read.
    remedy : str
        What to do.
    kind : type
        Of the error that is raised instead.

    Examples
    --------
    >>> with readable("model.gguf"):
    ...     [][0]
    Traceback (most recent call last):
    companion.errors.DamagedFile: model.gguf cannot be read (IndexError: list ...): copy it again
    """
    try:
        yield
    except Exception as error:  # parsers raise of every kind, MemoryError and RecursionError too
        if type(error).__module__ == __name__:
            raise
        reason = shorten(f"{type(error).__name__}: {error}".strip(": "), 200, placeholder=" ...")
        raise kind(f"{path} cannot be read ({reason}): {remedy}") from None


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Import what an optional part of the package needs, or say which line installs it.

    Parameters
    ----------
    name : str
        An extra of the wheel, such as ``"deploy"``.

    Raises
    ------
    MissingExtra
        Instead of an ImportError, with the pip line.

    Examples
    --------
    >>> with extra("deploy"):
    ...     import no_such_package
    Traceback (most recent call last):
    companion.errors.MissingExtra: no_such_package is missing: pip install 'companion[deploy]'
    """
    try:
        yield
    except MissingExtra:
        raise
    except ImportError as error:
        missing = f"{error.name} is missing" if error.name else str(error)
        raise MissingExtra(f"{missing}: pip install 'companion[{name}]'") from error
