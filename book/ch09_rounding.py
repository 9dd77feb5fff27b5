# %% [markdown]
# (ch09)=
# # Rounding a language model
#
# :::{epigraph}
# At the edge of the forest stood a woodman made of tin. "I was not born so," he said. "The smith
# put tin in my place limb by limb, and he had sheet of four thicknesses only, so every part of me
# was made in the nearest one." Dorothy asked whether it had hurt. "Most of it I never noticed. One
# small piece, in here, I have missed ever since." He knocked on his chest. "He should have asked
# after each piece. Then he would have known where to spend the good tin."
# :::
#
# Before anybody trains, round. {term}`Post-training quantization` to the nearest grid point takes a
# second, needs no data, and is often good enough. This chapter does it to docs-lm, measures what it
# costs, and looks for the small piece that is missed. What it finds is the damage that [](ch10)
# repairs.
#
# **What you will learn**
#
# - to round a `Linear` of a language model by hand, and get the same from `convert` and upstream;
# - what width and {term}`group size` cost in bits and in {term}`perplexity`, and where nothing is
#   lost;
# - which layers are hurt, and what a single outlier does to those who share its scale;
# - what changes when activations are rounded as well;
# - to pack integers into bytes, and why a whole file shrinks less than its layers.
#
# *Running time: about two minutes on two cores.*

# %% tags=["hide-input"]
import math
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from myst_nb import glue
from torch import nn
from torch.utils.data import DataLoader, Subset

from companion import (
    W2,
    W4,
    W4A8,
    W8A8,
    Activations,
    QuantScheme,
    choose_scale,
    convert,
    dequantize,
    fake_quantize,
    load_pretrained,
    load_quantized,
    load_task,
    pack,
    prepare_qat,
    quantize,
    save_quantized,
    unpack,
)
from companion.course.check import check
from companion.course.figures import bars, curves, heatmap
from companion.course.sources import MINILM, find, load_tokenizer
from companion.evaluation.language import (
    as_perplexity,
    document_losses,
    loss_difference,
)
from companion.numerics.activations import fake_quantize_activations
from companion.numerics.affine import to_groups

warnings.filterwarnings(
    "ignore"
)  # upstream's int8 kernel announces its removal; see chapter 5

# %% [markdown]
# ## One layer by hand
#
# The model of [](ch08) has four blocks of seven `Linear` layers each. We take one of them and cut
# its rows into groups of 32 neighbours, each of which gets a {term}`scale` of its own.

# %%
model = load_pretrained("docs-lm").eval()
name = "model.layers.0.mlp.down_proj"
weight = model.get_submodule(
    name
).weight.detach()  # (256 outputs, 512 inputs)
groups = to_groups(weight, 32)  # (256, 16 groups, 32 weights)
print(tuple(weight.shape), "->", tuple(groups.shape))

# %% [markdown]
# The grid of four bits has sixteen points, from $q_{\min} = -8$ to $q_{\max} = 7$. With the group's
# largest magnitude at its end,
#
# $$ s_g = \frac{\max_{i \in g} |w_i|}{(q_{\max} - q_{\min}) / 2}, \qquad q_i = \operatorname{clip}\!\big(\operatorname{round}(w_i / s_g), -8, 7\big), \qquad \hat w_i = s_g\, q_i . $$

# %%
s = groups.abs().amax(-1, keepdim=True) / ((7 - -8) / 2)  # (256, 16, 1)
q = torch.clamp(
    torch.round(groups * (1 / s)), -8, 7
)  # multiply, as the kernels do
w_hat = s * q
print("integers of the first group:", q[0, 0].int().tolist())

# %%
scale, zero_point = choose_scale(groups, bits=4)
integers = quantize(groups, scale, bits=4)
print("same scales:  ", torch.equal(scale, s))
print("same integers:", torch.equal(integers.float(), q))
print("same weights: ", torch.equal(dequantize(integers, scale), w_hat))

# %% [markdown]
# Upstream has no operator for groups, but it has one for rows. A group is a short row, if one views
# the matrix so.

# %%
rows = groups.reshape(-1, 32)  # (256 * 16, 32)
zeros = torch.zeros(len(rows), dtype=torch.int32)
upstream = torch.fake_quantize_per_channel_affine(
    rows, scale.flatten(), zeros, 0, -8, 7
)
print("torch agrees:", torch.equal(upstream.view_as(groups), w_hat))

