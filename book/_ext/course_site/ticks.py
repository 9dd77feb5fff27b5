"""Checks that hold take one line: a tick and what was checked, with the output itself in a closed box.

A cell that compares prints "same integers: True", so that the notebook's own checks can compare it. A
reader wants to know that it holds, and goes on. Where anything is False, the output stays as it is.
"""

from __future__ import annotations

import re
from itertools import groupby
from typing import TYPE_CHECKING, Any

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform

from course_site.quizzes import tag

if TYPE_CHECKING:
    from sphinx.application import Sphinx

HOLDS = re.compile(r"^(?P<what>.*\S):\s+True\s*$")


def ticked(text: str) -> list[tuple[list[str], str]] | None:
    """Return runs of lines, each with what its checks say ("" for other lines); None: leave it."""
    lines = text.rstrip("\n").split("\n")
    if "False" in text or not any(map(HOLDS.match, lines)):
        return None
    runs = []
    for holds, run in groupby(
        lines, key=lambda line: bool(HOLDS.match(line))
    ):
        found = list(run)
        said = [
            " ".join(HOLDS.match(line)["what"].split())
            for line in found
            if holds
        ]
        if holds or "".join(found).strip():
            runs.append((found, " · ".join(said)))
    return runs


class Ticks(SphinxPostTransform):
    """Put the checks of an output into a box that says they hold."""

    default_priority = 35
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        for block in list(self.document.findall(nodes.literal_block)):
            if "stream" not in block["classes"]:
                continue
            runs = ticked(block.astext())
            if runs is None:
                continue
            made: list[nodes.Node] = []
            for lines, said in runs:
                text = "\n".join(lines)
                part = nodes.literal_block(text, text, **block.attributes)
                if said:
                    line = tag("summary", nodes.Text(f"✓ {said}"))
                    part = tag("details", line, part, class_="checks")
                made.append(part)
            block.replace_self(made)


def setup(app: Sphinx) -> None:
    app.add_post_transform(Ticks)
