"""What the book's pages need beyond their theme, one concern in each module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from course_site import (
    address,
    assets,
    dropdowns,
    numbers,
    pages,
    reference,
)

if TYPE_CHECKING:
    from sphinx.application import Sphinx


def setup(app: Sphinx) -> dict[str, bool]:
    for module in (address, assets, dropdowns, numbers, pages, reference):
        module.setup(app)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
