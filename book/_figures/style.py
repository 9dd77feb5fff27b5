"""One style for all pictures: a palette, a scale of type, and few shapes.

Every colour is a CSS variable with a fallback. In a page the picture stands inline and course.css
sets the variables, so that it follows the page's theme; as a file of its own it shows the fallbacks,
on the light card that every picture brings along.

A picture is 480 units wide. A phone of 390 px shows it 374 px wide, so that its smallest type, of
17 units, is 13 px there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

WIDTH, MARGIN = 480, 24
LEFT, RIGHT = MARGIN, WIDTH - MARGIN
TITLE, BODY, SMALL = 22, 18, 17
SANS = (
    "-apple-system, BlinkMacSystemFont, 'Segoe UI', 'Helvetica Neue', "
    "Arial, sans-serif"
)
MONO = "ui-monospace, Menlo, Consolas, 'Liberation Mono', monospace"

PALETTE = {  # name: light, dark
    "card": ("#fdf8ea", "#1b2436"),
    "ink": ("#22304a", "#ece5d3"),  # night blue: what is read
    "muted": ("#56607a", "#b3bccd"),  # what is read second
    "rule": ("#cdbf9a", "#4a566e"),  # axes and frames
    "idle": ("#ece4ce", "#2a3549"),  # bricks without a use
    "wheat": ("#f7e4ad", "#5b4b22"),  # floats, and grounds
    "brick": ("#e9b949", "#dba93a"),  # integers
    "mortar": ("#8a6410", "#f2d58b"),  # the outline of both
    "night": ("#22304a", "#1b2436"),  # text on a brick
    "emerald": ("#20694a", "#6fd0a2"),  # what goes well
    "mint": ("#d3ebdd", "#1f4d3b"),
    "red": ("#b3202c", "#ff8f8a"),  # the accent: what a picture is about
    "rose": ("#f9dad5", "#5c2a33"),
}


def colour(name: str) -> str:
    """Return a colour as the variable that a page sets, with the light one to fall back on."""
    if name == "none":
        return name
    return f"var(--fig-{name}, {PALETTE[name][0]})"


def number(value: float) -> str:
    """Return a coordinate with two decimals at most."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def text(
    x: float,
    y: float,
    content: str,
    *,
    size: float = BODY,
    anchor: str = "start",
    fill: str = "ink",
    bold: bool = False,
    mono: bool = False,
) -> str:
    """Write a line of text; y is its baseline."""
    extra = f' font-size="{number(size)}"' if size != BODY else ""
    extra += f' text-anchor="{anchor}"' if anchor != "start" else ""
    extra += ' font-weight="700"' if bold else ""
    extra += f' font-family="{MONO}"' if mono else ""
    return (
        f'<text x="{number(x)}" y="{number(y)}" fill="{colour(fill)}"{extra}>'
        f"{escape(content, quote=False)}</text>"
    )


def lines(
    x: float,
    y: float,
    content: Iterable[str],
    *,
    leading: float = 24,
    **how,
) -> str:
    """Write several lines of text, one below the other."""
    return "".join(
        text(x, y + leading * i, line, **how)
        for i, line in enumerate(content)
    )


def rect(
    x: float,
    y: float,
    width: float,
    height: float,
    *,
    fill: str = "none",
    stroke: str = "none",
    radius: float = 3,
    weight: float = 1.5,
    dash: str = "",
) -> str:
    """Draw a rectangle."""
    extra = f' stroke-dasharray="{dash}"' if dash else ""
    if stroke != "none":
        extra += (
            f' stroke="{colour(stroke)}" stroke-width="{number(weight)}"'
        )
    return (
        f'<rect x="{number(x)}" y="{number(y)}" width="{number(width)}" '
        f'height="{number(height)}" rx="{number(radius)}" fill="{colour(fill)}"{extra}/>'
    )


