"""Every page at the widths of a phone, a tablet and a desk, as a reader's browser meets it.

One tour for each width visits every page once and notes what is wrong, by kind; each test asks for
one kind, so that one run names every fault.
"""

import re
from collections import defaultdict

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Error, Page

from tests.site.conftest import WIDTHS, Site, settle

DESK = 1400
LIMIT, LIMIT_WITH_EQUATIONS = 1.5e6, 2.0e6  # bytes, uncompressed
WIDER = """() => [...document.querySelectorAll('.bd-article *')].filter((e) => {
  const box = e.getBoundingClientRect();
  if (box.width < 2 || e.closest('mjx-container, .headerlink')) return false;
  const cut = getComputedStyle(e).overflowX;
  if ((cut === 'hidden' || cut === 'clip') && e.clientWidth > 0 && e.scrollWidth > e.clientWidth + 1) return true;
  if (box.right <= innerWidth + 1) return false;
  for (let p = e.parentElement; p; p = p.parentElement)
    if (['auto', 'scroll'].includes(getComputedStyle(p).overflowX)) return false;
  return true;
}).slice(0, 3).map((e) => e.outerHTML.slice(0, 80))"""
SHADOWLESS = """() => [...document.querySelectorAll('.bd-article *')].filter((e) =>
  ['auto', 'scroll'].includes(getComputedStyle(e).overflowX) && e.scrollWidth > e.clientWidth + 1
  && (!getComputedStyle(e).backgroundAttachment.includes('local') || e.tabIndex < 0)
).slice(0, 3).map((e) => e.outerHTML.slice(0, 80))"""
OPEN_ALL = "() => document.querySelectorAll('details').forEach((box) => { box.open = true; })"
AXE = {"resultTypes": ["violations"], "rules": {"label-content-name-mismatch": {"enabled": True}}}
AXE_COLOURS = {  # all that differs in the dark
    "resultTypes": ["violations"],
    "runOnly": ["color-contrast", "link-in-text-block"],
}
GONE = """() => { const b = document.querySelector('.bd-sidebar-primary').getBoundingClientRect();
  return b.right <= 0 || b.width === 0; }"""


