# %% [markdown]
# (ch03)=
# # Step 2: `quantize_dynamic`, and what it leaves alone
#
# ![A grey city seen through large spectacles: only what lies behind the lenses is green.](_static/tale/ch03.svg)
#
# :::{epigraph}
# At the city gate a guardian locked green spectacles onto everyone who entered, and from then
# on all things looked green. "Does the whole city wear them?" asked Dorothy. "Everyone on my
# list," said the guardian. She looked at his list. It was short, and the towers of the city were
# not on it. Nobody had told the towers; nobody had told Dorothy either.
# :::
#
# **What you will learn**
#
# - what dynamic quantization changes in a `Linear` or an `LSTM`, and where the integers sit;
# - what it passes over without a word, and how to look before you trust it;
# - how many bytes it saves, and why that depends on the layers a model is made of;
# - why a quantized layer does not train.
#
# *Running time: under a minute on two cores.*

# %% tags=["hide-input"]
import textwrap
import warnings
from collections import Counter

import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.ao.quantization.quantization_mappings import (
    get_default_dynamic_quant_module_mappings,
)
from torchvision.models import resnet18

from companion import choose_scale, dequantize, fit, model_bytes, quantize
from companion.course.check import check
from companion.course.figures import bars
from companion.errors import NothingToTrain

# upstream announces its removal; chapter 5 says where
warnings.filterwarnings("ignore")
generator = torch.Generator().manual_seed(0)

# %% [markdown]
# ## One layer, by hand
#
# {term}`Dynamic quantization <dynamic quantization>` stores the weights of a layer as 8-bit
# integers and rounds its inputs while the model runs, when their range is known. The weights
# come first: one {term}`scale` $s$ for the whole matrix ({term}`per-tensor`), then
# {term}`rounding` and {term}`clipping`,
#
# $$ s = \frac{\max |w|}{(q_{\max} - q_{\min}) / 2}, \qquad q = \operatorname{clip}\big(\operatorname{round}(w / s),\, q_{\min},\, q_{\max}\big). $$
#
# [](ch04) takes this apart; here it is a few lines.

# %%
layer = nn.Linear(64, 32)
with torch.no_grad():
    layer.weight.copy_(torch.randn(32, 64, generator=generator))  # out, in
    layer.bias.zero_()
weight = layer.weight.detach()
scale = weight.abs().max() / (255 / 2)
by_hand = torch.clamp(torch.round(weight * (1 / scale)), -128, 127)
print(by_hand[0, :6].int().tolist())

# %% [markdown]
# The companion's `choose_scale` and `quantize` treat the last dimension as one group, so a
# single scale for the matrix means one long row.

# %%
row = layer.weight.detach().flatten()  # (2048,)
scale, zero_point = choose_scale(row, bits=8)
integers = quantize(row, scale, zero_point, bits=8)
print("same integers:", torch.equal(integers.float(), by_hand.flatten()))

# %% [markdown]
# And upstream's: one call, which returns a model whose `Linear` has become another class.

# %%
small = nn.Sequential(layer)
dynamic = quantize_dynamic(small, {nn.Linear}, dtype=torch.qint8)
packed = dynamic[0].weight()
print(type(dynamic[0]).__module__ + "." + type(dynamic[0]).__name__)
print("same integers:", torch.equal(packed.int_repr().flatten(), integers))

# %% [markdown]
# What the layer computes is the product with the *rounded* weights, on inputs that it rounds to
# 8 bits as well. Neither rounding is free, so let us see them apart: the error of the layer, and
# the error that its rounded weights would make on exact inputs.


# %%
def error(y, reference):
    """Relative distance between two outputs."""
    return ((y - reference).norm() / reference.norm()).item()


x = torch.randn(16, 64, generator=generator)  # (batch, in)
with torch.no_grad():
    exact, served = layer(x), dynamic(x)
    rounded_weights = x @ dequantize(integers, scale).view(32, 64).T
