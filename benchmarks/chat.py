"""A chat model is fine-tuned and rounded: what was won on the task, and what was forgotten.

    python -m benchmarks.chat                         (hours; interrupted, it goes on)
    python -m benchmarks.chat --workers 2             (one process on each of two cores)
    python -m benchmarks.chat --small                 (tries every kind of run for four steps)

SmolLM2-135M-Instruct learns to write the summary line of a docstring: 40 optimizer steps of 8 chats,
three draws of the training chats, 320 test chats of modules that no run trains on. Every arm is
measured three ways: by the loss of the author's line, by its own greedy answers (ROUGE-L, and whether
they are one line that ends as a sentence does), and by how far its predictions on everyday questions
have moved from those of the model that it was made of. See benchmarks.arms for what the arms share,
and benchmarks/hypotheses.md for the rules. The jobs stand in the order of their weight, one draw of
every cell before the others. Writes benchmarks/results/chat.json.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.arms import (
    FLOAT,
    SEEDS,
    TUNING,
    W3,
    W4,
    Arm,
    Budget,
    Job,
    Study,
    Work,
    command,
    exact,
)
from benchmarks.verdicts import Families, judge
from companion import QuantScheme, convert, prepare_qat
from companion.course.corpus import docstrings
from companion.course.passages import instructed_summaries
from companion.course.sources import load_tokenizer
from companion.data.chat import Messages, conversations, encode_chat
from companion.data.examples import Collator
from companion.evaluation.estimates import Scores
from companion.evaluation.generation import answers, forgotten, rouge_l
from companion.files import cache_folder, write_atomically
from companion.qat.lora import convert_base, lora_outside, lora_qat
from companion.study.tables import scheme_name
from companion.training.losses import distillation_loss

MOST = 112
"""Tokens of a chat at most: short ones, so that a study takes hours and not days."""
TRAINED, CALIBRATED = 320, 128
"""Chats of a draw; and those for GPTQ, which no run trains on."""
HELD_OUT = {"validation": 64, "test": 320}
ANSWERED, NEW_TOKENS = 100, 40
"""Test chats that are answered, the same ones for every arm, and tokens of an answer at most."""
KEPT = 16
"""Answers that the results file shows."""
RANK = 8
EVERYDAY = (
    "What is the capital of France?",
    "What is the capital of Japan?",
    "How many days are there in a week?",
    "Name three primary colours.",
    "What do bees make?",
    "Who wrote Romeo and Juliet?",
    "Why is the sky blue?",
    "How do I boil an egg?",
    "What is the opposite of hot?",
    "Say hello to my friend Anna.",
    "Give me a name for a small dog.",
    "What is the largest planet of our solar system?",
    "How does a bicycle stay upright?",
    "What should I pack for a day at the beach?",
    "Tell me a fact about elephants.",
    "Translate 'good morning' into French.",
    "What is two plus three?",
    "Write a sentence about rain.",
    "Why do leaves fall in autumn?",
    "What is a good breakfast?",
    "How can I fall asleep more easily?",
    "What is the difference between a lake and a river?",
    "Name a fruit that is yellow.",
    "Who was Albert Einstein?",
    "What is a noun?",
    "Suggest a title for a story about a lost key.",
    "How many legs does a spider have?",
    "What do plants need to grow?",
    "Explain what a library is to a child.",
    "What is the freezing point of water?",
    "Describe the taste of a lemon.",
    "What is the fastest animal on land?",
    "How do I say thank you politely?",
    "What is a rainbow?",
    "Give me a tip for learning a language.",
    "What does a baker do?",
    "Why is exercise good for you?",
    "What colour do you get from blue and yellow?",
    "Write a short birthday wish.",
    "Where does chocolate come from?",
)
"""Chats outside the task; the original model's own answers to them are what may be forgotten."""

BUDGET = Budget((3e-5, 1e-4, 3e-4), (5e-5, 1.5e-4, 5e-4), steps=40, looks=2, bfloat16=True)
AROUND = {W4: (5e-5, 1.5e-4, 5e-4), W3: (1.5e-4, 5e-4, 1.5e-3)}
ADAPTERS = (5e-4, 1.5e-3, 4.5e-3)
"""Rates that adapters begin with, which start at nothing and have further to go."""
LABELS, TORCHAO = Arm("lsq", calibrated=True), Arm("torchao")
TEACHER = replace(LABELS, target="teacher")
INSIDE, OUTSIDE = Arm("lora_qat", calibrated=True), Arm("lora_outside", calibrated=True)
SCHEMES = (W3, W4)
FAMILIES: Families = {
    "I": [(scheme_name(s), LABELS.name, TORCHAO.name) for s in SCHEMES],
    "J": [(scheme_name(s), TEACHER.name, LABELS.name) for s in SCHEMES],
    "K": [(scheme_name(s), (LABELS.name, TEACHER.name), "gptq") for s in SCHEMES],
    "L": [(scheme_name(s), INSIDE.name, LABELS.name) for s in SCHEMES],
    "M": [(scheme_name(s), INSIDE.name, OUTSIDE.name) for s in SCHEMES],
}
"""As in benchmarks/hypotheses.md."""


