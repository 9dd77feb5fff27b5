"""The command line: ``companion`` or ``python -m companion``.

Floor 13 of the house.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import sys
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from companion.sources import MINILM, find

app = typer.Typer(
    help="Quantization-aware fine-tuning in PyTorch: the companion of the course.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

TESTED = {
    "torch": "2.14.1",
    "torchvision": "0.29.1",
    "transformers": "5.23.0",
    "torchao": "0.18.0",
}
Check = tuple[str, bool, str, bool]  # what, passed, detail, required


@app.command()
def doctor(
    network: bool = typer.Option(True, help="Also try to reach the sources of weights."),
) -> None:
    """Check this machine: versions, threads, quantized engines, sources of weights.

    One OK or FAIL line each. The exit code is 1 only if something required fails; sources
    that cannot be reached have a stand-in, and are marked optional.

    Example: python -m companion doctor --no-network
    """
    failed = False
    for what, passed, detail, required in checks(network):
        mark = "OK  " if passed else "FAIL"
        typer.echo(f"{mark} {what}: {detail}{'' if required or passed else ' (optional)'}")
        failed |= required and not passed
    raise typer.Exit(code=int(failed))


@app.command()
def pretrain(
    folder: Annotated[Path, typer.Argument(help="Where the model is written.")] = Path("docs-lm"),
    steps: int = typer.Option(6000, min=1, help="Optimizer steps."),
    batch_size: int = typer.Option(8, min=1, help="Rows of 256 tokens in a step."),
    seed: int = typer.Option(0, help="Decides the weights drawn and the order of the data."),
    bfloat16: bool = typer.Option(False, help="Mixed precision, faster on CPUs that have it."),
) -> None:
    """Pre-train docs-lm, the small language model of the course, and write it with its card.

    Reads the docstrings of the installed packages; takes about half an hour on two cores.
    Interrupted, the same command goes on from the last checkpoint.

    Example: python -m companion pretrain my-docs-lm --steps 500
    """
    from companion.pretrain import pretrain as run

    try:
        report = run(folder, steps=steps, batch_size=batch_size, seed=seed, bfloat16=bfloat16)
    except (RuntimeError, ValueError) as error:
        typer.echo(f"pretrain: {error}", err=True)
        raise typer.Exit(code=1) from None
    test, trigram = report["test_perplexity"], report["trigram_perplexity"]
    typer.echo(f"held-out perplexity {test['value']:.2f}, of a trigram {trigram['value']:.2f}")
    typer.echo(f"written to {folder}: model, tokenizer, README.md with the curve")


def checks(network: bool = True) -> Iterator[Check]:
    """Yield each check's name, outcome, what was found or what to do, and whether it matters."""
    yield "python", sys.version_info >= (3, 11), f"{platform.python_version()} (3.11+)", True
    for name, version in TESTED.items():
        yield _guard(name, lambda n=name, v=version: _version(n, v), required=name == "torch")
    yield _guard("threads", _threads)
    yield _guard("quantized engines", _engines)
    yield _guard("torch.ao.quantization", _classic_road, required=False)
    yield _guard("digits (scikit-learn)", lambda: _package("scikit-learn"), required=False)
    yield _guard("docs-lm", lambda: _weights("docs-lm"), required=False)
    yield _guard("MiniLM", lambda: _weights(MINILM), required=False)
    if network:
        yield _guard("ImageNet weights (torchvision)", _imagenet, required=False)


def _guard(name: str, probe: Callable[[], str], required: bool = True) -> Check:
    try:
        return name, True, probe(), required
    except Exception as error:
        return name, False, str(error).split("\n")[0] or type(error).__name__, required


def _version(name: str, tested: str) -> str:
    found = importlib.metadata.version(name).split("+")[0]
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao, when imported
    __import__(name)
    return found if found == tested else f"{found} (the book is checked with {tested})"


def _package(name: str) -> str:
    return importlib.metadata.version(name)


def _weights(name: str) -> str:
    return f"weights verified, from {find(name)[1]}"


def _threads() -> str:
    import torch

    return f"{torch.get_num_threads()} of {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def _engines() -> str:
    import torch

    engines = [e for e in torch.backends.quantized.supported_engines if e != "none"]
    if not engines:
        raise RuntimeError("none in this build of PyTorch: convert() will not run")
    return ", ".join(engines)


def _classic_road() -> str:
    if find_spec("torch.ao.quantization") is None:
        raise RuntimeError("removed from this PyTorch: chapters 1 and 3 to 7 need torch 2.14")
    return "present"


def _imagenet() -> str:
    from torchvision.models import ResNet18_Weights

    request = urllib.request.Request(ResNet18_Weights.DEFAULT.url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=5):
            return "reachable"
    except OSError as error:
        raise RuntimeError(
            f"not reachable ({error}); load_pretrained uses the digits stand-in"
        ) from None
