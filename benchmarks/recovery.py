"""What each method recovers: float control, post-training and training under rounding, compared.

    python -m benchmarks.recovery                (about three hours on two cores)
    python -m benchmarks.recovery --minilm       (only MiniLM; docs-lm keeps what the file has)

docs-lm is fine-tuned on the Python language reference, MiniLM on the topics of docstrings. First
the levers: trials of single settings, seed 100, measured on validation only. The rates found
there are written below. Then the grid of `compare`, several seeds, measured on the test split
once. Writes benchmarks/results/recovery.json: ``records`` (one for each scheme, method and
seed), ``runs`` (the same with the loss on every test document) and ``levers``.
Interrupted, the same command goes on after the last finished run.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import warnings
from dataclasses import replace

import torch
from torch import nn

from benchmarks.provenance import RESULTS, write_results
from companion import QuantScheme, compare, load_pretrained, load_task
from companion.study.recipes import ARMS, Arm
from companion.study.tables import scheme_name

logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="torchao")

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
BITS = (4, 3, 2)
RATES = (5e-4, 1e-3)
KIN = {"absmax": "absmax", "lsq": "absmax", "torchao": "absmax", "default": "default"}
"""Whose tuned learning rate an arm takes: arms that round from the first step share absmax's."""
SCREENING_STEPS, SCREENING_RATES = 100, (1e-3, 3e-3)
MINILM_STEPS, MINILM_RATES, SKIP = 100, (1e-4, 3e-4), ("classifier", "pooler")
LOG = RESULTS / "recovery.unfinished.json"


def torchao_config(scheme: QuantScheme):
    """Return torchao's own weight-only format of a scheme."""
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis, PerGroup

    size = scheme.group_size
    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{scheme.weight_bits}"),
        granularity=PerAxis(0) if size is None else PerGroup(size),
    )


