"""What SmolLM2-135M answers to four prompts, rounded to fewer and fewer bits.

    python -m benchmarks.answers                          (some minutes on two cores)
    python -m benchmarks.answers --model "after QAT"=FOLDER

Greedy answers in floating point, rounded to nearest, and rounded by GPTQ, in groups of 32. `--model`
adds what a model says that was saved with `save_quantized`, beside those that the results file has;
its label names the way it was made, its folder says in how many bits. Nothing is done twice. Chapter 9
shows benchmarks/results/answers.json as a figure that moves.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.arms import machine
from benchmarks.excerpts import read
from benchmarks.provenance import RESULTS, write_results
from companion import QuantScheme, convert, load_pretrained, load_quantized, prepare_qat
from companion.course.sources import load_tokenizer
from companion.ptq.gptq import gptq
from companion.study.tables import scheme_name

PROMPTS = (
    "What is the capital of France?",
    "Why does ice float on water? Answer in one sentence.",
    "Tell me a story about a girl and her dog in three sentences.",
    "Translate into French: good morning.",
)
TOKENS = 60
"""Of an answer, at most."""
NEAREST, GPTQ = (8, 4, 3, 2), (4, 3, 2)
"""Bits of either way to round; at eight, rounding costs next to nothing."""
ROWS = 16
"""Rows of 256 tokens that GPTQ calibrates on: 4,096 tokens of docstrings."""


@torch.no_grad()
def answers(model: nn.Module, prompts: tuple[str, ...] = PROMPTS, tokens: int = TOKENS) -> dict:
    """Return what a chat model answers greedily, by prompt, and whether it came to an end.

    Parameters
    ----------
    model : nn.Module
        With SmolLM2's vocabulary.
    prompts : tuple of str
    tokens : int
        At most so many for each answer.

    Returns
    -------
    dict
        ``{"text": ..., "ended": ...}`` by prompt; not ended means cut off at `tokens`.
    """
    tokenizer = load_tokenizer("smollm2")
    asked = tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in prompts], add_generation_prompt=True,
        return_tensors="pt", return_dict=True, padding=True,
        tokenizer_kwargs={"padding_side": "left"},
    ).to(next(model.parameters()).device)  # fmt: skip
    whole = model.generate(**asked, max_new_tokens=tokens, do_sample=False)
    new = whole[:, asked["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    ended = (new == tokenizer.eos_token_id).any(1) | (new.shape[1] < tokens)
    return {
        prompt: {"text": text.strip(), "ended": bool(end)}
        for prompt, text, end in zip(prompts, texts, ended, strict=True)
    }


def name_of(scheme: QuantScheme | None, method: str) -> str:
    """Return what a record is called by.

    Examples
    --------
    >>> name_of(QuantScheme(4), "gptq"), name_of(None, "float")
    ('W4 g32 gptq', 'float')
    """
    return method if scheme is None else f"{scheme_name(scheme)} {method}"


def work(model: nn.Module, texts: Callable) -> dict[str, tuple]:
    """Return what there is to be answered by: a scheme, a method and how to round, by name."""

    def rounded(scheme: QuantScheme) -> nn.Module:
        return convert(prepare_qat(model, scheme, "absmax")).eval()

    def compensated(scheme: QuantScheme) -> nn.Module:
        rows = texts().calibration(ROWS, 8, model.device)
        found = gptq(model, scheme, rows, batches=len(rows), act_order=True, progress=False)
        return convert(found).eval()

    schemes = {bits: QuantScheme(bits) for bits in NEAREST}
    found = [(None, "float", lambda _: model)]
    found += [(schemes[bits], "nearest", rounded) for bits in NEAREST]
    found += [(schemes[bits], "gptq", compensated) for bits in GPTQ]
    return {name_of(scheme, method): (scheme, method, make) for scheme, method, make in found}


def record(model: nn.Module, scheme: QuantScheme | None, method: str) -> dict:
    """Return one entry of the results file."""
    return {
        "name": name_of(scheme, method), "scheme": "float" if scheme is None else scheme_name(scheme),
        "bits": None if scheme is None else scheme.weight_bits, "method": method,
        "answers": answers(model), "machine": machine(next(model.parameters()).device),
    }  # fmt: skip


def labelled(text: str) -> tuple[str, Path]:
    """Read LABEL=FOLDER.

    Examples
    --------
    >>> labelled("after QAT=models/w2")[0]
    'after QAT'
    """
    label, equals, folder = text.partition("=")
    if not (label and equals and folder):
        raise argparse.ArgumentTypeError(f"{text!r}: write LABEL=FOLDER, as in 'after QAT'=mine/w2")
    return label, Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=labelled, action="append", default=[],
                        metavar="LABEL=FOLDER", help="add a saved model")  # fmt: skip
    args = parser.parse_args()
    path, done = RESULTS / "answers.json", {}
    if path.exists():
        done = {r["name"]: r for r in json.loads(path.read_text())["records"]}

    def keep(entry: dict) -> None:
        done[entry["name"]] = entry
        write_results("answers", list(done.values()), prompts=PROMPTS, tokens=TOKENS, rows=ROWS)
        print(
            entry["name"], *(a["text"] for a in entry["answers"].values()), sep="\n  ", flush=True
        )

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for label, folder in args.model:
        model = load_quantized(folder).to(device).eval()
        keep(record(model, model.quantization.scheme, label))
    start = load_pretrained("smollm2").to(device).eval()
    for name, (scheme, method, make) in work(start, read).items():
        if name not in done:
            keep(record(make(scheme), scheme, method))


if __name__ == "__main__":
    main()
