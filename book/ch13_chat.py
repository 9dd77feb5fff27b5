# %% [markdown]
# (ch13)=
# # The Wizard's voice
#
# ![A hand holds a brass speaking-trumpet out of a red curtain; two cords hang beside it, and what it says is built of bricks.](_static/tale/ch13.svg)
#
# :::{epigraph}
# The model could go on with any sentence in the country, and so, when Dorothy asked it a question, it
# went on with three more questions. From behind the curtain came a great voice that answered at once.
# "How does it know when it is its turn?" asked Dorothy. "Somebody pulls a cord before I speak," said
# the Wizard, "and another when I have done. Learn to listen for the cords."
# :::
#
# So far our models went on with texts. What people fine-tune today is a model that *answers*: it was
# taught to, on conversations, and it gets a few more of them, of the kind that its owner cares about.
# Then it is rounded, and some of what it learned is lost. This chapter does both to
# SmolLM2-135M-Instruct, which is to learn one small trade: to write the summary line of a docstring.
#
# **What you will learn**
#
# - what a chat model really reads, and which tokens of it are learned: by hand, with the companion, and
#   with TRL, shown equal but for one token;
# - how to train under rounding in TRL's `SFTTrainer`;
# - four roads to three bits: to round a fine-tuned model afterwards, to train under rounding with the
#   labels or with a teacher, and to train adapters inside the rounding;
# - to weigh two things and not one: what was won on the task, and what was forgotten elsewhere.
#
# *Running time: about two and a half minutes on two cores.*

# %% tags=["hide-input"]
import copy
import json
import logging
import tempfile
import textwrap
import warnings
from pathlib import Path

import pandas as pd
import torch
from myst_nb import glue

logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")

import datasets
import transformers
import trl

from companion import W3, convert, fit, load_pretrained, prepare_qat
from companion.course.check import check
from companion.course.figures import read_and_scored, trade
from companion.course.passages import instructed_summaries
from companion.course.sources import load_tokenizer
from companion.data.chat import chat, conversations, encode_chat, render
from companion.evaluation.generation import answers, forgotten, rouge_l
from companion.evaluation.language import document_losses, loss_difference
from companion.qat.lora import lora_qat
from companion.study.tables import Results
from companion.training.losses import default_loss
from companion.training.trainer import QATCallback, QATMixin

transformers.logging.set_verbosity_error()
datasets.disable_progress_bars()
torch.manual_seed(0)
tokenizer = load_tokenizer("smollm2")
print(f"{len(tokenizer):,} tokens")

# %% [markdown]
# ## What the model reads
#
# A language model knows no roles. It reads one text, from left to right. So somebody has to write a
# conversation out as one text, and the rule by which that is done is the model's {term}`chat template`.
# SmolLM2's is short. Each turn stands between two special tokens, with the role on a line of its own;
# and where nobody says otherwise, the conversation begins with a system message.

# %%
talk = [
    {"role": "user", "content": "Where does the road lead?"},
    {"role": "assistant", "content": "To the Emerald City."},
    {"role": "user", "content": "Who lives there?"},
    {"role": "assistant", "content": "A Wizard."},
]
system = "You are a helpful AI assistant named SmolLM, trained by "
system += "Hugging Face"
by_hand = f"<|im_start|>system\n{system}<|im_end|>\n"
for turn in talk:
    by_hand += f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n"
print(by_hand)

# %% [markdown]
# The template is a little program that travels with the tokenizer. transformers runs it, and so does the
# companion:

# %%
theirs = tokenizer.apply_chat_template(talk, tokenize=False)
same = by_hand == render(talk, tokenizer) == theirs
print("by hand, by the companion and by transformers alike:", same)

# %% [markdown]
# When the model is to speak, the same program opens its turn and stops there. The last line of the
# text is the cord that is pulled behind the curtain. A model that was fine-tuned on another template waits
# for another cord, and a good deal of disappointment with chat models is no more than that.

# %%
asked = render(talk[:3], tokenizer, answer=True)
print(asked[-60:])