print(f"served layer:          {error(served, exact):.3f}")
print(f"rounded weights alone: {error(rounded_weights, exact):.3f}")

# %% [markdown]
# ## Where the inputs get their 8 bits
#
# The weights were rounded once, when the model was made. The inputs are rounded at every call,
# onto a grid that spans whatever this call happens to contain. Their smallest value is rarely
# minus their largest, so the grid may lie off-centre, and a {term}`zero point` $z$ says which
# integer stands for 0.0. With $x \approx s_x (q_x - z)$ and $w \approx s_w q_w$, a layer is
#
# $$ y = s_x s_w \sum_k (q_x - z)_k\, (q_w)_k + b , $$
#
# a sum of integers and one multiplication at the end. On x86 processors the inputs get only half
# of their 256 integers. The reason is a vector instruction that adds two products in a 16-bit
# register. (PyTorch calls the library that does its integer arithmetic the *quantized engine*. The
# one for ARM processors is `qnnpack`, and the second cell below asks whether it is in use.)

# %%
print("largest number that 16 bits hold:  ", torch.iinfo(torch.int16).max)
print("two products with inputs up to 255:", 2 * 255 * 128)
print("two products with inputs up to 127:", 2 * 127 * 128)


# %%
on_arm = torch.backends.quantized.engine == "qnnpack"


def serve(x, top=255 if on_arm else 127):
    """What the served layer computes for x of shape (batch, in)."""
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    step = (high - low) / top
    zero = round(-low / step)
    q_x = torch.clamp(torch.round(x / step) + zero, 0, top)  # (batch, in)
    q_w = integers.view(32, 64).float()  # (out, in)
    return step * scale * ((q_x - zero) @ q_w.T)  # the bias is zero here


print("by hand = upstream, to five digits:", error(serve(x), served) < 1e-5)

# %% [markdown]
# No calibration data, no observers: that is the charm of the dynamic kind. The price is that
# the whole call shares one grid, so that a row is rounded by its neighbours' range. In
# [](ch05) the range is fixed beforehand, and this goes away.

# %%
with torch.no_grad():
    # one call per row
    float_alone = torch.cat([layer(row[None]) for row in x])
    alone = torch.cat([dynamic(row[None]) for row in x])
same_float = error(float_alone, exact) < 1e-5
same_served = error(alone, served) < 1e-5
print("float:  alone = in the batch, to five digits:", same_float)
print("served: alone = in the batch, to five digits:", same_served)
print(f"served: distance of the two: {error(alone, served):.3f}")

# %% [markdown]
# That distance is of the size of the rounding error itself, and harmless. It grows when one row
# is loud: its range stretches the grid, and its quiet neighbours are left with few integers.

# %%
loud = x.clone()
loud[0] *= 30
with torch.no_grad():
    neighbours = dynamic(loud)[1:]
quiet, beside = error(served[1:], exact[1:]), error(neighbours, exact[1:])
print(f"error of rows 1 to 15 beside an ordinary row 0: {quiet:.3f}")
print(f"error of rows 1 to 15 beside a loud row 0:      {beside:.3f}")

# %% [markdown]
# Large language models do have such loud values {cite}`dettmers2022`; a scale for every row of
# inputs instead of one for all is the usual remedy.
#
# ## Who is on the list
#
# `quantize_dynamic` walks through the model, looks up the class of each layer in a table, and
# swaps those that it finds and that you asked for. This is the table, as far as it concerns
# ordinary layers.

# %%
# float class -> quantized class
table = get_default_dynamic_quant_module_mappings()
ordinary = sorted(
    kind.__name__
    for kind in table
    if kind.__module__.startswith("torch.nn")
)
print(*ordinary, sep="\n")
print("Conv2d on the list:", nn.Conv2d in table)

