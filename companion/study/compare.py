"""`compare`: float control, rounding after training and training under rounding, at equal cost.

Every arm takes the same number of optimizer steps on the same batches. What differs is when the
rounding begins: never (the control), after the last step (post-training), before the first
(plain QAT), or in between. Built in chapter 11.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from tqdm import tqdm

from companion.data.task import Task
from companion.errors import CheckpointError, SchemeError, readable
from companion.numerics.scheme import QuantScheme
from companion.study.recipes import ARMS, FLOAT, NEAREST, Arm
from companion.study.runs import TUNING_SEED, Log, Runs, rate_key
from companion.study.tables import tabulate

if TYPE_CHECKING:
    import pandas as pd

RATES = (3e-4, 1e-3, 3e-3)


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
    embeddings: bool = False,
    log: str | Path | None = None,
    models: str | Path | None = None,
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
    embeddings : bool
        Round embeddings, too, as in `prepare_qat`.
    log : path, optional
        JSON file that receives every finished run; the same call goes on from it. A run is the
        same if the weights it starts from, all the data, the arm and its functions, every setting
        and the versions of companion, torch and transformers are.
    models : path, optional
        Folder that receives the quantized model of every scheme and method, with seed 0, as
        `save_quantized` writes it: ``<models>/W4-g32-default``. A model that the log knows of
        and the folder lacks is trained again; a later comparison replaces those of its names.
    progress : bool

    Returns
    -------
    pandas.DataFrame
        From `tabulate`. Its ``attrs`` hold ``rates`` and ``runs``, every run with its loss on
        each test document, for `tabulate` to read again.

    Raises
    ------
    ValueError
        For a method that is neither known nor an Arm, two arms of one name, or rates that lack
        an arm's.
    CheckpointError
        If the log is none, or a folder for a model holds files of other origin.

    Examples
    --------
    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 5))
    >>> scheme = QuantScheme(2, group_size=None)
    >>> table = compare(model, "digits-5-9", [scheme], ["absmax"], steps=20, seeds=1,
    ...                 rates=[1e-3], progress=False)
    >>> list(table.index)
    [('W2 row', 'nearest'), ('W2 row', 'absmax')]
    >>> bool(table.loc[("W2 row", "nearest"), "damage"] > 0)
    True
    """
    arms = _distinct(methods)
    schemes = _schemes(schemes)
    if models is not None and seeds < 1:
        raise ValueError("models keeps those of seed 0: let seeds be at least 1")
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    study = Runs(model, task, steps, skip, Log(log), progress, models, embeddings)
    if models is not None:
        study.check_folders((arm, scheme) for arm in arms for scheme in schemes)
    tuned = [arm for arm in arms if arm.float_share < 1]
    wanted = [(FLOAT, None)] + [(arm, scheme) for arm in tuned for scheme in schemes]
    chosen = _given(rates, [rate_key(*pair) for pair in wanted])
    trials = 0 if chosen else len(rates) * len(wanted)
    with tqdm(total=trials + seeds * (1 + len(schemes) * len(arms)), desc="runs",
              **({} if progress else {"disable": True})) as study.bar:  # fmt: skip
        if not chosen:
            for arm, scheme in wanted:
                chosen[rate_key(arm, scheme)] = study.tune(
                    arm, scheme, rates, tuning_steps or steps, chosen
                )
        runs = []
        for seed in range(seeds):
            runs.append(study.run(FLOAT, None, seed, chosen))
            runs += [study.run(arm, scheme, seed, chosen) for scheme in schemes for arm in arms]
    told = nullcontext() if log is None else readable(
        log, "give another path, or delete it to begin anew", CheckpointError)  # fmt: skip
    with told:
        table = tabulate(runs)
    table.attrs["rates"] = chosen
    return table


def trial(
    model: nn.Module | str,
    task: Task | str,
    scheme: QuantScheme | None,
    method: str | Arm,
    *,
    steps: int,
    rate: float,
    float_rate: float | None = None,
    progress: bool = True,
) -> dict:
    """Run one arm once, with the seed of the trials, and measure it on validation only.

    Parameters
    ----------
    model, task, scheme, method, steps, progress
        As in `compare`, for a single scheme and method.
    rate : float
        Learning rate under rounding.
    float_rate : float, optional
        Learning rate of the float steps before; default: `rate`.

    Returns
    -------
    dict
        With ``validation_loss`` and what else a run holds.

    Examples
    --------
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 5))
    >>> run = trial(model, "digits-5-9", QuantScheme(2, None), "lsq", steps=2, rate=1e-3,
    ...             progress=False)
    >>> run["method"], run["seed"], run["steps"]
    ('lsq', 100, 2)
    """
    study = Runs(model, task, steps, (), Log(), progress)
    chosen = {"float": float_rate or rate}
    return study.get(_arm(method), scheme, TUNING_SEED, steps, rate, chosen, test=False)


def _distinct(methods: Sequence[str | Arm]) -> list[Arm]:
    """The arms of a comparison, rounding to nearest first, each once and of its own name."""
    if isinstance(methods, (str, Arm)):
        methods = [methods]
    arms: dict[str, Arm] = {FLOAT.name: FLOAT, NEAREST.name: NEAREST}
    for arm in map(_arm, methods):
        if arms.setdefault(arm.name, arm) != arm:
            raise ValueError(
                f"two different arms are called {arm.name!r}, and would become one row: give one "
                "another name, as in dataclasses.replace(arm, name=...)"
            )
    return [arm for arm in arms.values() if arm is not FLOAT]


def _schemes(schemes: Sequence[QuantScheme]) -> list[QuantScheme]:
    if isinstance(schemes, QuantScheme):
        schemes = [schemes]
    for scheme in schemes:
        if not isinstance(scheme, QuantScheme):
            raise SchemeError(
                f"{scheme!r} is no scheme: give companion.W4 or another QuantScheme, or read its "
                "name with parse_scheme"
            )
    return list(dict.fromkeys(schemes))


def _given(rates: Sequence[float] | Mapping[str, float], names: list[str]) -> dict[str, float]:
    """The rates that need no trial: those given by name, or a single one for all."""
    if not rates:
        raise ValueError("no learning rate is given: leave rates out, or name at least one")
    if not isinstance(rates, Mapping):
        return dict.fromkeys(names, rates[0]) if len(rates) == 1 else {}
    if lacking := [name for name in names if name not in rates]:
        raise ValueError(
            f"rates lack {', '.join(map(repr, lacking))}: give a rate for each method and scheme, "
            "or a list to choose from"
        )
    return dict(rates)


def _arm(method: str | Arm) -> Arm:
    if isinstance(method, Arm):
        return method
    if not isinstance(method, str) or method not in ARMS:
        raise ValueError(
            f"method {method!r} is unknown: choose from {', '.join(ARMS)}, or pass an Arm"
        )
    return ARMS[method]
