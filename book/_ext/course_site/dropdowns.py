"""Solutions that open where people tap: one <details> with the code inside, open in print.

The theme's own toggles need a script that fails on a title with a link, and leave the code that
belongs to a solution behind a second toggle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx_exercise.nodes import (
    exercise_enumerable_node,
    exercise_node,
    solution_node,
)

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.writers.html5 import HTML5Translator


class dropdown(nodes.General, nodes.Element):
    """A box that is closed until its title is tapped."""


class summary(nodes.Part, nodes.TextElement):
    """Its title."""


def is_hidden_cell(node: nodes.Node) -> bool:
    return (
        isinstance(node, nodes.container) and node.get("hide_mode") == "all"
    )


class Dropdowns(SphinxPostTransform):
    """Make dropdown boxes of solutions, with the hidden cells behind them, and of admonitions."""

    default_priority = 30  # after sphinx-exercise has written its titles, before myst-nb hides cells
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        for node in list(self.document.findall(is_exercise)):
            unwrap_sections(node)
        for node in list(self.document.findall(is_dropdown)):
            if isinstance(node, solution_node):
                unwrap_sections(node)
                take_hidden_cells(node)
            title, *content = node.children
            box = dropdown(
                "",
                *content,
                ids=node["ids"],
                classes=[*node["classes"], "admonition"],
            )
            box.insert(0, summary("", "", *without_links(title)))
            node.replace_self(box)


def is_exercise(node: nodes.Node) -> bool:
    return isinstance(node, exercise_node | exercise_enumerable_node)


def is_dropdown(node: nodes.Node) -> bool:
    if isinstance(node, solution_node):
        return True
    return isinstance(node, nodes.Admonition) and "dropdown" in node.get(
        "classes", []
    )


def unwrap_sections(node: nodes.Element) -> None:
    """Lift content out of sections whose id ("solution-content") is the same in every box."""
    for section in [
        child for child in node.children if isinstance(child, nodes.section)
    ]:
        where = node.index(section)
        node[where : where + 1] = section.children


def take_hidden_cells(solution: nodes.Element) -> None:
    """Move the hidden cells that follow a solution into it, and show them there."""
    parent = solution.parent
    after = parent.index(solution) + 1
    while after < len(parent) and is_hidden_cell(parent[after]):
        cell = parent[after]
        parent.remove(cell)
        solution.append(cell)
    for cell in solution.findall(is_hidden_cell):
        del cell["hide_mode"]


def without_links(title: nodes.Element) -> list[nodes.Node]:
    """Return a title's content as text: a link in it would be followed instead of opening."""
    for link in list(title.findall(nodes.reference)):
        link.replace_self(link.children)
    return list(title.children)


def visit_dropdown(self: HTML5Translator, node: dropdown) -> None:
    self.body.append(self.starttag(node, "details"))


def depart_dropdown(self: HTML5Translator, node: dropdown) -> None:
    self.body.append("</details>\n")


def visit_summary(self: HTML5Translator, node: summary) -> None:
    self.body.append(
        self.starttag(node, "summary", "", CLASS="admonition-title")
    )


def depart_summary(self: HTML5Translator, node: summary) -> None:
    self.body.append("</summary>\n")


def setup(app: Sphinx) -> None:
    app.add_node(dropdown, html=(visit_dropdown, depart_dropdown))
    app.add_node(summary, html=(visit_summary, depart_summary))
    app.add_post_transform(Dropdowns)
