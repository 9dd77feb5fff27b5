# %% [markdown]
# (ch10)=
# # Quantization-aware fine-tuning
#
# ![The Woodman and the Scarecrow walk side by side along the yellow road at dusk.](_static/tale/ch10.svg)
#
# :::{epigraph}
# The tinsmiths could hammer the Woodman straight again, but not make his joints as fine as they
# had been. "Then let me practise with the joints I shall have," he said, and walked up and down
# the yard until he had the way of it. The Scarecrow, whose legs were as ever, walked beside him,
# step for step, so that in the end one could tell what was owed to the joints and what to the
# walking.
# :::
#
# [](ch09) rounded a finished model and counted the damage. Now the model practises with the
# rounded weights while it is fine-tuned: {term}`quantization-aware training`, on the road that
# language models take. And because fine-tuning alone helps too, a float model walks beside it,
# step for step.
#
# **What you will learn**
#
# - fake quantization of one layer by hand, and that `prepare_qat` computes the same, gradients
#   included;
# - what `prepare_qat` swaps, what it skips, and what it refuses;
# - how to compare fairly: a {term}`matched control`, paired differences, and the share recovered;
# - how to convert, save and load, and why the result is smaller but not faster;
# - how torchao does the same, and the one rule in which it differs;
# - the recipe on an encoder that you did not train, in a loop of your own.
#
# *Running time: about three minutes on two cores.*

# %% tags=["hide-input"]
import json
import re
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from myst_nb import glue
from torch import nn
from torch.nn import functional as F

from companion import (
    W2,
    W4,
    QuantScheme,
    convert,
    fit,
    load_pretrained,
    load_quantized,
    load_task,
    prepare_qat,
    recovery,
    save_quantized,
)
from companion.course.check import check
from companion.course.corpus import language_reference
from companion.course.figures import curves, estimates
from companion.course.sources import load_tokenizer
from companion.evaluation.estimates import bootstrap
from companion.evaluation.language import (
    as_perplexity,
    document_losses,
    loss_difference,
)

warnings.filterwarnings("ignore")
generator = torch.Generator().manual_seed(0)
start = load_pretrained("docs-lm")
print(f"{start.num_parameters():,} parameters")

# %% [markdown]
# ## One layer, by hand
#
# One `Linear` layer of docs-lm, at two bits: the {term}`grid` has four points, -2, -1, 0 and 1
# times a {term}`scale`, and each group of 32 neighbours has a scale of its own, kept in float16,
#
# $$ s = \operatorname{float16}\!\left(\frac{\max |w|}{3/2}\right), \qquad
# \hat w = s \cdot \operatorname{clip}\big(\operatorname{round}(w / s),\, -2,\, 1\big) . $$
#
# There is no {term}`observer` and nothing to calibrate. The weights are at hand, so their scale
# can be computed anew in every forward pass, and the grid follows the weights as they train.

# %%
layer = start.model.layers[0].mlp.down_proj
weight = layer.weight.detach()  # (out, in)
qmin, qmax = W2.integers


def steps_and_scale(w):
    groups = w.detach().unflatten(-1, (-1, 32))  # (out, groups, 32)
    largest = groups.abs().amax(-1, keepdim=True)
    scale = (
        (largest / ((qmax - qmin) / 2)).half().float()
    )  # rounded as it will be stored
    return torch.round(groups * (1 / scale)), scale


# %%
def rounded(w):
    steps, scale = steps_and_scale(w)
    return (steps.clamp(qmin, qmax) * scale).flatten(-2)  # (out, in)


# %%
steps, scale = steps_and_scale(weight)
print("weight:", tuple(weight.shape), " scales:", tuple(scale.shape))
for level in range(qmin, qmax + 1):
    print(
        f"at {level:2}: "
        f"{(steps.clamp(qmin, qmax) == level).float().mean():.1%}"
    )

# %% [markdown]
# ### A gradient for the staircase
#
# The gradient of rounding is zero ([](ch06)), so the {term}`straight-through estimator` puts a
# one in its place. There is a well-known line that does it without a class of its own: add the
# difference to the rounded value, and hide that difference from autograd.

# %%
w = weight.clone().requires_grad_()
through = w + (rounded(w) - w).detach()
through.sum().backward()
print("the grid point, bit for bit:", torch.equal(through, rounded(w)))
print("every gradient is one:      ", (w.grad == 1).all().item())

