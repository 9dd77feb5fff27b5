"""What a page loads: only what it uses.

The theme sends every icon there is as a script, every page gets the scripts of extensions that it
does not use, and MathJax comes with its menu. Here the icons become fonts of the few dozen in
use, scripts and styles go where nothing needs them, and figures are stored in 256 colours.
"""

from __future__ import annotations

import logging
import re
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pydata_sphinx_theme
from fontTools.subset import Options, Subsetter
from fontTools.ttLib import TTFont
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Iterable

    from docutils import nodes
    from sphinx.application import Sphinx
    from sphinx.config import Config

FONTS = next(
    Path(pydata_sphinx_theme.__file__).parent.rglob(
        "fontawesome/*/webfonts"
    )
)
NEVER = (
    "thebe",
    "togglebutton",
    "toggleHint",
    "toggleOpen",
    "THEBE_JS_URL",
)
WHERE = {  # what is loaded only by pages whose body has the text
    "mathjax": 'class="math',
    "MathJax": 'class="math',
    "sphinx-design": "sd-",
    "design-tabs": "sd-",
    "mystnb": 'class="cell',
    "exercise.css": "admonition",
    "copybutton": "highlight",
    "clipboard": "highlight",
    "quiz": 'class="quiz"',
}
ICON_RULES = """\
:root{--fa-font-solid:normal 900 1em/1 "Font Awesome 6 Free";\
--fa-font-brands:normal 400 1em/1 "Font Awesome 6 Brands"}
.fas,.fab,.fa-solid,.fa-brands{display:inline-block;font-style:normal;font-variant:normal;\
line-height:1;text-rendering:auto;-webkit-font-smoothing:antialiased}
.fas,.fa-solid{font-family:"Font Awesome 6 Free";font-weight:900}
.fab,.fa-brands{font-family:"Font Awesome 6 Brands";font-weight:400}
.fa-lg{font-size:1.25em;line-height:.05em;vertical-align:-.075em}
"""
FACES = {  # font file: the family names that styles ask for
    "fa-solid-900": ("Font Awesome 6 Free", "Font Awesome 5 Free", 900),
    "fa-brands-400": (
        "Font Awesome 6 Brands",
        "Font Awesome 5 Brands",
        400,
    ),
}


def lean_extensions(app: Sphinx, config: Config) -> None:
    """Ask for the parts of MathJax that the equations need, and drop unused extensions' hooks."""
    config.mathjax_path = "mathjax/startup.js"
    config.mathjax3_config = {
        **(config.mathjax3_config or {}),
        "loader": {
            "load": ["input/tex", "output/chtml", "a11y/assistive-mml"]
        },
    }
    config.templates_path.append(str(Path(__file__).parent / "templates"))
    for listeners in app.events.listeners.values():
        listeners[:] = [
            x for x in listeners if x.handler.__module__ != "sphinx_thebe"
        ]


def keep(asset: Any, body: str) -> bool:
    """Say whether a page with this body uses a script or style."""
    name = f"{getattr(asset, 'filename', asset)} {getattr(asset, 'attributes', {}).get('body', '')}"
    if any(word in name for word in NEVER):
        return False
    return all(text in body for word, text in WHERE.items() if word in name)


def lean_page(
    app: Sphinx,
    pagename: str,
    template: str,
    context: dict[str, Any],
    doctree: nodes.document,
) -> None:
    """Leave out the scripts and styles that this page does not use."""
    body = context.get("body", "")
    for key in ("script_files", "css_files"):
        context[key] = [
            asset for asset in context[key] if keep(asset, body)
        ]


def icons(app: Sphinx, failed: Exception | None) -> None:
    """Write fonts and a style sheet with the icons that pages and styles name."""
    if failed or app.builder.format != "html":
        return
    out = Path(app.outdir)
    named = set(re.findall(r"\bfa-[a-z0-9-]+", read(out.rglob("*.html"))))
    codes = {
        name: code for name, code in icon_codes().items() if name in named
    }
    styles = read(
        p
        for p in (out / "_static").rglob("*.css")
        if "vendor" not in p.parts
    )
    points = {ord(c) for c in re.findall("[\ue000-\uf8ff]", styles)}
    points |= {
        int(c, 16) for c in re.findall(r"\\(f[0-9a-f]{3})\b", styles)
    }
    points |= {int(code, 16) for code in codes.values()}
    css = ICON_RULES
    css += "".join(
        f'.{name}:before{{content:"\\{code}"}}\n'
        for name, code in codes.items()
    )
    for file, (*families, weight) in FACES.items():
        (out / "_static" / f"{file}.woff").write_bytes(
            subset(FONTS / f"{file}.ttf", points)
        )
        css += "".join(
            f'@font-face{{font-family:"{family}";font-weight:{weight};font-display:block;'
            f'src:url({file}.woff) format("woff")}}\n'
            for family in families
        )
    (out / "_static" / "icons.css").write_text(css)


def read(paths: Iterable[Path]) -> str:
    return "".join(path.read_text() for path in paths)


def icon_codes() -> dict[str, str]:
    """Return the character of every icon, as hexadecimal digits."""
    css = (FONTS.parent / "css" / "all.min.css").read_text()
    codes = {}
    for names, code in re.findall(
        r'((?:\.fa-[a-z0-9-]+:before,?)+)\{content:"\\([0-9a-f]+)"', css
    ):
        codes |= dict.fromkeys(
            re.findall(r"\.(fa-[a-z0-9-]+):", names), code
        )
    return codes


def subset(font: Path, points: set[int]) -> bytes:
    """Return a font with these characters only, in the format that needs no further package."""
    options = Options(
        flavor="woff", layout_features=[], notdef_outline=True
    )
    subsetter = Subsetter(options)
    subsetter.populate(unicodes=points)
    with TTFont(font) as face:
        subsetter.subset(face)
        face.flavor = "woff"
        buffer = BytesIO()
        face.save(buffer)
    return buffer.getvalue()


def small_figures(app: Sphinx, failed: Exception | None) -> None:
    """Store figures with 256 colours, where that is smaller and the eye does not see it."""
    if failed or app.builder.format != "html":
        return
    for path in (Path(app.outdir) / "_images").glob("*.png"):
        data = fewer_colours(path)
        if data is not None and len(data) < 0.9 * path.stat().st_size:
            path.write_bytes(data)


def fewer_colours(path: Path) -> bytes | None:
    """Return a picture with a palette, None where it has one or would lose by it."""
    picture = Image.open(path)
    if picture.mode == "P":
        return None
    full = picture.convert("RGBA")
    opaque = full.getextrema()[3] == (255, 255)
    small = (
        full.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        if opaque
        else full.quantize(
            256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE
        )
    )
    was, now = (
        np.asarray(x.convert("RGBA"), dtype=np.int16) for x in (full, small)
    )
    if np.abs(was - now).mean() > 1:  # of 255: a photograph, say
        return None
    buffer = BytesIO()
    small.save(buffer, "png", optimize=True)
    return buffer.getvalue()


def setup(app: Sphinx) -> None:
    logging.getLogger("fontTools").setLevel(logging.WARNING)
    app.connect("config-inited", lean_extensions, priority=900)
    app.connect("html-page-context", lean_page, priority=900)
    app.connect("build-finished", icons, priority=900)
    app.connect("build-finished", small_figures, priority=900)
