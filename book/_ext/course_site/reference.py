"""The companion's reference: a page for each room, written from what the rooms hold."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import TYPE_CHECKING, Any

import companion

if TYPE_CHECKING:
    from sphinx.application import Sphinx

FACE = "% the names of the face"
ROOM = "% the modules of companion."


def purpose(text: str | None) -> str:
    """Return the first sentence of a docstring, on one line that a table can hold."""
    first = inspect.cleandoc(text or "").split("\n\n")[0]
    return " ".join(first.split()).replace("``", "`").replace("|", "\\|")


def modules(room: str) -> list[Any]:
    """Return the modules of a room that offer names, in the order of their names."""
    package = importlib.import_module(f"companion.{room}")
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    loaded = [
        importlib.import_module(m.name)
        for m in found
        if ".assets" not in m.name
    ]
    return [m for m in loaded if public(m)]


def public(module: Any) -> list[str]:
    """Return the names of a module that its reference lists."""
    return [
        n
        for n in getattr(module, "__all__", [])
        if not hasattr(module, "__path__")
    ]


def link(module: str, name: str) -> str:
    return f"{{py:obj}}`{name} <{module}.{name}>`"


def described(module: Any, name: str) -> str:
    """Return a row of a table: a name and what it is for."""
    value = getattr(module, name)
    if inspect.isclass(value) or inspect.isroutine(value):
        return (
            f"| {link(module.__name__, name)} | {purpose(value.__doc__)} |"
        )
    return f"| {link(module.__name__, name)} | `{value!r}` |"


def table(rows: list[str]) -> str:
    return "\n".join(["| Name | What it is for |", "|---|---|", *rows])


def room_page(room: str) -> str:
    """Return a room's tables and entries, in Markdown."""
    parts = []
    for module in modules(room):
        short = module.__name__.removeprefix(f"companion.{room}.")
        rows = table([described(module, name) for name in public(module)])
        entry = f"```{{eval-rst}}\n.. automodule:: {module.__name__}\n   :members:\n```"
        parts.append(f"## {short}\n\n{rows}\n\n{entry}")
    return "\n\n".join(parts)


def face_table() -> str:
    """Return the names of ``from companion import ...``, room by room."""
    return table(
        [
            described(importlib.import_module(f"companion.{module}"), name)
            for module, names in companion._HOME.items()
            for name in names
        ]
    )


def write(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replace the lines that stand for generated text."""
    lines = source[0].splitlines()
    for i, line in enumerate(lines):
        if line == FACE:
            lines[i] = face_table()
        elif line.startswith(ROOM):
            lines[i] = room_page(line.removeprefix(ROOM))
    source[0] = "\n".join(lines) + "\n"


def setup(app: Sphinx) -> None:
    app.connect("source-read", write)
