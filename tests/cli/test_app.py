"""The command line, from a text of one's own to a served model; bad input gives one line."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from companion.cli import app as cli

runner = CliRunner()


def run(*arguments) -> str:
    result = runner.invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model fine-tuned on a text file, for two steps."""
    folder = tmp_path_factory.mktemp("cli")
    paragraphs = [f"Paragraph {i} says that the scale of a group is {i} steps." for i in range(60)]
    (folder / "notes.txt").write_text("\n\n".join(paragraphs))
    text = run("finetune", "docs-lm", "--task", folder / "notes.txt", "--scheme", "W2-row",
               "--steps", 2, "--method", "lsq", "--out", folder / "out")  # fmt: skip
    (folder / "said.txt").write_text(text)
    return folder


def test_finetune_prints_the_table_and_keeps_the_models(folder):
    head, columns, *rows, last = (folder / "said.txt").read_text().strip().splitlines()
    assert "loss (lower is better), 2 steps, 1 seed" in head
    assert columns.split() == ["scheme", "method", "value", "recovered", "MB"]
    assert [row.split()[:2] for row in rows] == [["float", "float"], ["W2", "row"], ["W2", "row"]]
    assert last == f"written to {folder / 'out'}: results.json and the quantized models"
    kept = {path.name for path in (folder / "out").iterdir()}
    assert kept == {"W2-row-lsq", "W2-row-nearest", "results.json", "log.json"}


def test_from_fine_tuned_to_served(folder):
    model, file = folder / "out" / "W2-row-lsq", folder / "served" / "model.onnx"
    assert "MB" in run("export", model, file)
    before, after = (
        run("evaluate", m, "--task", folder / "notes.txt").split() for m in (model, file)
    )
    assert before[0] == after[0] == "loss:"
    assert abs(float(before[1]) - float(after[1])) < 0.05
    text = run("generate", file, "Paragraph 3", "--max-new-tokens", 5)
    assert text.startswith("Paragraph 3")
    assert len(text) > len("Paragraph 3") + 3
    first, second = run(
        "bench", model, file, "--prompt", 8, "--tokens", 3, "--rounds", 1
    ).splitlines()
    assert first.startswith(f"{model}: prompt ")
    assert "(1.0x)" in first
    assert second.startswith(f"{file}: prompt ")


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["finetune", "--scheme", "W9"], "scheme 'W9' is unknown: write W4"),
        (["finetune", "--method", "magic"], "method 'magic' is unknown: choose from"),
        (["finetune", "--task", "no.txt"], "task 'no.txt' is unknown: choose one of"),
        (["finetune", "./no-model"], "./no-model"),
        (["evaluate", "no.onnx"], "no.onnx"),
        (["export", "docs-lm", "a.onnx"], "finetune makes one"),
        (["generate", "no.onnx", "a"], "no.onnx is missing"),
        (["bench", "./no-model"], "./no-model"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_bad_input_gives_one_line(arguments, remedy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(cli.app, arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"{arguments[0]}: ")
    assert remedy in line
    assert not list(tmp_path.rglob("*.onnx"))


def test_an_empty_file_gives_one_line(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    result = runner.invoke(cli.app, ["finetune", "--task", str(tmp_path / "empty.txt"),
                                     "--out", str(tmp_path / "out")])  # fmt: skip
    assert result.exit_code == 1
    assert "empty.txt" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("command", ["finetune", "evaluate", "export", "generate", "bench"])
def test_every_command_shows_an_example(command):
    assert "Example" in run(command, "--help")


@pytest.mark.parametrize("command", [[sys.executable, "-m", "companion"], ["companion"]])
def test_both_commands_exist_and_help(command):
    if command == ["companion"]:
        command = [str(Path(sys.executable).with_name("companion"))]
    run = subprocess.run([*command, "doctor", "--help"], capture_output=True, text=True, check=True)
    assert "One OK or FAIL line each" in run.stdout
    assert "Example" in run.stdout
