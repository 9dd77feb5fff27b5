"""The figures that move, as a reader moves them: by mouse, by keyboard, without scripts."""

import json
import re
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from playwright.sync_api import Locator, Page

from benchmarks.moving import FIGURES
from companion import choose_scale, dequantize, fake_quantize, quantize
from companion.numerics.affine import to_groups
from tests.site.stills import BY_SCRIPT, IN_WORDS, drawn, open_lightly, page_of

NAMES = ("answers", "grid", "recovery", "road", "staircase")


@pytest.fixture(scope="module")
def figures(browser, site) -> Iterator:
    """Return what opens the page of a figure on a phone, once, and finds the figure in it."""
    opened: dict[str, Page] = {}
    faults: list[str] = []

    def of(name: str) -> Locator:
        if name not in opened:
            context = browser.new_context(
                viewport={"width": 390, "height": 844}, base_url=site.address
            )
            page = opened[name] = context.new_page()
            page.on("console", lambda m: m.type == "error" and faults.append(f"{name}: {m.text}"))
            page.on("pageerror", lambda e: faults.append(f"{name}: {e}"))
            open_lightly(page, page_of(site.folder, name))
        return opened[name].locator(f"[data-figure={name}]")

    yield of
    for page in opened.values():
        page.context.close()
    assert not faults, "\n".join(faults)


def slider(figure: Locator, label: str) -> Locator:
    return figure.get_by_label(label, exact=True)


def tile(figure: Locator, label: str) -> str:
    return figure.locator(".mv-tiles > div", has_text=label).locator("dd").inner_text()


def floats(text: str) -> torch.Tensor:
    import base64

    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)


def test_the_grid_rounds_as_the_companion_does(figures):
    """Integers, scales and values are equal, bit for bit; the error up to summation."""
    page = figures("grid").page
    data = json.loads((FIGURES / "grid.json").read_text())
    for row, (bits, size, percent) in product(
        data["rows"], [(4, None, 100), (2, 32, 100), (3, 16, 55), (8, 128, 100), (5, 64, 80), (6, None, 37)]
    ):  # fmt: skip
        weights = floats(row["weights"])
        groups = to_groups(weights[None], size)
        limit = groups.abs().amax(-1, keepdim=True) * torch.tensor(percent / 100)
        scale, _ = choose_scale(groups.clamp(-limit, limit), bits, scale_dtype=torch.float16)
        integers = quantize(groups, scale, bits=bits)
        values = dequantize(integers, scale)
        found = page.evaluate(
            "([text, bits, size, percent]) => grid.roundRow(grid.decode(text), bits, size, percent)"
            ".map((g) => ({ scale: g.scale, integers: g.integers, values: g.values }))",
            [row["weights"], bits, size or len(weights), percent],
        )
        case = f"row {row['row']}, {bits} bits, {size}, {percent}%"
        assert [g["scale"] for g in found] == scale.float().flatten().tolist(), case
        assert [g["integers"] for g in found] == integers[0].tolist(), case
        assert [g["values"] for g in found] == values[0].tolist(), case
        error = page.evaluate(
            "([text, values]) => grid.error(grid.decode(text), values)",
            [row["weights"], values.flatten().tolist()],
        )
        wrong = (values - groups).double().norm() / groups.double().norm()
        assert error == pytest.approx(float(wrong), rel=1e-9), case


def test_halves_are_rounded_to_the_even_one_and_scales_to_float16(figures):
    page = figures("grid").page
    x = torch.tensor([0.5, 1.5, -0.5, 2.5, 7.5])  # a step of 1 in four bits: ties everywhere
    found = page.evaluate("(x) => grid.roundRow(new Float32Array(x), 4, 5, 100)[0]", x.tolist())
    scale, _ = choose_scale(x, 4, scale_dtype=torch.float16)
    assert (found["scale"], found["integers"]) == (
        scale.item(),
        quantize(x, scale, bits=4).tolist(),
    )
    tiny = torch.tensor([2e-6, -1e-6, 0.0])  # float16 has no normal number so small
    found = page.evaluate("(x) => grid.roundRow(new Float32Array(x), 3, 3, 100)[0]", tiny.tolist())
    scale, _ = choose_scale(tiny, 3, scale_dtype=torch.float16)
    assert (found["scale"], found["integers"]) == (
        scale.item(), quantize(tiny, scale, bits=3).tolist(),
    )  # fmt: skip


