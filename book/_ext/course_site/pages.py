"""Small mends of the pages as the theme and its companions write them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx


MENDS = {  # wrong: right; names that are spoken are those that are seen, or there is one
    '<summary aria-label="Toggle hidden content">': "<summary>",
    '<div role="list" class="citation-list">': '<div class="citation-list">',  # has no items
    '<summary><span class="toctree-toggle"': '<summary aria-label="Pages below"><span '
    'class="toctree-toggle"',
    'search-button-field search-button__button" title="Search" aria-label="Search"': "search-button-"
    'field search-button__button" title="Search"',
}


def mend(app: Sphinx, failed: Exception | None) -> None:
    """Mend the pages as they were written, whichever template a fault came from."""
    if failed or app.builder.format != "html":
        return
    for page in Path(app.outdir).rglob("*.html"):
        text = mended = page.read_text()
        for wrong, right in MENDS.items():
            mended = mended.replace(wrong, right)
        if page.name == "search.html":  # it has the field twice
            mended = mended.replace(
                'id="search-input"',
                "",
                mended.count('id="search-input"') - 1,
            )
        if mended != text:
            page.write_text(mended)


def setup(app: Sphinx) -> None:
    app.connect("build-finished", mend)