@dataclass(frozen=True)
class ChatTexts:
    """Chats to train on by draw, and held-out ones with the packages they come from.

    Parameters
    ----------
    draws : dict of int to list of list of dict
        Messages; what is beyond `TRAINED` in the tuning draw is for GPTQ.
    held_out : dict of str to list of list of dict
    packages : dict of str to list of str
    sha256 : str
    versions : dict of str to str
    tokenizer : PreTrainedTokenizerFast
    """

    draws: dict[int, list[Messages]]
    held_out: dict[str, list[Messages]]
    packages: dict[str, list[str]]
    sha256: str
    versions: dict[str, str]
    tokenizer: object
    size = MOST

    def train(self, draw: int, steps: int, rows: int, device: torch.device) -> list[dict]:
        """Return one batch for each step, no chat twice."""
        if steps * rows > TRAINED:
            raise ValueError(f"draw {draw} holds {TRAINED} chats, not {steps * rows}")
        return self.batches(self.draws[draw][: steps * rows], rows, device)

    def test(self, part: str, rows: int, device: torch.device) -> list[dict]:
        """Return batches of "validation" or "test", of chats of like length."""
        return self.batches(self.held_out[part], rows, device, measured=True)

    def calibration(self, rows: int, batch: int, device: torch.device) -> list[dict]:
        """Return chats for GPTQ and for ranges, which no run trains on, from the end of the tuning draw.

        One at a time whatever `batch` says, since GPTQ would count padding as an input.
        """
        kept = self.batches(self.draws[TUNING][TRAINED:][-rows:], 1, device)
        return [
            {name: column for name, column in each.items() if name != "labels"} for each in kept
        ]

    def batches(
        self, chats: Sequence[Messages], rows: int, device: torch.device, measured: bool = False
    ) -> list[dict]:
        """Encode chats; those to measure on are sorted by length, and numbered as they were."""
        encoded = [encode_chat(messages, self.tokenizer)[0] for messages in chats]
        if measured:
            encoded = [row | {"document": number} for number, row in enumerate(encoded)]
            encoded.sort(key=lambda row: len(row["input_ids"]))
        collate = Collator(self.tokenizer)
        found = (collate(encoded[at : at + rows]) for at in range(0, len(encoded), rows))
        return [{name: column.to(device) for name, column in batch.items()} for batch in found]


def write(path: Path, model: str = "smollm2") -> None:
    """Choose the chats of this machine's docstrings that are short enough for a model."""
    tokenizer = load_tokenizer(model)
    found = instructed_summaries(20_000, 4_000)
    sizes = {"train": len((*SEEDS, TUNING)) * TRAINED + CALIBRATED, **HELD_OUT}
    kept: dict[str, list] = {part: [] for part in sizes}
    for part, size in sizes.items():
        for example in found[part]:
            (chat,) = conversations([example._asdict()])
            if len(kept[part]) < size and len(encode_chat(chat, tokenizer)[0]["input_ids"]) <= MOST:
                kept[part].append((chat, example.package))
        if len(kept[part]) < size:
            raise ValueError(f"{part} has {len(kept[part])} chats of {MOST} tokens, not {size}")
    chats = {part: [chat for chat, _ in some] for part, some in kept.items()}
    content = {
        "draws": {str(draw): chats["train"][place * TRAINED : (place + 1) * TRAINED]
                  for place, draw in enumerate(SEEDS)}
        | {str(TUNING): chats["train"][len(SEEDS) * TRAINED :]},
        "held_out": {part: chats[part] for part in HELD_OUT},
        "packages": {part: [package for _, package in kept[part]] for part in HELD_OUT},
        "versions": docstrings(progress=False).versions,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda partial: partial.write_text(json.dumps(content)))


def read(path: Path | None = None, model: str = "smollm2") -> ChatTexts:
    """Read the file, or without one choose the chats now and keep them among cached files."""
    if path is None:
        path = cache_folder() / f"chats-{model}-{docstrings(progress=False).sha256[:12]}.json"
        if not path.exists():
            write(path, model)
    text = path.read_text()
    content = json.loads(text)
    draws = {int(draw): chats for draw, chats in content.pop("draws").items()}
    sha = hashlib.sha256(text.encode()).hexdigest()
    return ChatTexts(draws=draws, sha256=sha, tokenizer=load_tokenizer(model), **content)


