"""Draw the still images of the figures that move, from the figures of the built book.

    python -m tests.site.stills

They stand where scripts do not run: in JupyterLab, in print previews, in readers' own settings.
"""

from __future__ import annotations

import json
import re
import textwrap
from html import escape
from pathlib import Path

FIGURES = Path(__file__).parents[2] / "book" / "_static" / "moving"
WIDTH, EDGE = 344, 12
"""Of the drawing in pixels, as on a phone, and of the card around it."""
STEPS = 25
"""Steps of descent before the staircase is drawn."""
BY_SCRIPT = ("staircase", "grid", "recovery")
STYLE = (
    "text{{font:13px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;fill:{muted};"
    "paint-order:stroke;stroke:{card};stroke-width:4px;stroke-linejoin:round}}"
    ".strong{{fill:{ink};font-weight:600}}.axis{{stroke:{line}}}"
)
DRAW = """(name) => {
  const place = document.querySelector(`[data-figure="${name}"]`);
  if (name === "staircase")
    for (let i = 0; i < STEPS; i += 1) place.querySelector("button").click();
  return place.querySelector(".mv-drawing svg").outerHTML;
}""".replace("STEPS", str(STEPS))


def colours() -> dict[str, str]:
    """Return the colours by day, by name."""
    first = re.search(r"\.moving \{(.*?)\}", (FIGURES / "moving.css").read_text(), re.S)
    return dict(re.findall(r"--mv-(\w+): (#\w+)", first[1]))


def card(content: str, height: float) -> str:
    """Return an SVG of its own: content on a card, with colours instead of their names."""
    by_day = colours()
    content = re.sub(r"var\(--mv-(\w+)\)", lambda found: by_day[found[1]], content)
    wide, high = WIDTH + 2 * EDGE, height + 2 * EDGE
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high:g}" width="{wide}" height="{high:g}">'
        f"<style>{STYLE.format(**by_day)}</style>"
        f'<rect width="{wide}" height="{high:g}" rx="10" fill="{by_day["card"]}"/>'
        f'<g transform="translate({EDGE} {EDGE})">{content}</g></svg>\n'
    )


def drawn(page, name: str) -> str:
    """Return the still image of a figure that an open page draws."""
    page.add_style_tag(content=f".mv-drawing {{ width: {WIDTH}px !important; }}")
    page.wait_for_function(
        f"document.querySelector('[data-figure={name}] svg').clientWidth === {WIDTH}"
    )
    found = page.evaluate(DRAW, name)
    inner = re.search(r"<svg[^>]*>(.*)</svg>", found, re.S)[1].replace(' class=""', "")
    return card(inner, float(re.search(r'height="([\d.]+)"', found)[1]))


def paragraphs(parts: list[tuple[str, str]], lines: int = 3) -> str:
    """Return a card of bold headings, each with some lines of text below it."""
    content, y = [], 4
    for heading, text in parts:
        rows = [("strong", row) for row in textwrap.wrap(heading, 46)]
        rows += [("", row) for row in textwrap.wrap(text, 50, max_lines=lines, placeholder=" …")]
        for kind, row in rows:
            y += 18
            content.append(f'<text x="4" y="{y}" class="{kind}">{escape(row)}</text>')
        y += 8
    return card("".join(content).replace(' class=""', ""), y)


def answers() -> str:
    """The first prompt's answer in every width."""
    data = json.loads((FIGURES / "answers.json").read_text())
    words = {"float": "floating point", "nearest": "rounded to nearest", "gptq": "GPTQ"}

    def name(answer: dict) -> str:
        how = words.get(answer["method"], answer["method"])
        return f"{answer['bits']} bits, {how}" if answer["bits"] else how.capitalize()

    said = [(name(a), a["said"][0][0]) for a in data["answers"]]
    return paragraphs([("Prompt", data["prompts"][0]), *said])


def road() -> str:
    """What is asked, in words; the table says the rest."""
    return paragraphs([
        ("What do you have?", "A language model, or a convolutional network."),
        ("Where will it run?", "In PyTorch, where smaller is enough; where it must be faster; on an "
                               "engine that rounds inputs to 8 bits, too."),
        ("How many bits?", "8, 4, 3 or 2."),
        ("How much text to train on?", "None, a few rows, or plenty."),
        ("Memory to train all weights?", "Enough, or too little."),
        ("And the answer?", "A row of the table below."),
    ])  # fmt: skip


IN_WORDS = {"answers": answers, "road": road}


def open_lightly(page, address: str) -> None:
    """Open a page without its equations, which nothing here looks at."""
    empty = {"body": "", "content_type": "text/javascript"}
    page.route("**/mathjax/**", lambda route: route.fulfill(**empty))
    page.goto(address, wait_until="domcontentloaded", timeout=120_000)


def page_of(folder: Path, name: str) -> str:
    """Return the page of a built book that has a figure."""
    return next(p.name for p in sorted(folder.glob("ch*.html")) if f'data-figure="{name}"' in p.read_text())  # fmt: skip


def main() -> None:
    import shutil

    from playwright.sync_api import sync_playwright

    from companion.files import write_atomically
    from tests.site.conftest import FLAGS, HTML

    stills = {name: make() for name, make in IN_WORDS.items()}
    with sync_playwright() as playwright:
        path = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        for name in BY_SCRIPT:
            page = browser.new_page()
            open_lightly(page, (HTML / page_of(HTML, name)).as_uri())
            stills[name] = drawn(page, name)
        browser.close()
    for name, text in stills.items():
        write_atomically(FIGURES / f"{name}.svg", lambda part, text=text: part.write_text(text))


if __name__ == "__main__":
    main()