# %% [markdown]
# Linear layers, one of them with a long name that we shall meet again; recurrent layers; and two
# kinds of embedding, which want settings of their own. There is no convolution. Dynamic
# quantization is meant for layers that spend their time waiting for weights: a linear layer fetches
# each weight from memory, uses it once for every row of a small batch, and is done with it, so that
# it gains when a weight has fewer bytes. A convolution uses each of its weights again at many
# positions of the image, and waits less. Upstream does have a dynamic `Conv2d` class, and warns
# against it for its poor numerical accuracy. Leaving convolutions out is sound, then. What is
# missing is a word to the caller, and a small helper can supply it.


# %%
def what_changed(before, after):
    """Count layers with weights, by whether their class changed."""
    fates = Counter()
    for name, layer in before.named_modules():
        if list(layer.parameters(recurse=False)):  # weights of its own
            same = type(after.get_submodule(name)) is type(layer)
            fate = "unchanged" if same else "swapped"
            fates[type(layer).__name__, fate] += 1
    for (kind, fate), count in fates.items():
        print(f"{count:3d} x {kind:31s} {fate}")


# %% [markdown]
# It compares the classes themselves, since a quantized `Linear` is still called `Linear`; only
# its module tells. On a small text model all is well:

# %%
text = nn.ModuleDict(
    {"words": nn.LSTM(64, 128), "label": nn.Linear(128, 5)}
)
dynamic_text = quantize_dynamic(
    text, {nn.LSTM, nn.Linear}, dtype=torch.qint8
)
what_changed(text, dynamic_text)
print(dynamic_text["words"])

# %% [markdown]
# In the LSTM each weight matrix has become integers; gates, cell state and outputs stay float,
# and its inputs are rounded at every time step. Now the call of the recipe in [](ch01): ask for
# the convolutions of a ResNet-18 {cite}`he2016`. Untrained weights will do, since a class is a
# class.

# %%
torch.manual_seed(0)
resnet = resnet18(weights=None).eval()  # 1000 classes
asked = quantize_dynamic(resnet, {nn.Conv2d}, dtype=torch.qint8)
what_changed(resnet, asked)

# %%
convolutions = [
    name for name, m in resnet.named_modules() if isinstance(m, nn.Conv2d)
]
still = [
    name
    for name in convolutions
    if type(asked.get_submodule(name)) is nn.Conv2d
]
# (batch, channels, height, width)
image = torch.randn(2, 3, 32, 32, generator=generator)
with torch.no_grad():
    same = torch.equal(asked(image), resnet(image))
print(f"convolutions still float: {len(still)} of {len(convolutions)}")
sizes = model_bytes(resnet), model_bytes(asked)
print("bytes before and after:  ", *sizes)
print(f"same output, bit for bit: {same}")

# %% [markdown]
# There was no exception, no warning that anything had been left out, and no integer. There are two
# more ways to be passed over. Whoever asks for a class does not ask for its subclasses: the output
# layer of attention is a `NonDynamicallyQuantizableLinear`, a `Linear` that stands on the list under
# a name of its own, and a call for `nn.Linear` does not reach it. And weights that sit in a layer
# outside the list stay float whatever is asked for, such as attention's input projection.

# %%
block = nn.TransformerEncoderLayer(d_model=64, nhead=4)
what_changed(block, quantize_dynamic(block, {nn.Linear}, dtype=torch.qint8))

# %% [markdown]
# And swapping happens in a parent's list of children, so a layer without a parent cannot be
# swapped. (This is why `layer` went into an `nn.Sequential` above.)

# %%
what_changed(layer, quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8))

# %% [markdown]
# ## How many bytes
#
# :::{figure-md} fig-bit-layouts
#
# ![Rows of cells, one for each bit. Float32 has 1 for the sign, 8 for the exponent and 23 for the
# fraction; bfloat16 has 1, 8 and 7. An int8 is a row of eight, an int4 a row of
# four.](_static/figures/bit-layouts.svg)
#
# One cell is one bit. A float spends most of its bits on telling close neighbours apart; an integer
# of $b$ bits has $2^b$ values and no more: 256 for eight bits, 16 for four. bfloat16 is float32
# with the last 16 bits of the fraction cut off.
#
# :::
#
# A weight shrinks from four bytes to one, everything else stays. If a share $p$ of the
# parameters sits in layers that are swapped, the file should shrink to about
#
# $$ \frac{\text{after}}{\text{before}} \approx \frac{p}{4} + (1 - p) = 1 - \tfrac34\, p . $$
#
# :::{admonition} Before you read on
# An LSTM, two `Linear` layers with a ReLU between them, and a ResNet-18 for a thousand classes. What share
# of its bytes will each of them keep?
# :::
#
# Three models, from all to hardly any:

