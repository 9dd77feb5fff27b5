"""The cover, by day and by night: one drawing in two lights."""

from __future__ import annotations

from math import dist, sin
from random import Random

from .parts import (
    bricks,
    centre,
    city,
    curtain,
    document,
    falling,
    field,
    grain,
    lattice,
    path,
    paving,
    shadow,
    stars,
    use,
    wheat,
)

WIDTH, HEIGHT = 1200, 630
DAY = {
    "sky": ("#6fb9b0", "#bfdcc0", "#fbe6b0"), "disc": "#fff4cf", "ring": "#fdeab4",
    "far": "#9cc7a2", "hill": "#6dab84", "near": "#4b9270", "lawn": "#2f7a5c", "deep": "#1e5f49",
    "city": ("#2f9272", "#1f7459", "#f9e3a0"), "cloud": "#fdf6df",
    "joint": "#b97a25", "bricks": ("#f0c254", "#eab748", "#f4cb68", "#e3aa3c"),
    "metal": "#1d2f5f", "metal2": "#2f4d8c", "cord": "#24386f", "grain": ("#16224a", 0.14),
    "tint": "",
}  # fmt: skip
NIGHT = {
    "sky": ("#0d1638", "#1b2f63", "#3a5f8c"), "disc": "#29497f", "ring": "#223c71",
    "far": "#284f78", "hill": "#1f4a63", "near": "#1a4a52", "lawn": "#163f42", "deep": "#0f3036",
    "city": ("#1f7d63", "#145847", "#ffe08a"), "cloud": "#2c4a80",
    "joint": "#6b4a22", "bricks": ("#c9993f", "#bd8c36", "#d3a54a", "#b0812f"),
    "metal": "#0d1638", "metal2": "#4a6db0", "cord": "#8fa9d6", "grain": ("#fdf2d6", 0.09),
    "tint": "#101c4a",
}  # fmt: skip


def middle(y: float) -> float:
    """Return where the middle of the road lies: before us, then to the left, then to the city."""
    depth = max(0.0, HEIGHT - y) / (HEIGHT - 318)
    return (
        600
        + 276 * depth**2.2
        - 120 * sin(3.1 * depth) * depth**0.5 * (1 - 0.2 * depth)
    )


def half(y: float) -> float:
    """Return half the width of the road at a height."""
    depth = max(0.0, (y - 318) / (HEIGHT - 318))
    return 5 + 345 * depth**1.55


def sky(light: dict) -> str:
    top, between, low = light["sky"]
    night = bool(light["tint"])
    drawn = (
        f'<linearGradient id="sky" x1="0" y1="0" x2="0" y2="1"><stop offset="0" stop-color="{top}"/>'
        f'<stop offset=".34" stop-color="{between}"/><stop offset=".56" stop-color="{low}"/></linearGradient>'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="url(#sky)"/>'
    )
    if night:
        drawn += stars(130, WIDTH, 330)
        drawn += '<path d="M206 62a46 46 0 1 0 40 68 38 38 0 1 1-40-68Z" fill="#fdf2d6"/>'
    drawn += f'<circle cx="600" cy="228" r="222" fill="{light["ring"]}" opacity=".55"/>'
    drawn += f'<circle cx="600" cy="228" r="180" fill="{light["disc"]}" opacity=".9"/>'
    clouds = (
        '<path d="M60 150c6-24 40-28 52-10 12-22 52-16 54 10 20-2 30 20 14 28H50c-18-4-12-28 10-28Z"/>'
        '<path d="M962 96c5-20 34-24 44-8 10-18 44-14 46 8 16-2 24 16 12 23H952c-14-4-10-23 10-23Z"/>'
        '<path d="M300 70c4-14 24-17 31-6 7-13 31-9 32 6 12-1 18 12 9 17h-78c-11-3-8-17 6-17Z"/>'
    )
    return (
        drawn
        + f'<g fill="{light["cloud"]}" opacity="{0.28 if night else 0.8}">{clouds}</g>'
    )