def test_the_staircase_descends_as_torch_does(figures):
    """From inside the grid and from beyond it, forty steps, to the last bit."""
    page = figures("staircase").page
    for start in (0.1, -1.9, 1.7, 2.2):
        found = page.evaluate(
            "(w) => { const all = []; w = Math.fround(w); for (let i = 0; i < 40; i += 1)"
            " { all.push(w); w = staircase.step(w).next; } return all; }",
            start,
        )
        w, expected = torch.tensor([start], requires_grad=True), []
        for _ in range(40):
            expected.append(w.item())
            loss = (fake_quantize(w, torch.tensor([0.5]), bits=3) - 1.2) ** 2
            (slope,) = torch.autograd.grad(loss.sum(), w)
            w = (w - 0.1 * slope).detach().requires_grad_()
        assert found == expected, start


@pytest.mark.parametrize(
    ("label", "key"), [("Bits", "ArrowRight"), ("Range, of the largest weight", "Home")]
)
def test_a_slider_moves_by_keyboard(figures, label, key):
    figure = figures("grid")
    before = tile(figure, "error of the row")
    slider(figure, label).focus()
    figure.page.keyboard.press(key)
    assert tile(figure, "error of the row") != before
    said = slider(figure, label).get_attribute("aria-valuetext")
    assert said == figure.locator(".mv-slider", has_text=label).locator("output").inner_text()


def test_a_slider_moves_by_mouse(figures):
    figure = figures("grid")
    before = tile(figure, "bytes a weight")
    handle = slider(figure, "Group size")
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    figure.page.mouse.click(box["x"] + 0.98 * box["width"], box["y"] + box["height"] / 2)
    assert handle.get_attribute("aria-valuetext") == "16 weights"
    after = tile(figure, "bytes a weight")
    assert float(after) > float(before)
    bits = int(slider(figure, "Bits").input_value())
    assert float(after) == pytest.approx((bits + 16 / 16) / 8, abs=1e-3)


def test_a_tapped_group_is_drawn(figures):
    figure = figures("grid")
    slider(figure, "Group size").fill("3")
    ladder = figure.locator(".mv-drawing").nth(1)
    ladder.scroll_into_view_if_needed()
    box = ladder.bounding_box()
    ladder.click(position={"x": 0.51 * box["width"], "y": 20})
    assert slider(figure, "Group that is drawn").get_attribute("aria-valuetext") == "25 of 48"


def test_the_weight_is_dragged_stepped_and_moved_by_arrows(figures):
    figure = figures("staircase")
    drawing = figure.locator(".mv-drawing")
    drawing.scroll_into_view_if_needed()
    box = drawing.bounding_box()
    mouse = figure.page.mouse
    mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 215)
    mouse.down()
    mouse.move(box["x"] + box["width"] - 10, box["y"] + 215, steps=4)
    mouse.up()
    assert float(tile(figure, "hidden weight")) > 2.3
    assert tile(figure, "gradient that reaches") == "0.00"  # clipped
    figure.get_by_role("button", name="Start again").click()
    slider(figure, "Hidden weight").focus()
    figure.page.keyboard.press("ArrowRight")
    assert float(tile(figure, "hidden weight")) == pytest.approx(0.15)
    figure.get_by_role("button", name="Start again").click()
    for _ in range(2):
        figure.get_by_role("button", name="One step").press("Enter")
    assert tile(figure, "hidden weight") == "0.48"  # as chapter 6 prints for its third step
    figure.get_by_label("the true one").check()
    figure.get_by_role("button", name="One step").click()
    assert tile(figure, "hidden weight") == "0.48"
    figure.get_by_label("straight through").check()


