"""What the two wheels hold: the package for everybody, and docs-lm's weights on their own."""

import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WEIGHTS = "companion/course/assets/docs-lm/"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> tuple[Path, Path]:
    """Both distributions, built offline from a copy: building leaves folders behind."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    shutil.copytree(ROOT / "companion", copy / "companion", ignore=ignored)
    (copy / "tests").mkdir()
    (copy / "tests" / "__init__.py").touch()
    for source in (copy, copy / "companion" / "course" / "assets"):
        subprocess.run(
            [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps",
             "--no-index", "--disable-pip-version-check", "--wheel-dir", str(out), str(source)],
            check=True,
        )  # fmt: skip
    (package,) = out.glob("companion-*.whl")
    (course,) = out.glob("companion_course-*.whl")
    return package, course


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def metadata(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_the_package_is_small_typed_and_whole(wheels):
    package, _ = wheels
    held = names(package)
    assert package.stat().st_size < 1e6
    assert "companion/py.typed" in held
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "companion").rglob("*.py")}
    assert {name for name in held if name.endswith(".py")} == sources
    rooms = {
        path.name for path in (ROOT / "companion").iterdir() if (path / "__init__.py").exists()
    }
    initial = {name.split("/")[1] for name in held if name.count("/") == 2 and "__init__" in name}
    assert rooms == initial
    assert not any(name.startswith((WEIGHTS, "tests")) for name in held)


def test_docs_lm_comes_on_its_own_to_the_place_where_it_is_looked_for(wheels):
    package, course = wheels
    shipped = {f"{WEIGHTS}{path.name}" for path in (ROOT / WEIGHTS).iterdir()}
    assert f"{WEIGHTS}model.safetensors" in shipped
    assert shipped == {name for name in names(course) if not name.startswith("companion_course-")}
    assert not shipped & names(package)


def test_the_extra_asks_for_the_weights_in_the_version_there_is(wheels):
    package, course = map(metadata, wheels)
    assert package["Version"] == course["Version"]
    wanted = [
        line for line in package.get_all("Requires-Dist") if line.startswith("companion-course")
    ]
    (line,) = wanted
    assert line.startswith(f"companion-course=={course['Version']}")
    assert "course" in line.split(";")[1]


def test_the_base_asks_for_four_packages(wheels):
    base = [line for line in metadata(wheels[0]).get_all("Requires-Dist") if ";" not in line]
    assert sorted(line.split(">=")[0] for line in base) == ["numpy", "safetensors", "torch", "tqdm"]
