"""Small mends of the pages as the theme and its companions write them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.application import Sphinx


MENDS = {
    '<summary aria-label="Toggle hidden content">': "<summary>",
    '<div role="list" class="citation-list">': '<div class="citation-list">',
}


def mend(
    app: Sphinx,
    pagename: str,
    template: str,
    context: dict[str, Any],
    doctree: nodes.document,
) -> None:
    """Let visible words name what opens a hidden cell, and a list of references be no list."""
    for wrong, right in MENDS.items():
        context["body"] = context.get("body", "").replace(wrong, right)


def mend_search(app: Sphinx, failed: Exception | None) -> None:
    """Give the name of the search field to one of the two on the search page."""
    page = Path(app.outdir) / "search.html"
    if not failed and page.exists():
        page.write_text(
            page.read_text().replace(' id="search-input"', "", 1)
        )


def setup(app: Sphinx) -> None:
    app.connect("html-page-context", mend, priority=800)
    app.connect("build-finished", mend_search)