def test_it_plays_and_stops_and_stands_still_for_who_asks(figures):
    figure = figures("staircase")
    figure.get_by_role("button", name="Start again").click()
    figure.get_by_role("button", name="Play").click()
    before = tile(figure, "hidden weight")
    figure.page.wait_for_function(
        "(old) => document.querySelector('.mv-tiles dd').textContent !== old", arg=before
    )
    figure.get_by_role("button", name="Pause").click()
    assert figure.get_by_role("button", name="Play").is_visible()
    figure.page.emulate_media(reduced_motion="reduce")
    figure.get_by_role("button", name="Start again").click()
    figure.get_by_role("button", name="40 steps").click()
    figure.page.wait_for_function(
        "document.querySelector('.mv-report').textContent.includes('Step 40')"
    )
    figure.page.emulate_media(reduced_motion="no-preference")


def test_methods_are_compared_and_tokens_shown(figures):
    figure = figures("recovery")
    study = json.loads((FIGURES / "recovery.json").read_text())
    for bits, rows in study["shares"].items():
        figure.get_by_label(bits, exact=True).check()
        label = figure.locator(".mv-drawing svg").first.get_attribute("aria-label")
        for row in rows:
            value, low, high = (f"{100 * x:.0f}%" for x in row["share"])
            assert f"{row['method']} {value} [{low}, {high}]" in label
    figure.get_by_label("2", exact=True).check()
    figure.get_by_label("with", exact=True).select_option("torchao, teacher")
    figure.page.wait_for_function(
        "document.querySelector('.mv-report').textContent.includes('torchao, teacher by')"
    )
    figure.get_by_label("tokens trained", exact=True).check()
    assert figure.get_by_label("4", exact=True).is_disabled()
    slider(figure, "Tokens trained").focus()
    figure.page.keyboard.press("Home")
    first = study["curves"]["2"]["Learned, labels"][0]
    figure.page.wait_for_function(
        "(text) => document.querySelector('.mv-report').textContent.includes(text)",
        arg=f"{100 * first[1]:.0f}% after {first[0]:,} tokens",
    )
    figure.get_by_label("methods", exact=True).check()


def test_answers_are_those_of_the_file(figures):
    figure = figures("answers")
    data = json.loads((FIGURES / "answers.json").read_text())
    widths = sorted({a["bits"] or 32 for a in data["answers"]}, reverse=True)
    words = {"nearest": "rounded to nearest", "gptq": "rounded by GPTQ"}
    for answer, (i, prompt) in product(data["answers"], enumerate(data["prompts"])):
        figure.get_by_label(prompt).check()
        slider(figure, "Bits of a weight").fill(str(widths.index(answer["bits"] or 32)))
        if answer["bits"]:
            figure.get_by_label(words.get(answer["method"], answer["method"])).check()
        text, ended = answer["said"][i]
        shown = figure.locator(".mv-answer").first.text_content()
        assert shown == text + ("" if ended else " …")
        assert bool(figure.locator(".mv-answer").first.locator("mark").count()) == (
            text != data["answers"][0]["said"][i][0]
            and not data["answers"][0]["said"][i][0].startswith(text)
        )


ROADS = [  # what is answered, and the rows of the table that come out
    ({"What do you have?": "a convolutional network"}, ["1"]),
    ({"How many bits?": "8"}, ["4"]),
    ({"How many bits?": "4"}, ["6"]),
    ({"How many bits?": "4", "How much text to train on?": "none"}, ["5"]),
    ({"How many bits?": "2"}, ["7"]),
    ({"How many bits?": "3", "Memory to train all weights?": "too little"}, ["7", ""]),
    ({"Where will it run?": "where it must be faster", "How many bits?": "4"}, ["2", "6"]),
    ({"Where will it run?": "on an engine that rounds inputs to 8 bits, too", "How many bits?": "2"},
     ["2", "3", "7"]),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "expected"), ROADS)
