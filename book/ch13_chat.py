# %% [markdown]
# (ch13)=
# # The Wizard's voice

# %% tags=["hide-input"]
import copy
import json
import tempfile
import textwrap
import warnings
from pathlib import Path

import datasets
import pandas as pd
import torch
import transformers
import trl
from myst_nb import glue

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

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
datasets.disable_progress_bars()
torch.manual_seed(0)
tokenizer = load_tokenizer("smollm2")
print(f"{len(tokenizer):,} tokens")

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

# %%
theirs = tokenizer.apply_chat_template(talk, tokenize=False)
print("by hand, companion and transformers alike:",
      by_hand == render(talk, tokenizer) == theirs)

# %%
asked = render(talk[:3], tokenizer, answer=True)
print(asked[-60:])

# %%
ids, labels, scoring = [], [], False
for token in tokenizer(by_hand, add_special_tokens=False)["input_ids"]:
    ids.append(token)
    labels.append(token if scoring else -100)
    if tokenizer.decode(ids).endswith("<|im_start|>assistant\n"):
        scoring = True
    elif tokenizer.decode(token) == "<|im_end|>":
        scoring = False

row = encode_chat(talk, tokenizer)[0]
print("the same tokens:", ids == row["input_ids"])
print("the same labels:", labels == row["labels"])
print(f"{sum(x != -100 for x in labels)} of {len(ids)} are scored")

# %% mystnb={"image": {"alt": "A conversation of two questions and two answers, drawn token by token in boxes. All tokens of the system message, of both questions and of the marks that open a turn are grey. The tokens of the two answers are blue, each with the token that ends the turn."}} tags=["hide-input"]
read_and_scored(
    [tokenizer.decode(token) for token in ids], [x != -100 for x in labels]
)

# %%
class Trainer(QATMixin, trl.SFTTrainer):
    """SFTTrainer for models that are rounded while they train."""


words = {"vocab_size": len(tokenizer), "hidden_size": 32}
tiny = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
        **words, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )
)
settings = trl.SFTConfig(
    tempfile.mkdtemp(), max_steps=4, learning_rate=1e-2, use_cpu=True,
    bf16=False, report_to=[], disable_tqdm=True, gradient_checkpointing=False,
)
trainer = Trainer(
    model=prepare_qat(tiny, W3, skip=["lm_head"]),
    args=settings,
    train_dataset=datasets.Dataset.from_list(
        [{"prompt": talk[:1], "completion": talk[1:2]}]
    ),
    processing_class=tokenizer,
    callbacks=[QATCallback(start=0.5)],
)
theirs = trainer.train_dataset[0]
ours = encode_chat(talk[:2], tokenizer)[0]
differ = [
    place for place, (a, b) in
    enumerate(zip(ours["labels"], theirs["labels"], strict=True)) if a != b
]
print("the same tokens:", ours["input_ids"] == theirs["input_ids"])
print("labels that differ:", len(differ))
print("TRL scores there:", repr(tokenizer.decode(ids=theirs["labels"][differ[0]])))

# %%
batch = trainer.data_collator([theirs])
batch["labels"][0, differ[0]] = -100
mine = {k: torch.tensor([v]) for k, v in ours.items()}
print("the same loss without it:",
      torch.equal(default_loss(tiny, batch), default_loss(tiny, mine)))

# %%
trainer.remove_callback(transformers.PrinterCallback)
trainer.train()
small = convert(trainer.model)
with torch.no_grad():
    before = trainer.model.eval()(mine["input_ids"]).logits
    after = small(mine["input_ids"]).logits
print("converted computes what was trained:", torch.equal(before, after))

# %%
found = instructed_summaries(examples=600, held_out=400)
LONGEST, SIZES = 88, {"train": 24, "validation": 8, "test": 16}
splits = {}
for part, size in SIZES.items():
    talks = conversations(e._asdict() for e in found[part])
    short = [t for t in talks
             if len(encode_chat(t, tokenizer)[0]["input_ids"]) <= LONGEST]
    splits[part] = short[:size]
task = chat("summary lines", splits, tokenizer, "docstrings", batch_size=4)
prompts = [messages[:-1] for messages in splits["test"][:6]]
authors = [messages[-1]["content"] for messages in splits["test"][:6]]
print(prompts[0][0]["content"])
print("->", authors[0])

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
outside = [[{"role": "user", "content": q},
            {"role": "assistant", "content": a}]
           for q, a in zip(everyday, said, strict=True)]
