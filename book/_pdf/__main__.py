"""python -m book._pdf: the built book as _build/pdf/few-bits.pdf."""

from __future__ import annotations

import shutil
import sys

from book._pdf import BOOK, write
from playwright.sync_api import sync_playwright

SITE = BOOK.parent / "_build" / "html"
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def main() -> None:
    """Print and join, and say where it lies."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        sys.exit(
            "Chromium prints the pages, and none is installed: apt-get install chromium"
        )
    if not (SITE / "intro.html").exists():
        sys.exit("the book is not built: make book")
    with sync_playwright() as playwright:
        flags = [
            "--no-sandbox",
            "--disable-gpu",
            "--allow-file-access-from-files",
        ]
        browser = playwright.chromium.launch(
            executable_path=found, args=flags
        )
        print(
            "written to",
            write(SITE, SITE.parent / "pdf" / "few-bits.pdf", browser),
        )


if __name__ == "__main__":
    main()
