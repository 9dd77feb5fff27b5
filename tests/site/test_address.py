"""The repository's address: one setting, and what follows from it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
ADDRESS = "https://github.com/emerald/city"


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Return what builds two pages of the book, with its own configuration, at an address."""

    def at(setting: str, variable: str = "") -> dict[str, str]:
        root = tmp_path_factory.mktemp("book")
        (root / "book").mkdir()
        config = yaml.safe_load((ROOT / "_config.yml").read_text())
        assert config["repository"]["url"] == "", "the checkout itself promises no address"
        config["repository"]["url"] = setting
        (root / "_config.yml").write_text(yaml.safe_dump(config))
        for name in ("_ext", "_static", "_quizzes"):
            shutil.copytree(ROOT / "book" / name, root / "book" / name)
        shutil.copy(ROOT / "book" / "references.bib", root / "book")
        intro = "# Welcome\n\nWords. {cite:t}`baum1900`\n\n{{ colab }}\n\n```{bibliography}\n```\n"
        (root / "book" / "intro.md").write_text(intro)
        shutil.copy(ROOT / "book" / "ch04_integer_grid.ipynb", root / "book" / "ch04.ipynb")
        toc = {"format": "jb-book", "root": "intro", "chapters": [{"file": "ch04"}]}
        (root / "book" / "_toc.yml").write_text(yaml.safe_dump(toc))
        command = [str(Path(sys.executable).parent / "jupyter-book"), "build", "book/", "-q"]
        environment = {**os.environ, "COURSE_REPOSITORY": variable}
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return {p.stem: p.read_text() for p in (root / "_build" / "html").glob("*.html")}

    return at


def test_an_address_gives_every_button_and_tag_its_place(build):
    pages = build(ADDRESS)
    chapter = pages["ch04"]
    for link in (
        f'"{ADDRESS}"',
        f'"{ADDRESS}/issues/new',
        "https://mybinder.org/v2/gh/emerald/city/main?urlpath=lab/tree/book/ch04.ipynb",
        "https://colab.research.google.com/github/emerald/city/blob/main/book/ch04.ipynb",
        '<meta property="og:url" content="https://emerald.github.io/city/ch04.html" />',
        '"og:image" content="https://emerald.github.io/city/_static/cover.png"',
        '<link rel="canonical" href="https://emerald.github.io/city/ch04.html"',
    ):
        assert link in chapter, link
    assert f"git+{ADDRESS}" in pages["intro"]


def test_the_variable_goes_first(build):
    pages = build("", ADDRESS + ".git")
    assert f'"{ADDRESS}/issues/new' in pages["ch04"]
    assert "https://emerald.github.io/city/" in pages["ch04"]


def test_no_address_gives_no_button_and_no_promise(build):
    pages = build("")
    for name, text in pages.items():
        for word in ("mybinder", "colab", "issues/new", "fa-rocket", "fa-github", "og:url"):
            assert word not in text, (name, word)
        assert 'rel="canonical"' not in text
        assert not re.search(r'property="og:\w+" content="http', text)
    assert '"og:image" content="_static/cover.png"' in pages["ch04"]


@pytest.mark.parametrize("url", ["emerald/city", "https://github.com/emerald", "http://x.y/a/b"])
def test_what_is_no_address_is_refused(url, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "book" / "_ext")
    from course_site.address import site_of
    from sphinx.errors import ConfigError

    with pytest.raises(ConfigError, match="https://host/owner/name"):
        site_of(url)


@pytest.mark.parametrize(
    ("url", "site"),
    [
        (ADDRESS, "https://emerald.github.io/city/"),
        ("https://github.com/Emerald/emerald.github.io", "https://emerald.github.io/"),
        ("https://gitlab.com/emerald/city", "https://emerald.gitlab.io/city/"),
        ("https://git.example.org/emerald/city", ""),
    ],
)
def test_the_site_lies_where_its_host_serves_pages(url, site, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "book" / "_ext")
    from course_site.address import site_of

    assert site_of(url) == site
