# %% [markdown]
# (ch08)=
# # A language model of our own
#
# ![The Scarecrow stands in the wheat and lifts a hand, as one does who is about to end a sentence.](_static/tale/ch08.svg)
#
# :::{epigraph}
# Behind the green city the road ran through a field of wheat, and in it stood a Scarecrow, reading the
# label on a sack. "I was stuffed with instructions," he said, "and know nothing else. But begin a
# sentence, and I can guess how it goes on." Dorothy began one. He guessed; he hesitated; he guessed
# again. She did not ask him whether he was clever. She asked between how many words he had
# hesitated, for that was a thing one could count.
# :::
#
# Here the second part begins: language models, whose weights sit almost all in `Linear` layers. To
# see what few bits do to one, we need one that was trained in earnest, that runs on a laptop, and
# whose every training text we know. This chapter meets it while it is still in floating point; and
# at the end a second one, forty times as large, which answers when it is asked.
#
# **What you will learn**
#
# - how text becomes tokens, and how to know that what you measure on was never trained on;
# - what the model is made of, and how much of it `Linear` layers and the embedding take;
# - what perplexity is, by hand and with the companion, and how to give every token one turn;
# - how to fine-tune on little text without fooling yourself;
# - what a chat model adds, and how to compare two models whose tokens differ;
# - how the same calls take a model and a text of yours.
#
# *Running time: about two minutes on two cores.*

# %% tags=["hide-input"]
import copy
import json
import re
import tempfile
import textwrap
import warnings
from collections import Counter
from itertools import combinations, pairwise
from math import exp
from pathlib import Path

import numpy as np
import torch
from myst_nb import glue
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import companion.course
from companion import Estimate, fit, load_pretrained, load_task, perplexity
from companion.course.check import check
from companion.course.corpus import language_reference, ngrams
from companion.course.figures import bars, curves, estimates
from companion.course.pretrain import train_tokenizer
from companion.course.sources import load_tokenizer
from companion.data.text import Trigram, encode, start_token, windows
from companion.evaluation.language import (
    DocumentLosses,
    as_perplexity,
    document_losses,
    loss_difference,
)

# no bars are shown here
warnings.filterwarnings("ignore", message="IProgress not found")

# %% [markdown]
# ## From letters to tokens
#
# A language model reads numbers from a fixed list, its vocabulary. Single letters would make a
# short list and long texts; whole words a list without end. **Byte-pair encoding** starts from
# letters and glues together the pair of neighbours that occurs most often, again and again
# {cite}`sennrich2016`. The space belongs to the word that follows it, and no pair reaches across
# words. One sentence is enough to watch it:

# %%
sentence = "the lizard saw the wizard and the wizard saw the blizzard"
spaced = re.findall(r" ?\w+", sentence)
words = [list(word.replace(" ", "Ġ")) for word in spaced]
vocabulary = sorted({letter for word in words for letter in word})
print(words[1], len(vocabulary), "letters to begin with")


# %%
def most_frequent_pair(words):
    counts = Counter(pair for word in words for pair in pairwise(word))

    def rank(pair):  # among equals, the first in the vocabulary
        return -counts[pair], *map(vocabulary.index, pair)

    return min(counts, key=rank)


def glue_together(word, pair):
    out = []
    for token in word:
        joined = out and (out[-1], token) == pair
        out = [*out[:-1], out[-1] + token] if joined else [*out, token]
    return out


# %%
merges = []
for _ in range(8):
    pair = most_frequent_pair(words)
    words = [glue_together(word, pair) for word in words]
    vocabulary.append("".join(pair))
    merges.append(pair)
    print(pair[0], "+", pair[1], "->", vocabulary[-1])
print(textwrap.fill(str(words), 76))

# %% [markdown]
# The companion trains its tokenizers with the library `tokenizers`, on bytes instead of letters, so
# that there is no text it cannot write. On our sentence, with room for the 256 bytes, one
# token that marks the start, and eight merges, it has to find the same eight.

# %%
tiny = train_tokenizer([sentence], vocabulary=256 + 1 + 8)
upstream = json.loads(tiny.backend_tokenizer.to_str())["model"]["merges"]
print("the same merges:", [tuple(pair) for pair in upstream] == merges)
ours = [token for word in words for token in word]
print("the same tokens:", tiny.tokenize(sentence) == ours)

