"""`compare`: float control, rounding after training and training under rounding, at equal cost.

Every arm takes the same number of optimizer steps on the same batches. What differs is when the
rounding begins: never (the control), after the last step (post-training), before the first
(plain QAT), or in between. Floor 9 of the house. Built in chapter 11.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from torch import nn
from tqdm import tqdm

from companion.arms import ARMS, FLOAT, NEAREST, Arm
from companion.cost import model_bytes
from companion.files import write_atomically
from companion.language import document_losses
from companion.losses import default_loss, distillation_loss
from companion.models import load_pretrained
from companion.scheme import QuantScheme
from companion.stream import batches
from companion.tables import scheme_name, tabulate
from companion.tasks import Task, load_task
from companion.train import fit

if TYPE_CHECKING:
    import pandas as pd

TUNING_SEED = 100
RATES = (3e-4, 1e-3, 3e-3)


class Log:
    """Results kept on disk as they come, so that an interrupted study goes on where it was.

    Parameters
    ----------
    path : path, optional
        A JSON file; None keeps them in memory only.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        found = self.path is not None and self.path.exists()
        self.results: dict[str, Any] = json.loads(self.path.read_text()) if found else {}

    def get(self, key: str, run: Callable[[], Any]) -> Any:
        """Return the stored result of a key, or run for it and store it."""
        if key not in self.results:
            self.results[key] = run()
            if self.path is not None:
                text = json.dumps(self.results)
                write_atomically(self.path, lambda part: part.write_text(text))
        return self.results[key]


