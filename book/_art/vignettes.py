"""The small pictures of the chapters and the wide ones of the tale."""

from __future__ import annotations

from collections.abc import Callable

from .parts import (
    bricks,
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

WIDE, HIGH = 440, 330
MOODS = {  # the sky from top to horizon, a hill behind, the ground
    "day": ("#7cc3b4", "#f8e7b6", "#6dab84", "#2f7a5c"),
    "evening": ("#e58a5c", "#fbdc9a", "#a6763f", "#7a5428"),
    "dusk": ("#24386f", "#e9a26a", "#35577d", "#1f4a52"),
    "night": ("#0f1b42", "#35588c", "#1f4a63", "#163f42"),
    "hall": ("#14634a", "#1f7d5c", "#14634a", "#0f4a3b"),
    "room": ("#24386f", "#3a5590", "#24386f", "#5b3a24"),
}
YELLOW = ("#f0c254", "#eab748", "#f4cb68", "#e3aa3c")


def ground(
    mood: str, wide: int = WIDE, high: int = HIGH, floor: float = 0.74
) -> str:
    """Return sky and land of a mood; in a hall or a room, wall and floor."""
    top, low, hill, near = MOODS[mood]
    y = high * floor
    drawn = (
        f'<linearGradient id="sky" x1="0" y1="0" x2="0" y2="1"><stop offset="0" stop-color="{top}"/>'
        f'<stop offset=".8" stop-color="{low}"/></linearGradient><rect width="{wide}" height="{high}" fill="url(#sky)"/>'
    )
    if mood == "night":
        drawn += stars(46, wide, high * 0.6)
    if mood in ("hall", "room"):
        return (
            drawn
            + f'<rect y="{y:.0f}" width="{wide}" height="{high - y:.0f}" fill="{near}"/>'
        )
    return drawn + (
        f'<path d="M0 {y - 34:.0f}C{wide * 0.2:.0f} {y - 66:.0f} {wide * 0.42:.0f} {y - 20:.0f} {wide * 0.62:.0f} {y - 34:.0f}S{wide * 0.9:.0f} {y - 60:.0f} {wide} {y - 40:.0f}V{high}H0Z" fill="{hill}"/>'
        f'<path d="M0 {y + 4:.0f}C{wide * 0.3:.0f} {y - 18:.0f} {wide * 0.6:.0f} {y + 10:.0f} {wide} {y - 8:.0f}V{high}H0Z" fill="{near}"/>'
    )


def picture(
    title: str,
    drawing: str,
    wide: int = WIDE,
    high: int = HIGH,
    shown: int = 220,
) -> str:
    """Return a picture with round corners and the grain of a print, on any page's colour."""
    body = (
        f'<clipPath id="frame"><rect width="{wide}" height="{high}" rx="34"/></clipPath>'
        f'<g clip-path="url(#frame)">{drawing}{grain(wide, high, opacity=0.07)}</g>'
    )
    return document(wide, high, title, body, shown)


def disc(
    x: float,
    y: float,
    r: float,
    colour: str = "#fff4cf",
    opacity: float = 0.85,
) -> str:
    return (
        f'<circle cx="{x}" cy="{y}" r="{r * 1.25:.0f}" fill="{colour}" opacity="{opacity * 0.35:.2f}"/>'
        f'<circle cx="{x}" cy="{y}" r="{r}" fill="{colour}" opacity="{opacity}"/>'
    )


def straight(x: float, near: float, far: float, wide: float, tip: float, lean: float = 0, rows: int = 9) -> str:  # fmt: skip
    """Return a piece of the road that runs from the lower edge to the horizon."""

    def part(y: float) -> float:
        return (near - y) / (near - far)

    def middle(y: float) -> float:
        return x + lean * part(y) ** 1.6

    def half(y: float) -> float:
        return wide + (tip - wide) * part(y) ** 0.8

    edge = [
        (middle(near) - half(near), near),
        (middle(near) + half(near), near),
    ]
    ys = [near + (far - near) * i / 12 for i in range(13)]
    edge = [(middle(y) - half(y) - 2, y) for y in ys] + [(middle(y) + half(y) + 2, y) for y in ys[::-1]]  # fmt: skip
    return path(edge, "#b97a25") + paving(
        bricks(middle, half, near, far, rows, 5, 1.6), YELLOW
    )


def course(x: float, y: float, widths: list[float], high: float = 30, lit: tuple[int, ...] = ()) -> str:  # fmt: skip
    """Return a row of bricks seen from the side."""
    drawn = f'<rect x="{x - 3}" y="{y - 3}" width="{sum(widths) + 3}" height="{high + 6}" rx="4" fill="#b97a25"/>'
    for n, wide in enumerate(widths):
        fill = "#fff3c4" if n in lit else YELLOW[n % 4]
        drawn += f'<rect x="{x}" y="{y}" width="{wide - 3}" height="{high}" rx="3" fill="{fill}"/>'
        drawn += f'<path d="M{x + 2} {y + high - 3}H{x + wide - 5}" stroke="#c98f2c" stroke-width="4" opacity=".6"/>'
        x += wide
    return drawn


def recipe() -> str:
    road = straight(220, 340, 236, 300, 60)
    card = '<g transform="translate(352 140) rotate(9) scale(1.15)"><use href="#card"/><use href="#card-lines"/></g>'
    return (
        ground("evening") + disc(232, 150, 84) + field(0, 440, 262, 0.5, 3, 20) + road + card
        + shadow(308, 290, 62) + use("basket", 308, 176, 2) + shadow(116, 294, 66)
        + use("toto-sitting", 112, 294, 1.55) + use("bark", 226, 206, 0.85, turn=-6)
    )  # fmt: skip


def shoes() -> str:
    return (
        ground("day") + city(330, 226, 0.55, "#2f9272", "#1f7459", "#f9e3a0") + disc(150, 120, 58)
        + straight(214, 340, 214, 330, 18, 108) + shadow(210, 290, 150)
        + use("great-shoe", 150, 242, 1.06) + use("great-shoe", 64, 268, 1.24)
        + use("spark", 340, 168, 1.6) + use("spark", 300, 140, 0.9) + use("spark", 52, 150, 1.0)
    )  # fmt: skip


def guardian() -> str:
    towers = city(220, 236, 0.98, "#c8b58a", "#a8946a", "#fdf2d6")
    green = city(220, 236, 0.98, "#2f9272", "#1f7459", "#d9f5e6")
    lenses = '<clipPath id="lenses"><circle cx="134" cy="168" r="66"/><circle cx="306" cy="168" r="66"/></clipPath>'  # fmt: skip
    inside = '<rect width="440" height="330" fill="#8fd3b6"/>' + green + '<path d="M0 238H440V330H0Z" fill="#1e5f49"/>'  # fmt: skip
    rim = (
        '<g fill="none" stroke="#dca23a" stroke-width="12" stroke-linecap="round"><circle cx="134" cy="168" r="66"/><circle cx="306" cy="168" r="66"/>'
        '<path d="M200 160Q220 142 240 160M68 158L16 132M372 158L424 132"/></g>'
        '<g stroke="#fff" stroke-width="8" stroke-linecap="round" opacity=".75"><path d="M96 140L116 122M268 140L288 122"/></g>'
    )
    return (
        ground("evening") + towers + '<path d="M0 236H440V330H0Z" fill="#8a5f2c"/>' + straight(220, 340, 236, 150, 20)
        + lenses + f'<g clip-path="url(#lenses)">{inside}</g>' + rim
    )  # fmt: skip


def grid() -> str:
    points = [(48, 110), (112, 62), (176, 138), (232, 84), (300, 120)]
    drops = "".join(falling(x, y - 44, y, 1.5) for x, y in points)
    row = course(-20, 232, [84] * 6, 44, (1, 3)) + course(
        -62, 282, [84] * 7, 44
    )
    return (
        ground("night", floor=0.6) + disc(220, 150, 96, "#29497f") + row
        + f'<g transform="translate(404 92) rotate(212)">{use("mallet", 0, 0, 1.6)}</g>'
        + drops + use("glow", 105, 222, 2) + use("glow", 273, 222, 2)
    )  # fmt: skip


def doors() -> str:
    wall = "".join(
        f'<rect x="{x + (row % 2) * 32 - 40}" y="{row * 30}" width="60" height="26" rx="4" fill="#2b8466" opacity=".5"/>'
        for row in range(9) for x in range(0, 500, 64)
    )  # fmt: skip

    def door(x: float, ajar: bool) -> str:
        arch = (
            f"M{x - 50} 262V130C{x - 50} 66 {x + 50} 66 {x + 50} 130V262Z"
        )
        drawn = f'<path d="{arch}" fill="#0a2f27" stroke="#f0c35a" stroke-width="9"/>'
        if ajar:
            drawn += f'<path d="{arch}" fill="url(#shine)"/><path d="M{x - 46} 262V130C{x - 46} 96 {x - 20} 86 {x - 4} 104L{x - 2} 276Z" fill="#c62f3b"/><path d="M{x - 4} 104L{x - 2} 276 {x + 4} 272V110Z" fill="#8f1d2c"/><circle cx="{x - 14}" cy="192" r="5" fill="#f0c35a"/>'
        else:
            drawn += f'<path d="M{x - 46} 262V130C{x - 46} 72 {x + 46} 72 {x + 46} 130V262Z" fill="#c62f3b"/><path d="M{x} 88V262M{x - 46} 150H{x + 46}M{x - 46} 214H{x + 46}" stroke="#8f1d2c" stroke-width="4"/><circle cx="{x + 30}" cy="186" r="7" fill="#f0c35a"/><path d="M{x + 30} 190l-4 12h8Z" fill="#f0c35a"/>'
        return drawn

    return (
        ground("hall", floor=0.78) + wall + door(84, True) + door(356, False)
        + '<path d="M0 258H440V330H0Z" fill="#0f4a3b"/>' + straight(220, 340, 258, 330, 200, rows=4)
        + shadow(220, 270, 70) + lattice(220, 268, 104, layers=4, across=4, loose=0.8)
    )  # fmt: skip


def behind() -> str:
    head = (
        '<g opacity=".95"><path d="M44 74C44 18 150 18 150 74V116C150 150 124 166 97 166S44 150 44 116Z" fill="#2fa37a"/><path d="M118 30C142 40 150 56 150 74V116C150 150 124 166 97 166 128 150 134 80 118 30Z" fill="#1f7d5c"/>'
        '<path d="M66 82h20M108 82h20" stroke="#fff3c4" stroke-width="9" stroke-linecap="round"/><path d="M97 88l-9 26h18Z" fill="#14634a"/><path d="M74 132h46" stroke="#0f4a3b" stroke-width="7" stroke-linecap="round"/></g>'
    )
    return (
        ground("room", floor=0.8) + disc(97, 96, 86, "#6fc3a0", 0.35) + head
        + '<path d="M214 0H440V276H214Z" fill="#2c1020"/>' + use("glow", 330, 96, 7)
        + shadow(330, 280, 56) + use("keeper", 330, 280, 1.32)
        + f'<g transform="translate(272 184) rotate(-14) scale(.86)">{use("ruler", 0, 0)}</g>'
        + curtain(374, -10, 292, 120, pulled=8) + curtain(172, -10, 292, 66, pulled=-34)
        + shadow(118, 296, 48) + use("toto-walking", 112, 296, 1.12)
    )  # fmt: skip


def honest() -> str:
    ghosts = "".join(
        f'<path d="M220 122L220 44" stroke="#c62f3b" stroke-width="5" stroke-linecap="round" opacity="{o}" transform="rotate({t} 220 122)"/>'
        for t, o in ((-16, 0.25), (-8, 0.5), (8, 0.5), (16, 0.25), (0, 1))
    )  # fmt: skip

    def pan(x: float) -> str:
        return (
            f'<path d="M{x} 118L{x - 46} 212M{x} 118L{x + 46} 212" stroke="#24386f" stroke-width="3"/>'
            f'<path d="M{x - 56} 210H{x + 56}C{x + 42} 238 {x - 42} 238 {x - 56} 210Z" fill="#1d2f5f"/><path d="M{x - 56} 210H{x + 56}L{x + 53} 217H{x - 53}Z" fill="#4a6db0"/>'
        )

    return (
        ground("day") + city(220, 240, 0.9, "#9cc7a2", "#84b590", "#fbe6b0")
        + '<path d="M0 252C130 232 300 236 440 250V330H0Z" fill="#2f7a5c"/>' + straight(220, 344, 262, 260, 150, rows=4)
        + '<path d="M150 92A76 76 0 0 1 290 92" fill="none" stroke="#fdf2d6" stroke-width="10" stroke-linecap="round"/>' + ghosts
        + '<path d="M212 118H228L234 276H206Z" fill="#1d2f5f"/><path d="M212 118H219L214 276H206Z" fill="#4a6db0"/><path d="M160 292C164 270 190 266 220 266S276 270 280 292Z" fill="#1d2f5f"/>'
        '<path d="M92 114C150 124 190 112 220 112S290 124 348 114V124C290 134 250 124 220 124S150 134 92 124Z" fill="#1d2f5f"/><circle cx="220" cy="120" r="15" fill="#4a6db0"/><circle cx="220" cy="120" r="7" fill="#f0c35a"/>'
        + pan(96) + pan(344) + lattice(96, 212, 52, layers=4, across=3, loose=0.6) + lattice(344, 212, 52, layers=4, across=3, loose=0)
    )  # fmt: skip


def scarecrow() -> str:
    return (
        ground("day", floor=0.7) + disc(96, 96, 46) + field(0, 440, 252, 0.62, 3, 24)
        + '<path d="M222 330V120" stroke="#6d3a22" stroke-width="11"/>' + use("scarecrow", 222, 306, 1.24)
        + field(-10, 190, 334, 0.92, 5, 26) + field(262, 450, 334, 0.92, 8, 26) + field(150, 300, 346, 0.7, 9, 28)
        + use("glow", 318, 66, 1.8) + use("glow", 346, 50, 1.4) + use("glow", 370, 40, 1)
    )  # fmt: skip


def trees(mood: str) -> str:
    colours = (
        ("#1f6b58", "#17574a") if mood == "day" else ("#24516b", "#1b4058")
    )
    drawn = ""
    for x, y, s in ((40, 250, 1.5), (96, 244, 1.1), (352, 246, 1.3), (410, 252, 1.7), (306, 242, 0.9)):  # fmt: skip
        drawn += f'<g transform="translate({x} {y}) scale({s})"><path d="M-5 0V-30H5V0Z" fill="#5b3a24"/><path d="M0-120L34-60H18L42-20H-42L-18-60H-34Z" fill="{colours[0]}"/><path d="M0-120L34-60H18L42-20H6Z" fill="{colours[1]}"/></g>'
    return drawn


def woodman() -> str:
    return (
        ground("day", floor=0.74) + trees("day") + disc(206, 130, 84, "#fff4cf", 0.6)
        + shadow(112, 290, 60) + use("stump", 116, 294, 1.15) + shadow(226, 296, 66) + use("woodman", 226, 294, 1.26)
        + "".join(
            f'<rect x="{322 + 5 * n}" y="{y}" width="{94 - 10 * n}" height="{t}" rx="2" fill="{c}"/>'
            for n, (y, t, c) in enumerate(((280, 18, "#7f93a6"), (267, 12, "#a9bac8"), (259, 7, "#c3d0da"), (255, 3, "#f2f6f9")))
        )
    )  # fmt: skip


def practice() -> str:
    steps = "".join(
        f'<ellipse cx="{x}" cy="{y}" rx="12" ry="4.5" fill="#8a5a1c" opacity=".55"/>'
        for x in (40, 96) for y in (284, 304)
    )  # fmt: skip
    return (
        ground("dusk", floor=0.72) + disc(330, 150, 52, "#ffe0a0") + straight(220, 344, 262, 420, 330, rows=4)
        + steps + shadow(286, 282, 50, 0.3) + use("scarecrow-walking", 286, 282, 1.08)
        + shadow(172, 304, 56, 0.3) + use("woodman-walking", 172, 304, 1.2)
    )  # fmt: skip


def methods() -> str:
    bench = '<path d="M14 226H426V246H14Z" fill="#a8703a"/><path d="M14 226H426V233H14Z" fill="#c98f52"/><path d="M44 246H72V330H44ZM368 246H396V330H368Z" fill="#6d4526"/>'
    bolt = "".join(
        f'<path d="M{x} 226V{226 - h}H{x - 8}V{212 - h}H{x + 26}V{226 - h}H{x + 18}V226Z" fill="{c}"/>'
        for x, h, c in ((40, 34, "#93a6b7"), (80, 62, "#b9c7d3"), (120, 92, "#93a6b7"))
    )  # fmt: skip
    joint = (
        '<path d="M226 226V176H262V226Z" fill="#a9bac8"/><path d="M250 226V176H262V226Z" fill="#7f93a6"/><circle cx="244" cy="166" r="26" fill="#c3d0da"/><circle cx="244" cy="166" r="9" fill="#41566a"/>'
        '<path d="M244 166L312 122" stroke="#a9bac8" stroke-width="28" stroke-linecap="round"/><path d="M250 172L316 128" stroke="#7f93a6" stroke-width="8" stroke-linecap="round"/><circle cx="244" cy="166" r="12" fill="#5d7286"/>'
    )
    tools = (
        '<path d="M372 112H390V200L381 214 372 200Z" fill="#dfe7ee"/><path d="M372 124h18M372 136h18M372 148h18M372 160h18M372 172h18M372 184h18" stroke="#93a6b7" stroke-width="3"/><path d="M373 62H389L386 114H376Z" fill="#c62f3b"/><circle cx="381" cy="62" r="5" fill="#f0c35a"/>'
        '<path d="M206 60C164 66 160 116 178 140M206 60C248 66 252 100 240 122" fill="none" stroke="#f0c35a" stroke-width="8" stroke-linecap="round"/><circle cx="206" cy="58" r="9" fill="#dca23a"/>'
    )
    lamp = (
        use("glow", 300, 60, 6)
        + '<path d="M300 0V34" stroke="#16224a" stroke-width="4"/><path d="M272 60C274 36 326 36 328 60Z" fill="#c62f3b"/>'
    )
    return ground("room", floor=0.9) + lamp + bolt + joint + tools + bench


def tasks() -> str:
    post = '<path d="M346 300V40" stroke="#6d4526" stroke-width="12"/>'
    for n, (flip, colour) in enumerate(((1, "#f0c35a"), (-1, "#c62f3b"), (1, "#6fc3a0"), (-1, "#8fb0d9"), (1, "#fdf2d6"))):  # fmt: skip
        y = 58 + 34 * n
        a, b = (340, 410) if flip > 0 else (352, 282)
        tip = b + 18 * flip
        post += f'<path d="M{a} {y - 13}H{b}L{tip} {y} {b} {y + 13}H{a}Z" fill="{colour}"/>'
    glasses = f'<g transform="translate(152 176) scale(1.5)">{use("spectacles", 0, 0)}</g>'
    return (
        ground("day") + disc(150, 130, 92) + straight(200, 340, 236, 320, 60, 20) + post + shadow(346, 300, 24)
        + shadow(152, 284, 84) + lattice(152, 284, 152, layers=4, across=4) + glasses
    )  # fmt: skip


def voice() -> str:
    waves = "".join(
        f'<path d="M{270 + 23 * n} {142 - 14 * n}A{34 + 28 * n} {34 + 28 * n} 0 0 1 {270 + 23 * n} {178 + 14 * n}" fill="none" stroke="#fff3c4" stroke-width="7" stroke-linecap="round" opacity="{0.95 - 0.18 * n}"/>'
        for n in range(4)
    )  # fmt: skip
    cords = "".join(
        f'<path d="M{x} 0V{y}" stroke="#f0c35a" stroke-width="5"/><circle cx="{x}" cy="{y}" r="8" fill="#dca23a"/>'
        f'<path d="M{x - 8} {y + 4}H{x + 8}L{x + 12} {y + 34}H{x - 12}Z" fill="#f0c35a"/><path d="M{x - 4} {y + 8}l-2 26M{x + 4} {y + 8}l2 26" stroke="#a86d1f" stroke-width="2"/>'
        for x, y in ((152, 42), (190, 66))
    )  # fmt: skip
    bubbles = (
        '<path d="M330 40h72a14 14 0 0 1 14 14v28a14 14 0 0 1-14 14h-40l-18 18v-18h-14a14 14 0 0 1-14-14V54a14 14 0 0 1 14-14Z" fill="#fdf2d6"/>'
        + course(334, 54, [26, 26, 26], 12) + course(334, 72, [20, 34], 12)
    )  # fmt: skip
    return (
        ground("hall", floor=0.84) + disc(120, 150, 108, "#6fc3a0", 0.3) + '<path d="M0 0H60V290H0Z" fill="#2c1020"/>'
        + curtain(24, -10, 306, 96, pulled=-10) + f'<g transform="translate(150 164) scale(1.62)">{use("trumpet", 0, 0)}</g>'
        + '<path d="M40 168Q56 164 72 166" fill="none" stroke="#2a9470" stroke-width="24" stroke-linecap="round"/><path d="M72 166h10" stroke="#fdf8ea" stroke-width="24"/><circle cx="92" cy="168" r="14" fill="#f3c7a0"/><path d="M90 158h18M92 167h20M90 176h17" stroke="#f3c7a0" stroke-width="9" stroke-linecap="round"/>'
        + cords + waves + bubbles
    )  # fmt: skip


def balloon() -> str:
    fountain = (
        '<path d="M286 270H414L402 304H298Z" fill="#b9b6ad"/><path d="M280 260H420V274H280Z" fill="#d5d2c8"/><path d="M342 262V214H358V262Z" fill="#b9b6ad"/><path d="M318 216H382L372 228H328Z" fill="#d5d2c8"/>'
        '<path d="M350 212C350 176 322 180 320 214M350 212C350 176 378 180 380 214M350 212V178" fill="none" stroke="#d8f0ee" stroke-width="5" stroke-linecap="round"/>'
    )
    rope = '<path d="M170 262C210 312 250 290 290 286" fill="none" stroke="#8a5420" stroke-width="5"/><path d="M288 278l10 16M294 276l10 16" stroke="#6d3a22" stroke-width="5"/>'
    return (
        ground("day") + '<g fill="#fdf6df" opacity=".85"><path d="M20 96c5-18 32-22 40-8 10-16 42-12 44 8 14-2 22 14 10 22H14c-14-4-10-22 6-22Z"/><path d="M330 60c4-14 24-17 31-6 7-13 31-9 32 6 12-1 18 12 9 17h-78c-11-3-8-17 6-17Z"/></g>'
        + f'<g transform="translate(158 262) rotate(-5) scale(1.26)">{use("balloon", 0, 0)}</g>' + shadow(158, 290, 40) + rope + fountain
    )  # fmt: skip


def deploys() -> str:
    rows = "".join(course(262, 92 + 26 * n, w, 17, lit) for n, (w, lit) in enumerate((
        ([28, 28, 28, 28], (1,)), ([42, 28, 42], ()), ([28, 28, 28, 28], (0, 3)), ([28, 56, 28], ()), ([28, 28, 28, 28], (2,)),
    )))  # fmt: skip
    card = f'<g transform="rotate(5 318 160)"><rect x="246" y="70" width="142" height="176" rx="8" fill="#0d1735" opacity=".25" transform="translate(6 8)"/><rect x="246" y="70" width="142" height="176" rx="8" fill="#fdf2d6"/>{rows}</g>'
    return (
        ground("evening") + disc(128, 130, 74) + straight(220, 344, 240, 380, 120) + card
        + shadow(140, 292, 70) + use("toto-sitting", 128, 292, 1.75)
        + '<g transform="translate(206 204) scale(.62)"><circle r="22" fill="#fff" fill-opacity=".35" stroke="#dca23a" stroke-width="6"/></g>'
        + use("spark", 60, 250, 1.4) + use("spark", 228, 74, 1.1)
    )  # fmt: skip


def together() -> str:
    pole = '<path d="M52 172H258" stroke="#6d4526" stroke-width="8" stroke-linecap="round"/>'
    return (
        ground("dusk", floor=0.7) + disc(214, 110, 60, "#ffe0a0") + straight(220, 344, 250, 420, 300, rows=5)
        + shadow(82, 284, 40, 0.3) + use("scarecrow-walking", 82, 284, 0.96)
        + lattice(154, 212, 56, layers=3, across=4, loose=0.7) + use("basket", 154, 170, 1.75)
        + shadow(228, 284, 40, 0.3) + use("woodman-walking", 228, 284, 0.96) + pole
        + shadow(350, 308, 66, 0.3) + use("lion", 348, 306, 0.8) + use("milestone", 26, 316, 1.15)
    )  # fmt: skip


def travellers() -> str:
    crown = '<g transform="translate(0 36)"><path d="M300 62L292 34 312 46 330 24 348 46 368 34 360 62Z" fill="#f0c35a"/><path d="M300 62H360V70H300Z" fill="#c98f2c"/></g>'
    bubbles = "".join(
        f'<g transform="translate({x} {y}) scale({s})"><path d="M-22-16h44a9 9 0 0 1 9 9v14a9 9 0 0 1-9 9H0l-9 11V16h-13a9 9 0 0 1-9-9v-14a9 9 0 0 1 9-9Z" fill="{c}"/><path d="M-18-4h36M-18 6h22" stroke="#16224a" stroke-width="4" stroke-linecap="round" opacity=".55"/></g>'
        for x, y, s, c in ((146, 96, 0.8, "#fdf2d6"), (196, 76, 0.9, "#f6b8a0"), (232, 112, 0.7, "#bfe0cf"))
    )  # fmt: skip
    wings = '<path d="M40 214C14 206 4 186 4 172 24 174 44 188 50 206ZM88 214C114 206 124 186 124 172 104 174 84 188 78 206Z" fill="#fdfaf0"/>'
    return (
        ground("day") + city(112, 232, 0.42, "#6dab84", "#5c9c76", "#f9e3a0") + straight(220, 344, 240, 420, 160, rows=6)
        + shadow(64, 278, 34) + wings + lattice(64, 254, 46, layers=3, across=3, loose=0.6)
        + shadow(186, 284, 50) + lattice(186, 282, 84, layers=4, across=4) + bubbles
        + shadow(330, 296, 88) + lattice(330, 294, 158, layers=4, across=5) + crown
    )  # fmt: skip


CHAPTERS: dict[str, tuple[str, Callable[[], str]]] = {
    "ch01": ("Toto barks at the basket", recipe),
    "ch02": ("The silver shoes on the yellow road", shoes),
    "ch03": ("The towers through green spectacles", guardian),
    "ch04": ("Points fall onto bricks", grid),
    "ch05": ("Two doors, one on each side of the model", doors),
    "ch06": ("The man with the ruler behind the curtain", behind),
    "ch07": ("The honest scales", honest),
    "ch08": ("The Scarecrow in the wheat", scarecrow),
    "ch09": ("The Tin Woodman beside his stump", woodman),
    "ch10": ("Woodman and Scarecrow walk in step", practice),
    "ch11": ("A tin joint on the workbench", methods),
    "ch12": ("The model in green spectacles at a signpost", tasks),
    "ch13": ("The Wizard's speaking-trumpet", voice),
    "ch14": ("The balloon tied to the fountain", balloon),
    "ch15": ("Toto reads the card over", deploys),
    "ch16": ("Four friends carry the basket", together),
    "ch17": ("Three models at the gate", travellers),
}


def icon() -> str:
    """Return one brick, and the point that settles on it: the course's mark."""
    point = '<circle cx="100" cy="46" r="14" fill="#c9741f"/><circle cx="100" cy="46" r="11" fill="#ffc93c"/>'
    mark = (
        falling(100, 0, 46, 2.4)
        + '<g transform="translate(100 128) scale(1.5)"><use href="#brick"/></g>'
        + point
    )
    return document(200, 216, "A yellow brick", mark, 200)


PLATE = (760, 400)  # the wide pictures of the tale


def at_the_curtain() -> str:
    wide, high = PLATE
    flask = (
        '<path d="M372 300H470V312H372Z" fill="#6d4526"/><path d="M384 312V372M458 312V372" stroke="#5b3a24" stroke-width="10"/>'
        '<path d="M396 300C386 300 382 288 390 280L402 260V238H418V260L430 280C438 288 434 300 424 300Z" fill="#d8f3e4" opacity=".85"/><path d="M391 284H429C434 292 430 298 424 298H396C390 298 386 292 391 284Z" fill="#c62f3b"/>'
        '<path d="M446 300V268H462V300Z" fill="#f0c35a" opacity=".9"/>'
    )
    sparks = use("glow", 410, 222, 3.4) + "".join(use("spark", x, y, s) for x, y, s in ((388, 196, 0.9), (436, 186, 1.2), (410, 160, 0.8), (452, 220, 0.7), (372, 228, 0.6)))  # fmt: skip
    windows = "".join(
        f'<path d="M{x - 30} 190V100a30 30 0 0 1 60 0V190Z" fill="#f8e7b6"/><path d="M{x} 70V190M{x - 30} 130H{x + 30}" stroke="#14634a" stroke-width="6"/>'
        for x in (84, 330)
    )  # fmt: skip
    return (
        ground("hall", wide, high, 0.84) + windows + '<path d="M500 0H760V350H500Z" fill="#2c1020"/>' + use("glow", 640, 120, 8)
        + '<path d="M0 336H760V400H0Z" fill="#0f4a3b"/><path d="M60 352H520L560 388H20Z" fill="#c62f3b" opacity=".55"/>'
        + flask + sparks + shadow(190, 366, 80) + use("dorothy", 184, 366, 1.36) + shadow(292, 374, 46) + use("toto-sitting", 290, 374, 0.95)
        + shadow(574, 368, 70) + use("wizard", 580, 368, 1.36) + curtain(606, -10, 372, 190, pulled=24)
    )  # fmt: skip


def empty_recipe() -> str:
    wide, high = PLATE

    def balance() -> str:
        drawn = '<path d="M372 118H388L398 336H362Z" fill="#1d2f5f"/><path d="M372 118H379L372 336H362Z" fill="#4a6db0"/><path d="M312 356C316 336 344 330 380 330S444 336 448 356Z" fill="#1d2f5f"/><path d="M196 112C270 124 340 110 380 110S490 124 564 112V122C490 134 420 122 380 122S270 134 196 122Z" fill="#1d2f5f"/><circle cx="380" cy="118" r="15" fill="#4a6db0"/><circle cx="380" cy="118" r="7" fill="#f0c35a"/>'
        for x in (200, 560):
            drawn += f'<path d="M{x} 116L{x - 76} 284M{x} 116L{x + 76} 284" stroke="#24386f" stroke-width="3.5"/><path d="M{x - 90} 282H{x + 90}C{x + 70} 318 {x - 70} 318 {x - 90} 282Z" fill="#1d2f5f"/><path d="M{x - 90} 282H{x + 90}L{x + 86} 291H{x - 86}Z" fill="#4a6db0"/>'
        return drawn

    day = (  # morning on the left, evening on the right
        '<linearGradient id="day" x1="0" x2="1"><stop offset=".1" stop-color="#f9e4a8"/><stop offset=".5" stop-color="#e9a26a"/><stop offset=".9" stop-color="#24386f"/></linearGradient>'
        f'<rect width="{wide}" height="318" fill="url(#day)"/>'
        + disc(92, 96, 44)
        + f'<g transform="translate(400 0)">{stars(30, 270, 170, 5)}</g><path d="M676 60a34 34 0 1 0 30 50 28 28 0 1 1-30-50Z" fill="#fdf2d6"/>'
        '<path d="M0 300C200 270 560 330 760 284V400H0Z" fill="#8a6a3c"/>'
    )
    card = '<g transform="translate(474 338) rotate(-62) scale(.82)"><use href="#card"/><use href="#card-lines"/></g>'
    return (
        ground("evening", wide, high, 0.78) + day + field(0, 760, 318, 0.6, 4, 22) + straight(380, 412, 320, 520, 330, rows=4)
        + balance() + use("basket", 200, 172, 1.95) + use("basket", 560, 172, 1.95)
        + card + shadow(690, 376, 56) + use("toto-sitting", 696, 374, 1.3, flip=True)
    )  # fmt: skip


def evening() -> str:
    wide, high = PLATE
    return (
        ground("evening", wide, high, 0.72) + disc(556, 190, 84) + city(150, 268, 0.62, "#8a6a3c", "#765830", "#ffe9a6")
        + '<path d="M0 282C180 250 420 300 760 262V400H0Z" fill="#7a5428"/>' + straight(250, 412, 280, 330, 14, 330, rows=11)
        + field(0, 150, 330, 0.7, 3, 20) + field(520, 760, 330, 0.7, 5, 20)
        + lattice(291, 298, 58, layers=3, across=4, loose=0) + shadow(346, 372, 76, 0.3) + use("dorothy-walking", 346, 372, 1.38)
        + shadow(470, 378, 56, 0.3) + use("toto-walking", 470, 378, 1.15)
        + "".join(use("glow", x, y, s) for x, y, s in ((280, 214, 1.2), (300, 196, 1.0), (262, 190, 0.8)))
        + wheat([(20, 420, 1.3, 8), (60, 424, 1.1, -5), (742, 420, 1.35, -9), (700, 424, 1.1, 4)])
    )  # fmt: skip


TALE: dict[str, tuple[str, Callable[[], str]]] = {
    "curtain": ("Dorothy asks the Wizard", at_the_curtain),
    "basket": ("The basket weighs what it weighed", empty_recipe),
    "evening": ("The way home with a light basket", evening),
}