# %% [markdown]
# The tokenizer that comes with the model made its merges on all of the training text.

# %%
tokenizer = load_tokenizer("docs-lm")
line = (
    "Return the sorted keys of a dictionary; "
    "raises TypeError for an unhashable wizard."
)
tokens = encode([line], tokenizer)[0]
pieces = tokenizer.convert_ids_to_tokens(tokens)
print(textwrap.fill(str(pieces), 76))
same = tokenizer.decode(tokens) == line
print("vocabulary:", len(tokenizer), "  there and back:", same)
print("tokens:", len(tokens), "for", len(line), "characters")

# %% [markdown]
# What the corpus is full of is one token; what it hardly knows comes in pieces.
#
# ## Where the text comes from
#
# The model read the docstrings of the packages that this course installs anyway: real English, by
# real authors, about a narrow world. Nothing of it lies in this repository. The record of the
# training run says what was read.

# %%
assets = Path(companion.course.__file__).parent / "assets"
report = json.loads((assets / "docs-lm" / "training.json").read_text())
print("documents (train, validation, test):", report["documents"])
there, seen = report["training_tokens"], report["tokens_seen"]
print(f"tokens to train on: {there:,}   seen: {seen:,}")
packages = ", ".join(sorted(report["versions"]))
print(textwrap.fill(f"packages: {packages}", 76))
print("sha256 of the text:", report["corpus_sha256"][:16])

# %% [markdown]
# What a model has read it can recite, and then a test measures memory. Three rules keep the parts
# apart: a document occurs once; all docstrings of one source file go into one split; and a held-out
# docstring that shares 13 words in a row with the training split is dropped. With other versions of
# the packages you would get a slightly other corpus, and another hash.
#
# To fine-tune we take a text that the model has not seen at all: the Python language reference,
# which every CPython carries with it.

# %%
reference = language_reference()
splits = {
    part: getattr(reference, part)
    for part in ("train", "validation", "test")
}
for part, documents in splits.items():
    n = sum(len(ids) for ids in encode(documents, tokenizer))
    print(f"{part:10s} {len(documents):3d} documents {n:7,d} tokens")


# %% [markdown]
# A few long topics to train on and many short ones to be tested on, because an interval counts
# documents. Is anything shared? By hand, as sets of 13 words in a row:


# %%
def runs(documents, n=13):
    found = set()
    for document in documents:
        w = re.findall(r"\w+", document.lower())
        found |= {tuple(w[i : i + n]) for i in range(len(w) - n + 1)}
    return found


by_hand = {part: runs(documents) for part, documents in splits.items()}
for part, other in combinations(splits, 2):
    shared = len(by_hand[part] & by_hand[other])
    print(f"13 words in both {part} and {other}:", shared)

# %% [markdown]
# The companion's `ngrams` hashes the runs, which is what makes millions of words feasible. It must
# find as many.

# %%
hashed = {
    p: np.unique(np.concatenate([ngrams(d) for d in docs]))
    for p, docs in splits.items()
}
same = all(len(hashed[p]) == len(by_hand[p]) for p in splits)
print("as many distinct runs:", same)
shared = np.intersect1d(hashed["train"], hashed["test"])
print("shared, hashed:", len(shared))

# %% [markdown]
# ## What the model is made of
#
# `docs-lm` has the architecture of Llama {cite}`touvron2023`, four layers of it.

# %%
model = load_pretrained("docs-lm").eval()
parts = {
    "embed_tokens": "embedding",
    "self_attn": "attention",
    "mlp": "feed-forward",
}


def sizes_of(model):
    """Parameters by part."""
    sizes = Counter()
    for name, p in model.named_parameters():
        labels = [label for key, label in parts.items() if key in name]
        sizes[labels[0] if labels else "norms"] += p.numel()
    return sizes


sizes = sizes_of(model)
total = sum(sizes.values())
for label, n in sizes.most_common():
    print(f"{label:13s} {n:9,d}  {n / total:6.1%}")
print(f"{'all':13s} {total:9,d}")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Horizontal bars of millions of parameters: feed-forward layers the most, then the embedding, then attention; the norms are close to none."}}
bars(
    {k: n / 1e6 for k, n in sizes.most_common()},
    xlabel="million parameters",
    form="{:.2f}",
)