def test_advice_is_the_tables_and_its_links_lead_to_chapters(figures, site, asked, expected):
    usual = {
        "What do you have?": "a language model", "Where will it run?": "in PyTorch; smaller is enough",
        "How many bits?": "2", "How much text to train on?": "plenty",
        "Memory to train all weights?": "enough",
    }  # fmt: skip
    figure, data = figures("road"), json.loads((FIGURES / "road.json").read_text())
    for question, answer in (usual | asked).items():
        field = figure.get_by_role("group", name=question)
        if field.is_visible():
            field.get_by_label(answer, exact=True).check()
    cards = figure.locator(".mv-road li").all()
    rows = [next(r for r in data["rows"] if r["number"] == number) for number in expected]
    assert len(cards) == len(rows)
    for shown, row in zip(cards, rows, strict=True):
        text = shown.inner_text()
        approach = row["approach"].replace("`", "")
        assert approach[1:] in text
        assert row["why"].replace("`", "") in text
        assert all(sentence in text for sentence in data["evidence"].get(row["number"], []))
        links = [a.get_attribute("href") for a in shown.locator("a").all()]
        assert [link[2:4] for link in links] == row["chapters"]
        assert all((site.folder / link).is_file() for link in links)


@pytest.mark.parametrize("name", NAMES)
def test_it_fits_a_phone_can_be_touched_and_follows_the_theme(figures, name):
    figure = figures(name)
    page = figure.page
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    box = figure.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    small = figure.locator("button, select, input").evaluate_all(
        "(all) => all.filter((e) => { const b = e.getBoundingClientRect();"
        " return b.width && (b.height < 40 || b.width < 40); }).map((e) => e.outerHTML)"
    )
    assert not small
    ground = "(e) => getComputedStyle(e).backgroundColor"
    colours = set()
    for theme in ("light", "dark"):
        page.evaluate("(x) => { document.documentElement.dataset.theme = x }", theme)
        colours.add(figure.evaluate(ground))
    page.evaluate("document.documentElement.dataset.theme = 'light'")
    assert len(colours) == 2


@pytest.mark.parametrize("name", NAMES)
def test_it_is_named_and_says_what_it_shows(figures, name):
    figure = figures(name)
    assert figure.get_attribute("role") == "group"
    title = figure.get_attribute("aria-labelledby")
    assert len(figure.page.locator(f"#{title}").inner_text()) > 10
    assert figure.locator("[aria-live]").count() == 1
    assert figure.locator("img").count() == 0
    unnamed = figure.locator(".mv-drawing svg").evaluate_all(
        "(all) => all.filter((e) => (e.getAttribute('aria-label') ?? '').length < 20).length"
    )
    assert unnamed == 0


@pytest.mark.parametrize("name", NAMES)
def test_without_scripts_there_is_a_still_image(tab, site, name):
    page = tab(390, java_script_enabled=False)
    open_lightly(page, page_of(site.folder, name))
    still = page.locator(f"[data-figure={name}] > img")
    still.scroll_into_view_if_needed()
    assert still.is_visible()
    box = still.bounding_box()
    assert box["width"] > 250
    assert box["height"] > 150
    assert len(still.get_attribute("alt")) > 60
    text = (FIGURES / f"{name}.svg").read_text()
    assert not re.search(r"<script|href=|url\(|var\(|foreignObject", text)


def test_a_page_opened_from_its_folder_moves_too(browser, site):
    page = browser.new_page()
    open_lightly(page, (site.folder / page_of(site.folder, "grid")).as_uri())
    assert tile(page.locator("[data-figure=grid]"), "error of the row").endswith("%")
    page.close()


@pytest.mark.parametrize("name", BY_SCRIPT)
def test_stills_are_what_the_figures_draw(browser, site, name):
    page = browser.new_page(base_url=site.address, viewport={"width": 390, "height": 844})
    open_lightly(page, page_of(site.folder, name))
    assert drawn(page, name) == (FIGURES / f"{name}.svg").read_text()
    page.close()


@pytest.mark.parametrize("name", IN_WORDS)
def test_stills_in_words_are_those_of_their_data(name):
    assert IN_WORDS[name]() == (FIGURES / f"{name}.svg").read_text()


def test_pages_without_a_figure_load_nothing_of_it(site):
    for path in site.pages:
        text = (site.folder / path).read_text()
        asked = set(re.findall(r'data-figure="([\w-]+)"', text))
        loaded = set(re.findall(r'src="[^"]*moving/([\w-]+)\.js', text))
        assert loaded == (asked | {"moving"} if asked else set()), path
        assert ("moving.css" in text) == bool(asked), path