# %% [markdown]
# ## What a scale costs
#
# A scale is a number that has to be stored as well. With $b$ bits for an integer and $c$ bits for
# the scale of $g$ weights, each weight takes $b + c / g$ bits. Files of quantized models keep
# scales in float16, and so do the presets of the companion.

# %%
for dtype in (torch.float32, torch.float16):
    print(
        f"{dtype!s:13} scales: "
        f"{replace(W4, scale_dtype=dtype).bits_per_weight(512)} bits"
    )

# %% [markdown]
# The grid is computed in float32; then its step is rounded. Values that sat on the edge between two
# integers may fall to the other side, above all the largest of each group, which a float32 scale
# puts exactly on the edge at 7.5 steps.

# %%
half, _ = choose_scale(groups, bits=4, scale_dtype=torch.float16)
in_half = quantize(groups, half, bits=4)
moved = in_half != integers
largest = groups.abs() == groups.abs().amax(-1, keepdim=True)
print(
    f"integers that changed: {moved.sum().item()} of {moved.numel()}, "
    f"{moved.float().mean():.1%}"
)
print(
    f"of them the largest of their group: {(moved & largest).sum().item()}"
)
print(
    "by one at most:",
    (in_half.int() - integers.int()).abs().max().item() == 1,
)

# %% [markdown]
# Float16 keeps eleven significant bits of the step, far more than a grid of sixteen points can
# show. What moved was on an edge, and moved by one.
#
# ## The whole model
#
# `prepare_qat` puts the rounding into every `Linear`, and `convert` replaces those layers by ones
# that store integers. Between the two one would train; for {term}`post-training quantization` one
# does not.

# %%
prepared = prepare_qat(model, W4, "absmax")
converted = convert(prepared)
print(prepared.quantization)

# %% [markdown]
# The output layer is the embedding again, used a second time, and both stay in floating point
# unless we ask for them. Our hand-made integers are the ones that the converted layer keeps, and
# the whole model computes bit for bit what the prepared one does.

# %%
layer = converted.get_submodule(name)
stored = unpack(layer.integers, bits=4, n=512)  # (256, 512)
print("stored integers are ours:", torch.equal(stored, in_half.flatten(1)))
print(
    "their values are torch's:",
    torch.equal(
        layer.weight.view_as(rows),
        torch.fake_quantize_per_channel_affine(
            rows, half.float().flatten(), zeros, 0, -8, 7
        ),
    ),
)

# %%
task = load_task("language-reference")
windows = next(iter(task.test))["input_ids"]  # (16, 256)
with torch.no_grad():
    logits, again = (
        prepared.eval()(windows).logits,
        converted(windows).logits,
    )
print("converted = prepared, bit for bit:", torch.equal(logits, again))

# %% [markdown]
# ## How much does it hurt?
#
# We measure on the test split of Python's language reference. The model never read a line of it,
# and it is not what the model was trained on, docstrings, so the float perplexity is higher than in
# [](ch08). That is the state in which fine-tuning finds it.

# %%
float_losses = document_losses(model, task.test)
float_ppl = as_perplexity(float_losses)
print(
    f"tokens scored: {float_losses.tokens.sum()} of {float_ppl.n} documents"
)

# %% [markdown]
# Four widths, four group sizes, sixteen rounded models. `prepare_qat` alone is enough to measure
# them, since converting changes no value.

# %%
WIDTHS, SIZES = (8, 4, 3, 2), (32, 64, 128, None)


def rounded(scheme, **options):
    """Losses on the test documents, after rounding to nearest."""
    return document_losses(
        prepare_qat(model, scheme, "absmax", **options), task.test
    )


losses = {(b, g): rounded(QuantScheme(b, g)) for b in WIDTHS for g in SIZES}
ppl = {key: as_perplexity(value) for key, value in losses.items()}

# %% mystnb={"image": {"alt": "Perplexity against the bits of a weight, one line for each group size and a flat line for the float model. At 8 and 4 bits all lines lie on the float line, at 3 bits slightly above; at 2 bits they fan out, groups of 32 lowest and one scale per row highest."}} tags=["hide-input"]
lines = {"float": dict.fromkeys(WIDTHS, float_ppl.value)}
for size in SIZES:
    label = f"groups of {size}" if size else "one scale per row"
    lines[label] = {bits: ppl[bits, size].value for bits in WIDTHS}
