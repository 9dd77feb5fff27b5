"""The doctor reports what is there, and fails only on what is required."""

import re
from types import SimpleNamespace

import torch
from typer.testing import CliRunner

from companion.cli import app as cli
from companion.cli import doctor

runner = CliRunner()


def test_doctor_prints_one_line_per_check_and_passes_here():
    result = runner.invoke(cli.app, ["doctor"])
    assert result.exit_code == 0, result.output
    lines = result.output.strip().splitlines()
    assert all(line.startswith(("OK  ", "FAIL")) for line in lines)
    named = " ".join(lines)
    for what in ("python", "torch", "threads", "quantized engines", "digits", "ImageNet"):
        assert what in named
    # tests run without a network: the source is reported, and does not fail the check
    assert re.search(r"^FAIL ImageNet.*\(optional\)$", result.output, flags=re.M)


def test_doctor_fails_on_a_missing_engine(monkeypatch):
    monkeypatch.setattr(torch.backends, "quantized", SimpleNamespace(supported_engines=["none"]))
    result = runner.invoke(cli.app, ["doctor", "--no-network"])
    assert result.exit_code == 1
    assert "FAIL quantized engines: none in this build" in result.output
    assert "ImageNet" not in result.output


def test_doctor_survives_a_missing_package(monkeypatch):
    monkeypatch.setitem(doctor.TESTED, "no-such-package", "1.0")
    result = runner.invoke(cli.app, ["doctor", "--no-network"])
    assert result.exit_code == 0
    assert "FAIL no-such-package" in result.output
