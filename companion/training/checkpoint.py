"""Checkpoints without pickle: tensors as safetensors, the rest as JSON in the file's header.

One file, replaced atomically, so that a
process killed at any moment leaves a complete checkpoint behind. Used by `fit`.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from companion.errors import CheckpointError
from companion.files import write_atomically

CHECKPOINT = "checkpoint.safetensors"


def write_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    run: dict,
    history: dict[str, list],
    best: dict[str, Tensor] | None = None,
) -> None:
    """Write the state of a run to one file, replacing an older one atomically.

    Parameters
    ----------
    path : Path
    model, optimizer
        Their state dicts are saved; the random generators' states are added.
    step : int
        Optimizer steps done.
    run : dict
        What must be the same for a run to be continued; JSON values.
    history : dict of lists
    best : dict of Tensor, optional
        Weights that did best in validation.

    Examples
    --------
    >>> import tempfile
    >>> model = nn.Linear(1, 1)
    >>> path = Path(tempfile.mkdtemp(), CHECKPOINT)
    >>> write_checkpoint(path, model, torch.optim.SGD(model.parameters()), 3, {"seed": 0}, {})
    >>> read_checkpoint(path, {"seed": 0})["step"]
    3
    """
    state = optimizer.state_dict()
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    tensors |= {f"best.{key}": value for key, value in (best or {}).items()}
    scalars: dict[str, dict] = {}
    for index, entry in state["state"].items():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                scalars.setdefault(str(index), {})[key] = value
    rng_tensors, rng_rest = _get_rng()
    tensors |= {f"rng.{key}": value for key, value in rng_tensors.items()}
    meta = {
        "run": run,
        "step": step,
        "history": history,
        "param_groups": state["param_groups"],
        "optimizer_scalars": scalars,
        "rng": rng_rest,
    }
    # clone: tied weights share memory, which the format refuses
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    metadata = {"companion": json.dumps(meta)}
    write_atomically(path, lambda partial: save_file(tensors, partial, metadata=metadata))


def read_checkpoint(path: Path, run: dict) -> dict:
    """Read what `write_checkpoint` wrote, and refuse another run's or a damaged file.

    Parameters
    ----------
    path : Path
    run : dict
        The run to be continued; it must equal the one in the file.

    Returns
    -------
    dict
        ``step``, ``history``, ``model``, ``best``, ``optimizer`` and ``rng`` (for `set_rng`).

    Raises
    ------
    CheckpointError
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads(file.metadata()["companion"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise CheckpointError(f"{path} is not a readable checkpoint ({error}): delete it") from None
    if meta["run"] != run:
        differ = ", ".join(f"{k}: {meta['run'][k]} there, {run[k]} here" for k in run
                           if meta["run"][k] != run[k])  # fmt: skip
        raise CheckpointError(
            f"{path} is of another run ({differ}): use its values or a new folder"
        )
    parts: dict[str, dict] = {"model": {}, "best": {}, "optimizer": {}, "rng": {}}
    for key, value in tensors.items():
        part, name = key.split(".", 1)
        parts[part][name] = value
    state = {int(index): dict(entry) for index, entry in meta["optimizer_scalars"].items()}
    for key, value in parts["optimizer"].items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {
        "step": meta["step"],
        "history": meta["history"],
        "model": parts["model"],
        "best": parts["best"],
        "optimizer": {"state": state, "param_groups": meta["param_groups"]},
        "rng": (parts["rng"], meta["rng"]),
    }


def _get_rng() -> tuple[dict[str, Tensor], dict]:
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(keys.astype(np.int64))}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors, {"numpy": [kind, position, has_gauss, gauss], "python": random.getstate()}


def set_rng(saved: tuple[dict[str, Tensor], dict]) -> None:
    """Put the random generators of torch, numpy and Python back as they were saved."""
    tensors, rest = saved
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    kind, *tail = rest["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), *tail))
    version, state, gauss = rest["python"]
    random.setstate((version, tuple(state), gauss))