curves(
    lines, xlabel="bits per weight, without its scale", ylabel="perplexity"
)

# %% tags=["nbval-ignore-output"]
print("width  group  bits/weight  perplexity")
print(
    f"float {'':6}  {32:11.3f}  {float_ppl.value:6.1f} "
    f"[{float_ppl.low:.1f}, {float_ppl.high:.1f}]"
)
glue("ch09-float", float(float_ppl.value), display=False)
for (bits, size), e in ppl.items():
    cost = QuantScheme(bits, size).bits_per_weight(256)
    print(
        f"{bits:5}  {size or 'row':>5}  {cost:11.3f}  {e.value:6.1f} "
        f"[{e.low:.1f}, {e.high:.1f}]"
    )
for bits in (4, 2):
    glue(f"ch09-w{bits}-32", float(ppl[bits, 32].value), display=False)
    glue(f"ch09-w{bits}-row", float(ppl[bits, None].value), display=False)

# %% [markdown]
# From {glue:text}`ch09-float:.1f` to {glue:text}`ch09-w4-32:.1f` at 4 bits in groups of 32, and to
# {glue:text}`ch09-w2-32:.1f` at 2 bits; with one scale for a whole row, to
# {glue:text}`ch09-w2-row:.1f`. Four bits are nearly free here. Between three and two something
# breaks.
#
# Perplexities of two models share their documents, and most of their spread, so whether one is
# worse is a matter for the {term}`paired difference` of [](ch07). We fixed what to expect, here and
# below, on an unfinished checkpoint of docs-lm, before the weights measured here existed. From 4
# bits on, each bit less costs something clearly above zero; and at 2 bits, one scale per row is
# worse than groups of 32 by more than 0.1 nats per token, with the whole interval.

# %%
per_bit = [
    loss_difference(losses[low, g], losses[high, g]).low > 0
    for g in SIZES
    for high, low in ((4, 3), (3, 2))
]
row_or_32 = loss_difference(losses[2, None], losses[2, 32])
print("each bit below 4 costs, at every group size:", all(per_bit))
print(
    "W2 per row is worse than W2 g32 by more than 0.1 nats:",
    row_or_32.low > 0.1,
)

# %% [markdown]
# ## Nothing to recover
#
# Whoever reports that training took back some share of a damage should first show that there was
# one. Here is the damage of all sixteen, in nats per token, paired with the float model. A damage
# whose interval does not lie above zero is not there as far as this test set can tell, and
# {term}`recovered share` is a word without meaning for it.

# %% tags=["nbval-ignore-output"]
damage = {
    key: loss_difference(value, float_losses)
    for key, value in losses.items()
}
for (bits, size), e in damage.items():
    verdict = "" if e.low > 0 else "  nothing to recover"
    print(
        f"W{bits} {f'g{size}' if size else 'row':>4}: "
        f"{e.value:7.4f} [{e.low:7.4f}, {e.high:7.4f}]{verdict}"
    )
glue("ch09-damage-w4", float(damage[4, 32].value), display=False)
glue("ch09-damage-w2", float(damage[2, 32].value), display=False)
glue("ch09-damage-w2-row", float(damage[2, None].value), display=False)

# %% [markdown]
# Expected: 8 bits below 0.002 nats, whatever the group; 2 and 3 bits clearly above zero; 4 bits in
# groups of 32 below 0.03. The table adds that there is nothing to recover at 8 bits only, and there
# not for every group size.

# %%
print(
    "W8 below 0.002 nats:          ",
    all(damage[8, g].high < 0.002 for g in SIZES),
)
print(
    "W3 and W2 clearly above zero: ",
    all(damage[b, g].low > 0 for b in (3, 2) for g in SIZES),
)
print("W4 g32 below 0.03 nats:       ", damage[4, 32].high < 0.03)
unclear = {bits for (bits, _), e in damage.items() if e.low <= 0}
print("nothing to recover, at 8 bits only:", unclear == {8})
print("documents behind each interval:", damage[4, 32].n)