# %%
models = {
    "LSTM": nn.Sequential(nn.LSTM(256, 512)),
    "MLP": nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 10)
    ),
    "ResNet-18": resnet,
}


def share(model, kinds):
    """Share of the parameters that sit in layers of these kinds."""
    inside = [
        p
        for m in model.modules()
        if isinstance(m, kinds)
        for p in m.parameters(recurse=False)
    ]
    every = sum(p.numel() for p in model.parameters())
    return sum(p.numel() for p in inside) / every


# %%
ratio = {}
for name, model in models.items():
    after = quantize_dynamic(model, {nn.LSTM, nn.Linear}, dtype=torch.qint8)
    ratio[name] = model_bytes(after) / model_bytes(model)
    p = share(model, (nn.LSTM, nn.Linear))
    print(
        f"{name:9s} share {p:.3f}   predicted {1 - 0.75 * p:.3f}"
        f"   measured {ratio[name]:.3f}"
    )

# %% tags=["hide-input"] mystnb={"image": {"alt": "Bars of the file size after dynamic quantization relative to before: about a quarter for an LSTM and an MLP, nearly one for ResNet-18."}}
bars(ratio, xlabel="bytes after / bytes before", form="{:.2f}")

# %% [markdown]
# The first two come out a little above a quarter, for biases stay float and a file has a
# header. ResNet-18 keeps nearly all its bytes, and the shares of its parameters say why:

# %%
for kind in (nn.Conv2d, nn.BatchNorm2d, nn.Linear):
    print(f"{kind.__name__:12s} {share(resnet, kind):6.1%}")

# %% [markdown]
# Its thousand-class `Linear` is all that this call can reach. A convolutional network needs the
# other road, on which convolutions do have integer kernels, compiled routines that compute them on
# integers: [](ch05).
#
# ## Why a quantized layer does not train
#
# The integers are packed for the kernel that multiplies them. They are no `nn.Parameter`, and
# an integer has no small step to take.

# %%
served = quantize_dynamic(resnet, {nn.Linear}, dtype=torch.qint8)
counts = [len(list(m.fc.parameters())) for m in (resnet, served)]
print("parameters of the classifier, float:    ", counts[0])
print("parameters of the classifier, quantized:", counts[1])

# %% [markdown]
# Worse, the layer is a wall for those in front of it. The output claims to require a gradient,
# and `backward()` runs through with no exception, only a warning that our first cell hides
# ([](ch01) shows it). Count what has arrived:


# %%
def gradients(model):
    """Run backward() once and count the parameters that it reached."""
    model.zero_grad()
    output = model(image)  # (2, 1000)
    output.sum().backward()
    reached = sum(p.grad is not None for p in model.parameters())
    total = len(list(model.parameters()))
    asks = output.requires_grad
    print(f"requires_grad: {asks}   reached: {reached} of {total}")


gradients(resnet)
gradients(served)

# %% [markdown]
# A training loop around this model runs to its end and trains nothing. The companion's `fit`
# looks at the gradients of the first step and refuses:

# %%
labels = torch.tensor([0, 1])
try:
    fit(served, [(image, labels)], steps=1)
except NothingToTrain as error:
    print(textwrap.fill(str(error), 76))

