"""The claims of chapter 14 on speed and size, held against the committed results; one small run."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.deployed_speed import (
    PROMPTS,
    ROWS,
    SMOLLM2,
    Row,
    copy_bandwidth,
    in_own_process,
    measure,
    peak_memory,
)
from companion import W2, W4, W8A8

CONTENT = json.loads(
    (Path(__file__).parents[2] / "benchmarks" / "results" / "deployed_speed.json").read_text()
)
RECORDS = {(r["engine"], r["precision"], r["phase"], r["tokens"]): r for r in CONTENT["records"]}
PHASES = (("prefill", 64), ("prefill", 512), ("decode", 1))


def test_every_row_has_every_phase():
    expected = {(row.engine, row.precision, *phase) for row in ROWS for phase in PHASES}
    assert set(RECORDS) == expected
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
    assert row("int4 level 4")["ms"] == fastest
    assert row("float32")["ms"] < 1.25 * row("float32")["limit_ms"]
    assert row("int4 level 4")["ms"] > 2 * row("int4 level 4")["limit_ms"]
    assert row("int2 level 4")["ms"] > 0.95 * fastest
    assert row("int2 level 4")["read_mb"] == pytest.approx(
        0.6 * row("int4 level 4")["read_mb"], 0.01
    )
    slow = [row("int8 level 0"), row("int2 level 0"), row("int8", engine="torchao"),
            row("int4, int8 inputs", engine="torchao")]  # fmt: skip
    assert all(r["ratio_to_torch_float32"] < 1 for r in slow)
    levels = [row(f"int4 level {level}")["ms"] for level in (0, 1, 2, 3)]
    assert max(levels) < 1.1 * min(levels)


def test_what_the_chapter_reads_in_the_times_of_a_prompt():
    short, long = (row("int8 W8A8", "prefill", tokens) for tokens in PROMPTS)
    best = min(r["ms"] for (*_, tokens), r in RECORDS.items() if tokens == 512)
    assert long["ms"] == best
    assert long["ratio_to_torch_float32"] < 0.6 * short["ratio_to_torch_float32"]
    assert long["ratio_to_ort_float32"] > 0.75 * short["ratio_to_ort_float32"]
    weight_only = [r for (engine, precision, *_, tokens), r in RECORDS.items()
                   if engine == "ONNX Runtime" and "level" in precision and tokens == 512]  # fmt: skip
    assert all(r["ratio_to_ort_float32"] < 1 for r in weight_only)


def test_two_bits_at_level_4_cost_a_little_and_nothing_else_does():
    costly = [r.precision for r in ROWS if r.scheme
              and row(r.precision)["parity"]["loss_difference"][1] > 0]  # fmt: skip
    assert costly == ["int2 level 4"]


def test_ratios_follow_from_the_times():
    for (_, _, phase, tokens), record in RECORDS.items():
        for engine, key in (("torch", "torch"), ("ONNX Runtime", "ort")):
            reference = RECORDS[engine, "float32", phase, tokens]["ms"]
            assert record[f"ratio_to_{key}_float32"] == pytest.approx(
                reference / record["ms"], rel=0.01
            )


def test_no_kernel_is_faster_than_memory():
    for record in CONTENT["records"]:
        if record["phase"] == "decode":
            assert record["limit_ms"] == pytest.approx(
                record["read_mb"] / CONTENT["copy_gb_per_s"], rel=0.01
            )


def test_every_quantized_file_names_its_parity():
    for row in ROWS:
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


def test_a_small_model_runs_through_the_benchmark():
    """Every step of it, down to the sizes of the files, at a shape of one layer."""
    shape = SMOLLM2 | {"num_hidden_layers": 1, "vocab_size": 1024}
    rows = [row for row in ROWS
            if row.engine != "torchao" and row.precision in ("float32", "int8", "int4 level 4")]  # fmt: skip

    def peak(row, *rest):  # the others look at this very process, which takes no start
        return (in_own_process if row.engine == "torch" else peak_memory)(row, *rest)

    records, _ = measure(shape, rows, tokens=2, rounds=1, prompts=(8, 16), peak=peak)
    found = {(r["engine"], r["precision"], r["phase"]): r for r in records}
    assert len(records) == 3 * len(rows)
    assert all(r["ms"] > 0 for r in records)
    assert found["torch", "float32", "prefill"]["peak_mb"] > 0
    float32 = found["torch", "float32", "decode"]
    assert found["ONNX Runtime", "float32", "decode"]["bytes"] == pytest.approx(
        float32["bytes"], rel=0.02
    )
    small = found["ONNX Runtime", "int4 level 4", "decode"]
    assert small["bytes"] < 0.17 * float32["bytes"]
    linear = 576 * (576 * 2 + 192 * 2 + 3 * 1536 + 1024)
    assert small["read_mb"] == pytest.approx(linear * 0.625 / 1e6, abs=0.06)
    torch.set_num_threads(min(2, torch.get_num_threads()))
