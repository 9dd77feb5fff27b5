# %% [markdown]
# (ch01)=
# # The recipe, run to the letter
#
# ![Toto barks at a full basket on the yellow road at evening; behind it stands a card with five lines.](_static/tale/ch01.svg)
#
# :::{epigraph}
# The card the Wizard gave her had five lines, and on the first day Dorothy did all five, in
# order, leaving nothing out. In the evening the model answered well and she was ready to call it
# done. But Toto sat in front of her basket and would not stop barking. She lifted the basket. It
# weighed what it had weighed that morning, to the gram.
# :::
#
# **What you will learn**
#
# - the five steps of a recipe for quantization-aware fine-tuning, each in a few lines;
# - five checks that show, on any model, whether quantization took place;
# - why the natural repair of the recipe trains nothing, and does so without an exception;
# - which chapter mends which step.
#
# *Running time: under a minute on two cores; the very first run adds the half minute in which
# the stand-in model is pre-trained and cached.*

# %% tags=["hide-input"]
import copy
import textwrap
import warnings
from functools import partial

import torch
import torchvision
from myst_nb import glue
from torch import nn
from torch.ao.quantization import DeQuantStub, QuantStub, quantize_dynamic
from torch.ao.quantization.quantization_mappings import (
    get_default_dynamic_quant_module_mappings,
)
from torch.nn import functional as F

import companion
from companion import accuracy, fit, load_pretrained, load_task, model_bytes
from companion.course.check import check
from companion.course.figures import curves
from companion.errors import NothingToTrain

# upstream announces its removal; chapter 5 says where
warnings.filterwarnings("ignore")

# %% [markdown]
# The card's five lines are those of the chapter that this course retells, *Quantization-aware
# Fine-Tuning of Large Language Models* (chapter 12 of a book on quantized language models in
# PyTorch). In our words: load a pre-trained model and the data; call `quantize_dynamic` on the model;
# put a `QuantWrapper` around it; train; evaluate. From here on this is *the source recipe*, or just
# the recipe. PyTorch's own order is another one, to which the end of this chapter comes back.
#
# The recipe promises {term}`quantization-aware training`: {term}`fine-tuning` in which the model
# already feels the coarse numbers it will be served with. It is told about language models and
# then shown on an image network; Part I does as it is shown. We follow it on ResNet-18
# {cite}`he2016` and scanned digits {cite}`alpaydin1998`, and only then ask what it did.
#
# ## Step 1: a pre-trained model and data
#
# The model has seen the digits 0 to 4; the task is 5 to 9, with few labels. (The source recipe
# fetches the model with `torch.hub`, which runs code out of a repository, and with
# `pretrained=True`, which torchvision has deprecated. `load_pretrained` goes through torchvision's
# own weights, or through a stand-in that needs no network.)

# %%
task = load_task("digits-5-9", batch_size=25)
# weights="auto" takes ImageNet weights where a network allows
model = load_pretrained(
    "resnet18", classes=5, weights="digits", quantizable=False
)
print(model.provenance)
train, test = task.train.dataset, task.test.dataset
print("images to train on:", len(train), "- to test on:", len(test))

# %% [markdown]
# ## Step 2: `quantize_dynamic`
#
# {term}`Dynamic quantization` takes the model, a set of layer types, and the integer type that
# their weights should have. A ResNet is made of convolutions, so that is what we ask for. The
# call returns a new model and says nothing.

# %%
quantized = quantize_dynamic(model, {nn.Conv2d}, dtype=torch.qint8)


# %% [markdown]
# ## Step 3: a `QuantWrapper`
#
# A {term}`stub` on either side of the model: one where floats are to become integers, one where
# integers become floats again.