# %% [markdown]
# The output layer is missing from the table. It is a `Linear` from 256 numbers to 4,096 scores, and
# it shares its weight with the embedding ({cite:t}`press2017`): one matrix, used to read and to
# write.

# %%
body = [
    m
    for name, m in model.named_modules()
    if isinstance(m, nn.Linear) and name != "lm_head"
]
inside = sum(p.numel() for m in body for p in m.parameters())
head = model.lm_head.weight
same = head is model.get_input_embeddings().weight
print("one matrix:", same, tuple(head.shape))
print(
    f"Linear layers without the output: {len(body)}, "
    f"{inside:,} parameters, {inside / total:.1%}"
)
glue("ch08-linear", inside / total, display=False)
glue("ch08-embedding", sizes["embedding"] / total, display=False)

# %% [markdown]
# Rounding the `Linear` layers of the body therefore reaches {glue:text}`ch08-linear:.1%` of the
# parameters, and the one matrix left in float, {glue:text}`ch08-embedding:.1%` of them, soon becomes
# the larger part of the file. The wider a model, the smaller the share of its embedding; [](ch10)
# returns to this.
#
# ## Between how many words it hesitates
#
# :::{figure-md} fig-perplexity
#
# ![Three rows of doors. One door, certain and right: loss 0, perplexity 1. Two doors: loss ln 2,
# perplexity 2. Eight doors: loss ln 8, perplexity 8.](_static/figures/perplexity.svg)
#
# Behind one of the doors is the token that comes next, and all of them look equally likely. With
# $k$ doors its probability is $1/k$, the loss $\ln k$, and the perplexity $e^{\ln k} = k$ again.
#
# :::
#
# At every place the model gives each token of the vocabulary a probability. Training and testing ask
# the same question: how probable was the token that came? For tokens $t_1, \dots, t_n$ the **loss**
# is the mean of $-\log p(t_i \mid t_0 \dots t_{i-1})$, and **perplexity** its exponential
# {cite}`jelinek1977`. The logarithm is the natural one, and its unit the {term}`nat`: a loss that is
# one nat higher means a probability 2.7 times lower.
#
# $$ \operatorname{ppl} = \exp\Big(-\frac1n \sum_{i=1}^{n} \log p(t_i \mid t_0, \dots, t_{i-1})\Big). $$
#
# If it hesitated between $k$ equally likely tokens each time, its perplexity would be $k$. One that
# knows nothing hesitates between all:

# %%
# (tokens, vocabulary)
know_nothing = torch.zeros(5, len(tokenizer), dtype=torch.double)
print(round(F.cross_entropy(know_nothing, torch.arange(5)).exp().item(), 6))

# %% [markdown]
# Now the model, on the line from above. A start token stands before it, so that its first token is
# predicted too. Logits at place $i$ are about the token at place $i + 1$.

# %%
start = tokenizer.bos_token_id
ids = torch.tensor([[start, *tokens]])  # (1, n + 1)
with torch.no_grad():
    logits = model(ids).logits  # (1, n + 1, vocabulary)
    logs = logits[0, :-1].log_softmax(-1)  # (n, vocabulary)
nll = -logs.gather(1, ids[0, 1:, None]).squeeze(1)  # (n,)
by_hand = nll.mean().exp()
print(tuple(logits.shape), tuple(nll.shape))

# %% tags=["nbval-ignore-output"]
pieces = tokenizer.convert_ids_to_tokens(tokens)
for token, x in zip(pieces[:8], nll.tolist()[:8], strict=True):
    print(f"{token:12s} probability {exp(-x):.3f}   loss {x:5.2f}")
print(f"perplexity of the line: {by_hand:.1f}")
glue("ch08-line", float(by_hand), display=False)

# %% [markdown]
# The same number, {glue:text}`ch08-line:.1f`, must come out of PyTorch's cross-entropy, of the loss
# that a `transformers` model computes when it is given labels, and of the companion's `perplexity`.

# %%
with torch.no_grad():
    theirs = {
        "cross_entropy": F.cross_entropy(logits[0, :-1], ids[0, 1:]).exp(),
        "transformers": model(input_ids=ids, labels=ids).loss.exp(),
    }
