"""Figures that move: a page that asks for one gets its scripts, and the data that they read.

A figure is asked for by ``data-figure="name"``; its script is book/_static/moving/name.js. What
it reads, name.json beside it, is laid into the page: a page that is opened from a folder may fetch
nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sphinx.errors import ExtensionError

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

FOLDER = Path(__file__).parents[2] / "_static" / "moving"
ASKED = re.compile(r'data-figure="([\w-]+)"')


def as_script(name: str, text: str) -> str:
    """Return JSON as an element that a script reads and nothing runs."""
    held = text.replace("</", "<\\/")
    return f'<script type="application/json" id="moving-{name}">{held}</script>\n'


def without_figures(assets: list[Any]) -> list[Any]:
    """Leave out what jupyter-book loads on every page: all that lies below _static."""
    return [
        asset
        for asset in assets
        if "/moving/" not in str(getattr(asset, "filename", asset))
    ]


def add_figures(
    app: Sphinx,
    pagename: str,
    template: str,
    context: dict[str, Any],
    doctree: nodes.document,
) -> None:
    """Load what the figures of a page need, and nothing on pages without one."""
    for key in ("script_files", "css_files"):
        context[key][:] = without_figures(context[key])
    names = sorted(set(ASKED.findall(context.get("body", ""))))
    if not names:
        return
    chapters = {
        name[2:4]: app.builder.get_relative_uri(pagename, name)
        for name in app.env.found_docs
        if re.match(r"ch\d\d_", name)
    }
    context["body"] += as_script("chapters", json.dumps(chapters))
    app.add_css_file("moving/moving.css")
    app.add_js_file("moving/moving.js", loading_method="defer")
    for name in names:
        if not (FOLDER / f"{name}.js").exists():
            raise ExtensionError(
                f'{pagename} asks for data-figure="{name}", and there is no {name}.js in {FOLDER}'
            )
        app.add_js_file(f"moving/{name}.js", loading_method="defer")
        data = FOLDER / f"{name}.json"
        if data.exists():
            context["body"] += as_script(name, data.read_text())


def outdated(
    app: Sphinx,
    env: BuildEnvironment,
    added: set[str],
    changed: set[str],
    removed: set[str],
) -> list[str]:
    """Build pages with figures anew when a script or its data changed."""
    files = sorted(FOLDER.glob("*.js*"))
    state = hashlib.sha256(b"".join(path.read_bytes() for path in files))
    before = getattr(env, "moving_state", "")
    env.moving_state = state.hexdigest()
    if before == env.moving_state:
        return []
    return [
        name
        for name in env.found_docs
        if ASKED.search(
            Path(env.doc2path(name)).read_text().replace("\\", "")
        )
    ]


def setup(app: Sphinx) -> None:
    app.connect("html-page-context", add_figures)
    app.connect("env-get-outdated", outdated)