# %% [markdown]
# ## What it learns from
#
# The loss compares each token with what the model expected there. But should it learn to expect the
# *question*? Its user will write that. What it has to learn are the answers, and when to stop. So the
# label of every other token is set to -100, by which PyTorch's cross-entropy leaves a place out. Going
# through the tokens by hand, we start to score behind the line that opens a turn of the assistant, and
# stop with the token that ends it:

# %%
ids, labels, scoring = [], [], False
for token in tokenizer(by_hand, add_special_tokens=False)["input_ids"]:
    ids.append(token)
    labels.append(token if scoring else -100)
    if tokenizer.decode(ids).endswith("<|im_start|>assistant\n"):
        scoring = True
    elif tokenizer.decode(token) == "<|im_end|>":
        scoring = False
print(f"{sum(x != -100 for x in labels)} of {len(ids)} are scored")

# %% [markdown]
# In a picture, token by token; what is blue is scored, all else is only read:

# %% mystnb={"image": {"alt": "A conversation of two questions and two answers, drawn token by token in boxes. All tokens of the system message, of both questions and of the marks that open a turn are grey. The tokens of the two answers are blue, each with the token that ends the turn."}} tags=["hide-input"]
read_and_scored(
    [tokenizer.decode(token) for token in ids], [x != -100 for x in labels]
)

# %% [markdown]
# The companion's `encode_chat` does the same for any template, one answer or many, and refuses a
# template that writes an answer otherwise when it is given than when it is asked for.

# %%
row = encode_chat(talk, tokenizer)[0]
print("the same tokens:", ids == row["input_ids"])
print("the same labels:", labels == row["labels"])

# %% [markdown]
# (ch13-trl)=
# ## TRL, and one token
#
# Most people fine-tune chat models with TRL's `SFTTrainer`. What does it score? We give it a
# question with its answer and look at the row that it makes. The model is a tiny one with random
# weights, since only the labels matter here; that it is already prepared for three bits we shall need
# in a moment.


# %%
class Trainer(QATMixin, trl.SFTTrainer):
    """SFTTrainer for models that are rounded while they train."""


tiny = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
)
settings = {"max_steps": 4, "learning_rate": 1e-2, "use_cpu": True}
settings |= {"bf16": False, "gradient_checkpointing": False}
trainer = Trainer(
    model=prepare_qat(tiny, W3, skip=["lm_head"]),
    args=trl.SFTConfig(
        tempfile.mkdtemp(), report_to=[], disable_tqdm=True, **settings
    ),
    train_dataset=datasets.Dataset.from_list(
        [{"prompt": talk[:1], "completion": talk[1:2]}]
    ),
    processing_class=tokenizer,
    callbacks=[QATCallback(start=0.5)],
)

# %%
theirs = trainer.train_dataset[0]
ours = encode_chat(talk[:2], tokenizer)[0]
pairs = zip(ours["labels"], theirs["labels"], strict=True)
differ = [place for place, (a, b) in enumerate(pairs) if a != b]
extra = tokenizer.decode(theirs["labels"][differ[0]])
print("the same tokens:", ours["input_ids"] == theirs["input_ids"])
print("labels that differ:", len(differ))
print("what TRL scores there:", repr(extra))

# %% [markdown]
# All but one. TRL scores whatever the template writes after the prompt, and SmolLM2's writes a line
# break behind the token that ends the turn. No model is ever asked for it, since it has stopped by then,
# and it is easily learned. But it counts in the mean: where answers are short, a loss from TRL and one
# from here are not the same number. Left out, they are:

# %%
batch = trainer.data_collator([theirs])
batch["labels"][0, differ[0]] = -100
mine = {name: torch.tensor([column]) for name, column in ours.items()}
same = torch.equal(default_loss(tiny, batch), default_loss(tiny, mine))
print("the same loss without it:", same)

