"""Files that can be trusted: a cache folder, atomic writing, hashes."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch


def cache_folder() -> Path:
    """Return where downloads and stand-ins are kept: beside torch's own cache (TORCH_HOME)."""
    return Path(torch.hub.get_dir()).parent / "companion"


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then replace `path` by it in one step.

    A process killed at any moment leaves either the old file or the complete new one.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "note.txt")
    >>> write_atomically(path, lambda partial: partial.write_text("whole"))
    >>> path.read_text()
    'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_folder(folder: str | Path, write: Callable[[Path], object], last: str) -> None:
    """Let `write` fill a new folder, then move its files into `folder`.

    Where there was no such folder it appears in one step, complete. Other files in one that is
    there stay; those of the same names are replaced, each in one step.

    Parameters
    ----------
    folder : path
    write : callable
        Takes the folder to fill, with files only.
    last : str
        The file that is replaced after all others: whoever finds the old one beside new files
        can tell by their hashes.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp(), "new")
    >>> write_folder(folder, lambda partial: (partial / "note.txt").write_text("whole"), "note.txt")
    >>> [path.name for path in folder.iterdir()]
    ['note.txt']
    """
    folder = Path(folder).resolve()
    beside = folder if folder.is_dir() else folder.parent  # where moving is no copying
    beside.mkdir(parents=True, exist_ok=True)
    partial = beside / f".{folder.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write(partial)
        for path in partial.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        if folder.is_dir():
            for path in sorted(partial.iterdir(), key=lambda path: path.name == last):
                path.replace(folder / path.name)
        else:
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