# %% [markdown]
# Twenty documents of unequal length make rough intervals; they are good enough for differences as
# large as these, and not for the third digit. The damage of W4 in groups of 32 is
# {glue:text}`ch09-damage-w4:.3f` nats. A method that took back all of it would gain that much and
# no more. At 2 bits it is {glue:text}`ch09-damage-w2:.2f`, and {glue:text}`ch09-damage-w2-row:.2f`
# per row: there is work to do.
#
# ## Which layers hurt
#
# The woodman's advice: replace one piece at a time and ask. We round a single layer to two bits and
# leave the other 27 as they are, then the next. Every fourth window of the test split will do.

# %%
linears = [
    n
    for n, m in model.named_modules()
    if type(m) is nn.Linear and n != "lm_head"
]
sample = DataLoader(
    Subset(task.test.dataset, range(0, len(task.test.dataset), 4)),
    batch_size=16,
)
before = document_losses(model, sample).mean


def hurt(layers):
    """Loss that two bits here add, in thousandths of a nat."""
    others = [n for n in linears if n not in layers]
    rounded = prepare_qat(model, W2, "absmax", skip=others)
    return 1000 * (document_losses(rounded, sample).mean - before)


alone = {n: hurt([n]) for n in linears}
together = hurt(linears)

# %% mystnb={"image": {"alt": "A table of four blocks by seven layers, shaded by how much rounding that one layer to two bits adds to the loss, in thousandths of a nat. The value projection of block 0 is by far the darkest; down projections and block 3 are grey; queries and keys of the first three blocks are nearly white."}} tags=["hide-input"]
kinds = [n.split(".")[-1].removesuffix("_proj") for n in linears[:7]]
heatmap(
    np.array(list(alone.values())).reshape(4, 7),
    ["0", "1", "2", "3"],
    kinds,
    xlabel="layer rounded to 2 bits (loss added, in thousandths of a nat)",
    ylabel="block",
)

# %% [markdown]
# Rounding is felt in a few places (a number just below zero is noise). The worst layer, we
# expected, would be at least three times as sensitive as the typical one. How large is that piece?
# And do the single damages add up? If layers erred independently and a little, their sum would be
# close to the damage of all together; we take "between half and twice" as agreement.

# %%
worst = max(alone, key=alone.get)
size = {n: model.get_submodule(n).weight.numel() for n in linears}
print("most sensitive:", worst)
print(
    f"its share of the weights in Linear layers: "
    f"{size[worst] / sum(size.values()):.2%}"
)
print(
    "at least three times the median:",
    alone[worst] >= 3 * np.median(list(alone.values())),
)
print("single damages add up:", 0.5 < sum(alone.values()) / together < 2)

# %% [markdown]
# So spend the good tin there: keep this one layer in floating point and round the others. We ask
# that, on the whole test split, the damage falls by more than zero, with its interval.

# %% tags=["nbval-ignore-output"]
spared = loss_difference(losses[2, 32], rounded(W2, skip=[worst]))
print("saved by sparing one layer:", spared)
glue("ch09-spared", float(spared.value), display=False)

# %%
print("sparing the most sensitive layer helps:", spared.low > 0)

# %% [markdown]
# It gives back {glue:text}`ch09-spared:.3f` nats of {glue:text}`ch09-damage-w2:.2f`. What remains
# is spread over all the others, so leaving out layers does not end the trouble; training might.
#
# ## One giant in the group
#
# Why does a {term}`group size` matter at all? The largest weight decides the step for everyone who
# shares its scale. A made-up row: 256 ordinary weights, then the same with one of them made twelve
# times as large as any other. The error of the *other* 255, in either case:

# %%
generator = torch.Generator().manual_seed(0)
row = torch.randn(1, 256, generator=generator, dtype=torch.double).float()
giant = row.clone()
giant[0, 100] = 12 * row.abs().max()
others = torch.arange(256) != 100


def error(x, group_size):
    """Mean squared error of the other 255 over their mean square."""
    view = to_groups(x, group_size)
    restored = fake_quantize(
        view, choose_scale(view, bits=4)[0], bits=4
    ).view_as(x)
    difference = (restored - x)[0, others].double()
    return (
        difference.square().mean() / x[0, others].double().square().mean()
    ).item()


for size in (None, 128, 64, 32):
    print(
        f"{f'groups of {size}' if size else 'whole row':13}: without the "
        f"giant "
        f"{error(row, size):.3f}, beside it {error(giant, size):.3f}"
    )

# %% [markdown]
# An error of 1 would mean that the others have all become zero. In smaller groups the giant only
# ruins its own neighbours; that is what they buy. And this is what they cost:

