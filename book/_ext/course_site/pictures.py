"""The pictures of the tale: they bring their own ground, in the light and in the dark.

The theme lays every other picture on a white card in the dark. A class says which to leave alone,
so that a chapter names its picture in plain Markdown, which JupyterLab shows as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from docutils import nodes

if TYPE_CHECKING:
    from sphinx.application import Sphinx


def mark(app: Sphinx, doctree: nodes.document) -> None:
    """Give the pictures of the tale their classes."""
    for image in doctree.findall(nodes.image):
        if "_static/tale/" in image["uri"]:
            wide = not image["uri"].rpartition("/")[2].startswith("ch")
            image["classes"] += [
                "dark-light",
                "scene" if wide else "vignette",
            ]


def setup(app: Sphinx) -> None:
    app.connect("doctree-read", mark)