# %% [markdown]
# Why is the value right to the last bit, after a subtraction and an addition of floats? There are two
# cases. If a weight and its grid point have the same sign and neither is more than twice the other,
# then their difference is itself a float, and adding it gives the grid point back. Otherwise the grid
# point is zero; then the difference is the weight with its sign changed, and the sum is zero exactly.
# The gradient is not quite right. A weight that was clipped gets a one as well, although moving it a
# little changes nothing. An `autograd.Function` can say so: forward returns the grid point, backward
# passes on what lay inside the grid, its ends included.


# %%
def inside(w):
    steps, _ = steps_and_scale(w)
    return ((qmin <= steps) & (steps <= qmax)).flatten(
        -2
    )  # the ends of the grid included


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(inside(w))
        return rounded(w)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0]


# %% [markdown]
# Who is clipped, when the scale follows the largest weight of its group? Only that weight itself
# can be. It sits at one and a half steps, half-way between an end of the grid and a point that
# does not exist, and the last bits of a float16 scale decide.

# %%
clipped = ~inside(weight)
groups = weight.unflatten(-1, (-1, 32)).abs()
largest = (groups == groups.amax(-1, keepdim=True)).flatten(-2)
print(f"clipped: {clipped.sum().item():,} of {clipped.numel():,} weights")
print(
    "all of them the largest of their group:", largest[clipped].all().item()
)

# %% [markdown]
# Now the same layer from the companion. `prepare_qat` returns a copy of the model in which
# `Linear` layers have become `FakeQuantLinear`. How the range of the grid is chosen is its third
# argument: `"absmax"`, as above. (Left out, it is the default that [](ch11) arrives at, after
# comparing.) The same input and the same upstream gradient for both:

# %%
qat = prepare_qat(start, W2, "absmax")
prepared = qat.model.layers[0].mlp.down_proj
x = torch.randn(
    64, 512, generator=generator, dtype=torch.double
).float()  # (tokens, in)
upstream = torch.randn(
    64, 256, generator=generator, dtype=torch.double
).float()  # (tokens, out)

w = weight.clone().requires_grad_()
y = F.linear(x, StraightThrough.apply(w))
(by_hand,) = torch.autograd.grad(y, w, upstream)
(gradient,) = torch.autograd.grad(prepared(x), prepared.weight, upstream)
print(type(prepared).__name__)
print("same output:  ", torch.equal(prepared(x), y))
print("same gradient:", torch.equal(gradient, by_hand))

# %% [markdown]
# ## What was swapped, and what was not
#
# The copy says itself what became of it, in its attribute `quantization`.

# %%
print(qat.quantization)

# %% [markdown]
# The output layer `lm_head` is a `Linear` layer too, but it shares its weight with the embedding,
# and embeddings stay in floating point unless asked for (`embeddings=True`). Rounding one of the
# two and not the other would tear the pair apart, so both stay. That has a price: only a part of
# the parameters is rounded.

# %%
small = sum(
    qat.get_submodule(name).weight.numel()
    for name in qat.quantization.layers
)
print(
    f"{small:,} of {qat.num_parameters():,} parameters: "
    f"{small / qat.num_parameters():.0%}"
)
print(
    "same names:",
    [n for n, _ in qat.named_parameters()]
    == [n for n, _ in start.named_parameters()],
)
print("the original is as it was:", type(layer) is nn.Linear)
print("still tied:", qat.lm_head.weight is qat.model.embed_tokens.weight)

# %% [markdown]
# No parameter was added and none renamed: an optimizer, a checkpoint or a trainer sees the model
# it knows. To keep more layers in floating point, name them in `skip`: by the end of their name,
# by a block around them, or by a pattern.

# %%
for skip in (["down_proj"], ["layers.0"], ["layers.0", "*.v_proj"]):
    record = prepare_qat(start, W2, skip=skip).quantization
    print(f"skip={skip}: {len(record.layers)} quantized")

# %% [markdown]
# ### What it refuses
#
# Four calls that would do nothing, or something else than you think. Each is an error with a
# remedy; here is the first part of each message.


# %%
def refusal(call):
    try:
        call()
    except (ValueError, RuntimeError) as error:
        print(f"{type(error).__name__}: {str(error).split('; ')[0]}")