class Tour:
    """What a reader meets who opens every page at one width and touches what can be touched."""

    def __init__(self, page: Page, site: Site, width: int) -> None:
        self.page, self.site, self.width = page, site, width
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.solutions, self.path, self.requests = 0, "", []
        page.on("console", lambda m: m.type == "error" and self.note("errors", m.text))
        page.on("pageerror", lambda e: self.note("errors", str(e)))
        page.on("request", lambda r: self.requests.append(r.url))
        for self.path in site.pages:
            page.goto("about:blank")  # what the page before is still loading is not this one's
            self.requests.clear()
            settle(page, self.path)
            self.weigh()
            self.open_solutions()
            self.look_for_cuts()
            if self.path.startswith(("ch", "reference/")):
                self.use_contents()
            self.use_menu()

    def note(self, kind: str, fault: str) -> None:
        self.faults[kind].append(f"{self.path}: {fault}")

    def touch(self, element) -> bool:
        """Say whether an element can be clicked: seen, still, and under nothing else."""
        try:
            element.click(timeout=4000)
        except Error:
            return False
        return True

    def weigh(self) -> None:
        address, folder = self.site.address, self.site.folder
        for url in self.requests:
            if not url.startswith((address, "data:", "blob:")):
                self.note("foreign", url)
        names = {re.sub("[?#].*", "", url.removeprefix(address)) for url in self.requests}
        size = sum((folder / n).stat().st_size for n in names if (folder / n).is_file())
        limit = LIMIT_WITH_EQUATIONS if self.page.locator(".math").count() else LIMIT
        if size > limit:
            self.note("weight", f"{size / 1e6:.2f} MB of {limit / 1e6}")

    def open_solutions(self) -> None:
        for solution in self.page.locator(".solution").all():
            self.solutions += 1
            title = solution.locator(".admonition-title").first
            name = repr(title.inner_text())
            cell = solution.locator(".cell_input, .cell_output")
            if solution.locator("p, pre").locator("visible=true").count():
                self.note("solutions", f"{name} is open before anybody taps")
            title.click() if self.width == DESK else title.tap()
            needed = 0 if "An experiment" in name else 2
            if cell.count() < needed or cell.locator("visible=true").count() < cell.count():
                self.note("solutions", f"{name} does not open whole")
            if "#" in self.page.url:
                self.note("solutions", f"{name} jumps to {self.page.url}")

    def look_for_cuts(self) -> None:
        self.page.evaluate(OPEN_ALL)
        across = self.page.evaluate("document.documentElement.scrollWidth")
        if across > self.width:
            self.note("cuts", f"the page is {across} wide")
        for element in self.page.evaluate(WIDER):
            self.note("cuts", f"cut: {element}")
        for element in self.page.evaluate(SHADOWLESS):
            self.note("cuts", f"scrolls without a sign, or not by keyboard: {element}")

    def use_contents(self) -> None:
        link = self.page.locator(".bd-sidebar-secondary .bd-toc-nav a").nth(1)
        if self.width < DESK:
            self.touch(self.page.locator("button.secondary-toggle:visible").first)
        if not self.touch(link):
            self.note("contents", "do not open")
            return
        name = self.page.evaluate("decodeURIComponent(location.hash).slice(1)")
        self.page.keyboard.press("Escape")
        found = self.page.evaluate("(id) => document.getElementById(id)?.tagName", name)
        if not name or not found:
            self.note("contents", f"lead to {name!r}")

    def use_menu(self) -> None:
        self.page.goto(self.path, wait_until="domcontentloaded")
        other = "ch01_recipe" if "ch02" in self.path else "ch02_model_and_data"
        target = self.page.locator(f".bd-sidebar-primary a[href$='{other}.html']")
        button = self.page.locator("button.primary-toggle:visible").first
        if not self.touch(button):
            self.note("menu", "has no button")
        elif self.width == DESK:
            try:
                self.page.wait_for_function(GONE, timeout=4000)
            except Error:
                self.note("menu", "is not put away by its button")
            self.touch(button)
        if not self.touch(target):
            self.note("menu", "does not open")
        elif other not in self.page.url:
            self.note("menu", f"leads to {self.page.url}")


@pytest.fixture(scope="session")
def tour(browser, site):
    """Return the tour at a width, made once."""
    made = {}

    def at(width: int) -> Tour:
        if width not in made:
            options = {"has_touch": width < DESK, "viewport": {"width": width, "height": 844}}
            with browser.new_context(base_url=site.address, **options) as context:
                made[width] = Tour(context.new_page(), site, width)
        return made[width]

    return at


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "kind",
    [
        "errors",  # in the console
        "foreign",  # requests that leave the machine
        "weight",
        "solutions",  # open where people tap, with their code
        "cuts",  # what is too wide scrolls in a box of its own, which shows it
        "contents",
        "menu",
    ],
)
def test_every_page(tour, width, kind):
    faults = tour(width).faults[kind]
    assert not faults, "\n".join(faults)
    assert tour(width).solutions >= 2 * len(tour(width).site.chapters)


def test_hidden_boxes_are_open_on_paper_and_shut_afterwards(tab, site):
    page, faults = tab(768), []
    for path in site.chapters:
        settle(page, path)
        shut = "document.querySelectorAll('details:not([open])').length"
        before = page.evaluate(shut)
        page.emulate_media(media="print")
        for pre in page.locator("details pre").all():
            if pre.bounding_box() is None or pre.bounding_box()["height"] < 10:
                faults.append(f"{path}: {pre.inner_text()[:40]!r} does not print")
        page.emulate_media(media="screen")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        if page.evaluate(shut):
            faults.append(f"{path}: browsers without ::details-content print shut boxes")
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        if page.evaluate(shut) != before or not before:
            faults.append(f"{path}: boxes stay open after printing")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("width", "where"),
    [(390, {}), (DESK, {"exclude": [[".bd-article"]]})],
    ids=["all of it on a phone", "what stands around it on a desk"],
)
def test_no_serious_barrier_for_readers(tab, site, width, where):
    """axe-core finds nothing serious or critical, light and dark, with every box open."""
    page, faults, axe = tab(width), [], Axe()
    for path in site.pages:
        settle(page, path)
        page.add_style_tag(content="* { transition: none !important }")  # colours change at once
        page.evaluate(OPEN_ALL)
        for scheme, options in (("light", AXE), ("dark", AXE_COLOURS)):
            page.evaluate("(x) => { document.documentElement.dataset.theme = x }", scheme)
            found = axe.run(page, context=where or None, options=options).response["violations"]
            faults += [
                f"{path} {scheme}: {fault['id']}, {fault['nodes'][0]['html'][:100]}"
                for fault in found
                if fault["impact"] in ("serious", "critical")
            ]
    assert not faults, "\n".join(faults)


