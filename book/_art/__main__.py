"""Draw the cover, the vignettes, the icons and the picture for shared links.

python -m book._art        (from the repository's root)

The drawings are written as SVG. The two pictures that have to be pixels, cover.png for shared
links and favicon.png, are then taken by Chromium, where there is one.
"""

from __future__ import annotations

import shutil
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from . import cover, vignettes

STATIC = Path(__file__).parents[1] / "_static"
PIXELS = {  # file: the drawing, its size
    "cover.png": ("tale/cover.svg", (cover.WIDTH, cover.HEIGHT)),
    "favicon.png": ("logo.svg", (64, 64)),
}


def drawings() -> dict[str, str]:
    """Return every drawing by its place below _static."""
    made = {
        "tale/cover.svg": cover.draw(cover.DAY),
        "tale/cover-night.svg": cover.draw(cover.NIGHT),
        "logo.svg": vignettes.icon(),
    }
    for name, (title, drawing) in vignettes.CHAPTERS.items():
        made[f"tale/{name}.svg"] = vignettes.picture(title, drawing())
    for name, (title, drawing) in vignettes.TALE.items():
        wide, high = vignettes.PLATE
        made[f"tale/{name}.svg"] = vignettes.picture(
            title, drawing(), wide, high, shown=wide
        )
    return made


def photograph(chromium: str) -> None:
    """Take the drawings that are needed as pixels."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox"]
        )
        for name, (drawing, (wide, high)) in PIXELS.items():
            page = browser.new_page(
                viewport={"width": wide, "height": high}
            )
            picture = (STATIC / drawing).read_text()
            page.set_content(
                "<style>* { margin: 0 } svg { display: block; width: 100vw; height: 100vh }</style>"
                + picture
            )
            pixels = Image.open(
                BytesIO(page.screenshot(omit_background=True))
            )
            opaque = pixels.getextrema()[-1] == (255, 255)
            (pixels.convert("RGB") if opaque else pixels).save(
                STATIC / name, optimize=True
            )
        browser.close()


def main() -> None:
    (STATIC / "tale").mkdir(exist_ok=True)
    for name, text in drawings().items():
        (STATIC / name).write_text(text)
    chromium = next(
        filter(
            None,
            map(shutil.which, ("chromium", "chromium-browser", "chrome")),
        ),
        None,
    )
    if chromium is None:
        print(
            "No Chromium here: cover.png and favicon.png stay as they were."
        )
    else:
        photograph(chromium)


if __name__ == "__main__":
    main()
