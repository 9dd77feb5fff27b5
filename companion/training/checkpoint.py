"""Checkpoints without pickle: tensors as safetensors, the rest as JSON in the file's header.

One file, replaced atomically, so that a process killed at any moment leaves a complete checkpoint
behind. Used by `fit`; built in chapter 2.
"""

from __future__ import annotations

import json
import operator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from companion.errors import CheckpointError, readable
from companion.files import BLANK, is_sealed, seal, write_atomically
from companion.training.batches import Stream
from companion.training.fingerprint import differences
from companion.training.state import get_rng

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
    >>> read_checkpoint(path)["step"]
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
    rng_tensors, rng_rest = get_rng()
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
    metadata = {"companion": json.dumps(meta), "sha256": BLANK}

    def write(partial: Path) -> None:
        save_file(tensors, partial, metadata=metadata)
        seal(partial)

    write_atomically(path, write)


def read_checkpoint(path: Path) -> dict:
    """Read what `write_checkpoint` wrote.

    Parameters
    ----------
    path : Path

    Returns
    -------
    dict
        ``step``, ``run``, ``history``, ``model``, ``best``, ``optimizer`` and ``rng`` (for `set_rng`).

    Raises
    ------
    CheckpointError
        If the file is damaged, or something else.
    """
    with readable(path, "delete it", CheckpointError):
        if is_sealed(path) is False:
            raise CheckpointError(
                f"{path} is not the checkpoint that was written (its hash differs): delete it"
            )
        return _read(path)


def _read(path: Path) -> dict:
    with safe_open(path, framework="pt") as file:
        meta = json.loads(file.metadata()["companion"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    parts: dict[str, dict] = {"model": {}, "best": {}, "optimizer": {}, "rng": {}}
    for key, value in tensors.items():
        part, name = key.split(".", 1)
        parts[part][name] = value
    state = {int(index): dict(entry) for index, entry in meta["optimizer_scalars"].items()}
    for key, value in parts["optimizer"].items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    for value in (meta["run"], meta["history"], *meta["param_groups"]):
        dict(value)  # TypeError where it is something else
    return {
        "step": operator.index(meta["step"]),
        "run": meta["run"],
        "history": meta["history"],
        "model": parts["model"],
        "best": parts["best"],
        "optimizer": {"state": state, "param_groups": meta["param_groups"]},
        "rng": (parts["rng"], meta["rng"]),
    }


@dataclass
class Keeper:
    """Keeps the checkpoint of one run in a folder, and takes no other run's for it.

    Parameters
    ----------
    folder : path
    run : dict
        What must be the same for a run to be continued; JSON values.
    stream : Stream
        Of the run; its first batch must be the same, too.
    """

    folder: str | Path
    run: dict
    stream: Stream

    @property
    def path(self) -> Path:
        return Path(self.folder) / CHECKPOINT

    def open(self, resume: bool, accumulate: int) -> dict | None:
        """Return the saved state to be continued, if any; its batches have been drawn then.

        Raises
        ------
        CheckpointError
            If the folder holds a run that was not to be continued, or another one.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)  # not first after hours
        except OSError as error:
            raise CheckpointError(
                f"{self.folder} cannot be a folder ({error}): name another"
            ) from None
        if not self.path.exists():
            return None
        if not resume:
            raise CheckpointError(
                f"{self.path} already holds a run: pass resume=True to continue it, or another "
                "folder"
            )
        saved = read_checkpoint(self.path)
        first = saved["run"].pop("first batch", None)
        self._compare(saved["run"], self.run)
        self.stream.skip(saved["step"] * accumulate)
        self._compare({"first batch": first}, {"first batch": self.stream.first})
        return saved

    def write(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        step: int,
        history: dict[str, list],
        best: dict[str, Tensor],
    ) -> None:
        """Replace the checkpoint by one of this moment."""
        run = self.run | {"first batch": self.stream.first}
        write_checkpoint(self.path, model, optimizer, step, run, history, best)

    def _compare(self, there: dict, here: dict) -> None:
        differ = differences(there, here)
        if differ:
            more = f", and {len(differ) - 6} more" if len(differ) > 6 else ""
            raise CheckpointError(
                f"{self.path} is of another run ({', '.join(differ[:6])}{more}): use its values or a "
                "new folder"
            )