def compare(
    model: nn.Module | str,
    task: Task | str,
    schemes: Sequence[QuantScheme],
    methods: Sequence[str | Arm] = ("absmax", "default"),
    *,
    steps: int = 200,
    seeds: int = 3,
    rates: Sequence[float] | Mapping[str, float] = RATES,
    tuning_steps: int | None = None,
    skip: Sequence[str] = (),
    log: str | Path | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Fine-tune one model in floating point and under every scheme and method, and compare.

    All arms share start, batches and number of steps, keep the weights that did best on
    validation, and had their learning rate chosen there with equally many trials. The float
    control rounded to nearest is always among the rows: it sets the damage.

    Parameters
    ----------
    model : nn.Module or str
        Or a name that `load_pretrained` takes.
    task : Task or str
        Or a name that `load_task` takes.
    schemes : sequence of QuantScheme
    methods : sequence of str or Arm
        Names of `ARMS`, or arms of your own.
    steps : int
        Optimizer steps of every arm, those in floating point included.
    seeds : int
        Runs of every arm, each with an order of the data of its own. With 0 only the trials of
        the rates are run, and the test split is not looked at.
    rates : sequence of float, or dict of str to float
        Learning rates to try (a single one is taken as it is), or one rate for each method and scheme by the names that
        ``table.attrs["rates"]`` of an earlier comparison has.
    tuning_steps : int, optional
        Length of a trial; default: all `steps`. Shorter trials favour higher rates.
    skip : sequence of str
        Layers that stay in floating point, as in `prepare_qat`.
    log : path, optional
        JSON file that receives every finished run; the same call goes on from it.
    progress : bool

    Returns
    -------
    pandas.DataFrame
        From `tabulate`. Its ``attrs`` hold ``rates`` and ``runs``, every run with its loss on
        each test document, for `tabulate` to read again.

    Raises
    ------
    ValueError
        For a method that is neither known nor an Arm.

    Examples
    --------
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 5))
    >>> scheme = QuantScheme(2, group_size=None)
    >>> table = compare(model, "digits-5-9", [scheme], ["absmax"], steps=20, seeds=1,
    ...                 rates=[1e-3], progress=False)
    >>> list(table.index)
    [('W2 row', 'nearest'), ('W2 row', 'absmax')]
    >>> bool(table.loc[("W2 row", "absmax"), "loss"] < table.loc[("W2 row", "nearest"), "loss"])
    True
    """
    arms = [NEAREST, *(_arm(method) for method in methods if method != NEAREST.name)]
    study = _Study(model, task, steps, tuple(skip), Log(log), progress)
    tuned = [arm for arm in arms if arm.float_share < 1]
    chosen = dict(rates) if isinstance(rates, Mapping) else {}
    wanted = [(FLOAT, None)] + [(arm, scheme) for arm in tuned for scheme in schemes]
    if len(rates) == 1 and not chosen:
        chosen = {_key(*pair): rates[0] for pair in wanted}
    trials = 0 if chosen else len(rates) * len(wanted)
    with tqdm(total=trials + seeds * (1 + len(schemes) * len(arms)), desc="runs",
              **({} if progress else {"disable": True})) as study.bar:  # fmt: skip
        if not chosen:
            for arm, scheme in wanted:
                chosen[_key(arm, scheme)] = study.tune(
                    arm, scheme, rates, tuning_steps or steps, chosen
                )
        runs = []
        for seed in range(seeds):
            runs.append(study.run(FLOAT, None, seed, chosen))
            runs += [study.run(arm, scheme, seed, chosen) for scheme in schemes for arm in arms]
    table = tabulate(runs)
    table.attrs["rates"] = chosen
    return table


class _Study:
    """The runs of one comparison: each is done once, and found again in the log."""

    def __init__(self, model, task, steps: int, skip: tuple, log: Log, progress: bool) -> None:
        self.task = load_task(task) if isinstance(task, str) else task
        self.name = model if isinstance(model, str) else type(model).__name__
        self.start = load_pretrained(model) if isinstance(model, str) else model
        self.steps, self.skip, self.log, self.progress = steps, skip, log, progress
        self.bar: tqdm | None = None
        self.fingerprint = f"{_fingerprint(self.start)} {' '.join(self.skip)}".strip()
        self.floats: dict[tuple, nn.Module] = {}  # float phases that several arms share

    def tune(self, arm: Arm, scheme, rates: Sequence[float], steps: int, chosen: dict) -> float:
        """Return the rate with the lowest validation loss after short runs."""
        found = {}
        for rate in rates:
            found[rate] = self._get(arm, scheme, TUNING_SEED, steps, rate, chosen, test=False)
            self.bar.update()
        return min(found, key=lambda rate: found[rate]["validation_loss"])

    def run(self, arm: Arm, scheme, seed: int, chosen: dict) -> dict:
        """Train an arm and measure it on the test split."""
        if arm is FLOAT:
            self.floats.clear()  # of the seed before
        rate = chosen["float" if arm.float_share == 1 else _key(arm, scheme)]
        result = self._get(arm, scheme, seed, self.steps, rate, chosen, test=True)
        self.bar.update()
        return result

    def _get(self, arm, scheme, seed, steps, rate, chosen, test: bool) -> dict:
        key = [self.name, self.fingerprint, self.task.name, scheme_name(scheme), arm.name, seed,
               steps, rate, chosen.get("float") if arm.float_share else None,
               "test" if test else "validation"]  # fmt: skip
        return self.log.get(
            " | ".join(map(str, key)),
            lambda: self._train(arm, scheme, seed, steps, rate, chosen.get("float"), test),
        )

    def _train(self, arm: Arm, scheme, seed, steps, rate, float_rate, test: bool) -> dict:
        first, rest = arm.steps(steps)
        stream = batches(self.task.train, steps, 1000 * seed)
        model = self._float(stream[:first], seed, rate if arm is FLOAT else float_rate)
        history = None
        if arm.prepare is not None:
            teacher = model
            model = arm.prepare(model, scheme, self.task, self.skip)
            if rest:
                loss_fn = distillation_loss(teacher) if arm.distil else default_loss
                history = self._fit(model, stream[first:], rate, seed, loss_fn)
            model = arm.finish(model)
        validation = document_losses(model, self.task.validation).mean
        record = {
            "model": self.name, "task": self.task.name, "scheme": scheme_name(scheme),
            "method": arm.name, "seed": seed, "steps": steps, "float_steps": first, "lr": rate,
            "validation_loss": validation, "bytes": model_bytes(model), "cost": self.cost(arm, scheme),
            "validation": history.validation if history else [],
            "training_tokens": sum(map(_size, stream)),
        }  # fmt: skip
        if test:
            losses = document_losses(model, self.task.test)
            record |= {"loss": [round(x, 4) for x in losses.loss], "tokens": losses.tokens.tolist()}
        return record

    def cost(self, arm: Arm, scheme) -> float:
        """Time of an arm's steps over that of as many float steps, timed side by side."""
        share = arm.steps(self.steps)[0] / self.steps
        if share == 1:
            return 1.0
        key = (
            f"{self.fingerprint} | {arm.name} | {scheme.weight_bits} | {scheme.activations} | cost"
        )
        return share + (1 - share) * self.log.get(key, lambda: self._step_ratio(arm, scheme))

    def _step_ratio(self, arm: Arm, scheme) -> float:
        models = [copy.deepcopy(self.start), arm.prepare(self.start, scheme, self.task, self.skip)]
        losses = [default_loss, distillation_loss(self.start) if arm.distil else default_loss]
        stream = batches(self.task.train, 6, TUNING_SEED)
        seconds: tuple[list, list] = ([], [])
        for batch in stream:
            for model, loss_fn, times in zip(models, losses, seconds, strict=True):
                started = time.perf_counter()
                fit(model, [batch], steps=1, loss_fn=loss_fn, lr=0.0, progress=False)
                times.append(time.perf_counter() - started)
        return median(seconds[1][1:]) / median(seconds[0][1:])

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


def _arm(method: str | Arm) -> Arm:
    if isinstance(method, Arm):
        return method
    if method not in ARMS:
        raise ValueError(
            f"method {method!r} is unknown: choose from {', '.join(ARMS)}, or pass an Arm"
        )
    return ARMS[method]


def _key(arm: Arm, scheme: QuantScheme | None) -> str:
    return arm.name if scheme is None else f"{arm.name} {scheme_name(scheme)}"


def _size(batch: Any) -> int:
    """Tokens of a batch, or examples where it holds no tokens."""
    return batch["input_ids"].numel() if isinstance(batch, Mapping) else len(batch[0])


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(
            name.encode() + tensor.detach().cpu().flatten()[:4096].float().numpy().tobytes()
        )
    return digest.hexdigest()[:12]
