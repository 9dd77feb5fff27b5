"""The study of chats: every arm trains and is heard; what is announced runs; claims are held."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.arms import SEEDS, TUNING, W3, Job
from benchmarks.chat import (
    ANSWERED,
    BUDGET,
    EVERYDAY,
    FAMILIES,
    HELD_OUT,
    MOST,
    TRAINED,
    ChatStudy,
    ChatTexts,
    jobs,
    summary_format,
)
from companion.course.passages import instructed_summaries
from companion.data.text import IGNORED
from companion.evaluation.estimates import Scores
from companion.study.tables import scheme_name
from companion.training.losses import default_loss, distillation_loss
from tests import tiny

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PATH = BENCHMARKS / "results" / "chat.json"
RECORDS = [r for r in json.loads(PATH.read_text())["records"] if "method" in r] \
    if PATH.exists() else []  # fmt: skip
ARMS = sorted({job.arm for job in jobs() if isinstance(job, Job)}, key=lambda arm: arm.name)


@pytest.fixture(scope="module")
def texts() -> ChatTexts:
    tokenizer = tiny.byte_level(pad_token="[PAD]", model_max_length=256)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|stop|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|start|>{{ m.role[0] }}\n{{ m.content }}<|stop|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start|>a\n{% endif %}"
    )
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": "the road"}]
             for text in tiny.TEXTS] * 11  # fmt: skip
    held_out = dict.fromkeys(HELD_OUT, chats[:8])
    packages = {part: ["a"] * 8 for part in HELD_OUT}
    return ChatTexts(dict.fromkeys((*SEEDS, TUNING), chats), held_out, packages, "", {}, tokenizer)


@pytest.fixture
def study(tmp_path, texts) -> ChatStudy:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(texts.tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=True, bos_token_id=None, initializer_range=0.2,
        eos_token_id=texts.tokenizer.eos_token_id, max_position_embeddings=256,
    )  # fmt: skip
    return ChatStudy(tmp_path, texts, LlamaForCausalLM(config).eval(), torch.device("cpu"),
                     math.inf, BUDGET, small=True)  # fmt: skip


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_no_arm_is_void_and_each_is_measured_three_ways(arm, study, monkeypatch):
    monkeypatch.setattr(study, "tune", lambda job: 3e-2)  # of the control that is imitated, too
    job = Job(arm, None if arm.method == "float" else W3)
    before = copy.deepcopy(study.start)
    record = study.run(job, 0, 3e-2, test=True)
    moved = [loss for _, loss in record["validation"]]
    assert moved[-1] < moved[0]
    assert record["loss"] < study.measure(study.start, "test").mean
    assert record["forgotten"]["value"] > 0
    assert len(record["rouge_l"]["total"]) == len(record["format"]["total"]) == len(study.prompts)
    assert 0 < record["training_tokens"] < 4 * 2 * MOST
    same = zip(before.parameters(), study.start.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)  # the next arm starts from the same


def test_the_original_has_forgotten_nothing_and_rounding_it_moves_it(study):
    whole, rounded = study.original(None), study.original(W3)
    assert whole["forgotten"]["value"] == pytest.approx(0, abs=1e-6)
    assert rounded["forgotten"]["value"] > 1e-4
    for name in study.after:
        study.round_after(W3, name, 0)  # of the control, which is trained first
    found = {json.loads(p.read_text()).get("method") for p in study.work.glob("W3*.json")}
    assert found == set(study.after)


def test_teachers_and_labels_speak_of_the_answers_alone(study, texts):
    (batch,) = texts.train(0, 1, 2, torch.device("cpu"))
    assert (batch["labels"] == IGNORED).any()
    other = batch | {"input_ids": batch["input_ids"].clone()}
    rows, places = torch.where(batch["labels"] != IGNORED)
    other["input_ids"][rows[-1], places[-1]] = 5  # its last scored token is only predicted
    teacher = copy.deepcopy(study.start)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(1.5)
    for loss in (default_loss, study.imitation(teacher)):
        assert torch.equal(loss(study.start, batch), loss(study.start, other))
    wanted = distillation_loss(teacher)(study.start, batch)
    assert torch.equal(study.imitation(teacher)(study.start, batch), wanted)


def test_batches_hold_each_chat_once_and_calibration_no_answer_to_learn(texts):
    place = torch.device("cpu")
    assert sum(len(b["labels"]) for b in texts.train(0, 5, 3, place)) == 15
    owners = [d for b in texts.test("test", 3, place) for d in b["document"].tolist()]
    assert sorted(owners) == list(range(8)) != owners  # sorted by length, numbered as they were
    seen = texts.calibration(4, 2, place)
    assert len(seen) == 4
    assert all("labels" not in batch and batch["attention_mask"].all() for batch in seen)
    with pytest.raises(ValueError, match=f"holds {TRAINED} chats"):
        texts.train(0, TRAINED, 2, place)


def test_the_form_of_a_summary_is_that_of_the_authors():
    authors = [example.completion for example in instructed_summaries()["test"]]
    assert summary_format(authors).value == 1
    others = ["", "No end", "two Lines.\nHere.", "It is. Two sentences.", "Here you are: a line.",
              "```Return it.```", "A " * 26 + "word."]  # fmt: skip
    assert summary_format(others).value == 0


def test_what_is_announced_is_what_runs():
    text = (BENCHMARKS / "hypotheses.md").read_text()
    queue = jobs()
    known = {tuple(job.name.split(", ", 1)) for job in queue
             if isinstance(job, Job) and job.draws == SEEDS}  # fmt: skip
    for scheme in {duel[0] for duels in FAMILIES.values() for duel in duels}:
        assert {("ptq", draw) for draw in SEEDS} <= {
            (job[0], job[2]) for job in queue
            if isinstance(job, tuple) and job[1] and scheme_name(job[1]) == scheme
        }  # fmt: skip
        known.add((scheme, "gptq"))
    for family, duels in FAMILIES.items():
        assert f"**{family}: " in text
        for scheme, first, second in duels:
            for name in (*((first,) if isinstance(first, str) else first), second):
                assert (scheme, name) in known
    first = [job.name for job in queue if isinstance(job, Job) and job.draws == SEEDS[:1]]
    assert set(first) == {job.name for job in queue if isinstance(job, Job)}  # one draw of each


def cell(scheme, method):
    return [r for r in RECORDS if (r["scheme"], r["method"]) == (scheme, method) and "loss" in r]


@pytest.mark.parametrize("record", [r for r in RECORDS if "loss" in r], ids=lambda r: r["name"])
def test_a_record_is_whole(record):
    assert len(record["total"]) == HELD_OUT["test"] >= 300
    assert len(record["rouge_l"]["total"]) == len(record["format"]["total"]) == ANSWERED >= 100
    assert len(record["forgotten"]["total"]) == len(EVERYDAY)
    assert sum(record["total"]) / sum(record["weight"]) == pytest.approx(record["loss"], 1e-4)
    for name in ("rouge_l", "format", "forgotten"):
        kept = record[name]
        scores = Scores(*(torch.tensor(kept[key]).double().numpy() for key in ("total", "weight")))
        assert scores.value == pytest.approx(kept["value"], abs=1e-3)
    assert record["machine"]
    assert record["steps"] in (0, BUDGET.steps)


@pytest.mark.parametrize(
    "record", [r for r in RECORDS if "loss" in r and r["lr"]], ids=lambda r: r["name"]
)
def test_its_rate_was_chosen_inside(record):
    tried = {r["lr"]: r["validation_loss"] for r in RECORDS
             if r["seed"] == TUNING and (r["scheme"], r["method"]) == (record["scheme"], record["method"])}  # fmt: skip
    assert len(tried) >= 3
    assert record["lr"] == min(tried, key=tried.get)
    assert min(tried) < record["lr"] < max(tried)
