"""The page of formulas and the five steps: what they show runs."""

import os
import re
import subprocess
import sys

from companion import load_quantized
from companion.cli.app import app
from tests.book.notebooks import BOOK

PAGE = (BOOK / "one_page.md").read_text()
SCRIPT = BOOK / "_static" / "five_steps.py"


def test_the_calls_of_the_one_page_run(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "one_page.md", "exec"), {})
    value, low, high, n = map(float, capsys.readouterr().out.split())
    assert low < value < high
    assert n == 20
    assert {"small", "small.onnx"} <= {path.name for path in tmp_path.iterdir()}
    assert max(map(len, code.splitlines())) <= 58  # a column on paper


def test_the_commands_are_those_there_are():
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    named = set(re.findall(r"companion (\w+)", PAGE)) - {"import"}
    assert named <= known
    assert {"finetune", "export", "parity"} <= named


def test_the_five_steps_stand_on_their_page_and_run(tmp_path):
    assert "```{literalinclude} _static/five_steps.py\n" in (BOOK / "five_steps.md").read_text()
    code = SCRIPT.read_text()
    assert [int(n) for n in re.findall(r"^# (\d)\.", code, flags=re.M)] == [1, 2, 3, 4, 5]
    run = subprocess.run(
        [sys.executable, SCRIPT], capture_output=True, text=True, cwd=tmp_path, timeout=300,
        env=os.environ | {"PYTHONPATH": str(BOOK.parent), "TQDM_DISABLE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = dict(re.findall(r"^(\w+) +perplexity ([\d.]+)", run.stdout, flags=re.M))
    # trained under rounding beats rounding, and stays above the float model
    assert float(found["float"]) < float(found["trained"]) < float(found["rounded"])
    assert load_quantized(tmp_path / "five-steps-w2").quantization.scheme.weight_bits == 2
