"""Small mends of the pages as the theme and its companions write them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.application import Sphinx


def mend(
    app: Sphinx,
    pagename: str,
    template: str,
    context: dict[str, Any],
    doctree: nodes.document,
) -> None:
    """Let the visible words name what opens a hidden cell."""
    if "body" in context:
        context["body"] = context["body"].replace(
            '<summary aria-label="Toggle hidden content">', "<summary>"
        )


def setup(app: Sphinx) -> None:
    app.connect("html-page-context", mend, priority=800)