ours = perplexity(model, DataLoader(windows([tokens], start, size=256)))
theirs["companion"] = torch.tensor(ours.value)
same = [
    torch.allclose(value.float(), by_hand, rtol=1e-4)
    for value in theirs.values()
]
print("✓" if all(same) else "✗", "equal to ours:", ", ".join(theirs))

# %% [markdown]
# ## Every token one turn
#
# The model looks at 256 tokens at most, and documents are longer. Cut anywhere, the first token of
# each piece would be predicted by nobody. `windows` therefore begins each piece with the last token
# of the one before, as context that is not scored (label -100). A document of seven tokens, windows
# of four:

# %%
rows = windows([[11, 12, 13, 14, 15, 16, 17]], start=0, size=4)
for row in rows:
    print(row["input_ids"].tolist(), "->", row["labels"].tolist())

# %% [markdown]
# And on the real test split:

# %%
task = load_task("language-reference")
labels = torch.cat([batch["labels"].flatten() for batch in task.test])
scored = labels[labels != -100].tolist()
documents = encode(reference.test, tokenizer)
written = [token for document in documents for token in document]
print(f"each token of {len(written):,} once, in order:", scored == written)

# %% [markdown]
# Early tokens of a window have little context, so the perplexity is a little higher than a window
# that slides token by token would give. That is a convention: state it, and use the same one for
# every model that you compare.
#
# ## Is it any good?
#
# A loss means nothing without another to hold it against. The classic one is a trigram: the
# probability of a token given the two before it, from counts, smoothed by the method of
# {cite:t}`kneser1995` in its interpolated form {cite}`chen1999`. Ours read the same training tokens
# as the model, and both were measured on the same held-out docstrings. The interval comes from a
# {term}`bootstrap` over documents, not tokens, because the tokens of a document go together.

# %%
held_out = {
    "trigram": Estimate(**report["trigram_perplexity"]),
    "docs-lm": Estimate(**report["test_perplexity"]),
}
for name, e in held_out.items():
    print(
        f"{name}: {e.value:.2f} [{e.low:.2f}, {e.high:.2f}], "
        f"n = {e.n:,} documents"
    )
apart = held_out["docs-lm"].high < held_out["trigram"].low
print("intervals apart:", apart)
glue("ch08-held-out", float(held_out["docs-lm"].value), display=False)
glue("ch08-trigram", float(held_out["trigram"].value), display=False)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Held-out perplexity with 95 percent intervals, two rows: the trigram lies far to the right of docs-lm, and the intervals do not touch."}}
estimates(held_out, xlabel="perplexity on held-out docstrings")

# %% [markdown]
# The model hesitates between {glue:text}`ch08-held-out:.1f` tokens where counting hesitates between
# {glue:text}`ch08-trigram:.1f`. These numbers come with the weights, from the run that made them;
# `python -m companion pretrain` repeats it, and `--help` lists its options. Its curve:

# %% tags=["hide-input"] mystnb={"image": {"alt": "Validation perplexity on a logarithmic axis against pre-training steps: a steep fall from several thousand in the first thousand steps, then a slow decline that has not quite ended."}}
curve = {
    step: exp(loss)
    for step, loss in report["validation"]
    if step % 1000 == 0
}
curves(
    {"docs-lm": curve},
    xlabel="pre-training step",
    ylabel="validation perplexity",
    log_y=True,
)

# %%
losses = [loss for _, loss in report["validation"]]
better = list(curve.values()) == sorted(curve.values())[::-1]
print("every thousand steps better than before:", better)
print("best at the end:", min(losses) == losses[-1])

# %% [markdown]
# :::{admonition} Before you read on
# Next comes another text, the language reference. The trigram may count its training part; docs-lm has
# never read a line of it. Who will predict the test part better?
# :::
#
# ## A text it has never seen
#
# Now the language reference. It is English about Python too, but other English: a grammar and its
# explanation instead of lists of parameters. The trigram may read the training split of it; the
# model gets nothing yet. Both are asked about the test split, token by token the same.

# %%
before = document_losses(model, task.test)
read, unread = (
    encode(documents, tokenizer)
    for documents in (reference.train, reference.test)
)
trigram = Trigram.train(read, vocabulary=len(tokenizer))
counted = DocumentLosses(trigram.losses(unread), before.tokens)
count = before.tokens.sum()
print(f"documents: {len(before.tokens)}   tokens: {count:,}")