def path(
    d: str,
    *,
    stroke: str = "ink",
    fill: str = "none",
    weight: float = 2,
    dash: str = "",
) -> str:
    """Draw a path."""
    extra = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<path d="{d}" fill="{colour(fill)}" stroke="{colour(stroke)}" '
        f'stroke-width="{number(weight)}" stroke-linecap="round" '
        f'stroke-linejoin="round"{extra}/>'
    )


def line(
    x1: float,
    y1: float,
    x2: float,
    y2: float,
    *,
    stroke: str = "rule",
    **how,
) -> str:
    """Draw a straight line."""
    return path(
        f"M{number(x1)} {number(y1)}L{number(x2)} {number(y2)}",
        stroke=stroke,
        **how,
    )


def head(
    x: float, y: float, angle: float, fill: str = "ink", size: float = 11
) -> str:
    """Draw the head of an arrow whose tip is at x and y. (A marker would need an id.)"""
    tips = []
    for turn in (0, 2.65, -2.65):
        length = 0 if turn == 0 else size
        tips.append(
            f"{number(x + length * math.cos(angle + turn))} "
            f"{number(y + length * math.sin(angle + turn))}"
        )
    return f'<path d="M{"L".join(tips)}Z" fill="{colour(fill)}"/>'


def arrow(
    x1: float,
    y1: float,
    x2: float,
    y2: float,
    *,
    stroke: str = "ink",
    weight: float = 2.5,
    dash: str = "",
) -> str:
    """Draw a straight arrow."""
    angle = math.atan2(y2 - y1, x2 - x1)
    back = 7  # the line ends inside the head
    return line(
        x1,
        y1,
        x2 - back * math.cos(angle),
        y2 - back * math.sin(angle),
        stroke=stroke,
        weight=weight,
        dash=dash,
    ) + head(x2, y2, angle, stroke)


def dot(
    x: float,
    y: float,
    fill: str = "ink",
    radius: float = 6,
    ring: str = "card",
) -> str:
    """Draw a dot with a ring that sets it off from what it lies on."""
    return (
        f'<circle cx="{number(x)}" cy="{number(y)}" r="{number(radius)}" '
        f'fill="{colour(fill)}" stroke="{colour(ring)}" stroke-width="1.5"/>'
    )


def brick(
    x: float,
    y: float,
    width: float,
    height: float,
    label: str = "",
    *,
    fill: str = "brick",
    stroke: str = "mortar",
    size: float = SMALL,
    bold: bool = False,
    mono: bool = False,
    weight: float = 1.5,
    radius: float = 3,
) -> str:
    """Draw a brick with its label in the middle."""
    drawn = rect(
        x,
        y,
        width,
        height,
        fill=fill,
        stroke=stroke,
        weight=weight,
        radius=radius,
    )
    if label:
        ink = {
            "brick": "night",
            "idle": "muted",
            "emerald": "card",
            "red": "card",
        }
        drawn += text(
            x + width / 2,
            y + height / 2 + 0.35 * size,
            label,
            size=size,
            anchor="middle",
            fill=ink.get(fill, "ink"),
            bold=bold,
            mono=mono,
        )
    return drawn


def signed(value: float | int) -> str:
    """Write a number with a minus sign, not a hyphen."""
    return str(value).replace("-", "−")


def picture(title: Sequence[str], height: float, *parts: str) -> str:
    """Put a title, which says what is found, above a drawing of some height.

    Parameters
    ----------
    title : sequence of str
        One string for each line.
    height : float
        Of the drawing below the title, whose y begins at zero.
    parts : str
    """
    below = 38 + 28 * len(title)
    total = below + height + MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {number(total)}" '
        f'width="{WIDTH}" height="{number(total)}" font-family="{SANS}" font-size="{BODY}">\n'
        f"<title>{escape(' '.join(title), quote=False)}</title>\n"
        f"{rect(0, 0, WIDTH, total, fill='card', radius=14)}\n"
        f"{lines(LEFT, 42, title, leading=28, size=TITLE, bold=True)}\n"
        f'<g transform="translate(0 {number(below)})">\n'
        + "\n".join(parts)
        + "\n</g>\n</svg>\n"
    )