# %%
for size in (None, 128, 64, 32, 16):
    cost = QuantScheme(4, size).bits_per_weight(256)
    print(
        f"{f'groups of {size}' if size else 'whole row':13}: {cost:.4f} "
        f"bits per weight"
    )

# %% [markdown]
# The giant can be measured: the *crest factor* of a group of $n$ weights is
#
# $$ c = \frac{\max |w|}{\sqrt{\tfrac1n \sum w^2}}, \qquad 1 \le c \le \sqrt{n}, $$
#
# and at the upper end one weight is all there is. We look for the highest crest of any row, in
# docs-lm and in MiniLM, an encoder that was trained for much longer on much more.


# %%
def crest(x):
    return x.abs().amax(-1) / x.square().mean(-1).sqrt()


def highest_crest(model):
    """Per layer, the largest crest factor of its rows; the ceiling."""
    layers = {
        n: m.weight.detach()
        for n, m in model.named_modules()
        if type(m) is nn.Linear and n != "lm_head"
    }
    return {
        n: (crest(w).max().item(), math.sqrt(w.shape[1]))
        for n, w in layers.items()
    }


minilm = load_pretrained(MINILM).eval()
for which, found in (
    ("docs-lm", highest_crest(model)),
    ("MiniLM", highest_crest(minilm)),
):
    most = max(found, key=lambda n: found[n][0])
    print(
        f"{which}: {most}, crest {found[most][0]:.1f}, ceiling "
        f"{found[most][1]:.1f}"
    )

# %% [markdown]
# docs-lm has no giants to speak of. In MiniLM there is a row of 1,536 weights that is nearly one
# weight and nothing else. At 4 bits:

# %%
w = minilm.get_submodule(
    "encoder.layer.0.output.dense"
).weight.detach()  # (384, 1536)
loud = w[crest(w).argmax()][None]  # (1, 1536)
for size in (None, 128, 32):
    view = to_groups(loud, size)
    zero = (
        (quantize(view, choose_scale(view, bits=4)[0], bits=4) == 0)
        .sum()
        .item()
    )
    print(
        f"{f'groups of {size}' if size else 'whole row':13}: {zero} of "
        f"1536 weights become zero"
    )

# %% mystnb={"image": {"alt": "Magnitudes of the 1536 weights of one row of MiniLM, sorted, on a logarithmic axis. The first lies far above all others; a dashed line marks half a step of the 4-bit grid for the row, and every weight but the first lies below it."}} tags=["hide-input"]
half_step = choose_scale(loud, bits=4)[0].item() / 2
magnitudes = loud.abs().flatten().sort(descending=True).values
curves(
    {
        "weights of the row": magnitudes.tolist(),
        "half a step: below it, zero": [half_step] * 1536,
    },
    xlabel="weights, sorted by size",
    ylabel="magnitude",
    log_y=True,
)

# %% [markdown]
# ## Activations, too
#
# Integer kernels want both factors as integers. Two of the presets round the inputs of a layer as
# well, while the model runs, on the range that is there ([](ch03)): `W4A8` with a scale for every
# {term}`token`, `W8A8` with one for the whole tensor and on the integers from 0 to 127 alone. The
# latter is what the fast int8 kernel of PyTorch on x86 does, since two products of a signed byte
# with a larger unsigned one might overflow its 16 bits.

# %%
for which, scheme in {"W4A8": W4A8, "W8A8": W8A8}.items():
    form = scheme.activations
    print(
        f"{which}: inputs in {form.bits} bits, per {form.granularity}, "
        f"integers {form.integers}"
    )

# %% [markdown]
# What each of these choices costs is best seen with 8-bit weights per row, which cost nothing.

# %%
forms = {
    "per token, 256 integers": Activations(8, "token"),
    "per tensor, 256 integers": Activations(8, "tensor"),
    "per tensor, 128 integers (W8A8)": Activations(
        8, "tensor", range=(0, 127)
    ),
}
inputs_too = {
    label: loss_difference(
        rounded(QuantScheme(8, None, activations=form)), float_losses
    )
    for label, form in forms.items()
}
w4a8 = loss_difference(rounded(W4A8), losses[4, 32])

# %% tags=["nbval-ignore-output"]
for label, e in inputs_too.items():
    print(f"{label:32}: {e.value:.4f} [{e.low:.4f}, {e.high:.4f}]")