refusal(
    lambda: prepare_qat(start, QuantScheme(weight_bits=2, group_size=48))
)
refusal(lambda: prepare_qat(qat, W2))
refusal(lambda: prepare_qat(start, W2, skip=["fc"]))
refusal(lambda: prepare_qat(nn.Sequential(nn.Conv2d(3, 8, 3)), W2))

# %% [markdown]
# ## Two arms, step for step
#
# The text to learn is the Python language reference, which docs-lm never read. Two models start
# from the same weights and see the same batches in the same order, for as many steps: the float
# {term}`matched control`, and the one that is rounded to two bits as it computes. Each keeps the
# weights that did best on the validation documents.
#
# Learning rates were chosen beforehand, by the validation loss, with as many trials for either
# arm and with a seed of their own (`python -m benchmarks.first_rates`).

# %%
results = Path("..") / "benchmarks" / "results"
records = json.loads((results / "first_rates.json").read_text())["records"]
rates = {}
for arm in ("float", "W2"):
    trials = [r for r in records if r["arm"] == arm]
    for r in trials:
        print(
            f"{arm:5}  rate {r['lr']}: validation loss "
            f"{r['validation_loss']:.3f}"
        )
    rates[arm] = min(trials, key=lambda r: r["validation_loss"])["lr"]
print("chosen:", rates)

# %%
task = load_task("language-reference")  # batches of 8 rows of 256 tokens
STEPS = 60
glue("ch10-steps", str(STEPS), display=False)


def validation_loss(model):
    return document_losses(model, task.validation).mean  # nats per token


def fine_tune(model, lr):
    return fit(
        model,
        task.train,
        steps=STEPS,
        lr=lr,
        seed=0,
        validate=validation_loss,
        validate_every=20,
    )


# %%
control = load_pretrained("docs-lm")
control_history = fine_tune(control, rates["float"])

# %%
qat = prepare_qat(start, W2, "absmax")
qat_history = fine_tune(qat, rates["W2"])

# %% mystnb={"image": {"alt": "Training loss over sixty steps. The two curves rise and fall together batch by batch while both go down; the two-bit model begins well above the float one and ends a little above it."}} tags=["hide-input"]
curves(
    {"float": control_history.loss, "QAT, 2 bits": qat_history.loss},
    xlabel="step",
    ylabel="training loss (nats per token)",
)

# %% [markdown]
# :::{admonition} Before you read on
# Fine-tuning has made the float model better. Round the fine-tuned model to two bits: will it then be
# better or worse than the model as it came, in floating point?
# :::
#
# The third arm costs no training: the control, rounded to nearest. And two more for orientation,
# the model as it came and that model rounded.


# %%
def round_to_nearest(model, scheme=W2):
    return convert(prepare_qat(model, scheme, "absmax"))


arms = {
    "as it came": start,
    "as it came, rounded": round_to_nearest(start),
    "float control": control,
    "PTQ: control, rounded": round_to_nearest(control),
    "QAT": convert(qat),
}
losses = {
    name: document_losses(model, task.test) for name, model in arms.items()
}

# %% mystnb={"image": {"alt": "Test perplexity of five models with intervals. The float control is lowest and QAT lies close above it. The rounded control lies far to the right of both, about where the float model was before fine-tuning; that model rounded lies farthest."}} tags=["nbval-ignore-output", "hide-input"]
estimates(
    {name: as_perplexity(loss) for name, loss in losses.items()},
    xlabel="test perplexity",
)

# %% tags=["nbval-ignore-output"]
for name, loss in losses.items():
    print(f"{name:22} {as_perplexity(loss)}")

# %% [markdown]
# Rounding the control throws away about as much as fine-tuning had gained. The intervals of
# neighbours overlap, because some documents are harder than others for all models. Compared in
# pairs, document by document, that drops out ({term}`paired difference`, in {term}`nats <nat>` per
# token). The margin, fixed before: the interval of a difference must not touch zero.

# %% tags=["nbval-ignore-output"]
c, ptq, q = (
    losses["float control"],
    losses["PTQ: control, rounded"],
    losses["QAT"],
)
differences = {
    "PTQ - control (the damage)": loss_difference(ptq, c),
    "PTQ - QAT (taken back)": loss_difference(ptq, q),
    "QAT - control (left over)": loss_difference(q, c),
}
for name, difference in differences.items():
    print(f"{name:27} {difference}")