def land(light: dict) -> str:
    return (
        f'<path d="M0 330C120 270 220 300 330 322 470 350 560 300 700 312 820 322 900 270 1020 286 1110 298 1160 320 1200 300V630H0Z" fill="{light["far"]}"/>'
        + city(866, 314, 0.92, *light["city"])
        + f'<path d="M0 372C110 322 260 336 380 372 520 410 600 330 760 318 900 308 1000 340 1200 346V630H0Z" fill="{light["hill"]}"/>'
        f'<path d="M0 420C140 380 280 400 420 440 560 470 640 400 800 380 960 362 1080 400 1200 392V630H0Z" fill="{light["near"]}"/>'
        f'<path d="M0 500C160 456 330 486 470 520 600 540 760 480 900 462 1020 448 1120 470 1200 456V630H0Z" fill="{light["lawn"]}"/>'
    )


def road(light: dict) -> tuple[str, str, list]:
    """Return the road, the bricks on it that shine, and where those lie."""
    laid = bricks(
        middle, half, HEIGHT + 14, 322, rows=24, across=8, power=1.9
    )
    edge = [
        (middle(y) - half(y) - 4, y) for y in range(HEIGHT + 10, 318, -6)
    ]
    edge += [
        (middle(y) + half(y) + 4, y) for y in range(324, HEIGHT + 14, 6)
    ]
    wanted = [
        (x, y) for y in (478, 516, 556, 602) for x in (470, 536, 664, 730)
    ]
    lit = [
        min(laid, key=lambda b: dist(centre(b), (x, y + 4 * (x % 3))))
        for x, y in wanted
    ]
    glow = "".join(
        f'<ellipse cx="{x:.1f}" cy="{y:.1f}" rx="44" ry="20" fill="url(#shine)" opacity=".85"/>'
        for x, y in map(centre, lit)
    )
    tiles = ""
    for brick in lit:
        x, y = centre(brick)
        s = 3 + (y - 440) / 36
        tiles += path(
            [(x, y - s * 0.55), (x + s, y), (x, y + s * 0.55), (x - s, y)],
            "#1f7d5c",
        )
    lamps = paving(lit, ["#fff3c4"])
    return (
        path(edge, light["joint"]) + paving(laid, light["bricks"]),
        glow + lamps + tiles,
        lit,
    )


def scales(light: dict) -> str:
    """Return the balance on which the model stands: a target on one pan, a feather on the other."""
    metal, shine, cord = light["metal"], light["metal2"], light["cord"]
    pans = ""
    for x in (392, 808):
        pans += f'<path d="M{x} 418L{x - 58} 520M{x} 418L{x + 58} 520" stroke="{cord}" stroke-width="2.5"/>'
    pans += '<g transform="translate(392 466)">' + use("target", 0, 0, 1.02) + use("needle", 0, 0, 0.95, turn=11) + "</g>"  # fmt: skip
    pans += use("feather", 812, 486, 1.25, turn=8)
    for x in (392, 808):
        pans += f'<path d="M{x - 68} 518H{x + 68}C{x + 52} 548 {x - 52} 548 {x - 68} 518Z" fill="{metal}"/>'
        pans += f'<path d="M{x - 68} 518H{x + 68}L{x + 64} 525H{x - 64}Z" fill="{shine}"/>'
        pans += f'<circle cx="{x}" cy="418" r="7" fill="{shine}"/>'
    return (
        f'<path d="M590 420H610L618 560H582Z" fill="{metal}"/><path d="M590 420H598L594 560H582Z" fill="{shine}"/>'
        f'<path d="M540 578C544 560 572 552 600 552S656 560 660 578Z" fill="{metal}"/><path d="M532 576H668V588Q600 594 532 588Z" fill="{shine}"/>'
        f'<path d="M384 414C470 424 540 408 600 404 660 408 730 424 816 414L816 423C730 436 660 424 600 422 540 424 470 436 384 423Z" fill="{metal}"/>'
        f'<path d="M384 414C470 424 540 408 600 404 660 408 730 424 816 414L816 417C730 428 660 413 600 409 540 413 470 428 384 417Z" fill="{shine}"/>'
        f'<path d="M462 336L600 406 738 336V345L600 416 462 345Z" fill="{metal}"/><path d="M462 336L600 266 738 336 600 406Z" fill="{shine}"/>'
        f'<circle cx="600" cy="430" r="15" fill="{shine}"/><circle cx="600" cy="430" r="8" fill="#f0c35a"/>' + pans
    )  # fmt: skip