# %% [markdown]
# And this is all that it takes to train under rounding in that trainer: a prepared model, `QATMixin`
# in front of the trainer's class, and a callback that says when the rounding begins (here after half of
# the steps; [](ch11) says when late is better). What comes out is converted as ever, without a change:

# %%
trainer.remove_callback(transformers.PrinterCallback)
trainer.train()
small = convert(trainer.model)
with torch.no_grad():
    before = trainer.model.eval()(mine["input_ids"]).logits
    after = small(mine["input_ids"]).logits
print("converted computes what was trained:", torch.equal(before, after))

# %% [markdown]
# ## A trade to learn
#
# The task comes from docstrings, like most of our texts. The prompt shows what stands below
# the summary line; the answer is the line that the author wrote. Modules whose docstrings are tested are
# never trained on. `load_task("docstring-summaries")` holds thousands of such chats; we take a few short
# ones, so that this page runs on a laptop while you read it.

# %%
found = instructed_summaries(examples=600, held_out=400)
SIZES = {"train": 24, "validation": 4, "test": 12}
splits = {}
for part, size in SIZES.items():
    short = [e._asdict() for e in found[part] if len(e.prompt) <= 180]
    splits[part] = conversations(short[:size])
task = chat("lines", splits, tokenizer, "docstrings", batch_size=4)
prompts = [messages[:-1] for messages in splits["test"][:6]]
authors = [messages[-1]["content"] for messages in splits["test"][:6]]
print(prompts[2][0]["content"])
print("->", authors[2])

# %% [markdown]
# And there is everything else that the model could do before. To notice whether it forgets that, we
# ask it a few everyday questions *now*, and keep its own answers. (These weights passed through a
# four-bit file before they reached us; see [](ch08).)

