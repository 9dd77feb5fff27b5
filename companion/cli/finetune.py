"""Fine-tune, round and compare a model in one call, and keep what came of it.

Built in chapter 15.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from companion.cli.stages import HEADS, open_model, open_task, open_tokenizer, save_tokenizer
from companion.errors import CheckpointError, UnsupportedModel
from companion.files import write_atomically
from companion.formats.registry import format_at
from companion.numerics.scheme import QuantScheme
from companion.qat.prepare import prepare_qat
from companion.study.compare import compare
from companion.study.recipes import ARMS, NEAREST
from companion.study.runs import model_folder
from companion.study.tables import Results, recovered

if TYPE_CHECKING:
    import pandas as pd

FRESH = ("classifier", "score", "pooler")
"""Layers that stay in floating point: a fresh head, and a pooler that no task here asks."""
RESULTS, LOG = "results.json", "log.json"


def finetune(
    model: str,
    task: str,
    schemes: Sequence[QuantScheme],
    methods: Sequence[str] = ("default",),
    *,
    folder: str | Path,
    steps: int = 200,
    seeds: int = 1,
    rates: Sequence[float] = (1e-3,),
    batch_size: int = 4,
    embeddings: bool = False,
    progress: bool = True,
    **options: Any,
) -> pd.DataFrame:
    """Compare float, rounding after training and QAT by name, and keep the quantized models.

    Parameters
    ----------
    model, task : str
        As `load_pretrained` and `load_task` take them.
    schemes, methods, steps, seeds, rates, embeddings, progress
        As in `companion.compare`.
    folder : path
        Receives ``results.json``, a folder for each quantized model (seed 0) with its tokenizer,
        and a log, from which an interrupted call goes on. New, empty, or from an earlier call
        with the same model, task and settings; schemes, methods and seeds may be added.
    batch_size : int
    **options
        Of the task, such as ``block_size``, ``text_column`` and ``encoding``.

    Returns
    -------
    pandas.DataFrame
        From `compare`.

    Raises
    ------
    CheckpointError
        If the folder holds something that this call did not write.
    UnsupportedModel
        If the model does not fit the task.
    """
    folder = Path(folder)
    tokenizer = open_tokenizer(model)
    data = open_task(task, tokenizer, batch_size=batch_size, **options)
    sized = {"classes": len(data.classes)} if data.classes else {}
    start = open_model(model, head=HEADS[data.metric], **sized)
    if hasattr(start, "quantization") or format_at(model) is not None:
        raise UnsupportedModel(
            f"{model} is quantized already, and finetune starts from floating point"
        )
    parts = {part for name, _ in start.named_modules() for part in name.split(".")}
    skip = [name for name in FRESH if name in parts]
    for method in methods:
        if method not in ARMS:
            raise ValueError(f"method {method!r} is unknown: choose from {', '.join(ARMS)}")
    for scheme in schemes:  # what cannot be quantized is found before anything is trained
        prepare_qat(start, scheme, "absmax", skip=skip, embeddings=embeddings)
        for method in methods if embeddings else ():
            ARMS[method].prepare(start, scheme, data, skip, embeddings=True)
    asked = {"model": model, "task": task, "steps": steps, "rates": list(rates),
             "batch_size": batch_size, "embeddings": embeddings,
             **{name: value for name, value in options.items() if value is not None}}  # fmt: skip
    names = [model_folder(ARMS[method], scheme) for scheme in schemes
             for method in dict.fromkeys((NEAREST.name, *methods))]  # fmt: skip
    content = _claim(folder, asked, names)
    table = compare(
        start, data, schemes, methods, steps=steps, seeds=seeds, rates=rates, skip=skip,
        embeddings=embeddings, log=folder / LOG, models=folder, progress=progress,
    )  # fmt: skip
    for name in names:
        if (folder / name).is_dir():
            save_tokenizer(tokenizer, folder / name)
    _write(
        folder,
        content | {"seeds": seeds, "rates": table.attrs["rates"], "runs": table.attrs["runs"]},
    )
    return table


def _claim(folder: Path, asked: dict[str, Any], models: Sequence[str]) -> dict[str, Any]:
    """Note in a folder what is going to be written into it; refuse one that holds other things.

    Returns
    -------
    dict
        What ``results.json`` holds so far.
    """
    other = "choose another folder (--out)"
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: {other}")
    found: dict[str, Any] = {}
    if folder.exists() and any(folder.iterdir()):
        try:
            found = json.loads((folder / RESULTS).read_text())
            before, known = found["asked"], found["models"]
        except (OSError, ValueError, KeyError, TypeError):
            raise CheckpointError(
                f"{folder} holds files that finetune did not write: {other}"
            ) from None
        for name in asked.keys() | before.keys():
            if asked.get(name) != before.get(name):
                raise CheckpointError(
                    f"{folder} holds runs with {name} {before.get(name)}, not {asked.get(name)}: {other}, "
                    "or delete it"
                )
        foreign = [name for name in models if name not in known and (folder / name).exists()]
        if foreign:
            raise CheckpointError(f"{folder / foreign[0]} was not written by finetune: {other}")
        models = list(dict.fromkeys([*known, *models]))
    content = {**asked, **found, "asked": asked, "models": list(models)}
    _write(folder, content)
    return content


def _write(folder: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1)
    write_atomically(folder / RESULTS, lambda partial: partial.write_text(text + "\n"))


def report(runs: Sequence[dict]) -> str:
    """Lay the runs of one comparison out as a table: float, rounded, trained, recovered.

    Parameters
    ----------
    runs : sequence of dict
        As in ``compare(...).attrs["runs"]``.

    Returns
    -------
    str
        Each value with its 95 % interval.

    Examples
    --------
    >>> run = {"total": [2.0, 1.0], "weight": [1, 1], "higher_is_better": False, "metric": "loss",
    ...        "task": "t", "model": "m", "steps": 9, "seed": 0, "bytes": 2_000_000}
    >>> print(report([run | {"scheme": "float", "method": "float"},
    ...               run | {"scheme": "W2 g32", "method": "nearest", "total": [3.0, 2.0]},
    ...               run | {"scheme": "W2 g32", "method": "lsq", "total": [2.2, 1.2]}]))
    m on t: loss (lower is better), 9 steps, 1 seed, n = 2
    scheme  method  value                 recovered          MB
    float   float   1.500 [1.000, 2.000]                   2.00
    W2 g32  nearest 2.500 [2.000, 3.000]                   2.00
    W2 g32  lsq     1.700 [1.200, 2.200]  80 % [80, 80]    2.00
    """
    cells: dict[tuple[str, str], list[dict]] = {}
    for run in runs:
        cells.setdefault((run["scheme"], run["method"]), []).append(run)
    first = cells["float", "float"]
    better = "higher" if first[0]["higher_is_better"] else "lower"
    plural = "s" if len(first) > 1 else ""
    lines = [
        f"{first[0]['model']} on {first[0]['task']}: {first[0]['metric']} ({better} is better), "
        f"{first[0]['steps']} step{'s' if first[0]['steps'] > 1 else ''}, {len(first)} seed{plural}, n = {len(first[0]['total'])}",
        f"{'scheme':7} {'method':7} {'value':21} {'recovered':16} {'MB':>4}",
    ]
    for (scheme, method), found in cells.items():
        value, share = Results(found).estimate(), ""
        if method not in ("float", "nearest"):
            part = recovered(Results(first), Results(cells[scheme, "nearest"]), Results(found))
            share = "no damage" if part is None else (
                f"{100 * part.value:.0f} % [{100 * part.low:.0f}, {100 * part.high:.0f}]")  # fmt: skip
        text = f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"
        lines.append(f"{scheme:7} {method:7} {text:21} {share:16} {found[0]['bytes'] / 1e6:4.2f}")
    return "\n".join(lines)