# %% tags=["nbval-ignore-output"]
print("trigram, trained on the reference:", as_perplexity(counted))
print("docs-lm, as it comes:             ", as_perplexity(before))
ahead = loss_difference(counted, before)
print("trigram minus docs-lm, in nats:   ", ahead)
glue("ch08-before", as_perplexity(before).value, display=False)
glue("ch08-counted", as_perplexity(counted).value, display=False)

# %%
clearly = ahead.low > 0
print("docs-lm clearly ahead, though it never saw this text:", clearly)

# %% [markdown]
# Away from home its perplexity is {glue:text}`ch08-before:.0f` instead of
# {glue:text}`ch08-held-out:.1f`.
#
# ## Fine-tuning on little
#
# {term}`Fine-tuning` goes on with the same loss on the new text. Documents are joined behind start
# tokens and cut into blocks of 256 tokens, eight blocks to a batch:

# %%
batch = next(iter(task.train))
print("one batch:", tuple(batch["input_ids"].shape))
print("batches in the training split:", len(task.train))
steps = 60
print(f"{steps} steps read it {steps / len(task.train):.1f} times")

# %% [markdown]
# A text this small can be learned by heart, and the training loss would only praise that. So we keep
# an eye on the validation split: `fit` measures it every few steps and, at the end, gives back the
# weights that did best on it. The learning rate is chosen on it too, between two: small models often
# take 5e-4, and ten times that should be too much, so that we see what too much looks like. Below,
# the winner alone is measured on the test split. Two rates find a good one, not the best.


# %%
def train(lr):
    tuned = copy.deepcopy(model)
    history = fit(
        tuned,
        task.train,
        steps=steps,
        lr=lr,
        validate_every=20,
        validate=lambda m: document_losses(m, task.validation).mean,
    )
    return tuned, history


small, small_run = train(5e-4)
looked = [step for step, _ in small_run.validation]
print("validated after", looked, "steps")

# %%
large, large_run = train(5e-3)
runs_by_rate = {"5e-4": small_run, "5e-3": large_run}

# %% tags=["nbval-ignore-output"]
best = {
    rate: min(loss for _, loss in run.validation)
    for rate, run in runs_by_rate.items()
}
gap = {
    r: run.validation[-1][1] - np.mean(run.loss[-20:])
    for r, run in runs_by_rate.items()
}
for rate in runs_by_rate:
    print(
        f"rate {rate}: best validation loss {best[rate]:.3f},",
        f"at the end {gap[rate]:.2f} above the training loss",
    )
glue("ch08-gap-small", float(gap["5e-4"]), display=False)
glue("ch08-gap-large", float(gap["5e-3"]), display=False)

# %%
print("the smaller rate wins on validation:", best["5e-4"] < best["5e-3"])
print("the gap is wider at the larger rate:", gap["5e-4"] < gap["5e-3"])

# %% tags=["hide-input"] mystnb={"image": {"alt": "Loss against fine-tuning steps for two learning rates, training and validation. Both training losses fall throughout. The validation loss of the smaller rate falls and flattens; that of the larger rate ends above it, far from its own training loss."}}
lines = {}
for rate, run in runs_by_rate.items():
    lines[f"training, {rate}"] = {
        k + 20: np.mean(run.loss[k : k + 20]) for k in (0, 20, 40)
    }
    lines[f"validation, {rate}"] = dict(run.validation)
curves(lines, xlabel="fine-tuning step", ylabel="loss (nats per token)")

# %% [markdown]
# Training losses are means over the twenty steps before each mark. At the end the model does better
# on what it trains on than on what is held out, by {glue:text}`ch08-gap-small:.2f` nats at the
# smaller rate and by {glue:text}`ch08-gap-large:.2f` at the larger. The two splits are not equally
# hard to begin with, so a gap says something only next to the other: at the larger rate, more of
# what looks like learning is memory.
#
# ## Before and after
#
# Now the test split, with the weights that validation chose at 5e-4. The difference is
# {term}`paired <paired difference>` by document. We ask that its whole interval lie above 0.1 nats,
# about a tenth off the perplexity. That bar was set after a first run, and low enough to hold on
# other machines.