# %%
original = load_pretrained("smollm2").eval()
everyday = [
    "What is the capital of France?",
    "How many days are there in a week?",
    "What do bees make?",
    "Why is the sky blue?",
    "Name a fruit that is yellow.",
    "What does a baker do?",
]
said = answers(original, tokenizer, everyday, max_new_tokens=20)
outside = [
    [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    for question, answer in zip(everyday, said, strict=True)
]
parts = dict.fromkeys(("train", "validation", "test"), outside)
elsewhere = chat("everyday", parts, tokenizer, "the model itself").test

# %% tags=["nbval-ignore-output"]
for question, answer in zip(everyday[:3], said, strict=False):
    print(f"{question} {answer}")

# %%
print("it knows the capital of France:", "Paris" in said[0])

# %% [markdown]
# ## Two scales
#
# **What was won** is measured on the task: by the loss of the author's line, and by the model's own
# answers. These rarely repeat the author's words, so one counts the longest sequence of words that both
# have in common, in order, as a share of both: {term}`ROUGE-L`. It is crude. It cannot tell a good line
# from a bad one that uses the same words; it can tell a line from a lecture.
#
# **What was forgotten** is measured elsewhere. The model reads its own earlier answers to the everyday
# questions, and at each token we ask how far its expectation has moved from what it was: the
# Kullback-Leibler divergence $\sum_w p(w) \log \frac{p(w)}{q(w)}$ of the original's probabilities $p$
# from the new model's $q$, in nats per token. It is 0 for a model that has not moved at all. It counts
# every change as a loss, welcome or not, and so it is an alarm rather than a verdict.

# %%
STEPS = 6
given, losses, moved = {}, {}, {}


def measure(name, model):
    """What was won on the task, and how far it has moved elsewhere."""
    losses[name] = document_losses(model, task.test)
    given[name] = answers(model, tokenizer, prompts, max_new_tokens=24)
    moved[name] = forgotten(model, original, elsewhere)


measure("before", original)

# %% [markdown]
# :::{admonition} Before you read on
# The model is about to learn from two dozen lines, and then the weights of its layers are rounded, each
# to one of the eight steps that its group has at three bits. Which of the two does more to its answers
# about bees and bakers: the lessons, or the rounding?
# :::
#
# ## Four roads to three bits
#
# First in floating point; this is what most people have when they begin to think about size. It goes by
# the name of *supervised fine-tuning*, SFT. Then that model is rounded to nearest, in groups of 32.

# %%
sft = copy.deepcopy(original)
fit(sft, task.train, steps=STEPS, lr=1e-4, progress=False)
measure("float SFT", sft)

nearest = convert(prepare_qat(sft, W3, "absmax"))
measure("rounded after", nearest)

# %% [markdown]
# Now the same lessons under rounding, from the same start and in as many steps. The ranges are learned
# and begin with an eye on the inputs ([](ch11)). What is imitated are the authors' lines:

# %%
seen = list(task.train)  # what the ranges look at before the first step
qat = prepare_qat(original, W3, calibration=seen)
fit(qat, task.train, steps=STEPS, lr=5e-4, progress=False)
measure("QAT, labels", convert(qat))

# %% [markdown]
# Or the fine-tuned float model. At each scored token it says how likely *every* word is, where an author
# wrote one. Prompts are left out here, too: the teacher speaks only where the student has to.

# %%
qat = prepare_qat(original, W3, calibration=seen)
fit(qat, task.train, teacher=sft, steps=STEPS, lr=5e-4, progress=False)
measure("QAT, teacher", convert(qat))

# %% [markdown]
# Or adapters. {term}`LoRA` leaves the weights $W$ frozen and trains a product of two narrow matrices
# beside them. Here it stands *inside* the rounding, `fake_quantize(W + B A)`, so that it merges into the
# grid to the last bit; an adapter beside a rounded layer does not merge, and has to be served as a
# second part.

# %%
adapted = lora_qat(original, W3, 8, calibration=seen)
trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
whole = sum(p.numel() for p in original.parameters())
print(f"{trained:,} of {whole:,} numbers train: {trained / whole:.1%}")
fit(adapted, task.train, steps=STEPS, lr=1.5e-3, progress=False)
merged = convert(adapted.merge_and_unload())
measure("LoRA-QAT", merged)

# %% [markdown]
# Adapters begin at nothing and have further to go, so they take a larger learning rate. The rates here
# are guesses after a look at other runs; the study below finds one for each arm. On a dozen test chats:

# %% tags=["nbval-ignore-output"]
table = pd.DataFrame(
    {
        "loss": {n: f"{x.mean:.2f}" for n, x in losses.items()},
        "ROUGE-L": {
            n: f"{rouge_l(x, authors).value:.2f}" for n, x in given.items()
        },
        "moved elsewhere": {n: f"{x.value:.2f}" for n, x in moved.items()},
    }
)
print(table.to_string())

# %% mystnb={"image": {"alt": "Six named points: loss on the task across, how far the model has moved elsewhere upwards. Before training nothing has moved and the loss is high. Fine-tuned in floating point the loss is low and little has moved. The same model rounded afterwards lies far to the right and high up. The three that trained under rounding lie between the two."}} tags=["hide-input", "nbval-ignore-output"]
trade(
    {name: (losses[name].mean, moved[name].value) for name in losses},
    xlabel="loss on the task, nats per token (left: more was won)",
    ylabel="moved elsewhere, nats per token",
)

# %% [markdown]
# Downwards and to the left is where one wants to be. The margins were fixed before this page was first
# run, after a trial of four steps on other chats:

# %%
lesson = loss_difference(losses["before"], losses["float SFT"])
damage = loss_difference(losses["rounded after"], losses["float SFT"])
back = {
    name: loss_difference(losses["rounded after"], losses[name]).value
    for name in losses
    if "QAT" in name
}
further = moved["rounded after"].value > moved["float SFT"].value
print("float SFT wins more than 0.2 nats:           ", lesson.value > 0.2)
print("rounding it costs more than 0.3:             ", damage.value > 0.3)
print(
    "each road takes more than 0.2 of that back:  ",
    min(back.values()) > 0.2,
)
print("rounding moves it further than the lessons:  ", further)

# %% [markdown]
# So much for bees and bakers: the rounding did more to them than the lessons. What looks like forgetting
# in a small fine-tuned model may be rounding first of all. In the last column the models that trained under
# rounding have moved less far than the one that was rounded afterwards, and nobody taught them about bees:
# a weight that rounding broke was broken for every question, and what mends it mends more than the task.
#
# ### Side by side
#
# Numbers of a dozen chats are soon believed and soon forgotten. Here is what the six models say. Read
# it with suspicion: one answer more or less proves nothing.

# %% tags=["nbval-ignore-output"]
for place in (1, 2):
    body = prompts[place][0]["content"].partition("\n\n")[2]
    print(textwrap.shorten(body, 74))
    for name, texts in {"author": authors, **given}.items():
        lines = textwrap.wrap(" ".join(texts[place].split()), 56)
        print(
            f"  {name:14}", "\n                 ".join(lines[:2] or ["-"])
        )
    print()

# %% [markdown]
# And to the everyday questions, which none of them was trained on:

# %% tags=["nbval-ignore-output"]
both = {"rounded after": nearest, "LoRA-QAT": merged}
talked = {
    name: answers(model, tokenizer, everyday[:3], max_new_tokens=16)
    for name, model in both.items()
}
for place, question in enumerate(everyday[:3]):
    print(question)
    for name, texts in talked.items():
        print(f"  {name:14}", textwrap.shorten(texts[place], 56) or "-")

# %%
complete = all(len(texts) == len(prompts) for texts in given.values())
print("every model answered every prompt:", complete)

# %% [markdown]
# ### The alarm, by hand
#
# What `forgotten` does fits into a cell: two forward passes over the same text, and a divergence at
# every token that is scored.

# %%
batch = next(iter(elsewhere))
inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
with torch.no_grad():
    p, q = (
        model(**inputs).logits[:, :-1].log_softmax(-1)
        for model in (original, sft)
    )
counts = batch["labels"][:, 1:] != -100  # each token predicts the next
by_hand = float((p.exp() * (p - q)).sum(-1)[counts].mean())
theirs = forgotten(sft, original, [batch]).value
print("the same:", abs(by_hand - theirs) < 1e-3 * theirs)

# %% [markdown]
# (ch13-study)=
# ## The study
#
# Six steps on two dozen chats show how it goes, not how far. For that there is one command:
#
# ```
# python -m benchmarks.chat
# ```
#
# Forty steps of eight chats, three draws of the training chats, three hundred and twenty test chats of modules
# that no run trains on, three bits and four, and a learning rate for every arm, the best of three or more
# on validation. Beside the arms above stand GPTQ of the fine-tuned model, torchao's own training under
# rounding, and adapters outside the rounding. What is to be compared was written down before any of the
# runs, in `benchmarks/hypotheses.md`.

# %% tags=["hide-input"]
content = json.loads(
    (Path("..") / "benchmarks" / "results" / "chat.json").read_text()
)
ARMS = {
    "original": "as it came",
    "float": "float SFT",
    "nearest": "rounded to nearest",
    "gptq": "rounded by GPTQ",
    "lsq calibrated, labels, first": "QAT, labels",
    "lsq calibrated, teacher, first": "QAT, teacher",
    "torchao, labels, first": "torchao's QAT, labels",
    "lora_qat calibrated, labels, first": "LoRA inside",
    "lora_outside calibrated, labels, first": "LoRA outside",
}
PLAN = [("float", "original"), ("float", "float")]
PLAN += [(s, a) for s in ("W4 g32", "W3 g32") for a in ARMS if a != "float"]
cells = {}
for run in content["records"]:
    if "loss" in run:
        cells.setdefault((run["scheme"], run["method"]), []).append(run)
there = [cell for cell in PLAN if cell in cells]
missing = [cell for cell in PLAN if cell not in cells]
packages = content["packages"]


def estimate(cell, measure):
    """A measure of a cell with its interval over chats and draws."""
    runs, strata = cells[cell], packages
    if measure != "loss":
        low_is_good = measure == "forgotten"
        runs = [
            run[measure] | {"higher_is_better": not low_is_good}
            for run in runs
        ]
        strata = None if low_is_good else packages[: len(runs[0]["total"])]
    e = Results(runs, strata).estimate()
    return f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}]"