# %%
damage, taken_back, left_over = differences.values()
print("rounding did damage:         ", damage.low > 0)
print("QAT below PTQ at 2 bits:     ", taken_back.low > 0)
print("QAT still above the control: ", left_over.low > 0)

# %% [markdown]
# ## The share recovered
#
# :::{figure-md} fig-recovered-share
#
# ![A ruler of losses. At the top the model rounded afterwards, at the bottom the float control,
# between them the model trained under rounding. The way from the top to the middle is taken back,
# the rest is still missing.](_static/figures/recovered-share.svg)
#
# Three losses on one ruler. Rounding afterwards lifts the loss from the control to PTQ; training
# under rounding goes a part of that way back. The share is this part, whatever the length of the
# whole.
#
# :::
#
# One number sums up the three arms, the {term}`recovered share`:
#
# $$ \text{recovery} = \frac{L_{\text{PTQ}} - L_{\text{QAT}}}{L_{\text{PTQ}} - L_{\text{control}}} . $$
#
# It is 1 if training took all of the damage back and 0 if it did no better than rounding at the
# end. It is taken in the loss, not in perplexity, and resampled over documents in pairs. Where
# the damage is not clearly above zero there is nothing to share out, and `recovery` says so.

# %% tags=["nbval-ignore-output"]
result = recovery(c, ptq, q)
print(result)
glue("ch10-share", result.share.value, display=False)
glue("ch10-low", result.share.low, display=False)
glue("ch10-high", result.share.high, display=False)

# %%
by_definition = (ptq.mean - q.mean) / (ptq.mean - c.mean)
print(
    "equal to the definition:",
    abs(result.share.value - by_definition) < 1e-9,
)
print("at least half recovered:", result.share.low > 0.5)

# %% [markdown]
# In {glue:text}`ch10-steps` steps, {glue:text}`ch10-share:.0%` of the damage
# ({glue:text}`ch10-low:.0%` to {glue:text}`ch10-high:.0%`) were taken back, with one seed and two
# bits. The bar, at least half, was set after trial runs, an early one with this seed among them.
#
# ### The mistake of the missing control
#
# Suppose that we had no control and compared QAT with what we had before: the model as it came,
# rounded. Everything that fine-tuning does on its own would be counted as a merit of QAT.

# %% tags=["nbval-ignore-output"]
before = losses["as it came, rounded"]
naive = loss_difference(before, q)
print(f"QAT against what we had:         {naive}")
print(f"QAT against the rounded control: {taken_back}")

# %%
print(
    "without a control, QAT looks better than it is:",
    loss_difference(before, ptq).low > 0,
)

# %% [markdown]
# The first number holds a merit that is not quantization's: the float model learned the text as
# well.
#
# ## Convert, save, load
#
# `convert` stores what the layers have been computing with all along: integers, packed without
# gaps, and a float16 scale for each group. The converted model gives the very logits of the
# prepared one in eval mode. Not nearly: bit for bit, because it is the same arithmetic on the
# same grid points.

# %%
served = convert(qat)
batch = next(iter(task.test))
ids = batch["input_ids"][:4]  # (rows, tokens)
with torch.no_grad():
    equal = torch.equal(
        served(input_ids=ids).logits, qat.eval()(input_ids=ids).logits
    )
print("converted = prepared:", equal)
print(served.model.layers[0].mlp.down_proj)
print(
    "trainable parameters:",
    sum(p.requires_grad for p in served.parameters()),
)

# %%
with tempfile.TemporaryDirectory() as folder:
    path = save_quantized(served, Path(folder) / "docs-lm-2bit")
    files = {p.name: p.stat().st_size for p in sorted(path.iterdir())}
    loaded = load_quantized(path)
with torch.no_grad():
    same = torch.equal(
        loaded(input_ids=ids).logits, served(input_ids=ids).logits
    )
print("files:", *files)
print("loaded = saved:", same)

# %%
whole = files["model.safetensors"] / (
    4 * start.num_parameters()
)  # four bytes each in float32
packed = [served.get_submodule(name) for name in served.quantization.layers]
stored = sum(m.integers.nbytes + m.scale.nbytes for m in packed)
print(
    f"the layers that were rounded: {8 * stored / small:.2f} bits per "
    f"weight"
)
print(f"the whole file: {whole:.2f} of float32")