# %% [markdown]
# So dynamic quantization is a last step, for a model that has finished learning. Whoever wants
# to train *for* the integers needs weights that stay float and only look like integers:
# {term}`fake quantization`, which [](ch05) inserts into a model.
#
# ## Quiz
#
# ```{quiz} ch03
# Three questions, each answer explained: they stand in `_quizzes/ch03.md` beside this notebook.
# ```
#
# ## Exercises
#
# ```{exercise} Count what stays float
# :label: ch03-changed
# Write `untouched(model)`: how many `Conv2d` and `Linear` layers, subclasses included, are
# still float after `quantize_dynamic` was asked for `{nn.Conv2d, nn.Linear}`? Replace the `...`
# and run the cell.
# ```


# %%
def untouched(model):
    return ...  # your turn


check("ch03-changed", untouched)

# %% [markdown]
# ```{solution} ch03-changed
# :class: dropdown
# Make the call, then look at what is there. A quantized `Linear` is no `nn.Linear` any more,
# so whatever still answers to a float class was left alone.
# ```


# %% tags=["hide-cell"]
def untouched(model):
    after = quantize_dynamic(
        model, {nn.Conv2d, nn.Linear}, dtype=torch.qint8
    )
    return sum(
        isinstance(m, (nn.Conv2d, nn.Linear)) for m in after.modules()
    )


check("ch03-changed", untouched)

# %% [markdown]
# ```{exercise} Predict the size of an integer layer
# :label: ch03-bytes
# Write `predicted(inputs, outputs)`: the bytes of a dynamically quantized
# `Linear(inputs, outputs)` relative to the float layer. Its bias stays float32; neglect the
# header of the file and the one scale.
# ```


# %%
def predicted(inputs, outputs):
    return ...  # your turn


check("ch03-bytes", predicted)

# %% [markdown]
# ```{solution} ch03-bytes
# :class: dropdown
# One byte per weight and four per bias, over four bytes for each of both: a wide layer comes
# close to a quarter, a narrow one does not.
# ```


# %% tags=["hide-cell"]
def predicted(inputs, outputs):
    weights, biases = inputs * outputs, outputs
    return (weights + 4 * biases) / (4 * weights + 4 * biases)


check("ch03-bytes", predicted)

# %% [markdown]
# ```{exercise} An experiment: the loudest neighbour that can be borne
# :label: ch03-experiment
# Make row 0 of the batch 2, 5, 10 and 100 times as loud, and plot the error of the other rows. Where does it become larger
# than the error that rounding alone makes? Then give every row a call of its own.
# ```
#
# ```{solution} ch03-experiment
# :class: dropdown
# The step grows with the loudest value, so the error of the quiet rows grows with it, until they all round to zero and
# it can grow no further. Called row by row, a neighbour's loudness no longer reaches them.
# ```
#
# ## What we saw
#
# - Dynamic quantization replaces a `Linear` or an `LSTM` by a class that holds int8 weights and
#   rounds its inputs anew at every call, on one grid for the whole batch. We computed the same
#   outputs by hand, and a loud row spoiled its neighbours'.
# - Classes that are not on the list, subclasses of the one that was asked for, and layers without a
#   parent are passed over in silence: all convolutions of a ResNet-18 stayed float. Compare the
#   classes before and after.
# - The file shrinks to $1 - \tfrac34 p$, where $p$ is the share of parameters that were swapped:
#   a quarter for an LSTM, next to nothing for ResNet-18.
# - A quantized layer has no parameters and lets no gradient through, although the output says
#   it requires one. Train first, or train with fake quantization.
#
# :::{epigraph}
# "And what do you say to those who are not on it?" Dorothy asked. "Nothing," said the guardian, "and
# they have never complained." So she walked once around the city, wrote down every tower by name,
# and at dusk came back to ask whether she might borrow a pair of spectacles for the night.
# :::
#
# ## References
#
# - {cite:t}`jacob2018`: integers, scales and zero points for inference.
# - {cite:t}`krishnamoorthi2018`: choices of grid for weights and activations, compared.
# - {cite:t}`dettmers2022`: outliers in the activations of large language models.
# - {cite:t}`he2016`: the residual network that stayed float.
