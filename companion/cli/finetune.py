"""Fine-tune, round and compare a model in one call, and keep what came of it.

Built in chapter 14.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from companion.course.models import load_pretrained
from companion.course.sources import load_tokenizer
from companion.course.tasks import load_task
from companion.errors import UnsupportedModel
from companion.files import write_atomically
from companion.numerics.scheme import QuantScheme
from companion.study.compare import compare
from companion.study.tables import Results, recovered

if TYPE_CHECKING:
    import pandas as pd

HEADS = {"loss": "lm", "right choices": "lm", "accuracy": "classification",
         "span F1": "tokens", "recall@1": "retrieval"}  # fmt: skip
"""What a model ends in, by the metric of the task."""
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
    progress: bool = True,
) -> pd.DataFrame:
    """Compare float, rounding after training and QAT by name, and keep the quantized models.

    Parameters
    ----------
    model, task : str
        As `load_pretrained` and `load_task` take them.
    schemes, methods, steps, seeds, rates, progress
        As in `companion.compare`.
    folder : path
        Receives ``results.json``, a folder for each quantized model (seed 0) with its tokenizer,
        and a log, from which an interrupted call goes on.
    batch_size : int

    Returns
    -------
    pandas.DataFrame
        From `compare`.
    """
    folder = Path(folder)
    tokenizer = load_tokenizer(model)
    data = load_task(task, tokenizer=tokenizer, batch_size=batch_size)
    sized = {"classes": len(data.classes)} if data.classes else {}
    start = load_pretrained(model, head=HEADS[data.metric], **sized)
    made = getattr(getattr(start, "config", None), "architectures", None) or []
    if HEADS[data.metric] == "lm" and not any(
        n.endswith(("CausalLM", "LMHeadModel")) for n in made
    ):
        raise UnsupportedModel(f"{model} is no language model, and {task} needs one")
    parts = {part for name, _ in start.named_modules() for part in name.split(".")}
    table = compare(
        start, data, schemes, methods, steps=steps, seeds=seeds, rates=rates,
        skip=[name for name in FRESH if name in parts], log=folder / LOG, models=folder,
        progress=progress,
    )  # fmt: skip
    for saved in folder.glob("*/config.json"):
        tokenizer.save_pretrained(saved.parent)
    content = {"model": model, "task": task, "steps": steps, "seeds": seeds,
               "rates": table.attrs["rates"], "runs": table.attrs["runs"]}  # fmt: skip
    text = json.dumps(content, indent=1)
    write_atomically(folder / RESULTS, lambda partial: partial.write_text(text + "\n"))
    return table


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
        f"{first[0]['steps']} steps, {len(first)} seed{plural}, n = {len(first[0]['total'])}",
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
