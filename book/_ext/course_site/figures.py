"""The pictures of ideas stand in the page itself, so that their colours follow its theme.

Where a page shows a file of ``_static/figures``, its SVG takes the place of the image. What the alt
text says becomes its description; the ids of title and description are made of its name, so that
several pictures on a page do not meet. In JupyterLab, and wherever else the notebook is opened, the
same file is an image on its own light card.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from docutils import nodes
from sphinx.errors import ExtensionError
from sphinx.transforms.post_transforms import SphinxPostTransform

if TYPE_CHECKING:
    from sphinx.application import Sphinx

FOLDER = PurePosixPath("_static/figures")
SIZE = re.compile(r' width="[\d.]+" height="[\d.]+"')


def inline(svg: str, name: str, alt: str) -> str:
    """Return a picture as an element of a page, with a name and a description to be spoken."""
    title, description = f"fig-{name}-title", f"fig-{name}-desc"
    opening = f'<svg class="concept" role="img" aria-labelledby="{title} {description}"'
    svg = SIZE.sub("", svg.replace("<svg", opening, 1), count=1)
    return svg.replace("<title>", f'<title id="{title}">', 1).replace(
        "</title>",
        f'</title><desc id="{description}">{escape(alt, quote=False)}</desc>',
        1,
    )


class InlineFigures(SphinxPostTransform):
    """Replace the images of this folder by what the files hold."""

    default_priority = 20
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        for image in list(self.document.findall(nodes.image)):
            path = PurePosixPath(image["uri"])
            if not path.is_relative_to(FOLDER):
                continue
            alt = " ".join(image.get("alt", "").split())
            if not alt:
                raise ExtensionError(
                    f"{path}: the picture needs an alt text"
                )
            svg = (Path(self.app.srcdir) / path).read_text()
            image.replace_self(
                nodes.raw("", inline(svg, path.stem, alt), format="html")
            )


def depend(app: Sphinx, doctree: nodes.document) -> None:
    """Build a page anew when a picture on it was drawn anew."""
    for image in doctree.findall(nodes.image):
        if PurePosixPath(image["uri"]).is_relative_to(FOLDER):
            app.env.note_dependency(image["uri"])


def setup(app: Sphinx) -> None:
    app.add_post_transform(InlineFigures)
    app.connect("doctree-read", depend)
