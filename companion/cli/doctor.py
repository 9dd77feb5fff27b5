"""What this machine has: versions, threads, quantized engines, sources of weights.

`torch.utils.collect_env` and `transformers env` list what is installed; these checks say whether
what the course needs of it works, and what to do if not. Built in chapter 1.
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

from companion.course.sources import MINILM, find

TESTED = {
    "torch": "2.14.1",
    "torchvision": "0.29.1",
    "transformers": "5.23.0",
    "torchao": "0.18.0",
}
Check = tuple[str, bool, str, bool]  # what, passed, detail, required


def checks(network: bool = True) -> Iterator[Check]:
    """Yield each check's name, outcome, what was found or what to do, and whether it matters.

    Parameters
    ----------
    network : bool
        Also try to reach what must be downloaded.

    Yields
    ------
    tuple of (str, bool, str, bool)

    Examples
    --------
    >>> next(checks(network=False))[0]
    'python'
    """
    yield "python", sys.version_info >= (3, 11), f"{platform.python_version()} (3.11+)", True
    for name, version in TESTED.items():
        yield _guard(name, lambda n=name, v=version: _version(n, v), required=name == "torch")
    yield _guard("threads", _threads)
    yield _guard("quantized engines", _engines)
    yield _guard("onnxruntime", lambda: _package("onnxruntime"), required=False)
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