# %%
class QuantWrapper(nn.Module):
    """A stub in front, a stub behind, the model between them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.quant = QuantStub()
        self.model = inner
        self.dequant = DeQuantStub()

    def forward(self, images):  # (batch, 3, 32, 32) -> (batch, 5)
        return self.dequant(self.model(self.quant(images)))


wrapped = QuantWrapper(quantized)


# %% [markdown]
# ## Step 4: train
#
# Cross-entropy, stochastic gradient descent, the learning rate and momentum of the card. Two
# lines are ours: the seed, so that you get the order of images that we got, and the clipping of
# the gradient, which all training in this course shares.


# %%
def fine_tune(net, passes):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9)
    net.train()
    for number in range(passes):
        torch.manual_seed(number)
        for images, labels in task.train:  # (25, 3, 32, 32), (25,)
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()


fine_tune(wrapped, passes=30)

# %% [markdown]
# ## Step 5: evaluate

# %% tags=["nbval-ignore-output"]
result = accuracy(wrapped, task.test)
glue("ch01-accuracy", 100 * result.value, display=False)
print(f"Accuracy: {100 * result.value:.0f} %")

# %% [markdown]
# {glue:text}`ch01-accuracy:.0f` %. Before running it we had written down what would count as
# having learned the task: three answers in four, where guessing gives one in five.

# %%
print("learned the task:", result.value >= 0.75)

# %% [markdown]
# Five steps done, no error, a good number at the end. Here the source recipe stops.
#
# :::{admonition} Before you read on
# The float file has 44.77 MB, and the second step asked for eight bits instead of thirty-two. How many
# megabytes do you expect now?
# :::
#
# ## What happened?
#
# We lift the basket. Five checks, each of which works on any model.
#
# **Did the layers change?** Count the convolutions that are still ordinary float modules.

# %%
before = sum(type(m) is nn.Conv2d for m in model.modules())
after = sum(type(m) is nn.Conv2d for m in wrapped.modules())
print(f"convolutions still float: {after} of {before}")

# %% [markdown]
# `quantize_dynamic` looks each type up in a table that says which quantized class replaces it,
# and the table has no entry for a convolution. A type that is asked for but not listed is
# skipped, and skipping is not reported.

# %%
table = get_default_dynamic_quant_module_mappings()
for kind in (nn.Conv2d, nn.Linear):
    has = "has a" if kind in table else "no"
    print(f"{kind.__name__}: {has} dynamic version")

# %% [markdown]
# **Did training feel the integers?** {term}`Fake quantization` is a module that rounds while the
# model trains {cite}`jacob2018`. Without such modules no weight meets a rounding.

# %%
fakes = sum("FakeQuant" in type(m).__name__ for m in wrapped.modules())
print("fake-quant modules:", fakes)

# %% [markdown]
# Stubs are marks for a later call, `prepare_qat`, which puts fake quantization in their place.
# Nobody made that call, so they hand on what they are given.
#
# **Did the file shrink?**

# %%
size, new_size = model_bytes(model), model_bytes(quantized)
print(f"{size / 1e6:.2f} MB before, {new_size / 1e6:.2f} MB after")
print("same to the byte:", size == new_size)

# %% [markdown]
# **Did the output change?** Rounding that leaves every last bit of the output in place is not
# rounding. (We quantize and wrap the untrained model once more, to compare like with like.)

# %%
images, labels = next(iter(task.test))  # (100, 3, 32, 32), (100,)
bare = QuantWrapper(quantize_dynamic(model, {nn.Conv2d}, dtype=torch.qint8))
with torch.no_grad():
    same = torch.equal(bare.eval()(images), model.eval()(images))
print("same output, bit for bit:", same)

# %% [markdown]
# **Did the parameters receive a gradient?** They did, all of them, and that explains the good
# number.

# %%
parameters = list(wrapped.parameters())
got = sum(p.grad is not None for p in parameters)
print(f"received a gradient: {got} of {len(parameters)}")

# %% [markdown]
# Put together: a float model was fine-tuned, in float, and stayed float. If that is all that
# happened, then fine-tuning the plain model, never quantized and never wrapped, must give the same
# weights. The companion's `fit` is the training loop of all later chapters; it makes the same
# steps as ours.

# %%
plain = copy.deepcopy(model)
sgd = partial(torch.optim.SGD, lr=0.001, momentum=0.9)
_ = fit(plain, task.train, steps=120, optimizer=sgd, schedule="constant")
pairs = zip(plain.parameters(), wrapped.parameters(), strict=True)
same = all(torch.equal(a, b) for a, b in pairs)
print("same trained weights without the recipe:", same)

# %% [markdown]
# Bit for bit. Steps 2 and 3 could be deleted and nobody would notice.
#
# ## The natural repair
#
# Convolutions have no dynamic version, but linear layers have one, and ResNet-18 ends in one. So
# one adds it to the set. To look closely we make a few optimizer steps on one single batch, in
# train mode: batch norm then uses the statistics of that batch, and the loss can change only if
# a parameter does.


# %%
def losses_on_one_batch(net, steps):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(net.train()(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


torch.manual_seed(0)
batch = next(iter(task.train))  # (25, 3, 32, 32), (25,)

# %% tags=["nbval-ignore-output"]
repaired = QuantWrapper(
    quantize_dynamic(model, {nn.Conv2d, nn.Linear}, dtype=torch.qint8)
)
three = losses_on_one_batch(repaired, steps=3)
print("loss:", ", ".join(f"{loss:.7f}" for loss in three))

# %%
parameters = list(repaired.parameters())
print("all three losses equal:", len(set(three)) == 1)
got = sum(p.grad is not None for p in parameters)
print(f"received a gradient: {got} of {len(parameters)}")

# %% [markdown]
# The classifier is now one integer operation, and PyTorch has no derivative for it, so
# `backward()` stops there, at the last layer, before it has reached any parameter. The weights of
# the classifier itself are no longer among the parameters: they are packed away, out of the
# optimizer's sight.

# %%
classifier = repaired.model.fc
kind = type(classifier)
print("now:", kind.__module__, "-", kind.__name__)
print("its parameters:", list(classifier.parameters()))

# %% [markdown]
# Nothing is raised. There is one warning, which a first cell like ours hides; here it is. (A
# *kernel* is the compiled routine that carries out one operation. The one that the warning misses
# would carry the gradient back through it.)

# %%
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    F.cross_entropy(repaired(batch[0]), batch[1]).backward()
said = [str(w.message) for w in seen if "autograd" in str(w.message)]
print(len(said), "warning:", said[0].partition(" to the")[0])

# %% [markdown]
# On the same batch, the recipe to the letter learns (as a float model) and the repair stands
# still.

# %% tags=["hide-input", "nbval-ignore-output"] mystnb={"image": {"alt": "Training loss on one batch over ten optimizer steps. The recipe to the letter falls towards zero; its repair is a horizontal line at the starting value."}}
learning = losses_on_one_batch(bare, steps=11)
standing = losses_on_one_batch(repaired, steps=11)
lines = {"to the letter": learning, "with the repair": standing}
curves(
    {label: dict(enumerate(losses)) for label, losses in lines.items()},
    xlabel="optimizer steps taken",
    ylabel="loss on one batch",
)

# %% [markdown]
# Verdict, with the margin written down first: the one loses more than a tenth of its loss, the
# other nothing.

# %%
falls = learning[-1] < 0.9 * learning[0]
print("to the letter, falls by over a tenth:", falls)
print("with the repair, stays where it was:", len(set(standing)) == 1)

# %% [markdown]
# `fit` refuses to take part. When the first `backward()` has reached no parameter, it stops and
# says what to do instead.

# %%
try:
    fit(repaired, task.train, steps=120, optimizer=sgd, schedule="constant")
except NothingToTrain as error:
    print("NothingToTrain:")
    print(textwrap.fill(str(error), 76))

# %% [markdown]
# ### What the repair saves
#
# Our classifier has five outputs, which is next to nothing. At the usual thousand the linear
# layer is larger. Bytes and counts do not depend on what the weights are, so an untrained
# ResNet-18 with its thousand outputs will do.

# %%
big = torchvision.models.resnet18(weights=None)  # untrained, 1000 outputs
asked = {
    "to the letter": {nn.Conv2d},
    "repaired": {nn.Conv2d, nn.Linear},
}
for label, kinds in asked.items():
    small = quantize_dynamic(big, kinds, dtype=torch.qint8)
    before, after = model_bytes(big) / 1e6, model_bytes(small) / 1e6
    print(f"{label}: {before:.2f} -> {after:.2f} MB")
linear = sum(p.numel() for p in big.fc.parameters())
share = linear / sum(p.numel() for p in big.parameters())
print(f"share of the parameters in the linear layer: {100 * share:.1f} %")

# %% [markdown]
# Eight bits instead of thirty-two: the repair saves three quarters of a small share, and gives up
# training for it.
#
# ## What a repaired recipe should show
#
# :::{figure-md} fig-prepare-train-convert
#
# ![Three stages from top to bottom. Prepare: the weight 0.18 passes a rounding block and is used as
# 0.137. Train: the same, with an arrow that carries the gradient back to the float. Convert: the
# integer 1 times a scale of 0.137 is left, and the float is
# gone.](_static/figures/prepare-train-convert.svg)
#
# In the first two stages the weight is a float that is rounded each time it is used; training moves
# the float. Only the last stage throws it away and keeps the integer, here 1, and the scale that
# makes 0.137 of it.
#
# :::
#
# The order has to be another, and it is the one that PyTorch has written into its own
# `quantize_qat`: *prepare*, which puts fake quantization in; *train*; *convert*, which makes the
# integers, last. The companion's `QuantWrapper` does the first in `prepare_qat()`, on the variant of
# ResNet-18 that can be quantized. Chapters 5 and 6 build it; for now the same checks:

# %%
prepared = companion.QuantWrapper(
    load_pretrained("resnet18", classes=5, weights="digits")
)
prepared.prepare_qat()
fakes = sum("FakeQuant" in type(m).__name__ for m in prepared.modules())
print("fake-quant modules:", fakes)
trained = losses_on_one_batch(prepared, steps=3)
parameters = list(prepared.parameters())
got = sum(p.grad is not None for p in parameters)
print(f"received a gradient: {got} of {len(parameters)}")
print("loss falls:", trained[2] < trained[0])

# %% [markdown]
# ## The ledger
#
# | The recipe says | What we found | Mended in |
# |---|---|---|
# | Load a pre-trained model and data. | This works; what to hold out, and what to compare with, is left open. | [](ch02) |
# | `quantize_dynamic` quantizes it. | Convolutions are passed over in silence; with the linear layer, training is cut off. | [](ch03) |
# | The weights become integers. | None did. What that would mean, number by number, is never shown. | [](ch04) |
# | A wrapper accounts for the quantization. | Stubs alone are the identity: same output, bit for bit. | [](ch05) |
# | Training is quantization-aware. | No fake quantization: a float fine-tune, with the same weights as without the recipe. | [](ch06) |
# | The accuracy at the end shows success. | It is the accuracy of the float model, without an interval and without a comparison. | [](ch07) |
#
# ## Quiz
#
# ```{quiz} ch01
# Three questions, each answer explained: they stand in `_quizzes/ch01.md` beside this notebook.
# ```
#
# ## Exercises
#
# ```{exercise} Count the fake quantizers
# :label: ch01-count
# We looked for `"FakeQuant"` in class names, and a name is no proof. Every fake quantizer of
# PyTorch derives from `torch.ao.quantization.FakeQuantizeBase`. Write `count(model)` that returns
# how many modules of a model do, at any depth. Replace the `...` and run the cell.
# ```


# %%
def count(model): ...  # your turn


check("ch01-count", count)

# %% [markdown]
# ```{solution} ch01-count
# :class: dropdown
# `modules()` walks through the model at every depth, and `isinstance` asks about the class and
# all that derive from it.
# ```


# %% tags=["hide-cell"]
def count(model):
    kind = torch.ao.quantization.FakeQuantizeBase
    return sum(isinstance(module, kind) for module in model.modules())


check("ch01-count", count)

# %% [markdown]
# ```{exercise} Count what the gradient reached
# :label: ch01-gradients
# Write `reached(model)`, to be called after a `backward()`: how many parameters received a
# gradient? This one line, after the first step, would have caught the repair.
# ```


# %%
def reached(model): ...  # your turn


check("ch01-gradients", reached)

# %% [markdown]
# ```{solution} ch01-gradients
# :class: dropdown
# `requires_grad` tells what a parameter asks for; only `.grad` tells what it was given.
# ```


# %% tags=["hide-cell"]
def reached(model):
    return sum(
        parameter.grad is not None for parameter in model.parameters()
    )


check("ch01-gradients", reached)

# %% [markdown]
# ```{exercise} An experiment: your own lift of the basket
# :label: ch01-experiment
# Take the last model that you quantized, at work or from a tutorial, and run the five checks of this
# chapter on it. Write down beforehand what each will say.
# ```
#
# ```{solution} ch01-experiment
# :class: dropdown
# There is no right answer, but there is a test of having understood: for every check that surprised you, you
# can name the call that did nothing, or the layer that is on no list.
# ```
#
# ## What we saw
#
# - The five steps run without an error and end in a good accuracy. It is that of a float model.
# - Layer types, fake-quant modules, bytes, bitwise outputs and gradients tell within seconds
#   whether quantization took place. Here the first four said no, and the fifth said why nobody
#   noticed: a float model was training, as float models do.
# - With the linear layer included, the gradient stops at an operation that has none, no parameter
#   trains, and the loss repeats itself. PyTorch warns once; `fit` raises `NothingToTrain`.
# - Each step has a chapter that mends it; the next one starts with the model and the data.
#
# :::{epigraph}
# Dorothy turned the card over. The back was empty, so she ruled as many lines on it as the front
# had, and wrote behind the first: *lift the basket, before and after.* Toto lay down, for this was
# the first thing anybody had said all day with which he agreed.
# :::
#
# ## References
#
# - {cite:t}`he2016`: the network.
# - {cite:t}`alpaydin1998`: the digits.
# - {cite:t}`jacob2018`: training with quantization simulated, which the recipe has in mind.
# - {cite:t}`baum1900`: the road, the card's author and the dog.