splits_outside = {"train": outside, "validation": outside, "test": outside}
elsewhere = chat("everyday", splits_outside, tokenizer, "the model").test

# %% tags=["nbval-ignore-output"]
for question, answer in zip(everyday[:3], said, strict=False):
    print(f"{question} {answer}")

# %%
print("Paris is in it:", "Paris" in said[0])

# %%
STEPS = 6
given, losses, moved = {}, {}, {}


def measure(name, model):
    """What was won on the task, and how far it has moved elsewhere."""
    losses[name] = document_losses(model, task.test)
    given[name] = answers(model, tokenizer, prompts, max_new_tokens=24)
    moved[name] = forgotten(model, original, elsewhere)


measure("before", original)

# %%
sft = copy.deepcopy(original)
fit(sft, task.train, steps=STEPS, lr=1e-4, progress=False)
measure("float SFT", sft)

# %%
nearest = convert(prepare_qat(sft, W3, "absmax"))
measure("rounded after", nearest)

# %%
calibration = list(task.train)
qat = prepare_qat(original, W3, calibration=calibration)
fit(qat, task.train, steps=STEPS, lr=5e-4, progress=False)
measure("QAT, labels", convert(qat))

# %%
qat = prepare_qat(original, W3, calibration=calibration)
fit(qat, task.train, teacher=sft, steps=STEPS, lr=5e-4, progress=False)
measure("QAT, teacher", convert(qat))

# %%
adapted = lora_qat(original, W3, 8, calibration=calibration)
fit(adapted, task.train, steps=STEPS, lr=1.5e-3, progress=False)
merged = convert(adapted.merge_and_unload())
measure("LoRA-QAT", merged)

# %% tags=["nbval-ignore-output"]
table = pd.DataFrame({
    "loss": {name: f"{x.mean:.2f}" for name, x in losses.items()},
    "ROUGE-L": {name: f"{rouge_l(x, authors).value:.2f}"
                for name, x in given.items()},
    "moved elsewhere": {name: f"{x.value:.2f}" for name, x in moved.items()},
})
print(table.to_string())

# %%
above = loss_difference(losses["before"], losses["float SFT"])
cost = loss_difference(losses["rounded after"], losses["float SFT"])
trained = [name for name in losses if "QAT" in name]
back = [loss_difference(losses["rounded after"], losses[name])
        for name in trained]
print("float SFT is better than before by 0.2 nats:  ", above.value > 0.2)
print("rounding it costs more than 0.3 nats:         ", cost.value > 0.3)
print("each way of training takes back 0.2 of them:  ",
      min(gain.value for gain in back) > 0.2)
print("rounding alone moves further than float SFT:  ",
      moved["rounded after"].value > moved["float SFT"].value)

# %% tags=["nbval-ignore-output"]
for place in range(3):
    body = prompts[place][0]["content"].partition("\n\n")[2]
    print(textwrap.shorten(body, 74))
    for name, texts in {"author": authors, **given}.items():
        lines = textwrap.wrap(" ".join(texts[place].split()), 56)
        print(f"  {name:14}", "\n                 ".join(lines[:2] or ["-"]))
    print()

# %%
print("every model answers every prompt:",
      all(len(texts) == len(prompts) for texts in given.values()), "✓")

# %% tags=["nbval-ignore-output"]
small_talk = answers(merged, tokenizer, everyday[:3], max_new_tokens=20)
rounded_talk = answers(nearest, tokenizer, everyday[:3], max_new_tokens=20)
for question, *both in zip(everyday[:3], rounded_talk, small_talk,
                           strict=True):
    print(question)
    for name, text in zip(("rounded after", "LoRA-QAT"), both, strict=True):
        print(f"  {name:14}", textwrap.shorten(text, 56) or "-")

# %%
batch = next(iter(elsewhere))
with torch.no_grad():
    p, q = (
        model(batch["input_ids"], attention_mask=batch["attention_mask"])
        .logits[:, :-1].log_softmax(-1)
        for model in (original, sft)
    )
counts = batch["labels"][:, 1:] != -100
by_hand = (p.exp() * (p - q)).sum(-1)[counts].mean()
theirs = forgotten(sft, original, [batch]).value
print("by hand and by the companion alike:",
      torch.isclose(by_hand, torch.tensor(theirs), rtol=1e-3).item())
