"""The runs of a comparison: each is done once, logged, and found again after an interruption.

Built in chapter 11.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from torch import nn
from tqdm import tqdm

import companion  # its face knows the names of models and tasks; the course stands above
from companion.errors import CheckpointError
from companion.evaluation.cost import model_bytes
from companion.evaluation.language import document_losses
from companion.evaluation.metrics import METRICS
from companion.files import BLANK, is_sealed, read_json, seal, write_atomically
from companion.numerics.scheme import QuantScheme
from companion.qat.saved import keep_types
from companion.study.fingerprint import fingerprint, of_task
from companion.study.recipes import FLOAT, Arm
from companion.study.tables import scheme_name
from companion.training.batches import batches
from companion.training.fit import fit
from companion.training.losses import default_loss, distillation_loss

TUNING_SEED = 100
SEAL = "sha256"
MARK = "run.json"
"""Beside a kept model: the key of its run in the log."""


class Log:
    """Results kept on disk as they come, so that an interrupted study goes on where it was.

    Parameters
    ----------
    path : path, optional
        A JSON file; None keeps them in memory only.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.results: dict[str, Any] = {}
        if self.path is not None and self.path.exists():
            remedy = "give another path, or delete it to begin anew"
            if is_sealed(self.path) is False:
                raise CheckpointError(
                    f"{self.path} is not the log that was written (its hash differs): {remedy}"
                )
            try:
                self.results = _results(self.path)
            except (ValueError, TypeError, KeyError):
                raise CheckpointError(f"{self.path} is no log of a comparison: {remedy}") from None

    def get(self, key: str, run: Callable[[], Any]) -> Any:
        """Return the stored result of a key, or run for it and store it."""
        if key not in self.results:
            self.results[key] = run()
            if self.path is not None:
                text = json.dumps({SEAL: BLANK, **self.results})

                def write(partial: Path) -> None:
                    partial.write_text(text)
                    seal(partial)

                write_atomically(self.path, write)
        return self.results[key]


def _results(path: Path) -> dict[str, Any]:
    """Read a log: numbers, and runs with what a table asks of them."""
    found = dict(read_json(path))
    found.pop(SEAL, None)
    for key, said in found.items():
        if key.endswith("| cost") or not isinstance(said, dict):
            float(said)
        else:
            json.dumps([said["comparison"], said["recipe"]])
            float(said["validation_loss"])
    return found