def lines(*measures):
    """A row for each cell that was measured."""
    rows = [
        {
            "": f"{scheme}, {ARMS[method]}",
            "draws": len(cells[scheme, method]),
        }
        | {name: estimate((scheme, method), name) for name in measures}
        for scheme, method in there
    ]
    if not rows:
        return "no cell is measured yet"
    return pd.DataFrame(rows).to_string(index=False)


glue("ch13-there", str(len(there)), display=False)
glue("ch13-planned", str(len(PLAN)), display=False)
glue("ch13-answered", str(content["sizes"]["answered"]), display=False)

# %% [markdown]
# The study takes hours, and its file grows cell by cell. On this page {glue:text}`ch13-there` of
# {glue:text}`ch13-planned` cells are measured; those that are not are named below, and no sentence of this
# chapter rests on them. First what was won, with 95 % intervals: the loss of the authors' lines, and
# ROUGE-L of the model's own answers to the first {glue:text}`ch13-answered` prompts.

# %%
print(lines("loss", "rouge_l"))

# %% [markdown]
# Then the form and the alarm. *Format* is the share of answers that look as a summary has to: one line,
# one sentence, a capital in front and a full stop behind, twenty-five words at most. *Forgotten* is the
# divergence from the original on its own answers to forty everyday questions.

