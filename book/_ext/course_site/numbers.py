"""Chapter numbers, as in the sidebar, in references and in the titles of pages."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment


def chapter_number(env: BuildEnvironment, docname: str) -> int | None:
    """Return the number of a chapter, None for a page that has none."""
    number = env.toc_secnumbers.get(docname, {}).get("")
    return number[0] if number else None


class ChapterReferences(SphinxPostTransform):
    """Write "chapter 4" for a reference that would quote the chapter's title.

    Alone in its paragraph or cell, as in a table of contents, it reads "4 · The integer grid".
    """

    default_priority = 50  # references are resolved before
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        pages = {
            self.app.builder.get_target_uri(name): name
            for name in self.env.found_docs
        }
        here = self.app.builder.get_target_uri(self.env.docname)
        for link in self.document.findall(nodes.reference):
            if not link.get("internal"):
                continue
            target = resolve(here, link.get("refuri", "").partition("#")[0])
            title = self.env.titles.get(pages.get(target, self.env.docname))
            number = chapter_number(
                self.env, pages.get(target, self.env.docname)
            )
            if (
                number is None
                or title is None
                or link.astext() != title.astext()
            ):
                continue
            if len(link.parent) == 1 and isinstance(
                link.parent, nodes.paragraph
            ):
                link.insert(0, nodes.Text(f"{number} · "))
                continue
            word = "Chapter" if starts_sentence(link) else "chapter"
            link["reftitle"] = title.astext()
            link.children.clear()
            link.append(
                nodes.inline(
                    "", f"{word} {number}", classes=["std", "std-ref"]
                )
            )


def resolve(here: str, uri: str) -> str:
    """Return where a link of one page leads, as seen from the root."""
    from posixpath import dirname, join, normpath

    return normpath(join(dirname(here), uri)) if uri else here


def starts_sentence(link: nodes.reference) -> bool:
    """Say whether nothing, or a full stop, stands before it."""
    before = ""
    for node in link.parent.children:
        if node is link:
            break
        before += node.astext()
    return not before.strip() or bool(
        re.search(r"[.!?]\W*$", before.replace("…", "."))
    )


def number_titles(
    app: Sphinx,
    pagename: str,
    template: str,
    context: dict[str, Any],
    doctree: nodes.document,
) -> None:
    """Number the page's title, and those of the pages before and after."""
    number = chapter_number(app.env, pagename)
    shown = re.sub("<[^>]*>", "", context.get("title", ""))
    if number is not None and not shown.startswith(f"{number} · "):
        context["title"] = f"{number} · {context['title']}"
    names = app.env.found_docs
    for side, step in (("prev", 1), ("next", 2)):
        other = (relations(app).get(pagename) or [None] * 3)[step]
        if (
            context.get(side)
            and other in names
            and (number := chapter_number(app.env, other))
        ):
            context[side] = {
                **context[side],
                "title": f"{number} · {context[side]['title']}",
            }


def relations(app: Sphinx) -> dict[str, list[str | None]]:
    return app.builder.relations


def setup(app: Sphinx) -> None:
    app.add_post_transform(ChapterReferences)
    app.connect("html-page-context", number_titles, priority=100)
