"""Parts of a picture that repeat: bricks, nodes of a lattice, stalks of wheat, stars and grain.

Each function returns a fragment of SVG as text. What looks like chance is drawn from a seed, so
that the files come out the same on every machine.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Point = tuple[float, float]
FIGURES = Path(__file__).with_name("figures.svg").read_text()


@cache
def figure(name: str) -> str:
    """Return the group, gradient or pattern of figures.svg that has a name."""
    start = re.search(rf'<(\w+) id="{re.escape(name)}"', FIGURES)
    if start is None:
        raise KeyError(f"figures.svg has no part {name!r}")
    depth, tag = 0, start[1]
    for mark in re.finditer(
        rf"<{tag}\b[^>]*?(/?)>|</{tag}>", FIGURES[start.start() :]
    ):
        depth += {"": 1, "/": 0, None: -1}[mark[1]]
        if depth == 0:
            return FIGURES[start.start() : start.start() + mark.end()]
    raise ValueError(f"figures.svg: {name!r} has no end")


def document(
    width: int, height: int, title: str, body: str, shown: int | None = None
) -> str:
    """Return a whole SVG file: the drawing, and the figures that it uses, however deep."""
    known: dict[str, str] = {}
    waiting = [body]
    while waiting:
        for name in re.findall(r'(?:href="|url\()#([\w-]+)', waiting.pop()):
            if name not in known and f'id="{name}"' not in body:
                known[name] = figure(name)
                waiting.append(known[name])
    size = (
        f'width="{shown}" height="{round(shown * height / width)}" '
        if shown
        else ""
    )
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}viewBox="0 0 {width} {height}" '
        f'role="img" aria-labelledby="title">\n<title id="title">{title}</title>\n'
        f"<defs>\n{chr(10).join(known.values())}\n</defs>\n{body}\n</svg>\n"
    )
    return re.sub(r"\n\s+", "\n", re.sub(r"(\.\d*?[1-9])0+\b", r"\1", text))


def use(
    name: str,
    x: float,
    y: float,
    scale: float = 1,
    flip: bool = False,
    turn: float = 0,
) -> str:
    """Place a figure: its feet at (x, y)."""
    way = f"{-scale:g} {scale:g}" if flip else f"{scale:g}"
    spin = f"rotate({turn:g})" if turn else ""
    return f'<use href="#{name}" transform="translate({x:g} {y:g}){spin}scale({way})"/>'


def path(points: Sequence[Point], fill: str, more: str = "") -> str:
    """Return a polygon."""
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polygon points="{corners}" fill="{fill}" {more}/>'


def shadow(x: float, y: float, wide: float, opacity: float = 0.22) -> str:
    """Return what lies on the ground below a figure."""
    return (
        f'<ellipse cx="{x:g}" cy="{y:g}" rx="{wide:g}" ry="{wide / 6:.1f}" '
        f'fill="#0d1735" opacity="{opacity}"/>'
    )


def grain(
    width: int, height: int, colour: str = "#16224a", opacity: float = 0.13
) -> str:
    """Return the fine speckle of a screen print, as one tile that repeats."""
    random = Random(4)
    dots = "".join(
        f"M{random.random() * 90:.1f} {random.random() * 90:.1f}h{random.uniform(0.5, 1.5):.1f}"
        for _ in range(190)
    )
    return (
        f'<pattern id="grain" width="90" height="90" patternUnits="userSpaceOnUse">'
        f'<path d="{dots}" stroke="{colour}" stroke-width="1" opacity="{opacity}"/></pattern>'
        f'<rect width="{width}" height="{height}" fill="url(#grain)"/>'
    )


def stars(count: int, width: float, height: float, seed: int = 1) -> str:
    """Return a sky of small stars, denser at its top."""
    random = Random(seed)
    dots = []
    for _ in range(count):
        x, y = random.random() * width, random.random() ** 1.5 * height
        r, faint = (
            random.choice((0.8, 1.1, 1.6, 2.1)),
            random.uniform(0.4, 1),
        )
        dots.append(
            f'<circle cx="{x:.0f}" cy="{y:.0f}" r="{r}" opacity="{faint:.2f}"/>'
        )
    return f'<g fill="#fdf2d6">{"".join(dots)}</g>'


def wheat(stalks: Sequence[tuple[float, float, float, float]]) -> str:
    """Return stalks of wheat, each as x, y of its foot, its scale and how it leans."""
    return "".join(
        use("ear-of-wheat", x, y, scale, turn=lean)
        for x, y, scale, lean in stalks
    )


def field(
    left: float,
    right: float,
    y: float,
    scale: float,
    seed: int,
    gap: float = 14,
) -> str:
    """Return a row of wheat that stands from left to right."""
    random = Random(seed)
    count = max(1, int((right - left) / gap))
    return wheat([
        (left + (i + random.random()) * (right - left) / count, y + random.uniform(-6, 10),
         scale * random.uniform(0.82, 1.15), random.uniform(-11, 11))
        for i in range(count)
    ])  # fmt: skip


def city(
    x: float, base: float, scale: float, body: str, side: str, window: str
) -> str:
    """Return the green towers, the tallest in the middle, with their windows."""
    towers = [  # dx, width, height, roof
        (-118, 26, 52, "dome"), (112, 28, 58, "spire"), (-88, 34, 92, "spire"), (82, 36, 98, "dome"),
        (-52, 40, 128, "dome"), (46, 42, 142, "spire"), (0, 54, 182, "spire"), (-24, 26, 78, "spire"),
        (22, 24, 70, "dome"),
    ]  # fmt: skip
    parts = []
    for dx, w, h, roof in towers:
        left, right, top = dx - w / 2, dx + w / 2, -h
        parts.append(
            f'<path d="M{left} 26V{top}H{right}V26Z" fill="{body}"/>'
        )
        parts.append(
            f'<path d="M{dx + w * 0.16:.1f} 26V{top}H{right}V26Z" fill="{side}"/>'
        )
        if roof == "spire":
            tip = top - w * 1.25
            parts.append(
                f'<path d="M{left - 3} {top}H{right + 3}L{dx} {tip:.1f}Z" fill="{body}"/>'
            )
            parts.append(
                f'<path d="M{dx} {tip:.1f}L{right + 3} {top}H{dx + w * 0.16:.1f}Z" fill="{side}"/>'
            )
        else:
            tip = top - w * 0.62
            parts.append(
                f'<path d="M{left - 2} {top}C{left - 4} {top - w * 0.5:.1f} {dx - 5} {tip:.1f} {dx} {tip - 12:.1f}'
                f'C{dx + 5} {tip:.1f} {right + 4} {top - w * 0.5:.1f} {right + 2} {top}Z" fill="{body}"/>'
            )
            parts.append(
                f'<path d="M{dx} {tip - 12:.1f}C{dx + 5} {tip:.1f} {right + 4} {top - w * 0.5:.1f} {right + 2} {top}'
                f'H{dx + w * 0.16:.1f}Z" fill="{side}"/>'
            )
        for level in range(int(h // 24)):
            y = top + 12 + 22 * level
            if y < -14:
                at = dx - w * (0.08 if w > 50 else 0.2) - 2.5
                parts.append(
                    f'<path d="M{at:.1f} {y + 9}v-6a3 3 0 0 1 6 0v6Z" fill="{window}"/>'
                )
    inside = "".join(parts)
    return f'<g transform="translate({x:g} {base:g}) scale({scale:g})">{inside}</g>'


Brick = list[Point]


def bricks(
    middle: Callable[[float], float],
    half: Callable[[float], float],
    near: float,
    far: float,
    rows: int,
    across: int = 6,
    power: float = 2.0,
) -> list[Brick]:
    """Return the bricks of a road over level ground, row by row from the near edge to the far.

    ``middle`` and ``half`` give the road's centre and half its width at a height in the picture;
    rows grow thin with distance, and every second one is shifted by half a brick.
    """
    found = []
    edges = [
        far + (near - far) * (1 - i / rows) ** power
        for i in range(rows + 1)
    ]
    for row, (below, above) in enumerate(pairwise(edges)):
        inset = min(1.6, 0.09 * (below - above))
        low, high = below - inset, above + inset
        shift = 0.5 * (row % 2)
        for column in range(-1, across + 1):
            a, b = (column + shift) / across, (column + 1 + shift) / across
            a, b = max(a, 0.0), min(b, 1.0)
            if b - a < 0.02:
                continue
            margin = 0.008
            a, b = 2 * (a + margin) - 1, 2 * (b - margin) - 1
            found.append([
                (middle(low) + a * half(low), low), (middle(low) + b * half(low), low),
                (middle(high) + b * half(high), high), (middle(high) + a * half(high), high),
            ])  # fmt: skip
    return found


def paving(laid: Sequence[Brick], fills: Sequence[str]) -> str:
    """Return bricks in shades that change from one to the next."""
    random = Random(7)
    return "".join(path(brick, random.choice(fills)) for brick in laid)


def centre(brick: Brick) -> Point:
    """Return the middle of a brick."""
    return sum(x for x, _ in brick) / 4, sum(y for _, y in brick) / 4


def lattice(
    x: float,
    y: float,
    size: float,
    layers: int = 5,
    across: int = 4,
    loose: float = 1.0,
    seed: int = 5,
    night: bool = False,
) -> str:
    """Return the model: plates of nodes, loose and glowing on top, on the grid at the bottom.

    ``x``, ``y`` is the lowest corner, ``size`` the width; ``loose`` says how far the nodes of the
    top plate have strayed from the grid.
    """
    random = Random(seed)
    a = size / (2 * (across - 1))
    b, c = a * 0.5, size * 0.245
    foot = y - 2 * b * (across - 1) / 2 * 1.0

    def place(i: float, j: float, k: float) -> Point:
        return x + (i - j) * a, foot + (i + j - (across - 1)) * b - k * c

    def nodes_at(k: int) -> dict[tuple[int, int], Point]:
        stray = loose * (k / max(1, layers - 1)) ** 2 * a * 0.42
        return {
            (i, j): (
                px + random.uniform(-stray, stray),
                py + random.uniform(-stray, stray),
            )
            for i in range(across)
            for j in range(across)
            for px, py in [place(i, j, k)]
        }

    n, top = across - 1, layers - 1
    left = [
        place(0, n, 0),
        place(n, n, 0),
        place(n, n, top),
        place(0, n, top),
    ]
    right = [
        place(n, n, 0),
        place(n, 0, 0),
        place(n, 0, top),
        place(n, n, top),
    ]
    back = [place(0, n, 0), place(0, 0, 0), place(n, 0, 0), place(n, 0, top), place(0, 0, top), place(0, n, top)]  # fmt: skip
    ids = f"{round(x)}-{round(y)}"
    tone = ("#2b8f83", "#1b4f86", "#3ab58f", "#123a6b") if night else ("#17805f", "#1f8f83", "#2aa884", "#14697a")  # fmt: skip
    parts = [
        f'<linearGradient id="left-{ids}" x1="0" y1="0" x2="0" y2="1"><stop offset="0" stop-color="{tone[1]}" stop-opacity=".62"/><stop offset="1" stop-color="{tone[0]}" stop-opacity=".86"/></linearGradient>',
        f'<linearGradient id="right-{ids}" x1="0" y1="0" x2="0" y2="1"><stop offset="0" stop-color="{tone[3]}" stop-opacity=".7"/><stop offset="1" stop-color="#0f5a4c" stop-opacity=".92"/></linearGradient>',
        path(back, "#0f3d5c" if night else "#0f6a55", 'opacity=".24"'),
    ]
    parts.append(f'<ellipse cx="{x:.1f}" cy="{foot - c * top * 0.5:.1f}" rx="{size * 0.34:.1f}" ry="{size * 0.44:.1f}" fill="url(#shine)" opacity=".75"/>')  # fmt: skip
    planes = [nodes_at(k) for k in range(layers)]
    lines = []
    for k, plane in enumerate(planes):
        lines += [plate(place, n, k, tone[2])]
        segments = []
        for (i, j), (px, py) in plane.items():
            for step in ((i + 1, j), (i, j + 1)):
                if step in plane:
                    qx, qy = plane[step]
                    segments.append(f"M{px:.1f} {py:.1f}L{qx:.1f} {qy:.1f}")
            if k < top and (i == n or j == n or (i, j) == (0, 0)):
                qx, qy = planes[k + 1][i, j]
                segments.append(f"M{px:.1f} {py:.1f}L{qx:.1f} {qy:.1f}")
        lines.append(f'<path d="{"".join(segments)}" fill="none" stroke="#d8f3e4" stroke-opacity=".6" stroke-width="{max(0.9, size / 220):.2f}"/>')  # fmt: skip
    parts += lines
    glass = [path(left, f"url(#left-{ids})", 'opacity=".55"'), path(right, f"url(#right-{ids})", 'opacity=".62"')]  # fmt: skip
    parts += glass
    (lx, ly), (mx, my), (_, ty) = left[0], left[1], left[2]
    at = [(lx + (mx - lx) * f, ly + (my - ly) * f) for f in (0.14, 0.34)]
    rise = my - ty
    shine = [
        at[0],
        at[1],
        (at[1][0], at[1][1] - rise),
        (at[0][0], at[0][1] - rise),
    ]
    parts.append(path(shine, "#ffffff", 'opacity=".1"'))
    edges = "".join(
        f"M{px:.1f} {py:.1f}v{-rise:.1f}"
        for px, py in (left[0], left[1], right[1])
    )
    parts.append(f'<path d="{edges}" stroke="#d8f3e4" stroke-opacity=".7" stroke-width="{size / 150:.2f}"/>')  # fmt: skip
    r = size / 62
    for k, plane in enumerate(planes):
        for (i, j), (px, py) in plane.items():
            if not (i == n or j == n or k == top):
                continue
            fine = k / max(1, top)
            if fine < 0.45:
                tile = [
                    (px, py - r),
                    (px + 1.6 * r, py),
                    (px, py + r),
                    (px - 1.6 * r, py),
                ]
                parts.append(path(tile, "#f6cf63"))
            else:
                parts.append(
                    use("glow", px, py, r / 3.6 * random.uniform(0.7, 1.25))
                )
    return "<g>" + "".join(parts) + "</g>"


def plate(
    place: Callable[[float, float, float], Point],
    n: int,
    k: int,
    colour: str,
) -> str:
    """Return one translucent layer of a lattice."""
    corners = [
        place(0, 0, k),
        place(n, 0, k),
        place(n, n, k),
        place(0, n, k),
    ]
    return path(corners, colour, 'opacity=".42"')


def falling(x: float, high: float, low: float, size: float = 1.0) -> str:
    """Return a point on its way down, its trail above it."""
    return (
        f'<path d="M{x - 1.6 * size:.1f} {low:.1f}L{x:.1f} {high:.1f}L{x + 1.6 * size:.1f} {low:.1f}Z" '
        f'fill="#fff1bd" opacity=".55"/>' + use("glow", x, low, size)
    )  # fmt: skip


def curtain(x: float, top: float, bottom: float, wide: float, pulled: float = 0.0, seed: int = 2) -> str:  # fmt: skip
    """Return a curtain whose left edge is drawn in by ``pulled`` at the height of a hand."""
    height = bottom - top
    hand = top + height * 0.55
    edge = f"M{x} {top}C{x + 4} {top + height * 0.3:.0f} {x + pulled} {hand - 40:.0f} {x + pulled} {hand:.0f}S{x + pulled * 0.3:.0f} {bottom - 30} {x - 6} {bottom}"  # fmt: skip
    steps = 6
    hem = "".join(
        f"q{wide / steps / 2 + 1:.1f} 12 {(wide + 6) / steps:.1f} 0"
        for _ in range(steps)
    )
    shape = f"{edge}{hem}V{top}Z"
    folds = "".join(
        f"M{x + wide * f:.0f} {top}C{x + wide * f - 4:.0f} {top + height * 0.35:.0f} "
        f"{x + pulled * (1 - f) + wide * f:.0f} {hand - 30:.0f} {x + pulled * (1 - f) + wide * f:.0f} {hand:.0f}"
        f"S{x + wide * f + 3:.0f} {bottom - 40} {x + wide * f + 2:.0f} {bottom}"
        for f in (0.2, 0.4, 0.6, 0.8)
    )
    return (
        f'<path d="{shape}" fill="#c62f3b"/><path d="{folds}" fill="none" stroke="#8f1d2c" stroke-width="{wide / 26:.1f}" opacity=".75"/>'
        f'<path d="M{x - 6} {bottom - 6}{hem}" fill="none" stroke="#f0c35a" stroke-width="{wide / 22:.1f}"/>'
        f'<path d="{folds}" fill="none" stroke="#e86a68" stroke-width="{wide / 50:.1f}" opacity=".6" transform="translate({wide / 22:.1f} 0)"/>'
    )
