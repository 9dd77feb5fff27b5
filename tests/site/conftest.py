"""The built book in a browser: one Chromium, one server of files, nothing beyond this machine."""

import functools
import http.server
import ipaddress
import os
import shutil
import socket
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

HTML = Path(__file__).parents[2] / "_build" / "html"
WIDTHS = (390, 768, 1400)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
NO_BROWSER = (
    "these checks drive Chromium, and none is installed: apt-get install chromium, or what your "
    "system calls it"
)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lift the block of all connections for this machine's own address, and for it alone."""
    connect = socket.socket.connect

    def loopback_only(self, address):
        if self.family != socket.AF_UNIX and not ipaddress.ip_address(address[0]).is_loopback:
            raise OSError("tests run without a network")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", loopback_only)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serve files without a line for each of them."""

    def log_message(self, *args) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    """Say nothing when a browser leaves before it has read a file to its end."""

    def handle_error(self, request, client_address) -> None:
        pass


@dataclass(frozen=True)
class Site:
    """The folder of a built book, its address, and its pages."""

    folder: Path
    address: str

    @property
    def pages(self) -> list[str]:
        """Return every page but the one that only forwards to the welcome."""
        found = (p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*.html"))
        return sorted(p for p in found if not p.startswith("_") and p != "index.html")

    @property
    def chapters(self) -> list[str]:
        return [page for page in self.pages if page.startswith("ch")]


@pytest.fixture(scope="session")
def site():
    if not (HTML / "intro.html").exists():
        pytest.fail("the book is not built: make book")
    server = Server(("127.0.0.1", 0), functools.partial(Quiet, directory=str(HTML)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Site(HTML, f"http://127.0.0.1:{server.server_port}/")
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(NO_BROWSER)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser: Browser, site: Site):
    """Return what opens a tab of a width; tabs are closed after the test."""
    contexts = []

    def open_tab(width: int, **options) -> Page:
        height = 900 if width > 1000 else 844
        context = browser.new_context(
            viewport={"width": width, "height": height}, base_url=site.address, **options
        )
        context.add_init_script(  # jumps are measured, not watched
            "addEventListener('DOMContentLoaded', () =>"
            " { document.documentElement.style.scrollBehavior = 'auto' })"
        )
        contexts.append(context)
        return context.new_page()

    yield open_tab
    for context in contexts:
        context.close()


def settle(page: Page, path: str) -> None:
    """Open a page and wait until its equations are set."""
    page.goto(path, wait_until="load")
    page.evaluate("async () => { await window.MathJax?.startup?.promise; }")