# %% tags=["nbval-ignore-output"]
after = document_losses(small, task.test)
print("before:    ", as_perplexity(before))
print("after:     ", as_perplexity(after))
gain = loss_difference(before, after)
print("difference:", gain, "nats per token")
glue("ch08-after", as_perplexity(after).value, display=False)
glue("ch08-gain", gain.value, display=False)

# %%
print("better by more than 0.1 nats:", gain.low > 0.1)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Perplexity on the test split of the language reference with 95 percent intervals, three rows: trigram highest, docs-lm in the middle, docs-lm fine-tuned lowest."}}
three = {"trigram": counted, "docs-lm": before, "fine-tuned": after}
estimates(
    {name: as_perplexity(x) for name, x in three.items()},
    xlabel="perplexity on the language reference",
)

# %% [markdown]
# From {glue:text}`ch08-before:.1f` to {glue:text}`ch08-after:.1f`, a gain of
# {glue:text}`ch08-gain:.2f` nats per token. Two intervals of perplexity may overlap while the paired
# difference is clear: some documents are hard for both models, and pairing takes that out. By
# document:

# %%
lower = (after.loss < before.loss).sum()
n = len(before.loss)
print(f"lower loss on at least 15 of {n} documents:", lower >= 15)

# %% [markdown]
# ## What it writes
#
# To write, we take the most probable token, append it, and ask again. Upstream's `generate` does
# the same with less work; asked not to be clever, it must write the same.


# %%
@torch.no_grad()
def write(model, text, tokens=40):
    ids = torch.tensor([[start, *encode([text], tokenizer)[0]]])
    for _ in range(tokens):
        best = model(ids).logits[0, -1].argmax()
        if best == start:  # it would begin another document
            break
        ids = torch.cat([ids, best.view(1, 1)], dim=1)
    return ids


prompt = "The with statement is used to"
models = {"before": model.eval(), "after": small.eval()}
written = {name: write(m, prompt) for name, m in models.items()}

# %% tags=["nbval-ignore-output"]
for name, ids in written.items():
    print(f"{name}: {tokenizer.decode(ids[0], skip_special_tokens=True)}\n")

# %%
ids = torch.tensor([[start, *encode([prompt], tokenizer)[0]]])
theirs = model.generate(
    ids,
    attention_mask=torch.ones_like(ids),
    max_new_tokens=40,
    do_sample=False,
    use_cache=False,
)
theirs = [token for token in theirs[0, 1:].tolist() if token != start]
same = theirs == written["before"][0, 1:].tolist()
print("generate writes the same:", same)

# %% [markdown]
# That is how far 3.4 million parameters get. The grammar holds for a few words, the content for
# none: it has the sound of documentation and knows nothing. Do not ask it anything.
#
# ## A larger one, which answers
#
# SmolLM2-135M-Instruct {cite}`allal2025` is built like docs-lm, only wider and deeper. Its makers let
# it read two trillion tokens of the web, of books for learners and of code, and then taught it to
# answer. On a laptop it still runs.

# %%
smol = load_pretrained("smollm2").eval()
smol_tokenizer = load_tokenizer("smollm2")

# %% [markdown]
# Read that line: these weights come out of an installed package, which carries them in four bits, so
# that they were rounded once before we saw them. Where this book says SmolLM2 in floating point, it
# means what that file unpacks to. (With a network,
# `load_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")` loads the original.)

# %%
larger = sizes_of(smol)
print(f"{'':13s} {'docs-lm':>10s} {'SmolLM2':>12s}")
for label in sizes:
    print(f"{label:13s} {sizes[label]:10,d} {larger[label]:12,d}")
print(f"{'all':13s} {total:10,d} {larger.total():12,d}")
for which, m in {"docs-lm": model, "SmolLM2": smol}.items():
    c = m.config
    print(f"{which}: {c.num_hidden_layers} blocks, {c.hidden_size} wide")
glue("ch08-times", larger.total() / total, display=False)
glue("ch08-smollm2", larger.total() / 1e6, display=False)
share = larger["embedding"] / larger.total()
glue("ch08-smollm2-embedding", share, display=False)

