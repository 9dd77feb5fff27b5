"""Draw the cover, the vignettes, the icon and the picture for shared links.

python -m book._art        (from the repository's root)
"""

from __future__ import annotations

from pathlib import Path

from . import cover, vignettes

STATIC = Path(__file__).parents[1] / "_static"


def main() -> None:
    tale = STATIC / "tale"
    tale.mkdir(exist_ok=True)
    (tale / "cover.svg").write_text(cover.draw(cover.DAY))
    (tale / "cover-night.svg").write_text(cover.draw(cover.NIGHT))
    for name, (title, drawing) in vignettes.CHAPTERS.items():
        (tale / f"{name}.svg").write_text(vignettes.picture(title, drawing()))
    for name, (title, drawing) in vignettes.TALE.items():
        text = vignettes.picture(title, drawing(), *vignettes.PLATE, shown=760)
        (tale / f"{name}.svg").write_text(text)


if __name__ == "__main__":
    main()
