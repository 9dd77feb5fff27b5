"""Files that can be trusted: a cache folder, atomic writing, hashes, seals."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_MARK, _DIGITS = b"companion-sha256:", 64
BLANK = _MARK.decode() + "0" * _DIGITS
"""What a writer puts into a file, anywhere, for `seal` to fill."""


def cache_folder() -> Path:
    """Return where downloads and stand-ins are kept: beside torch's own cache (TORCH_HOME)."""
    return Path(torch.hub.get_dir()).parent / "companion"


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(path: str | Path, *beside: Path) -> None:
    """Write into a file the hash of itself, in place of the zeros of `BLANK`.

    The format's own readers see a text that says nothing to them. A file without `BLANK` stays as
    it is.

    Parameters
    ----------
    path : path
    *beside : Path
        Files that belong to it, and are hashed with it.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "note.txt")
    >>> _ = path.write_text(f"whole {BLANK}")
    >>> seal(path)
    >>> _ = is_sealed(path), path.write_text(path.read_text().replace("whole", "other"))
    >>> is_sealed(path)
    False
    """
    found = _sealed(Path(path), beside)
    if found is not None:
        place, _, digest = found
        with Path(path).open("rb+") as file:
            file.seek(place)
            file.write(digest)


def is_sealed(path: str | Path, *beside: Path) -> bool | None:
    """Whether a file is the one that was sealed; None where it carries no seal.

    Parameters
    ----------
    path, *beside
        As in `seal`.
    """
    found = _sealed(Path(path), beside)
    return None if found is None else found[1] == found[2]


def _sealed(path: Path, beside: tuple[Path, ...]) -> tuple[int, bytes, bytes] | None:
    """Where the digits of a seal stand, what they are, and what they should be."""
    if path.stat().st_size == 0:
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        place = data.find(_MARK) + len(_MARK)
        end = place + _DIGITS
        if place < len(_MARK) or end > len(data):
            return None
        found = hashlib.sha256()
        with memoryview(data) as whole, whole[:place] as head, whole[end:] as tail:
            for part in (head, b"0" * _DIGITS, tail):
                found.update(part)
        said = data[place:end]
    for other in beside:
        found.update(bytes.fromhex(sha256(other)))
    return place, said, found.hexdigest().encode()


def read_json(path: str | Path) -> Any:
    """Read a JSON file; whatever is wrong with its text is a ValueError.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "deep.json")
    >>> _ = path.write_text("[" * 100_000)
    >>> read_json(path)
    Traceback (most recent call last):
    ValueError: it is nested too deeply
    """
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def flush(path: Path) -> None:
    """Have the bytes of a file on the disk before its name says that they are there."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


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
        flush(partial)
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
            flush(path)
        if folder.is_dir():
            for path in sorted(partial.iterdir(), key=lambda path: path.name == last):
                path.replace(folder / path.name)
        else:
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