# %% [markdown]
# {glue:text}`ch08-smollm2:.1f` million parameters, {glue:text}`ch08-times:.0f` times docs-lm; the
# embedding takes {glue:text}`ch08-smollm2-embedding:.1%`. It has its own tokenizer, whose merges
# were made on far more text than ours:

# %%
both = {"docs-lm": tokenizer, "SmolLM2": smol_tokenizer}
for which, t in both.items():
    print(f"{which}: {len(t):,} tokens to choose from; the line:")
    print(textwrap.fill(" ".join(t.tokenize(line)), 76))

# %% [markdown]
# docs-lm has words of documentation in one piece, for that is all it ever saw. SmolLM2's list is
# twelve times as long and made for everything.
#
# Asking takes a form. A model that chats was trained on conversations written out as one text, with
# marks for who speaks, and it answers well only when it finds itself in such a text. The tokenizer
# carries the form, its *chat template*:

# %%
question = [{"role": "user", "content": "What is the capital of France?"}]
form = {"add_generation_prompt": True}
template = smol_tokenizer.apply_chat_template
print(template(question, tokenize=False, **form))

# %% [markdown]
# The last line is left open; there it goes on, until it writes the mark that closes its turn.

# %%
form |= {"return_tensors": "pt", "return_dict": True}
asked = template(question, **form)
n = asked["input_ids"].shape[1]
said = smol.generate(**asked, max_new_tokens=12, do_sample=False)
answer = smol_tokenizer.decode(said[0, n:], skip_special_tokens=True)
print("SmolLM2:", answer)
other = write(model, question[0]["content"], tokens=12)[0, 1:]
goes_on = tokenizer.decode(other).removeprefix(question[0]["content"])
print("docs-lm:", goes_on.strip())

# %% [markdown]
# Which of the two predicts better? Perplexities per token do not compare: who cuts a text into fewer
# pieces has a harder guess at each. Per *character* they do, since both read the same letters. Four
# beginnings from the language reference, of 400 characters each:


# %%
def loss_on(documents, model, tokenizer):
    """Nats per token, nats per character."""
    rows = windows(
        encode(documents, tokenizer), start_token(tokenizer), 256
    )
    losses = document_losses(model, DataLoader(rows, batch_size=4))
    return losses.mean, losses.loss.sum() / sum(map(len, documents))


short = [document[:400] for document in reference.test[:4]]
nats = {
    "docs-lm": loss_on(short, model, tokenizer),
    "SmolLM2": loss_on(short, smol, smol_tokenizer),
}
for which, (token, character) in nats.items():
    print(
        f"{which}: perplexity {exp(token):5.1f} a token, "
        f"{character:.2f} nats a character"
    )

# %% [markdown]
# Four beginnings are a glance, not a measurement, and there is a reason to distrust it: the
# documentation of Python lies open on the web, and what a model has read there it can recite. What
# docs-lm has read we know line by line; of a model that has read the web, nobody does.
#
# So each of the two has its office. **docs-lm** is the model whose every step can be run in seconds:
# on it a method is taken apart, trained, and trained again. What it cannot show is what rounding
# costs a model that has packed much into its weights. That is **SmolLM2**'s part, and [](ch09) puts
# the two side by side. They do not agree.
#
# ## Your model, your text
#
# Nothing above is special to these two. With a network, a model and a data set of the Hub go
# through the same calls:
#
# ```python
# name = "HuggingFaceTB/SmolLM2-135M"
# model, tokenizer = load_pretrained(name), load_tokenizer(name)
# task = load_task("Salesforce/wikitext", config="wikitext-2-raw-v1", tokenizer=tokenizer)
# ```
#
# Give the tokenizer along: token numbers of one model mean nothing to another, and perplexities per
# token compare only under the same tokenizer. Without a network we can take the road through files:
# a folder as `transformers` writes it, and a text of our own, whose paragraphs become documents,
# eight of ten to train on.

# %%
with tempfile.TemporaryDirectory() as folder:
    text = Path(folder, "my_text.txt")
    people = ("the scarecrow", "the lion", "the woodman", "Toto")
    lines = [
        f"Return the way of {who} to day {n} of the road."
        for who in people
        for n in range(5)
    ]
    text.write_text("\n\n".join(lines))
    small.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    mine = load_pretrained(folder)
    own = load_task(
        str(text),
        tokenizer=load_tokenizer(folder),
        block_size=32,
        batch_size=2,
    )