# %% [markdown]
# Two bits per weight and sixteen for each group of 32 make two and a half. The whole file shrinks
# far less, because the embedding in it is still in floating point: on a small model a large
# share.
#
# **Smaller, not faster.** To compute, a converted weight-only layer unpacks its integers and
# multiplies in floating point, as PyTorch has no {term}`kernel` for packed two-bit weights on a CPU. In
# eval mode it keeps the unpacked matrix where memory allows, so that only the first call unpacks;
# `release_cache(model)` gives that memory back, and `convert(qat, cache=False)` never takes it.
# What you gain is the size of the file, and without the cache that of the weights in memory. Speed
# is a matter of the runtime that serves the model.
#
# ### Two mistakes after the fact
#
# To convert with another scheme than one trained for, and to go on training a converted model:

# %%
refusal(lambda: convert(qat, W4))
refusal(lambda: fit(served, task.train, steps=1))

# %% [markdown]
# ## torchao, and the one rule in which it differs
#
# In torchao the same is `quantize_` with a `QATConfig`, which changes the model that it is given.
# Its filter takes every `Linear` layer, the tied output layer included, so we give it a filter;
# and it keeps scales in the type of the weight, so we ask for float32 on our side.

# %%
from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
from torchao.quantization.qat import QATConfig


def without_head(module, name):
    return isinstance(module, nn.Linear) and name != "lm_head"


scheme = QuantScheme(
    weight_bits=2, group_size=32, scale_dtype=torch.float32
)
config = IntxWeightOnlyConfig(
    weight_dtype=torch.int2, granularity=PerGroup(32)
)
theirs = load_pretrained("docs-lm")
quantize_(theirs, QATConfig(config, step="prepare"), filter_fn=without_head)
ours = prepare_qat(start, scheme, "absmax")
with torch.no_grad():
    print(
        "same logits:",
        torch.equal(
            ours(input_ids=ids).logits, theirs(input_ids=ids).logits
        ),
    )

# %% [markdown]
# Forward, the two are equal bit for bit. Backward they are not. torchao rounds and then clamps,
# and takes the gradient of that clamp, which is zero wherever the rounded weight sits *at* an end
# of the grid. Ours, like PyTorch's own operators, is zero only *beyond* the ends. With 255 steps
# nobody would notice. With three, the ends are half of the grid. We send a gradient of one to
# every weight and count where none arrives:


# %%
def silent(model):
    """Weights that receive no gradient, over all quantized layers."""
    count = 0
    for name in ours.quantization.layers:
        layer = model.get_submodule(name)
        rounding = (
            getattr(layer, "quantizer", None) or layer.weight_fake_quantizer
        )
        (gradient,) = torch.autograd.grad(
            rounding(layer.weight).sum(), layer.weight
        )
        count += (gradient == 0).sum().item()
    return count


arm = prepare_qat(start, scheme, method="absmax-torchao-gradient")
for name, model in {
    "ours": ours,
    "torchao": theirs,
    "ours, torchao's rule": arm,
}.items():
    print(
        f"{name:20} {silent(model) / small:.1%} of the weights without a "
        f"gradient"
    )

# %% [markdown]
# The third line is a method of the companion that follows torchao's rule, for comparison. With
# it, the gradients of the whole model's loss agree too. Not to the last bit, because torchao
# takes them on the way of the values, through a product with the scale and one with its
# reciprocal; to a millionth.


# %%
def gradients(model):
    loss = model(input_ids=ids, labels=ids).loss
    return torch.autograd.grad(
        loss, [model.get_parameter(name) for name in names]
    )


names = [f"{name}.weight" for name in ours.quantization.layers]
their_gradients = gradients(theirs)
for name, model in {"absmax": ours, "absmax-torchao-gradient": arm}.items():
    pairs = list(zip(gradients(model), their_gradients, strict=True))
    zeros = all(torch.equal(a == 0, b == 0) for a, b in pairs)
    close = all(
        torch.allclose(a, b, rtol=1e-6, atol=1e-12) for a, b in pairs
    )
    print(
        f"{name}: zero where torchao's are: {zeros}, equal to a millionth: "
        f"{close}"
    )

# %% [markdown]
# Which rule trains better is not settled by counting. More names on both sides stand in
# [](torchao_mapping.md).
#
# ## What this was, and what it was not
#
# One seed, one width, one learning rate, and few documents, of which some are much longer than others:

# %%
tokens = c.tokens
print(f"{len(tokens)} test documents")
print(f"the longest holds {tokens.max() / tokens.sum():.0%} of the tokens")

