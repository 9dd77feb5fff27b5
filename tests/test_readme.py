"""What the README shows is what runs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from companion import load_pretrained, load_quantized
from companion.cli.app import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_snippets_run_and_print_what_they_say(capsys, tmp_path, monkeypatch):
    images, language, served = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert max(len(code.strip().splitlines()) for code in (images, language, served)) <= 12
    monkeypatch.chdir(tmp_path)
    exec(compile(images, "README.md", "exec"), {})
    accuracy, share = re.search(
        r"(0\.\d+) \[.*\] \(n = 596\) (0\.\d+)", capsys.readouterr().out
    ).groups()
    assert float(accuracy) > 0.6
    assert 0.25 < float(share) < 0.27
    names: dict = {}
    exec(compile(language, "README.md", "exec"), names)
    value = float(re.match(r"(\d+\.\d+) \[", capsys.readouterr().out).group(1))
    assert value < names["perplexity"](load_pretrained("docs-lm"), names["task"].test).value
    again = load_quantized(tmp_path / "my-model-w2")
    assert names["perplexity"](again, names["task"].test).value == pytest.approx(value, abs=1e-3)
    exec(compile(served, "README.md", "exec"), names)
    assert re.fullmatch(r"\[(\d+, )*\d+\]\n", capsys.readouterr().out)
    assert (tmp_path / "served" / "model.onnx").exists()


def test_commands_and_figures_are_those_there_are():
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert set(re.findall(r"^\$? ?companion (\w+)", README, flags=re.M)) <= known
    assert re.search(r"`companion finetune`", README)
    results = json.loads((ROOT / "benchmarks" / "results" / "deployed_speed.json").read_text())
    rows = {(r["engine"], r["precision"], r["phase"], r["tokens"]): r for r in results["records"]}
    token = rows["ONNX Runtime", "int4 level 4", "decode", 1]
    prompt = rows["ONNX Runtime", "int8 W8A8", "prefill", 64]
    share = token["bytes"] / rows["torch", "float32", "decode", 1]["bytes"]
    assert 7 < token["ratio_to_torch_float32"] < 9  # "an eighth"
    ort = rows["ONNX Runtime", "float32", "decode", 1]
    assert 2.4 < ort["ratio_to_torch_float32"] < 2.9  # "three eighths"
    llama = rows["llama.cpp", "Q4_1", "decode", 1]
    assert 0.45 < token["ms"] / llama["ms"] < 0.65  # "little more than half"
    assert prompt["ratio_to_torch_float32"] > 5  # "less than a fifth"
    assert prompt["text"]["loss_difference"][1] > 0.5
    assert f"{prompt['text']['loss_difference'][0]:.1f} nats" in README
    assert f"{share:.3f}" in README


def test_the_cost_of_a_step_is_that_of_the_file():
    results = json.loads((ROOT / "benchmarks" / "results" / "step_cost.json").read_text())
    short, long = (
        next(r for r in results["records"] if (r["row"], r["scheme"]) == (row, "W4"))
        for row in ("SmolLM2-135M, 128 tokens", "SmolLM2-135M, 512 tokens")
    )
    flat = " ".join(README.split())
    absmax, learned, torchao = (
        tuple(f"{r['ratio'][arm]:.2f}" for r in (short, long))
        for arm in ("absmax", "lsq", "torchao")
    )
    assert f"takes {absmax[0]} times" in flat
    assert f"{absmax[1]} times for 512" in flat
    assert f"learned ranges: {' and '.join(learned)}; torchao: {' and '.join(torchao)}" in flat
    peak = {arm: round(short["peak MB"][arm]) for arm in ("float", "absmax", "torchao")}
    assert f"{peak['absmax']} MB beyond the weights" in flat
    assert f"takes {peak['float']} and torchao {peak['torchao']}" in flat


def test_named_files_exist_and_chapters_are_listed():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in link:
            assert (ROOT / link).exists(), link
    for notebook in (ROOT / "book").glob("ch*.ipynb"):
        assert notebook.name in README


def test_make_targets_are_the_documented_ones():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):.*##", makefile, flags=re.M))
    assert targets == {"help", "book", "pdf", "test", "lab", "notebooks", "clean"}
    for target in re.findall(r"`make (\w+)`", README):
        assert target in targets


@pytest.mark.skipif(sys.platform == "win32", reason="make is not used on Windows")
def test_make_without_a_target_helps():
    run = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "make test" in run.stdout or "test" in run.stdout
    assert len(run.stdout.splitlines()) >= 6
