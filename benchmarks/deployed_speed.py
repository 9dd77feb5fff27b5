"""Served speed at the shape of SmolLM2-135M: PyTorch, torchao and ONNX Runtime side by side.

    python -m benchmarks.deployed_speed          (about fifteen minutes; nothing else should run)

The shape is the public configuration of HuggingFaceTB/SmolLM2-135M; the weights are drawn at
random, since speed and size do not depend on them. All models are loaded, and timed in turns.
Peak memory is measured in a process for each. Whether a file computes what was trained is
measured on docs-lm, quantized and exported in the same way. Writes
benchmarks/results/deployed_speed.json.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import onnx
import torch
from torch import nn

from benchmarks.provenance import write_results
from companion import (
    W2,
    W4,
    W8,
    W8A8,
    QuantScheme,
    convert,
    export_onnx,
    load_pretrained,
    load_task,
    model_bytes,
    prepare_qat,
)
from companion.cli.bench import speeds
from companion.data.task import Task
from companion.formats.onnx.export import write_graph
from companion.formats.onnx.model import OnnxModel
from companion.formats.onnx.parity import parity
from companion.study.tables import scheme_name

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
THREADS = 2
PROMPTS = (64, 512)


@dataclass(frozen=True)
class Row:
    """One way to serve the model.

    Parameters
    ----------
    engine, precision : str
    scheme : QuantScheme, optional
        Of ours; None where another library quantizes, or nothing is quantized.
    level : int
        The accuracy level of ONNX Runtime's kernels.
    weight_bytes : float
        Read for each weight of a matrix, scales included, where there is no scheme.
    """

    engine: str
    precision: str
    scheme: QuantScheme | None = None
    level: int = 0
    weight_bytes: float = 4.0

    @property
    def file(self) -> str:
        return f"{self.precision}.onnx".replace(" ", "-").replace(",", "")

    def bytes_per_weight(self) -> float:
        """What one token has to read for each weight of the matrices."""
        if self.scheme is None:
            return self.weight_bytes
        scales = 4 / self.scheme.group_size if self.scheme.group_size else 0.0
        return self.scheme.weight_bits / 8 + scales


ROWS = (
    Row("torch", "float32"),
    Row("torch quantize_dynamic", "int8", weight_bytes=1.0),
    Row("torchao", "int8", weight_bytes=1.0),
    Row("torchao", "int4, int8 inputs", weight_bytes=1.0 + 4 / 32),  # kept one to a byte
    Row("ONNX Runtime", "float32"),
    Row("ONNX Runtime", "int8 W8A8", W8A8),
    *(Row("ONNX Runtime", f"int8 level {level}", W8, level) for level in (0, 4)),
    *(Row("ONNX Runtime", f"int4 level {level}", W4, level) for level in (0, 1, 2, 3, 4)),
    *(Row("ONNX Runtime", f"int2 level {level}", W2, level) for level in (0, 4)),
)


def random_model(shape: dict) -> nn.Module:
    """A language model of a shape, with weights drawn at random."""
    load_pretrained("docs-lm")  # imports transformers without its log lines
    import transformers

    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()


def quantized(model: nn.Module, scheme: QuantScheme) -> nn.Module:
    """Convert a model with its embedding; ranges as they are, since nothing is trained here."""
    return convert(prepare_qat(model, scheme, "absmax", embeddings=True))


def write_levels(model: nn.Module, rows: Sequence[Row], folder: Path) -> None:
    """Export a converted model for rows of its scheme, which differ by an attribute alone.

    Tracing takes minutes at this size, so it is done once for each scheme.
    """
    first = export_onnx(model, folder / rows[0].file, accuracy_level=rows[0].level)
    graph = onnx.load(first)
    for row in rows[1:]:
        for node in graph.graph.node:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = row.level
        onnx.save(graph, folder / row.file)


def by_scheme(rows: Sequence[Row]) -> dict[QuantScheme, list[Row]]:
    """The rows of each scheme of ours."""
    found: dict[QuantScheme, list[Row]] = {}
    for row in rows:
        if row.scheme is not None:
            found.setdefault(row.scheme, []).append(row)
    return found


def write_files(shape: dict, folder: Path, rows: Sequence[Row]) -> None:
    """Write what each row loads."""
    model = random_model(shape)
    model.save_pretrained(folder)
    for row in rows:
        if row.engine == "ONNX Runtime" and row.scheme is None:
            write_graph(model, folder / row.file)
    for scheme, members in by_scheme(rows).items():
        write_levels(quantized(model, scheme), members, folder)
        print("written:", scheme_name(scheme), flush=True)


def load(row: Row, folder: Path) -> nn.Module:
    """Load one way to serve the model from its file."""
    torch.set_num_threads(THREADS)
    if row.engine == "ONNX Runtime":
        return OnnxModel(folder / row.file, threads=THREADS)
    model = load_pretrained(str(folder), head="lm").eval()
    if row.engine == "torch quantize_dynamic":
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    if row.engine == "torchao":
        from torchao.quantization import (
            Int8DynamicActivationIntxWeightConfig,
            Int8WeightOnlyConfig,
            quantize_,
        )
        from torchao.quantization.granularity import PerGroup

        int4 = Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=PerGroup(32)
        )
        quantize_(model, Int8WeightOnlyConfig() if row.precision == "int8" else int4)
    return model


def peak_memory(row: Row, folder: Path, prompt: int) -> float:
    """Megabytes that loading and asking a model take beyond the libraries' own; needs a process."""
    import onnxruntime  # noqa: F401  its own memory is none of the model's

    load_pretrained("docs-lm")
    before = _resident("VmRSS")
    speeds({"": load(row, folder)}, prompt=prompt, tokens=2, rounds=1)
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    """Megabytes of this process's memory, now or at its peak (getrusage counts its parent's)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 1024


def in_own_process(row: Row, folder: Path, prompt: int) -> float:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(peak_memory, row, folder, prompt).result()


def copy_bandwidth(megabytes: int = 512, rounds: int = 9) -> float:
    """Gigabytes that a copy of a large tensor reads and writes in a second."""
    source = torch.ones(megabytes * 2**18)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / median(seconds) / 1e9


def parity_on_docs_lm(rows: Sequence[Row], folder: Path, task: Task) -> dict[Row, dict]:
    """Whether docs-lm, quantized and exported as each row is, computes what it did before."""
    found = {}
    for scheme, members in by_scheme(rows).items():
        model = quantized(load_pretrained("docs-lm"), scheme)
        write_levels(model, members, folder)
        for row in members:
            report = parity(model, folder / row.file, task)
            found[row] = {
                "scheme": scheme_name(scheme), "level": row.level, "integers": report.integers,
                "scales": report.scales, "logits": report.logits, "argmax": report.argmax,
                "loss_difference": [report.difference.value, report.difference.low,
                                    report.difference.high],
            }  # fmt: skip
            print(row.precision, found[row], flush=True)
    return found


def file_bytes(row: Row, model: nn.Module, folder: Path) -> int:
    """Bytes of the whole file; of what PyTorch quantizes on loading, those its state would take."""
    if row.engine == "ONNX Runtime":
        return (folder / row.file).stat().st_size
    return model_bytes(model)


def measure(shape: dict, rows: Sequence[Row], *, tokens: int, rounds: int,
            prompts: Sequence[int] = PROMPTS, peak: Callable[[Row, Path, int], float] = in_own_process,
            ) -> tuple[list[dict], float]:  # fmt: skip
    """Time all rows in turns: a record for each and each phase, and the bandwidth of copies."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_files(shape, folder, rows)
        peaks = {row: peak(row, folder, prompts[0]) for row in rows}
        models = {row: load(row, folder) for row in rows}
        sizes = {row: file_bytes(row, model, folder) for row, model in models.items()}
        matrices = sum(m.weight.numel() for m in random_model(shape).modules()
                       if isinstance(m, nn.Linear))  # fmt: skip
        bandwidth = copy_bandwidth()
        times = {n: speeds(models, prompt=n, tokens=tokens if n == prompts[0] else 2, rounds=rounds)
                 for n in prompts}  # fmt: skip
    phases = [("prefill", n, {row: ms["prefill"] for row, ms in times[n].items()}) for n in prompts]
    phases.append(("decode", 1, {row: ms["decode"] for row, ms in times[prompts[0]].items()}))
    records = []
    for phase, count, ms in phases:
        first, served = (next(ms[row] for row in rows if (row.engine, row.precision) == known)
                         for known in (("torch", "float32"), ("ONNX Runtime", "float32")))  # fmt: skip
        for row in rows:
            record = {
                "engine": row.engine, "precision": row.precision, "phase": phase, "tokens": count,
                "ms": round(ms[row], 3), "ratio_to_torch_float32": round(first / ms[row], 3),
                "ratio_to_ort_float32": round(served / ms[row], 3), "bytes": sizes[row],
                "peak_mb": round(peaks[row], 1),
            }  # fmt: skip
            if phase == "decode":
                read = matrices * row.bytes_per_weight()
                record |= {"read_mb": round(read / 1e6, 1),
                           "limit_ms": round(read / bandwidth / 1e6, 3)}  # fmt: skip
            records.append(record)
    return records, bandwidth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=12, help="generated in each round")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as place:
        task = load_task("language-reference", batch_size=4)
        same = parity_on_docs_lm(ROWS, Path(place), task)
    records, bandwidth = measure(SMOLLM2, ROWS, tokens=args.tokens, rounds=args.rounds)
    reports = {(row.engine, row.precision): report for row, report in same.items()}
    for record in records:
        record["parity"] = reports.get((record["engine"], record["precision"]))
    print(write_results("deployed_speed", records, {"copy_gb_per_s": round(bandwidth, 2)},
                        threads=THREADS, **vars(args)))  # fmt: skip


if __name__ == "__main__":
    main()