def lawns(light: dict) -> str:
    return (
        f'<ellipse cx="190" cy="590" rx="200" ry="30" fill="{light["near"]}" opacity=".7"/>'
        f'<ellipse cx="1010" cy="580" rx="130" ry="22" fill="{light["near"]}" opacity=".7"/>'
    )


def people(light: dict) -> str:
    drawn = shadow(166, 568, 70) + use("dorothy", 160, 568, 1.16)
    drawn += shadow(254, 592, 44) + use("toto-sitting", 250, 592, 0.9)
    drawn += '<path d="M1010 286H1200V574H1010Z" fill="#2c1020"/>'
    drawn += shadow(1006, 570, 66) + use("wizard", 1006, 570, 1.16)
    drawn += curtain(1024, 280, 580, 190, pulled=22)
    drawn += (
        '<path d="M990 282Q1100 292 1212 274" fill="none" stroke="#dca23a" stroke-width="11" stroke-linecap="round"/>'
        '<circle cx="990" cy="282" r="11" fill="#f0c35a"/>'
    )
    return drawn


def farm(x: float, y: float) -> str:
    """Return the house at the edge of the wheat, far away."""
    return (
        f'<g transform="translate({x} {y})"><path d="M-24 0V-20H24V0Z" fill="#f7dfa0"/><path d="M6 0V-20H24V0Z" fill="#dcb05a"/>'
        '<path d="M-30-20L-16-38H16L30-20Z" fill="#c62f3b"/><path d="M8-20L16-38 30-20Z" fill="#8f1d2c"/><path d="M-18-5v-9h8v9Z" fill="#24386f"/><path d="M12-34v-14h7v20Z" fill="#8f1d2c"/>'
        '<path d="M50 0L56-44H62L68 0Z" fill="#e7d3a2"/><path d="M59-46L39-58M59-46L79-34M59-46L47-26M59-46L71-66" stroke="#6d3a22" stroke-width="5"/></g>'
    )


def cascade() -> str:
    """Return the points that spill from the top of the model and fall down at its sides."""
    random = Random(8)
    drawn = ""
    for side in (-1, 1):
        for step in range(9):
            x = 600 + side * (
                134 + 26 * (step / 8) ** 0.6 + random.uniform(-9, 9)
            )
            y = 108 + 34 * step + random.uniform(-8, 8)
            drawn += falling(
                x, y - random.uniform(30, 64), y, random.uniform(0.55, 1.05)
            )
    return drawn


def draw(light: dict) -> str:
    """Return the cover in a light."""
    paved, shine, lit = road(light)
    drops = ""
    random = Random(3)
    for brick in lit:
        x, y = centre(brick)
        low = random.uniform(max(436, y - 90), y - 8)
        drops += falling(
            x,
            max(396, low - random.uniform(60, 120)),
            low,
            random.uniform(0.9, 1.4),
        )
    night = bool(light["tint"])
    body = sky(light) + land(light) + farm(322, 346) + lawns(light) + paved
    body += grain(WIDTH, HEIGHT, *light["grain"]) + field(
        20, 430, 470, 0.42, 6, 13
    )
    body += field(0, 150, 556, 0.74, 9, 15) + people(light)
    if night:
        body += (
            '<linearGradient id="dusk" x1="0" y1="0" x2="0" y2="1"><stop offset="0" stop-color="#101c4a" stop-opacity="0"/>'
            f'<stop offset=".2" stop-color="#101c4a" stop-opacity=".13"/></linearGradient><rect y="230" width="{WIDTH}" height="400" fill="url(#dusk)"/>'
        )
        body += use("glow", 889, 372, 2.4) + use("spark", 889, 372, 1.2)
    body += (
        shine
        + scales(light)
        + cascade()
        + lattice(600, 398, 244, layers=5, across=5, night=night)
        + drops
    )
    body += f'<path d="M0 640C90 566 200 590 300 640Z" fill="{light["deep"]}"/><path d="M1200 640C1100 580 980 590 900 640Z" fill="{light["deep"]}"/>'
    body += wheat([(18, 650, 1.5, 8), (58, 652, 1.3, -6), (94, 664, 1.25, 9), (1186, 650, 1.45, -8), (1142, 656, 1.25, 6), (1098, 662, 1.2, -12)])  # fmt: skip
    return document(WIDTH, HEIGHT, "Dorothy, the Wizard and the model on the yellow brick road", body)  # fmt: skip