def torchao_arm() -> Arm:
    """QAT as torchao does it, prepared and converted by torchao."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    config = {}

    def prepare(model: nn.Module, scheme: QuantScheme, task, skip) -> nn.Module:
        config["base"] = torchao_config(scheme)
        model = copy.deepcopy(model)

        def chosen(module: nn.Module, name: str) -> bool:
            """The layers that the companion rounds: tied and skipped ones stay in floating point."""
            return isinstance(module, nn.Linear) and name.split(".")[-1] not in ("lm_head", *skip)

        quantize_(model, QATConfig(config["base"], step="prepare"), chosen)
        return model

    def finish(model: nn.Module) -> nn.Module:
        quantize_(model, QATConfig(config["base"], step="convert"))
        return model

    return Arm("torchao", prepare, finish)


FLOAT_DISTILLED = Arm("float-distilled", lambda model, scheme, task, skip: copy.deepcopy(model),
                      finish=lambda model: model, float_share=ARMS["default"].float_share,
                      distil=True)  # fmt: skip
"""The default without its rounding: what imitation alone is worth on this text."""

GROUPED, ROWS = ([QuantScheme(bits, size) for bits in BITS] for size in (32, None))


def screen(task) -> None:
    """Every method at two bits for few steps: trials on validation, kept among the levers."""
    methods = [name for name in ARMS if ARMS[name].float_share < 1]
    compare("docs-lm", task, [QuantScheme(2)], methods, steps=SCREENING_STEPS, seeds=0,
            rates=SCREENING_RATES, log=LOG)  # fmt: skip


def tune(task, steps: int) -> dict[str, float]:
    """Tune two arms for each width at full length, and give their rates to their kin."""
    table = compare("docs-lm", task, GROUPED, ["absmax", "default"], steps=steps, seeds=0,
                    rates=RATES, log=LOG)  # fmt: skip
    rates = dict(table.attrs["rates"])
    for scheme in (*GROUPED, *ROWS):
        grid = scheme_name(QuantScheme(scheme.weight_bits))
        for arm, like in KIN.items():
            rates[f"{arm} {scheme_name(scheme)}"] = rates[f"{like} {grid}"]
    return rates


def docs_lm(task, schemes: list[QuantScheme], seeds: int, steps: int, rates: dict) -> list[dict]:
    """The grid of one granularity."""
    methods = ["nearest-mse", "gptq", "default", "absmax", torchao_arm(), "lsq"]
    table = compare(
        "docs-lm", task, schemes, methods, steps=steps, seeds=seeds, rates=rates, log=LOG
    )
    return table.attrs["runs"]


def float_distilled(task, seeds: int, steps: int) -> list[dict]:
    """The control of the default, tuned by as many trials; its row stands beside two bits."""
    table = compare("docs-lm", task, [QuantScheme(2)], [FLOAT_DISTILLED], steps=steps, seeds=seeds,
                    rates=RATES, log=LOG)  # fmt: skip
    return [run for run in table.attrs["runs"] if run["method"] == FLOAT_DISTILLED.name]


def minilm(seeds: int) -> list[dict]:
    """A smaller grid: a fresh classifier on MiniLM, its head in floating point."""
    task = replace(load_task("topics"), metric="loss")
    model = load_pretrained(MINILM, head="classification", classes=len(task.classes))
    schemes = [QuantScheme(2), QuantScheme(3, None)]
    first, _ = ARMS["default"].steps(MINILM_STEPS)  # a lever: how good is the default's teacher?
    compare(model, task, [], [], steps=first, seeds=0, rates=MINILM_RATES, skip=SKIP, log=LOG)
    table = compare(
        model, task, schemes, ["nearest-mse", "gptq", "absmax", "default", torchao_arm()],
        steps=MINILM_STEPS, seeds=seeds, rates=MINILM_RATES, skip=SKIP, log=LOG,
    )  # fmt: skip
    return table.attrs["runs"]


def records(runs: list[dict]) -> list[dict]:
    """One line for each scheme, method and seed: mean losses and the share recovered."""
    loss = {
        (run["model"], run["scheme"], run["method"], run["seed"]): sum(run["total"])
        / sum(run["weight"])
        for run in runs
    }
    lines = []
    for (model, scheme, method, seed), quantized in loss.items():
        if method != "float":
            control = loss[model, "float", "float", seed]
            nearest = loss[model, scheme, "nearest", seed]
            run = next(r for r in runs if (r["model"], r["scheme"], r["method"], r["seed"])
                       == (model, scheme, method, seed))  # fmt: skip
            lines.append({
                "model": model, "task": run["task"], "scheme": scheme, "method": method,
                "seed": seed, "steps": run["steps"], "lr": run["lr"], "float": control,
                "ptq": nearest, "qat": quantized,
                "recovered": (nearest - quantized) / (nearest - control),
            })  # fmt: skip
    return lines


def trials() -> list[dict]:
    """The trials in the log: single settings, measured on validation."""
    log = json.loads(LOG.read_text())
    return [run for key, run in log.items() if key.endswith("validation")]


def write(runs: list[dict], **settings) -> None:
    """Write what is finished: each stage is complete in itself."""
    by_hand = json.loads((RESULTS / "levers.json").read_text())["records"]
    more = {"runs": runs, "levers": by_hand + trials()}
    print(write_results("recovery", records(runs), more, **settings), flush=True)


def renew_minilm(seeds: int, steps: int) -> None:
    """Measure MiniLM again, and keep of docs-lm what the file has, with its provenance."""
    known = json.loads((RESULTS / "recovery.json").read_text())
    runs = [run for run in known["runs"] if run["model"] == "docs-lm"] + minilm(seeds)
    levers = [lever for lever in known["levers"] if lever["model"] == "docs-lm"] + trials()
    first = known.get("docs_lm_provenance", known["provenance"])
    more = {"runs": runs, "levers": levers, "docs_lm_provenance": first}
    print(write_results("recovery", records(runs), more, seeds=seeds, steps=steps), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--minilm", action="store_true", help="measure MiniLM only")
    args = parser.parse_args()
    if args.minilm:
        renew_minilm(args.seeds, args.steps)
        return LOG.unlink()
    task = load_task("language-reference", batch_size=4)
    rates = tune(task, args.steps)
    runs = docs_lm(task, GROUPED, args.seeds, args.steps, rates)
    runs += float_distilled(task, args.seeds, args.steps)
    write(runs, seeds=args.seeds, steps=args.steps)
    screen(task)
    runs += minilm(args.seeds)
    write(runs, seeds=args.seeds, steps=args.steps)
    by_row = docs_lm(task, ROWS, args.seeds, args.steps, rates)
    runs += [run for run in by_row if run["method"] != "float"]
    write(runs, seeds=args.seeds, steps=args.steps)
    LOG.unlink()


if __name__ == "__main__":
    main()
