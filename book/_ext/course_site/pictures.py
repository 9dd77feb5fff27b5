"""The pictures of the tale: they bring their own ground, in the light and in the dark.

The theme lays every other picture on a white card in the dark. A class says which to leave alone,
so that a chapter names its picture in plain Markdown, which JupyterLab shows as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from docutils import nodes

if TYPE_CHECKING:
    from sphinx.application import Sphinx


class image(nodes.image):  # writers find their method by this name
    """A picture whose words stand for it, and are not the first sentence of its page.

    A shared link describes a page by how its text begins.
    """

    def astext(self) -> str:
        return ""


def mark(app: Sphinx, doctree: nodes.document) -> None:
    """Give the pictures of the tale their classes."""
    for found in list(doctree.findall(nodes.image)):
        if "_static/tale/" not in found["uri"]:
            continue
        name = found["uri"].rpartition("/")[2]
        drawn = image(found.rawsource, **found.attributes)
        drawn["classes"] += [
            "dark-light",
            "vignette" if name.startswith("ch") else "scene",
        ]
        found.replace_self(drawn)


def setup(app: Sphinx) -> None:
    app.connect("doctree-read", mark)