print(
    f"{'W4A8 beyond W4':32}: {w4a8.value:.4f} [{w4a8.low:.4f}, "
    f"{w4a8.high:.4f}]"
)
glue(
    "ch09-w8a8",
    float(inputs_too["per tensor, 128 integers (W8A8)"].value),
    display=False,
)

# %% [markdown]
# Expected: per token below 0.003 nats; W8A8 clearly worse than that, and still below 0.05; W4A8
# within 0.005 of W4.

# %%
token, tensor, narrow = inputs_too.values()
print("per token below 0.003:        ", token.high < 0.003)
print(
    "W8A8 between per token and .05:",
    token.high < narrow.low and narrow.high < 0.05,
)
print(
    "W4A8 within 0.005 of W4:      ",
    max(abs(w4a8.low), abs(w4a8.high)) < 0.005,
)

# %% [markdown]
# Why does the whole tensor do worse than a token? For the same reason as before: who shares a step
# with whom. We catch the inputs of the layers, and compare crest factors.


# %%
def inputs_of(model, **batch):
    """What enters each Linear layer, by name."""
    caught, hooks = {}, []
    for n, m in model.named_modules():
        if type(m) is nn.Linear:

            def keep(m, args, n=n):
                caught.setdefault(n, args[0])

            hooks.append(m.register_forward_pre_hook(keep))
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return caught


# %% tags=["nbval-ignore-output"]
x = inputs_of(model, input_ids=windows)[
    "model.layers.2.mlp.down_proj"
]  # (16, 256, 512)
of_tensor, of_token = crest(x.flatten()).item(), crest(x).mean().item()
print(
    f"crest factor of the tensor: {of_tensor:.0f}, of its average token: "
    f"{of_token:.0f}"
)
glue("ch09-crest-tensor", float(of_tensor), display=False)
glue("ch09-crest-token", float(of_token), display=False)

# %%
print(
    "crest of the tensor more than twice that of a token:",
    of_tensor > 2 * of_token,
)

# %% [markdown]
# In `down_proj` of block 2, {glue:text}`ch09-crest-tensor:.0f` against
# {glue:text}`ch09-crest-token:.0f`: some tokens are loud, and in one grid for all of them the quiet
# ones get few integers.
#
# Worse than loud, they are strangers. With a range per tensor, what a row of text becomes depends
# on which other rows happen to be in the batch, and on the padding as well.

# %%
for which, form in forms.items():
    in_batch, by_itself = (
        fake_quantize_activations(v, form)[0] for v in (x, x[:1])
    )
    print(
        f"{which:32}: row 0 alone = in the batch: "
        f"{torch.equal(in_batch, by_itself)}"
    )

# %% [markdown]
# The kernel itself behaves the same. On one layer it computes what training simulates, up to float
# summation (we allow a relative $10^{-5}$). Alone and in the batch it differs by more than a
# hundred times that, though by less than twice what rounding changes in this layer.


# %%
def apart(y, reference):
    return ((y - reference).norm() / reference.norm()).item()


n = "model.layers.2.mlp.down_proj"
with torch.no_grad():
    simulated = prepare_qat(model, W8A8, "absmax").get_submodule(n)
    kernel = convert(prepare_qat(model, W8A8, "absmax")).get_submodule(n)
    print("kernel = simulation:", apart(kernel(x), simulated(x)) < 1e-5)
    alone_or_not = apart(kernel(x[:1])[0], kernel(x)[0])
    rounding = apart(kernel(x)[0], model.get_submodule(n)(x)[0])
print("kernel, alone = in the batch:", alone_or_not < 1e-3)
print(
    "apart by less than twice the rounding error:",
    alone_or_not < 2 * rounding,
)

# %% [markdown]
# Whoever serves W8A8 this way gets answers that vary with the traffic, by about as much as rounding
# changes them anyway. That cost {glue:text}`ch09-w8a8:.3f` nats in the test above, so it is nothing
# tragic here, but it is not reproducible either. Per token there is no such effect.
#
# A scale per token does not help when the outlier sits inside each token. MiniLM is such a case.
# Let us see which of its 384 features is the largest in the first token of three sentences, where
# each block feeds its wide layer.

