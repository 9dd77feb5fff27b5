"""The companion's reference: a page for each room, written from what the rooms hold."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import TYPE_CHECKING, Any

from sphinx.pycode import ModuleAnalyzer

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
    """Return the modules of a room that offer names; the solutions of exercises stay closed."""
    package = importlib.import_module(f"companion.{room}")
    found = [
        m.name
        for m in pkgutil.walk_packages(
            package.__path__, f"{package.__name__}."
        )
    ]
    loaded = [
        importlib.import_module(name)
        for name in found
        if ".exercises" not in name
    ]
    return [module for module in loaded if public(module)]


def public(module: Any) -> dict[str, str]:
    """Return the names that autodoc lists for a module, each with its purpose."""
    documented = ModuleAnalyzer.for_module(module.__name__).find_attr_docs()
    names = {
        name: " ".join(text)
        for (scope, name), text in documented.items()
        if not scope
    }
    for name, value in vars(module).items():
        callable_ = inspect.isclass(value) or inspect.isroutine(value)
        if (
            callable_
            and value.__doc__
            and value.__module__ == module.__name__
        ):
            names[name] = value.__doc__
    return {
        name: purpose(text)
        for name, text in names.items()
        if not name.startswith("_")
    }


def rows(module: str, names: dict[str, str]) -> list[str]:
    """Return rows of a table: a name that leads to its entry, and what it is for."""
    return [
        f"| {{py:obj}}`{name} <{module}.{name}>` | {text} |"
        for name, text in names.items()
    ]


def table(rows: list[str]) -> str:
    return "\n".join(["| Name | What it is for |", "|---|---|", *rows])


def room_page(room: str) -> str:
    """Return a room's tables and entries, in Markdown."""
    parts = []
    for module in modules(room):
        name = module.__name__
        entry = (
            f"```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n```"
        )
        short = name.removeprefix(f"companion.{room}.")
        parts += [f"## {short}", table(rows(name, public(module))), entry]
    return "\n\n".join(parts)


def face_table() -> str:
    """Return the names of ``from companion import ...``, room by room."""
    lines = []
    for module, offered in companion._HOME.items():
        names = public(importlib.import_module(f"companion.{module}"))
        lines += rows(
            f"companion.{module}", {name: names[name] for name in offered}
        )
    return table(lines)


def write(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replace the lines that stand for generated text."""
    lines = source[0].splitlines()
    for i, line in enumerate(lines):
        if line == FACE:
            lines[i] = face_table()
        elif line.startswith(ROOM):
            lines[i] = room_page(line.removeprefix(ROOM))
    source[0] = "\n".join(lines) + "\n"


def outdated(
    app: Sphinx,
    env: Any,
    added: set[str],
    changed: set[str],
    removed: set[str],
) -> list[str]:
    """Read these pages again in every build: a room may have gained a module."""
    return [
        name
        for name in env.found_docs
        if name.startswith(("reference/", "companion_"))
    ]


def setup(app: Sphinx) -> None:
    app.connect("env-get-outdated", outdated)
    app.connect("source-read", write)