# %% [markdown]
# That is enough to see the mechanism at work. It is no evidence of how much QAT recovers in general:
# intervals from so few and so unequal documents promise more than they hold. [](ch11) asks the question
# again, with hundreds of short documents, three draws of the training text, a rate for every arm, two
# models, and opponents that do not train at all.

# %% [markdown]
# ## An encoder, in a loop of your own
#
# Last, a model that we did not train: MiniLM {cite}`wang2020`, which turns a sentence into a
# vector of 384 numbers {cite}`reimers2019`. Its recipe is the same three calls, `prepare_qat`,
# training, `convert`. We take the sentences of the language reference, and ask that the vectors
# stay where the float model puts them.

# %%
name = "sentence-transformers/all-MiniLM-L6-v2"
minilm, tokenizer = (
    load_pretrained(name, head="embedding"),
    load_tokenizer(name),
)
reference = language_reference()


def sentences(documents):
    text = " ".join(" ".join(documents).split())
    found = re.split(r"(?<=\.) (?=[A-Z])", text)
    return [
        s
        for s in found
        if 40 <= len(s) <= 200 and re.match(r"[A-Z][\w ,.'()*\";:-]+$", s)
    ]


learn, held_out = sentences(reference.train), sentences(reference.test)
print(len(learn), "sentences to learn from,", len(held_out), "held out")
print(held_out[3])


# %%
def embed(model, batch):
    tokens = tokenizer(
        batch,
        padding=True,
        truncation=True,
        max_length=32,
        return_tensors="pt",
    )
    hidden = model(**tokens).last_hidden_state  # (sentences, tokens, 384)
    mask = tokens["attention_mask"][..., None]  # (sentences, tokens, 1)
    return F.normalize(
        (hidden * mask).sum(1) / mask.sum(1), dim=-1
    )  # (sentences, 384)


@torch.no_grad()
def agreement(model):
    """Cosine with the float model's vector, for each sentence."""
    return (embed(model, held_out) * target).sum(-1).numpy()


with torch.no_grad():
    target = embed(minilm, held_out)
skip = ["pooler"]  # a layer that sentence vectors do not pass through
rounded_only = {
    bits: agreement(prepare_qat(minilm, scheme, "absmax", skip=skip))
    for bits, scheme in {4: W4, 2: W2}.items()
}

# %% [markdown]
# At four bits the vectors turn a little; at two they turn away, and there training is worth its
# while. The loop is written out, to show that nothing in it knows about quantization. Note that
# the model stays in eval mode: fake quantization rounds in either mode, and dropout would blur a
# target that is exact. The learning rate was chosen among four on sentences of the validation
# documents.

# %%
tiny = prepare_qat(minilm, W2, "absmax", skip=skip).eval()
descent = torch.optim.AdamW(tiny.parameters(), lr=2e-4)
for step in range(30):
    batch = learn[16 * step : 16 * (step + 1)]
    with torch.no_grad():
        wanted = embed(minilm, batch)
    loss = (embed(tiny, batch) - wanted).square().sum(-1).mean()
    descent.zero_grad()
    loss.backward()
    descent.step()
trained = agreement(convert(tiny))

# %% mystnb={"image": {"alt": "Mean cosine similarity with the float model on held-out sentences, with intervals: close to one for four bits rounded, far lower for two bits rounded, and clearly higher for two bits after thirty steps of training."}} tags=["nbval-ignore-output", "hide-input"]
cosines = {
    "4 bits, rounded": bootstrap(rounded_only[4]),
    "2 bits, rounded": bootstrap(rounded_only[2]),
    "2 bits, trained": bootstrap(trained),
}
estimates(cosines, xlabel="cosine similarity with the float model")

# %% [markdown]
# The margin, set together with the learning rate after trial runs: trained must exceed rounded by
# 0.1, with the whole interval of the {term}`paired difference`.

# %%
gain = bootstrap(trained - rounded_only[2])
print(
    "4 bits above 2 bits:               ",
    cosines["4 bits, rounded"].low > cosines["2 bits, rounded"].high,
)
print("training turned the vectors back:  ", gain.low > 0.1)