# %%
result = perplexity(mine, own.test)
finite = np.isfinite(result.value)
print("documents to test on:", result.n, "  finite:", finite)
history = fit(mine, own.train, steps=10, lr=5e-4)
print("learns it:", perplexity(mine, own.test).value < result.value)

# %% [markdown]
# ## Quiz
#
# ```{quiz} ch08
# Three questions, each answer explained: they stand in `_quizzes/ch08.md` beside this notebook.
# ```
#
# ## Exercises
#
# ```{exercise} From probabilities to perplexity
# :label: ch08-perplexity
# A model gave the tokens that came the `probabilities`, a list of numbers above 0. Write
# `perplexity_of(probabilities)`. Replace the `...` and run the cell.
# ```


# %%
def perplexity_of(probabilities): ...  # your turn


check("ch08-perplexity", perplexity_of)

# %% [markdown]
# ```{solution} ch08-perplexity
# :class: dropdown
# The mean comes before the exponential. One over the mean of the probabilities is another number,
# and kinder: it forgives the tokens that the model held for impossible.
# ```


# %% tags=["hide-cell"]
def perplexity_of(probabilities):
    return float(np.exp(-np.mean(np.log(probabilities))))


check("ch08-perplexity", perplexity_of)

# %% [markdown]
# ```{exercise} How many windows
# :label: ch08-windows
# Write `count(n, size)`: the number of windows of `size` tokens that a document of `n` tokens is cut
# into, if every token is to be predicted once. Replace the `...` and run the cell.
# ```


# %%
def count(n, size): ...  # your turn


check("ch08-windows", count)

# %% [markdown]
# ```{solution} ch08-windows
# :class: dropdown
# The first token of a window is only context, so a window scores `size - 1` tokens, and the last
# one may score fewer: $\lceil n / (\text{size} - 1) \rceil$. Without floats, negate and divide
# downwards twice.
# ```


# %% tags=["hide-cell"]
def count(n, size):
    return -(-n // (size - 1))


check("ch08-windows", count)

# %% [markdown]
# ```{exercise} An experiment: text against text
# :label: ch08-experiment
# Measure docs-lm on three texts of your own, such as a letter, a page of documentation and a poem, each cut to the same number
# of characters. Order them by perplexity beforehand, and then by nats a character.
# ```
#
# ```{solution} ch08-experiment
# :class: dropdown
# The nearer a text is to docstrings, the lower its loss should be. The two orders may differ: a text of rare words is cut into more
# tokens, and each of these is easier to guess.
# ```
#
# ## What we saw
#
# - Byte-pair encoding merges the most frequent pair again and again; by hand, with the companion and
#   with the library the merges are the same. Counting the runs of words that two splits share tells
#   whether one was copied from the other; these share none.
# - Most of the model's parameters sit in `Linear` layers, most of the rest in an embedding that is
#   also the output layer.
# - Perplexity is the exponential of the mean loss: between how many tokens the model hesitates. By
#   hand, in PyTorch, in `transformers` and in the companion it is the same number, and windows give
#   every token exactly one turn. The model is ahead of a trigram, at home and away.
# - On little text the training loss falls whether or not anything is learned. Validation chooses
#   the rate and the weights; the test split judges what was chosen, paired by document.
# - SmolLM2 answers, in the form that it was taught, and its weights came out of a 4-bit file. Models
#   with different tokens are compared by the character. docs-lm is for what must run in seconds.
# - A folder or a Hub id, a file or a data set: the calls stay the same.
#
# :::{epigraph}
# "And if I asked you what lies behind the hill?" said Dorothy. "Then I would say something," said the
# Scarecrow, "and it would sound like an answer." "That," said Dorothy, "is why I count."
# :::
#
# ## References
#
# - {cite:t}`sennrich2016`: byte-pair encoding for text.
# - {cite:t}`jelinek1977`: perplexity.
# - {cite:t}`kneser1995` and {cite:t}`chen1999`: the baseline by counting, and why it is a good one.
# - {cite:t}`touvron2023`: the architecture; {cite:t}`press2017`: one matrix for reading and writing.
# - {cite:t}`allal2025`: SmolLM2, and what it read.
# - {cite:t}`efron1979`: the bootstrap.