# %%
tokenizer = load_tokenizer(MINILM)
sentences = [
    "The road led through a field of wheat.",
    "Return a tensor of the same shape, rounded to integers.",
    "Nobody had told the towers that they should wear green glasses.",
]
caught = inputs_of(
    minilm, **tokenizer(sentences, padding=True, return_tensors="pt")
)
first = {
    block: caught[f"encoder.layer.{block}.intermediate.dense"][:, 0]
    for block in range(6)
}
for block, tokens in first.items():
    print(
        f"block {block}: largest feature "
        f"{tokens.abs().argmax(-1).tolist()}, "
        f"crest at least {crest(tokens).min():.1f}, ceiling "
        f"{math.sqrt(384):.1f}"
    )

# %% [markdown]
# The same feature in every sentence and through all six blocks, and so large that nearly the whole
# token is that one number. Such features are known from much larger models {cite}`dettmers2022`,
# together with the usual remedy, to keep them apart in floating point.
#
# ## Packing
#
# So far the integers sat in `int8`, one byte each, whatever their width. {term}`Packing` puts two
# of four bits into each byte. In two's complement the four lowest bits of a number say all about
# it; the second number moves up by four. Coming back, a pattern of 8 or more stands for a negative
# number.

# %%
pair = stored[0, :2].int()  # two integers of the layer from above
byte = (pair[0] & 15) | ((pair[1] & 15) << 4)
print(
    f"{pair.tolist()} -> {pair[0] & 15:04b} and {pair[1] & 15:04b} -> "
    f"{byte:08b} = {byte}"
)
low, high = byte & 15, byte >> 4
print("back:", [((p ^ 8) - 8).item() for p in (low, high)])

# %%
by_hand = (stored[:, 0::2].int() & 15) | (
    (stored[:, 1::2].int() & 15) << 4
)  # (256, 256)
packed = pack(stored, bits=4)
print(tuple(stored.shape), "->", tuple(packed.shape), packed.dtype)
print("same bytes:   ", torch.equal(by_hand.to(torch.uint8), packed))
print("back again:   ", torch.equal(unpack(packed, bits=4, n=512), stored))
print("in the layer: ", torch.equal(layer.integers, packed))

# %% [markdown]
# Three bits do not divide eight, so eight integers share three bytes, and no bit is wasted.

# %%
for bits in (8, 4, 3, 2):
    low, high = QuantScheme(bits).integers
    some = (
        torch.arange(512)
        .remainder(high - low + 1)
        .add(low)
        .to(torch.int8)[None]
    )
    print(
        f"512 integers of {bits} bits: {pack(some, bits).numel()} bytes,",
        "back again:",
        torch.equal(unpack(pack(some, bits), bits, 512), some),
    )

# %% [markdown]
# ## What the file weighs
#
# Bytes that count are those of a file. We save some converted models, and compare with the float
# model's file: the layers alone, and the whole.


# %%
def weigh(model):
    """Bytes of the weights file that a converted model is saved to."""
    with tempfile.TemporaryDirectory() as folder:
        save_quantized(model, folder)
        return Path(folder, "model.safetensors").stat().st_size


float_bytes = (
    Path(find("docs-lm")[0], "model.safetensors").stat().st_size
)  # where it came from
converted_all = convert(prepare_qat(model, W4, "absmax", embeddings=True))
converted_all_2 = convert(prepare_qat(model, W2, "absmax", embeddings=True))
files = {"float": float_bytes, "W4": weigh(converted)}
files["W4, embedding too"] = weigh(converted_all)
files["W2, embedding too"] = weigh(converted_all_2)

# %%
packed_layers = [converted.get_submodule(n) for n in linears]
in_layers = sum(m.integers.nbytes + m.scale.nbytes for m in packed_layers)
float_layers = sum(4 * m.rows * m.columns for m in packed_layers)
print(f"Linear layers, W4 / float: {in_layers / float_layers:.4f}")
print(f"whole file,    W4 / float: {files['W4'] / files['float']:.4f}")
print(
    f"embedding's share of the float file: "
    f"{4 * 4096 * 256 / files['float']:.4f}"
)

# %% [markdown]
# The layers shrink to 4.5 bits of 32, and the file by much less, because the embedding stays as it
# is. In docs-lm it is a large part of the model; in models of billions of weights it is a small
# one. With `embeddings=True` it is rounded too, and the output layer, tied to it, reads the same
# integers.

