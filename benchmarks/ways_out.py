"""Whether each way out serves what was converted: docs-lm and SmolLM2-135M, at four and two bits.

    python -m benchmarks.ways_out                   (a quarter of an hour on two quiet cores)
    python -m benchmarks.ways_out --only docs-lm

Nothing is trained: weights, the tied embedding's included, are rounded to nearest in groups of 32, with
scales in bfloat16, which every format here holds. One converted model goes through every format and
its engine. The margins stand in `margin`, and were fixed before anything was measured. Each finished
part is kept below --work or in the results file; the end of every run writes
benchmarks/results/ways_out.json from them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.provenance import restore, write_results
from companion import QuantScheme, convert, load_pretrained, load_task, prepare_qat
from companion.course.sources import load_tokenizer
from companion.files import cache_folder, write_atomically
from companion.formats.parity import parity
from companion.formats.registry import FORMATS
from companion.study.tables import scheme_name

MODELS = ("docs-lm", "smollm2")
SCHEMES = (QuantScheme(4, 32, torch.bfloat16), QuantScheme(2, 32, torch.bfloat16))
TOKENS, MORE = 48, 8
"""Of a text of the test split that is read, and that both models go on with."""
KINDS = {"companion": "logits", "compressed-tensors": "logits", "onnx": "logits",
         "gguf": "nats", "executorch": "nats"}  # fmt: skip
"""What a margin is of: a log-probability; or, where inputs are rounded, the divergence in nats a token
from the model with its inputs rounded alike."""


def margin(model: str, form: str) -> float:
    """The most that a served model may be away.

    The companion's folder is opened by PyTorch, which then adds in the same order. The others add in
    orders of their own: SmolLM2 has 30 layers in place of 4, and ten times the margin. Where inputs are
    rounded, a last digit decides between two integers, and each such step moves a token as far as
    rounding does; SmolLM2, whose inputs have louder channels, is allowed four times as much.

    Examples
    --------
    >>> margin("docs-lm", "onnx"), margin("smollm2", "onnx")
    (0.0001, 0.001)
    """
    if form == "companion":
        return 0.0
    deep = model == "smollm2"
    return (1e-3 if deep else 1e-4) if KINDS[form] == "logits" else (0.1 if deep else 0.025)


def rounded(name: str, scheme: QuantScheme) -> nn.Module:
    """A model with every matrix rounded to nearest, and converted."""
    return convert(prepare_qat(load_pretrained(name), scheme, "absmax", embeddings=True))


def measure(name: str, model: nn.Module, form: str) -> dict:
    """Export, open, compare.

    Parameters
    ----------
    name : str
        Of `MODELS`.
    model : nn.Module
        From `rounded`.
    form : str
        Of `FORMATS`.
    """
    tokenizer = load_tokenizer(name)
    task = load_task("language-reference", block_size=TOKENS, batch_size=1, tokenizer=tokenizer)
    prompt = next(iter(task.test))["input_ids"][:1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{FORMATS[form].ending}"
        start = time.perf_counter()
        FORMATS[form].export(model, path, tokenizer)
        seconds = time.perf_counter() - start
        files = path.glob("*.safetensors") if path.is_dir() else [path]
        size = sum(file.stat().st_size for file in files)
        report = parity(model, path, prompt=prompt, max_new_tokens=MORE)
    away = report.logits if KINDS[form] == "logits" else report.rounded
    return {
        "model": name, "scheme": scheme_name(model.quantization.scheme), "format": form,
        "engine": report.engine, "layers": report.layers, "integers": report.integers,
        "scales": report.scales, "floats": report.floats, "places": report.places,
        "logits": report.logits, "nats": report.divergence, "nats, inputs rounded": report.rounded,
        "same choice": report.argmax, "same answer": report.ours == report.theirs,
        "margin of": KINDS[form], "margin": margin(name, form), "within": away <= margin(name, form),
        "bytes": size, "export seconds": round(seconds, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=cache_folder() / "ways_out")
    parser.add_argument("--only", choices=MODELS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    restore("ways_out", args.work, "part")
    keys = []
    for name in MODELS:
        for scheme in SCHEMES:
            model = None
            for form in FORMATS:
                key = f"{name}-w{scheme.weight_bits}-{form}"
                file = args.work / f"{key}.json"
                keys.append(file)
                if file.exists() or args.only not in (None, name):
                    continue
                model = rounded(name, scheme) if model is None else model
                record = {"part": key, **measure(name, model, form)}
                text = json.dumps(record)
                write_atomically(file, lambda partial, text=text: partial.write_text(text))
                print(key, record["integers"], record["scales"], record["within"], flush=True)
    records = [json.loads(file.read_text()) for file in keys if file.exists()]
    print(write_results("ways_out", records, tokens=TOKENS, generated=MORE))


if __name__ == "__main__":
    main()
