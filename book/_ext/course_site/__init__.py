"""What the book's pages need beyond their theme, one concern in each module."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_site import (
    address,
    assets,
    dropdowns,
    figures,
    moving,
    numbers,
    pages,
    pictures,
    quizzes,
    reference,
    ticks,
)

if TYPE_CHECKING:
    from sphinx.application import Sphinx


def setup(app: Sphinx) -> dict[str, Any]:
    """Set every concern up; pages built by an earlier state of this folder are built anew."""
    for module in (
        address,
        assets,
        dropdowns,
        figures,
        moving,
        numbers,
        pages,
        pictures,
        quizzes,
        reference,
        ticks,
    ):
        module.setup(app)
    sources = [
        path
        for path in Path(__file__).parent.rglob("*")
        if path.suffix in (".py", ".html")
    ]
    state = b"".join(path.read_bytes() for path in sorted(sources))
    version = int(hashlib.sha256(state).hexdigest()[:8], 16)
    return {
        "env_version": version,
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