# %% mystnb={"image": {"alt": "Bars of file size relative to float. W4 with a float embedding is the longest of the three quantized ones; with the embedding rounded, W4 comes to about a seventh and W2 to less than a twelfth."}} tags=["hide-input"]
bars(
    {k: v / float_bytes for k, v in files.items()},
    xlabel="bytes / float bytes",
    form="{:.3f}",
)

# %% tags=["nbval-ignore-output"]
embedding = loss_difference(rounded(W4, embeddings=True), losses[4, 32])
print("W4: rounding the embedding as well costs", embedding)
glue("ch09-embedding", float(embedding.value), display=False)

# %% [markdown]
# Is it worth it? The embedding adds {glue:text}`ch09-embedding:.3f` nats at 4 bits. We had put the
# limit at 0.05. A reloaded file is the model that was saved, bit for bit.

# %%
print(
    "rounding the embedding costs less than 0.05 nats:",
    embedding.high < 0.05,
)
with tempfile.TemporaryDirectory() as folder:
    reloaded = load_quantized(save_quantized(converted, folder))
with torch.no_grad():
    print(
        "reloaded = converted:",
        torch.equal(reloaded(windows).logits, again),
    )

# %% [markdown]
# One plain statement, because it is often passed over: **a converted weight-only model is smaller,
# not faster.** PyTorch has no kernel that multiplies these packed integers on a CPU, so the layer
# turns them back into floats at every call and multiplies those. Speed comes from exporting the
# model to a runtime that has such kernels, in a later chapter. The exception is W8A8, whose kernel
# we used above.
#
# ## Exercises
#
# ```{exercise} What does a weight cost?
# :label: ch09-bits
# Write `bits_per_weight(bits, group_size, scale_bits)`: the storage of one weight, its share of the
# scale included. Replace the `...` and run the cell.
# ```


# %%
def bits_per_weight(bits, group_size, scale_bits):
    return ...  # your turn


check("ch09-bits", bits_per_weight)

# %% [markdown]
# ```{solution} ch09-bits
# :class: dropdown
# A group stores its integers and one scale; divide by the number of weights.
# ```


# %% tags=["hide-cell"]
def bits_per_weight(bits, group_size, scale_bits):
    return (group_size * bits + scale_bits) / group_size


check("ch09-bits", bits_per_weight)

# %% [markdown]
# ```{exercise} Two in a byte
# :label: ch09-pack
# Write `two_in_a_byte(first, second)`: the byte, as a number from 0 to 255, that holds two integers
# from -8 to 7, the first in its lower half.
# ```


# %%
def two_in_a_byte(first, second):
    return ...  # your turn


check("ch09-pack", two_in_a_byte)

# %% [markdown]
# ```{solution} ch09-pack
# :class: dropdown
# `& 15` keeps the lowest four bits; in Python as in two's complement, -1 keeps four ones.
# ```


# %% tags=["hide-cell"]
def two_in_a_byte(first, second):
    return (first & 15) + 16 * (second & 15)


check("ch09-pack", two_in_a_byte)

# %% [markdown]
# ## What we saw
#
# - Rounding by hand, `convert(prepare_qat(model, W4, "absmax"))` and torch's operator on the grouped view
#   give the same values. Scales in float16 cost half a bit per weight at groups of 32 and move hardly
#   any integer.
# - Eight bits cost this model next to nothing, four bits little, and from there each bit costs
#   more. At 2 bits the group size matters most. Where the paired damage is not above zero, there
#   is nothing to recover.
# - Some layers are far more sensitive than others, and sparing the worst helps, without ending the
#   trouble. An outlier coarsens the step of everyone in its group; smaller groups confine it, for a
#   fraction of a bit.
# - Activations are safest with a range per token. With one per tensor, a row's result depends on
#   its neighbours. Some models carry outliers inside every token, and neither helps.
# - Packed layers weigh what the arithmetic says; the file weighs more while the embedding is float.
#   Smaller is not faster.
#
# ## References
#
# - {cite:t}`krishnamoorthi2018`: rounding to nearest, and scales per channel.
# - {cite:t}`nagel2021`: quantization after training, step by step.
# - {cite:t}`dettmers2022`: outlier features, found in large language models.
# - {cite:t}`jacob2018`: integers for weights and activations.
# - {cite:t}`touvron2023`: the architecture that docs-lm is a small example of.