class Runs:
    """The runs of one comparison: each is done once, and found again in the log.

    Parameters
    ----------
    model, task, steps, skip, progress, models, embeddings
        As in `companion.compare`.
    log : Log
    """

    def __init__(
        self, model, task, steps: int, skip: tuple, log: Log, progress: bool,
        models: str | Path | None = None, embeddings: bool = False,
    ) -> None:  # fmt: skip
        self.task = companion.load_task(task) if isinstance(task, str) else task
        self.start = companion.load_pretrained(model) if isinstance(model, str) else model
        known = getattr(self.start, "provenance", type(self.start).__name__)
        self.name = known.split(": ")[0]
        self.steps, self.skip, self.log, self.progress = steps, skip, log, progress
        self.embeddings = embeddings
        self.models = None if models is None else Path(models)
        self.bar: tqdm | None = None
        self.comparison = fingerprint(
            _versions(self.start), self.start, of_task(self.task), self.skip, embeddings
        )
        self.arms: dict[int, tuple[Arm, str]] = {}  # hashed once: what an arm encloses may change
        self.floats: dict[tuple, nn.Module] = {}  # float phases that several arms share

    def tune(self, arm: Arm, scheme, rates: Sequence[float], steps: int, chosen: dict) -> float:
        """Return the rate with the lowest validation loss."""
        found = {}
        for rate in rates:
            found[rate] = self.get(arm, scheme, TUNING_SEED, steps, rate, chosen, test=False)
            self.bar.update()
        return min(found, key=lambda rate: found[rate]["validation_loss"])

    def run(self, arm: Arm, scheme, seed: int, chosen: dict) -> dict:
        """Train an arm and measure it on the test split."""
        if arm is FLOAT:
            self.floats.clear()  # of the seed before
        rate = chosen["float" if arm.float_share == 1 else rate_key(arm, scheme)]
        result = self.get(arm, scheme, seed, self.steps, rate, chosen, test=True)
        self.bar.update()
        return result

    def get(self, arm, scheme, seed, steps, rate, chosen, test: bool) -> dict:
        """Return one run from the log, or do it; `test` says on which split it is measured."""
        float_rate = chosen.get("float") if arm.float_share else None
        recipe = fingerprint(self.comparison, self._arm(arm), scheme, rate, float_rate, steps)
        key = " | ".join(map(str, (
            self.name, self.task.name, scheme_name(scheme), arm.name, f"seed {seed}",
            f"{steps} steps", rate, recipe, "test" if test else "validation",
        )))  # fmt: skip
        folder = None
        if test and seed == 0 and self.models is not None and scheme is not None:
            folder = self.models / model_folder(arm, scheme)
            if key in self.log.results and not holds(folder, key):
                del self.log.results[key]  # of the model only numbers are left: train it again

        def run() -> dict:
            model, record = self._train(arm, scheme, seed, steps, rate, chosen.get("float"), test)
            if folder is not None:
                keep(model, folder, key)
            return record | {"comparison": self.comparison, "recipe": recipe}

        return self.log.get(key, run)

    def check_folders(self, pairs: Iterable[tuple[Arm, QuantScheme]]) -> None:
        """Refuse, before anything is trained, to write over folders of other origin."""
        for folder in (self.models / model_folder(*pair) for pair in pairs):
            if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
                raise CheckpointError(
                    f"{folder} holds files that no comparison wrote: move it away, or give models "
                    "another folder"
                )

    def _arm(self, arm: Arm) -> str:
        """Hash an arm, functions included, as it was when it was first met."""
        if id(arm) not in self.arms:
            self.arms[id(arm)] = arm, fingerprint(arm)
        return self.arms[id(arm)][1]

    def _train(self, arm: Arm, scheme, seed, steps, rate, float_rate, test: bool):
        first, rest = arm.steps(steps)
        stream = batches(self.task.train, steps, 1000 * seed)
        model = self._float(stream[:first], seed, rate if arm is FLOAT else float_rate)
        history = None
        if arm.prepare is not None:
            teacher = model
            model = self._prepare(arm, copy.deepcopy(model), scheme)
            if rest:
                loss_fn = distillation_loss(teacher) if arm.distil else default_loss
                history = self._fit(model, stream[first:], rate, seed, loss_fn)
            model = keep_types(arm.finish(model), self.start)
        validation = document_losses(model, self.task.validation).mean
        record = {
            "model": self.name, "task": self.task.name, "scheme": scheme_name(scheme),
            "method": arm.name, "seed": seed, "steps": steps, "float_steps": first, "lr": rate,
            "validation_loss": validation, "bytes": model_bytes(model), "cost": self.cost(arm, scheme),
            "validation": history.validation if history else [],
            "training_tokens": sum(map(_size, stream)),
        }  # fmt: skip
        if test:
            metric = METRICS[self.task.metric]
            measured = metric.measure(model, self.task)
            record |= {
                "metric": metric.name, "higher_is_better": metric.higher_is_better,
                "total": [round(float(x), 4) for x in measured.scores.total],
                "weight": measured.scores.weight.tolist(),
                "also": {name: [e.value, e.low, e.high] for name, e in measured.also.items()},
            }  # fmt: skip
        return model, record

    def cost(self, arm: Arm, scheme) -> float:
        """Time of an arm's steps over that of as many float steps, timed side by side."""
        share = arm.steps(self.steps)[0] / self.steps
        if share == 1:
            return 1.0
        key = f"{arm.name} | {fingerprint(self.comparison, self._arm(arm), scheme)} | cost"
        return share + (1 - share) * self.log.get(key, lambda: self._step_ratio(arm, scheme))

    def _step_ratio(self, arm: Arm, scheme) -> float:
        models = [copy.deepcopy(self.start), self._prepare(arm, copy.deepcopy(self.start), scheme)]
        losses = [default_loss, distillation_loss(self.start) if arm.distil else default_loss]
        stream = batches(self.task.train, 6, TUNING_SEED)
        seconds: tuple[list, list] = ([], [])
        for batch in stream:
            for model, loss_fn, times in zip(models, losses, seconds, strict=True):
                started = time.perf_counter()
                fit(model, [batch], steps=1, loss_fn=loss_fn, lr=0.0, progress=False)
                times.append(time.perf_counter() - started)
        return median(seconds[1][1:]) / median(seconds[0][1:])

    def _prepare(self, arm: Arm, model: nn.Module, scheme) -> nn.Module:
        """Let an arm prepare a model of its own: some change the one that they are given."""
        more = {"embeddings": True} if self.embeddings else {}
        return arm.prepare(model, scheme, self.task, self.skip, **more)

    def _float(self, stream: list, seed: int, rate: float) -> nn.Module:
        """The start, fine-tuned in floating point on these batches; arms share the result."""
        if not stream:
            return copy.deepcopy(self.start)
        key = (len(stream), seed, rate)
        if key not in self.floats:
            self.floats[key] = copy.deepcopy(self.start)
            self._fit(self.floats[key], stream, rate, seed, default_loss)
        return self.floats[key]

    def _fit(self, model: nn.Module, stream: list, rate: float, seed: int, loss_fn):
        return fit(
            model,
            stream,
            steps=len(stream),
            lr=rate,
            seed=seed,
            loss_fn=loss_fn,
            validate=lambda m: document_losses(m, self.task.validation).mean,
            validate_every=math.ceil(len(stream) / 8),
            progress=self.progress,
        )


def rate_key(arm: Arm, scheme: QuantScheme | None) -> str:
    """Name the learning rate of an arm at a scheme, such as "lsq W2 g32"."""
    return arm.name if scheme is None else f"{arm.name} {scheme_name(scheme)}"


def model_folder(arm: Arm, scheme: QuantScheme) -> str:
    """Name of the folder that `compare` keeps a model in, such as "W2-g32-lsq"."""
    return f"{scheme_name(scheme)} {arm.name}".replace(" ", "-")


def _size(batch: Any) -> int:
    """Tokens of a batch, or examples where it holds no tokens."""
    if not isinstance(batch, Mapping):
        return len(batch[0])
    return sum(value.numel() for name, value in batch.items() if name.endswith("input_ids"))


def _versions(model: nn.Module) -> list[str | None]:
    """What computes: results of another version are no results of this one."""
    used = ["companion", "torch", *(["transformers"] if hasattr(model, "config") else [])]
    return [getattr(sys.modules.get(name), "__version__", None) for name in used]


def keep(model: nn.Module, folder: Path, key: str) -> None:
    """Save a model, and beside it which run it is from."""

    def mark(text: str) -> None:
        write_atomically(
            folder / MARK, lambda part: part.write_text(json.dumps({"run": text}) + "\n")
        )

    mark("unfinished")
    companion.save_quantized(model, folder)
    mark(key)


def holds(folder: Path, key: str) -> bool:
    """Whether a folder holds the model of this very run."""
    try:
        return read_json(folder / MARK)["run"] == key
    except (OSError, ValueError, KeyError, TypeError):
        return False