def test_figures_lie_on_white_in_the_dark_and_pictures_of_the_tale_on_their_own_ground(tab, site):
    page, faults = tab(390, color_scheme="dark"), []
    for path in site.chapters:
        page.goto(path, wait_until="load")
        found = page.locator(".bd-article img").evaluate_all(
            "(all) => all.map((e) => [e.matches('.vignette'),"
            " getComputedStyle(e).backgroundColor, getComputedStyle(e).filter])"
        )
        for drawn, ground, veil in found:
            card = "rgba(0, 0, 0, 0)" if drawn else "rgb(255, 255, 255)"
            if (ground, veil) != (card, "none"):
                faults.append(f"{path}: a figure on {ground} under {veil}")
        if [drawn for drawn, _, _ in found].count(True) != 1:
            faults.append(f"{path}: not one vignette")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_welcome_shows_one_cover_and_the_ways_in_on_the_first_screen(tab, scheme):
    page = tab(DESK, color_scheme=scheme)
    page.goto("intro.html", wait_until="load")
    covers = page.locator("img.cover").evaluate_all("(all) => all.map((e) => e.offsetHeight > 300)")
    assert covers == [scheme == "light", scheme == "dark"]
    button = page.get_by_role("link", name="Start here")
    assert button.get_attribute("href").startswith("ch01")
    for part in (button, *page.locator(".opening .sd-card").all()):
        box = part.bounding_box()
        assert box["y"] + box["height"] <= 900, part.inner_text()


def test_an_epigraph_has_its_golden_rule(tab, site):
    page = tab(390)
    for path in site.chapters:
        page.goto(path, wait_until="load")
        colours = page.locator("blockquote.epigraph").evaluate_all(
            "(all) => all.map((e) => getComputedStyle(e).borderLeftColor)"
        )
        assert set(colours) == {"rgb(233, 185, 73)"}, path  # its opening, and a closing beat


def test_chapters_are_numbered_as_their_files_in_titles_sidebar_and_references(tab, site):
    page, references = tab(1400), 0
    for path in site.chapters:
        page.goto(path, wait_until="load")
        number = int(path[2:4])
        assert page.locator("h1:visible").first.inner_text().startswith(f"{number} · "), path
        assert page.title().startswith(f"{number} · "), path
        assert page.title().count(f"{number} · ") == 1, path
        current = page.locator(".bd-sidebar-primary .current > a.current")
        assert current.inner_text().startswith(f"{number} · "), path
        for link in page.locator(".bd-article a.internal:has(.std-ref)").all():
            target = re.search(r"ch(\d\d)\w*\.html#ch\d\d$", link.get_attribute("href"))
            if target:
                references += 1
                assert re.search(rf"\b{int(target[1])}\b", link.inner_text()), (path, link)
    assert references > 40


def test_few_outputs_read_true(tab, site):
    """Checks that hold are ticks; what is left of True stands among numbers."""
    page, found = tab(DESK), {}
    for path in site.chapters:
        page.goto(path, wait_until="load")
        words = page.locator(".cell_output pre >> visible=true").all_inner_texts()
        found[path] = sum(len(re.findall(r"\bTrue\b", text)) for text in words)
    assert 0 < sum(found.values()) <= 60, found
    assert page.locator("details.checks summary").first.inner_text().startswith("✓ ")