# %%
print(lines("format", "forgotten"))

# %% [markdown]
# A cell of one draw has an interval over chats alone, which is too narrow: another draw of the lessons
# would have moved it as well. A comparison is only judged when both of its arms have all three draws and
# the rest of its family is complete. So the verdicts, and what is still to come:

# %%
for line in content["verdicts"]:
    first, second = (ARMS[line[k]] for k in ("first", "second"))
    print(f"{line['family']}: {line['scheme']}: {first} against {second}")
    print(
        f"   {line['verdict']}, by {line['difference']:.3f} "
        f"[{line['low']:.3f}, {line['high']:.3f}] nats, n = {line['n']}"
    )
print(len(content["verdicts"]), "comparisons are judged")
print("not measured yet:")
waiting = [f"{scheme}, {ARMS[method]}" for scheme, method in missing]
print("\n".join(f"   {name}" for name in waiting) or "   nothing")

# %% [markdown]
# ## When to use which
#
# What follows is advice, and only part of it was shown on this page.
#
# - **You have a fine-tuned float model, and four bits are enough.** Round it, by GPTQ if you can spare
#   a few minutes, and measure both scales before you train anything. [](ch09) and [](ch11) show what
#   four bits cost the same model on running text.
# - **Three bits or fewer, and you have the lessons.** Train under rounding. Labels need nothing but the
#   data. A teacher needs the float model to be trained first, and a second forward pass in every step;
#   `store_teacher` writes its answers down once, so that it need not stay in memory.
# - **Memory is short.** Adapters inside the rounding train a small share of the numbers, and the optimizer
#   keeps its two moments for those alone ([](ch16)). They merge to the last bit, so what you serve is
#   an ordinary rounded model.
# - **Many trades on one rounded base.** Adapters outside: the base is stored once and each trade is a small
#   file beside it, served in two parts.
# - **Whatever you choose, weigh both scales.** A loss on the task says nothing of what the model no longer
#   knows. Keep some of its old answers, and listen for the alarm.
#
# On a file of your own conversations the whole comparison is one command, and another talks with what
# came of it. The file has a line for each conversation, with `messages`, or `prompt` and `completion`:
#
# ```
# companion finetune smollm2 --task chat.jsonl --scheme W4 \
#     --method default --method lora
# companion chat finetuned/W4-g32-lora
# ```
#
# ## Quiz
#
# ```{quiz} ch13
# Three questions, each answer explained: they stand in `_quizzes/ch13.md` beside this notebook.
# ```
#
# ## Exercises
#
# ```{exercise} Pull the cord
# :label: ch13-mask
# A conversation is a list of pairs, a role and its tokens. Write `mask(turns)`: the labels of all tokens
# in one list, -100 wherever the assistant does not speak. Replace the `...` and run the cell.
# ```