# %% [markdown]
# No {term}`recovered share` here: the target is the float model itself, so there is no control to
# train, and a cosine is no loss. And agreement with a vector is not yet quality at a task.
#
# With a trainer instead of a loop, nothing changes but the loop. This one is tested too:
#
# ```python
# from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
#
# qat = prepare_qat(AutoModelForCausalLM.from_pretrained("your/model"), W4)
# settings = TrainingArguments("run", learning_rate=1e-5, max_steps=500)
# Trainer(qat, settings, train_dataset=rows).train()  # rows of input_ids and labels
# save_quantized(convert(qat), "your-model-4bit")
# ```
#
# ## Quiz
#
# ```{quiz} ch10
# Three questions, each answer explained: they stand in `_quizzes/ch10.md` beside this notebook.
# ```
#
# ## Exercises
#
# ```{exercise} The share, from perplexities
# :label: ch10-recovery
# A paper reports the perplexities of the matched control, of PTQ and of QAT. Write
# `share(control, ptq, qat)`, the recovered share. Replace the `...` and run the cell.
# ```


# %%
def share(control, ptq, qat): ...  # your turn


check("ch10-recovery", share)

# %% [markdown]
# ```{solution} ch10-recovery
# :class: dropdown
# The share is defined in the loss, and the loss is the logarithm of the perplexity. Taken in
# perplexity itself, large damages would weigh too much.
# ```


# %% tags=["hide-cell"]
def share(control, ptq, qat):
    control, ptq, qat = np.log([control, ptq, qat])
    return (ptq - qat) / (ptq - control)


check("ch10-recovery", share)

# %% [markdown]
# ```{exercise} Two rules for the ends
# :label: ch10-ste
# `rounded` holds weights in steps of the grid, rounded but not yet clipped. Write
# `gradient(rounded, bits, ends)`: a float tensor of ones and zeros, the gradient that each weight
# gets. With `ends=True` the ends of the grid are inside (our rule), with `ends=False` they are
# not (torchao's). Replace the `...` and run the cell.
# ```


# %%
def gradient(rounded, bits, ends): ...  # your turn


check("ch10-ste", gradient)

# %% [markdown]
# ```{solution} ch10-ste
# :class: dropdown
# Only the comparison differs: with or without equality.
# ```


# %% tags=["hide-cell"]
def gradient(rounded, bits, ends):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if ends:
        return ((low <= rounded) & (rounded <= high)).float()
    return ((low < rounded) & (rounded < high)).float()


check("ch10-ste", gradient)

# %% [markdown]
# ```{exercise} An experiment: another seed, another rate
# :label: ch10-experiment
# Run the three arms with seeds 1 and 2, and QAT at half and at twice the learning rate. Does the recovered share leave the interval that
# this page prints?
# ```
#
# ```{solution} ch10-experiment
# :class: dropdown
# The interval on this page knows the documents, not the seed and not the rate. If your shares scatter more widely than it says, you have
# measured what it leaves out. The control has to be run again with each seed, too.
# ```
#
# ## What we saw
#
# - Fake quantization of a layer is a few lines: a scale from the weights, a rounding, and a
#   gradient that passes inside the grid. `prepare_qat` computes the same, bit for bit.
# - It swaps `Linear` layers and leaves what is tied to an embedding; it says which, and it
#   refuses a group size that does not divide, a second preparation, and a pattern that matches
#   nothing.
# - Against a matched control, QAT at two bits took back a large part of the damage of rounding,
#   and not all of it. Without the control, fine-tuning itself would have been counted in.
# - `convert` keeps the output bit for bit; saved and loaded it is the same model. It is smaller,
#   not faster.
# - torchao's forward is equal to ours; its gradient leaves out the weights at the ends of the
#   grid, which at two bits are many.
# - On MiniLM, in an ordinary loop, a few steps turned two-bit sentence vectors back towards the
#   float ones.
#
# :::{epigraph}
# By evening the Woodman walked nearly as the Scarecrow did. "Nearly," said Dorothy, who had measured: a
# little stiffness was left, which no practice had taken out. But she had counted the Scarecrow's steps
# as well, and so she did not thank the joints for what the road had taught them both.
# :::
#
# ## References
#
# - {cite:t}`bengio2013`: the straight-through estimator.
# - {cite:t}`jacob2018`: training with simulated quantization.
# - {cite:t}`liu2024llmqat`: quantization-aware training brought to large language models.
# - {cite:t}`or2025`: torchao, from training to serving.
# - {cite:t}`wang2020`, {cite:t}`reimers2019`: MiniLM, and sentence vectors from an encoder.