class ChatStudy(Study):
    """A study whose arms may be adapters, and which hears what they answer."""

    after = ("nearest", "gptq")
    one_shape = False

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        asked = self.texts.held_out["test"][: 4 if self.small else ANSWERED]
        self.prompts = [chat[:-1] for chat in asked]
        self.authors = [chat[-1]["content"] for chat in asked]
        shown = [{"prompt": chat[0]["content"], "author": chat[1]["content"]} for chat in asked]
        self.kept("asked", lambda: {"asked": shown[:KEPT]})
        self.everyday = EVERYDAY[: 2 if self.small else None]
        said = self.kept("everyday", self.original_answers)["answers"]
        chats = [[{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                 for question, answer in zip(self.everyday, said, strict=True)]  # fmt: skip
        self.outside = self.texts.batches(chats, 2 * self.rows, self.device, measured=True)

    def original_answers(self) -> dict:
        """What the model says to everyday questions before it learns anything."""
        return {"answers": self.answer(self.start, self.everyday)}

    def answer(self, model: nn.Module, prompts: Sequence) -> list[str]:
        with exact():
            return answers(
                model, self.texts.tokenizer, prompts, max_new_tokens=NEW_TOKENS, batch_size=25
            )

    def do(self, job) -> None:
        """As in `Study`; ("original", scheme, draw) is the start, rounded to nearest if at all."""
        if isinstance(job, tuple) and job[0] == "original":
            name = f"{scheme_name(job[1])}, original"
            self.kept(name, partial(self.original, job[1]))
        else:
            super().do(job)

    def original(self, scheme: QuantScheme | None) -> dict:
        model = self.start
        if scheme is not None:
            model = convert(prepare_qat(model, scheme, "absmax"))
        return self.record(model, test=True) | {
            "scheme": scheme_name(scheme), "method": "original", "seed": 0, "steps": 0,
            "float_steps": 0, "lr": 0.0, "training_tokens": 0,
        }  # fmt: skip

    def prepare(self, model: nn.Module, method: str, scheme, seen: list | None):
        if method == "lora_qat":
            adapted = lora_qat(model, scheme, RANK, calibration=seen)
            return adapted, lambda trained: convert(trained.merge_and_unload())
        if method == "lora_outside":
            return lora_outside(model, scheme, RANK, calibration=seen), convert_base
        return super().prepare(model, method, scheme, seen)

    def imitation(self, teacher: nn.Module):
        return distillation_loss(teacher)

    def tokens(self, draw: int, steps: int) -> int:
        batches = self.texts.train(draw, steps, self.rows, torch.device("cpu"))
        return sum(int(batch["attention_mask"].sum()) for batch in batches)

    def record(self, model: nn.Module, test: bool) -> dict:
        record = super().record(model, test)
        if not test:
            return record
        said = self.answer(model, self.prompts)
        with exact():
            moved = forgotten(model, self.start, self.outside)
        also = {"rouge_l": rouge_l(said, self.authors), "format": summary_format(said),
                "forgotten": moved}  # fmt: skip
        return record | {"answers": said[:KEPT]} | {
            name: {"value": scores.value, "total": [round(float(x), 4) for x in scores.total],
                   "weight": scores.weight.tolist()} for name, scores in also.items()
        }  # fmt: skip


def summary_format(given: Sequence[str]) -> Scores:
    """Share of answers that have the form of a summary: one line, one sentence, 25 words at most.

    The tests of the task's own answers, which all have it, are in tests/benchmarks/test_chat.py.

    Examples
    --------
    >>> summary_format(["Return the sum.", "Sure! Here it is.", "Return", "Two\\nlines."]).total
    array([1., 0., 0., 0.])
    """
    right = [
        bool(re.fullmatch(r"[A-Z][^\n:]*[^\s.:]\.", text))
        and not re.search(r"[.!?] [A-Z]", text)
        and len(text.split()) <= 25
        for text in given
    ]
    return Scores(np.array(right, float), np.ones(len(right)))


def more(records: list[dict], packages: list[str]) -> dict:
    """The verdicts on complete families, and how much was asked."""
    runs = [record for record in records if "method" in record]
    return {
        "verdicts": judge(runs, packages, FAMILIES, BUDGET.steps),
        "everyday": list(EVERYDAY),
        "sizes": {"answered": ANSWERED, "everyday": len(EVERYDAY), **HELD_OUT},
    }


def jobs() -> Work:
    """In the order of their weight: one draw of each cell first, then the others."""
    arms = (LABELS, TEACHER, INSIDE, TORCHAO, OUTSIDE)
    rates = dict.fromkeys((INSIDE, OUTSIDE), ADAPTERS)
    cells = [Job(arm, s, rates=rates.get(arm, AROUND[s])) for arm in arms for s in SCHEMES]
    queue: list = [("original", None, 0), Job(FLOAT, draws=(0,))]
    queue += [("ptq", s, 0) for s in SCHEMES]
    queue += [replace(job, draws=(0,)) for job in cells]
    queue += [("original", s, 0) for s in SCHEMES]
    queue += [Job(FLOAT)]
    queue += [("ptq", s, draw) for s in SCHEMES for draw in SEEDS]
    return queue + cells


if __name__ == "__main__":
    command("chat", "smollm2", jobs(), BUDGET, __doc__, more, ChatStudy, read)