# %%
def mask(turns): ...  # your turn


check("ch13-mask", mask)

# %% [markdown]
# ```{solution} ch13-mask
# :class: dropdown
# The token that ends a turn belongs to the tokens of that turn, and so it is learned.
# ```


# %% tags=["hide-cell"]
def mask(turns):
    labels = []
    for role, tokens in turns:
        said = role == "assistant"
        labels += tokens if said else [-100] * len(tokens)
    return labels


check("ch13-mask", mask)

# %% [markdown]
# ```{exercise} Words in common, in order
# :label: ch13-rouge
# Write `rouge(given, author)` for two texts whose words are split at spaces: twice the length of their
# longest common subsequence, over the number of words of both. Replace the `...` and run the cell.
# ```


# %%
def rouge(given, author): ...  # your turn


check("ch13-rouge", rouge)

# %% [markdown]
# ```{solution} ch13-rouge
# :class: dropdown
# A table of the longest common subsequence of all beginnings: one more than the beginnings without
# their last words where these are equal, otherwise the better of leaving either out.
# ```


# %% tags=["hide-cell"]
def rouge(given, author):
    a, b = given.split(), author.split()
    best = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            skip = max(best[i - 1][j], best[i][j - 1])
            best[i][j] = best[i - 1][j - 1] + 1 if x == y else skip
    return 2 * best[-1][-1] / (len(a) + len(b))


check("ch13-rouge", rouge)

# %% [markdown]
# ```{exercise} The alarm
# :label: ch13-forgotten
# `original` and `model` are logits of shape (tokens, words), and `labels` says which rows are scored: those
# that are not -100. Write `alarm(original, model, labels)`, the mean divergence of the original from the
# model over those rows. Replace the `...` and run the cell.
# ```


# %%
def alarm(original, model, labels): ...  # your turn


check("ch13-forgotten", alarm)

# %% [markdown]
# ```{solution} ch13-forgotten
# :class: dropdown
# Keep the scored rows first. The weights of the sum are the original's probabilities, not the model's.
# ```


# %% tags=["hide-cell"]
def alarm(original, model, labels):
    rows = labels != -100
    p = original[rows].log_softmax(-1)
    q = model[rows].log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


check("ch13-forgotten", alarm)

# %% [markdown]
# ## What we saw
#
# - A chat model reads one text, which its template writes. By hand, by the companion and by
#   transformers it is the same, to the last sign.
# - Only answers are scored, each up to the token that ends it. TRL scores one token more, the line break
#   behind it; without that the losses are equal bit for bit.
# - `SFTTrainer` trains under rounding with a mixin and a callback, and what it trained is converted without a
#   change.
# - In six steps at three bits, each of the three ways of training under rounding took back part of what
#   rounding afterwards had cost, on the task.
# - Rounding to three bits moved the model further from itself, on questions that no lesson was
#   about, than the lessons did.
# - How much of this holds at full length is for the study to say, as far as its cells are measured.
#
# :::{epigraph}
# In the evening the model sat by the window and answered the neighbours, each in one line and a full
# stop. "It has a good voice," said Dorothy. "It has mine," said the Wizard, "and a few words of yours.
# Ask it now and then about the bees, my dear. A pupil who has forgotten them will not tell you so."
# :::
#
# ## References
#
# - {cite:t}`ouyang2022`: fine-tuning on demonstrations, before people's preferences are learned.
# - {cite:t}`lin2004`: ROUGE, by the longest common subsequence and otherwise.
# - {cite:t}`hu2022`: low-rank adapters. {cite:t}`dettmers2023`: adapters on a rounded base.
# - {cite:t}`allal2025`: the model.
