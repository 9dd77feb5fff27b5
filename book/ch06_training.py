# %% [markdown]
# (ch06)=
# # Step 4: training behind the curtain
#
# ![Toto pulls a red curtain aside: behind it a small man holds a ruler, and in front hangs a great green Head.](_static/tale/ch06.svg)
#
# :::{epigraph}
# Toto pulled the curtain aside, and there sat a small man with a ruler in his hands. The great green
# Head that spoke to the audience in seven tones was only what he showed; he himself could move by a
# hair's breadth at a time. "Watch the Head," he said, "and you will learn nothing. Watch my hands."
# :::
#
# Fake quantization is that arrangement. The layer sees only a few levels; behind the curtain every
# weight stays a float, and the optimizer moves the float.
#
# **What you will learn**
#
# - how to round to a grid without leaving floating point, and why the true gradient is of no use;
# - what the straight-through estimator puts in its place, by hand, with the companion and upstream;
# - what `prepare_qat` inserts into a network, and that the training loop stays an ordinary one;
# - two ways in which the model you trained can differ from the model you serve.
#
# *Running time: about a minute on two cores.*

# %% tags=["hide-input"]
import copy
import warnings
from collections import Counter
from functools import partial
from itertools import cycle, islice

import numpy as np
import torch
import torch.ao.quantization as ao
from myst_nb import glue
from torch import nn
from torch.nn import functional as F

from companion import (
    QuantWrapper,
    choose_scale,
    fake_quantize,
    fit,
    load_pretrained,
    load_task,
)
from companion.classic.eager import make_qconfig
from companion.course.check import check
from companion.course.figures import curves, scatter, staircase
from companion.evaluation.estimates import predict

# upstream announces its removal; chapter 5 says where
warnings.filterwarnings("ignore")
generator = torch.Generator().manual_seed(0)


def draw(*shape):  # in double, so that every machine draws the same numbers
    drawn = torch.randn(*shape, generator=generator, dtype=torch.double)
    return drawn.float()


# %% [markdown]
# ## Round, and come back
#
# :::{figure-md} fig-fake-quant
#
# ![A chain from top to bottom. The weight 0.9, a float, enters a frame called fake quantization, is
# divided by 0.5 to 1.8, rounded and clipped to 2, and multiplied by 0.5 to 1.0; the layer computes
# with 1.0. An arrow for the gradient leads straight back up to the
# float.](_static/figures/fake-quant.svg)
#
# One weight of the next cell, whose step is 0.5. On the way forward it becomes 1.8 steps, then the
# integer 2, then 1.0. On the way back the gradient passes the whole block as if it were not there,
# and the optimizer moves the 0.9.
#
# :::
#
# {term}`Fake quantization` rounds a weight $w$ to the nearest point of its {term}`grid` and returns
# that point as a float:
#
# $$ \hat w = s \cdot \operatorname{clip}\big(\operatorname{round}(w / s),\, q_{\min},\, q_{\max}\big). $$
#
# Nothing is stored in fewer bits yet. The network only computes with values that fewer bits could
# hold, so the loss feels the {term}`rounding` while there is still time to do something about it.

# %%
qmin, qmax = -8, 7  # 4 bits
scale = 0.5
w = torch.tensor([-4.4, -1.3, 0.2, 0.3, 0.9, 3.7, 6.0])
integers = torch.clamp(torch.round(w * (1 / scale)), qmin, qmax)
rounded = scale * integers
print("integers:", integers.int().tolist())
print("values:  ", rounded.tolist())

# %% [markdown]
# The last weight was too large for the grid and came back as its end: {term}`clipping`.
#
# ## The gradient that never arrives
#
# A staircase is flat almost everywhere. Its derivative is zero on every step, and undefined only on
# the edges, where a float practically never lands. Autograd knows that.

# %%
w = w.requires_grad_()
loss = (scale * torch.round(w / scale) - 1.0).square().sum()
loss.backward()
print("loss:    ", round(loss.item(), 2))
print("gradient:", w.grad.tolist())

# %% [markdown]
# The loss is large and no weight is told about it. Training through an honest `round` is therefore
# no training at all.
#
# ## Straight through
#
# :::{figure-md} fig-straight-through
#
# ![The last bricks of a four-bit road, 5, 6 and 7, and no brick beyond. Three weights get the same
# gradient: 5.3 and 7.3 above bricks, 8.4 above none. By the true slope nothing arrives at any of
# them; straight through, the gradient arrives at the first two, and not at the
# third.](_static/figures/straight-through.svg)
#
# Weights in steps of the grid. The true slope of a stair is zero, so nobody is told anything. The
# straight-through rule puts 1 in its place for every weight that rounds to a brick which exists,
# and leaves the 0 where there is none.
#
# :::
#
# The {term}`straight-through estimator` ({cite}`bengio2013`) keeps the staircase in the forward pass
# and, in the backward pass, pretends that it was a straight line wherever the weight was inside the
# grid:
#
# $$ \frac{\partial \hat w}{\partial w} := \begin{cases} 1 & q_{\min} \le \operatorname{round}(w / s) \le q_{\max} \\ 0 & \text{otherwise.} \end{cases} $$
#
# Both ends of the grid are included. Beyond them a weight was clipped, and moving it a little would
# change nothing, so it gets no gradient. In PyTorch that is one small `autograd.Function`.


# %%
class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, scale, qmin, qmax):
        steps = torch.round(w * (1 / scale))
        inside = (qmin <= steps) & (steps <= qmax)
        ctx.save_for_backward(inside)
        return steps.clamp(qmin, qmax) * scale

    @staticmethod
    def backward(ctx, gradient):
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None, None


# %% [markdown]
# Weights given in steps of the grid show who is heard and who is not: 7.4 still rounds to the end
# of the grid, 7.6 would round beyond it.

# %%
steps = torch.tensor([-9.0, -8.4, -8.0, 0.3, 7.0, 7.4, 7.6, 12.0])
w = (0.25 * steps).requires_grad_()
StraightThrough.apply(w, torch.tensor(0.25), qmin, qmax).sum().backward()
for step, slope in zip(steps.tolist(), w.grad.tolist(), strict=True):
    print(f"{step:5.1f} steps from zero: gradient {slope:.0f}")

# %% [markdown]
# Drawn for two bits, whose four levels are easy to see: above, the staircase next to the line it
# replaces; below, the gradient it is given, and the true one.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Above: a staircase of four levels against the dotted diagonal it approximates, flat beyond its ends. Below: the straight-through gradient, a box of height one over the range of the grid, and the true gradient, a dotted line at zero."}}
x = torch.linspace(-3.5, 2.5, 601, requires_grad=True)
y = StraightThrough.apply(x, torch.tensor(1.0), -2, 1)
y.sum().backward()
staircase(x.detach().numpy(), y.detach().numpy(), x.grad.numpy())

# %% [markdown]
# The companion's `fake_quantize` follows the same rule, for any width and with one {term}`scale` for
# each row ({term}`per-channel`). Upstream's operator is
# `torch.fake_quantize_per_channel_affine`. All three, forward and backward, on 64 rows whose largest
# weights are clipped on purpose:


# %%
def value_and_gradient(rounding):
    w = rows.clone().requires_grad_()
    out = rounding(w)
    # weights, so that a constant gradient would not pass
    (out * weights).sum().backward()
    return out.detach(), w.grad


rows = draw(64, 128)  # (channels, weights)
weights = draw(64, 128)
# a bit too fine, so that the largest are clipped
s = 0.7 * choose_scale(rows, bits=4)[0]  # (64, 1)
zero = torch.zeros(64, dtype=torch.int32)


# %%
def by_hand(w):
    return StraightThrough.apply(w, s, qmin, qmax)


def by_companion(w):
    return fake_quantize(w, s, bits=4)


def by_torch(w):
    flat = s.flatten()
    return torch.fake_quantize_per_channel_affine(
        w, flat, zero, 0, qmin, qmax
    )


ours = value_and_gradient(by_hand)
for name, rounding in {
    "companion": by_companion,
    "upstream": by_torch,
}.items():
    value, gradient = value_and_gradient(rounding)
    same = torch.equal(value, ours[0]), torch.equal(gradient, ours[1])
    print(f"{name}: same values {same[0]}, same gradients {same[1]}")
print("weights without a gradient:", (ours[1] == 0).sum().item())

# %% [markdown]
# ## One weight, watched
#
# The smallest network there is: one weight, one input, one target, four bits,
#
# $$ L(w) = (\hat w x - y)^2, \qquad \frac{\partial L}{\partial w} \approx 2 (\hat w x - y)\, x . $$
#
# The target $y = 1.2$ lies between two grid points, 1.0 and 1.5. We descend by hand and write down
# the hidden weight and the value that the network uses.


# %%
def descend(rounding, w, steps=40, rate=0.1, x=1.0, y=1.2):
    w = torch.tensor(w, requires_grad=True)
    hidden, used = [], []
    for _ in range(steps):
        value = rounding(w)
        (slope,) = torch.autograd.grad((value * x - y) ** 2, w)
        hidden.append(w.item())
        used.append(value.item())
        w = (w - rate * slope).detach().requires_grad_()
    return hidden, used


# %%
step = torch.tensor(0.5)


def to_the_grid(w):
    return StraightThrough.apply(w, step, qmin, qmax)


hidden, used = descend(to_the_grid, 0.1)
for i in (0, 1, 2, 3, 4, 6, 8, 12, 17, 18, 19):
    integer = round(used[i] / 0.5)
    print(f"step {i:2}: hidden weight {hidden[i]:.2f}, integer {integer}")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two lines over forty steps. The hidden weight climbs smoothly and then hovers around 1.25; the value that the network uses jumps through 0, 0.5 and 1.0 and then alternates between 1.0 and 1.5."}}
curves(
    {"hidden weight": hidden, "what the network uses": used},
    xlabel="step",
    ylabel="value",
)

# %% [markdown]
# The hidden weight collects small pushes that are each too small to change the integer, until it
# crosses the edge of a step and the integer flips. That is the whole mechanism.
#
# <figure class="moving" data-figure="staircase">
# <figcaption><strong>Small pushes, and then a flip</strong>
# Drag the weight along the staircase, or move it with the arrow keys, and let it descend step by step.
# Try a start beyond the ends of the grid, and the true gradient. Three bits, to have both ends in view;
# the rest is the example above.
# </figcaption>
# <img src="_static/moving/staircase.svg" width="480" alt="Above, a staircase of eight levels with a weight on it and an arrow towards the target; below, the path of the hidden weight step by step, which drifts to the edge between two levels and then goes to and fro across it.">
# <p class="mv-still">A still of the staircase.</p>
# </figure>
#
# Notice how it ends. Neither 1.0 nor 1.5 is the target, each pushes towards the other, and the
# weight hovers at the edge between them while the integer keeps flipping. Two other starts, for
# comparison: with the true gradient nothing moves, and a weight that begins outside the grid gets no
# gradient either.

# %%
tail = used[20:]
print("levels used at the end:", sorted(set(tail)))
print(f"their average: {np.mean(tail):.2f}, the target: 1.20")
stuck, _ = descend(lambda w: step * torch.round(w / step), 0.1)
lost, _ = descend(lambda w: StraightThrough.apply(w, step, qmin, qmax), 5.0)
print("true gradient moved the weight:", stuck[-1] != stuck[0])
print("a clipped weight moved:", lost[-1] != lost[0])

# %% [markdown]
# ## What `prepare_qat` inserts
#
# {term}`Quantization-aware training` of a network is the same trick at every place where integers
# will later stand. We take the ResNet-18 of [](ch02), wrap it as in [](ch05), and prepare it for
# 4-bit weights.

# %%
task = load_task("digits-5-9", batch_size=25)
# weights="auto" takes ImageNet weights where a network allows
start = load_pretrained("resnet18", classes=5, weights="digits")
qat = QuantWrapper(start).prepare_qat(weight_bits=4)

fakes = {
    name: m
    for name, m in qat.named_modules()
    if isinstance(m, ao.FakeQuantize)
}
what = ["weights" if "weight" in name else "activations" for name in fakes]
print(Counter(what))

# %%
fake = qat.model.layer1[0].conv1.weight_fake_quant
watcher = fake.activation_post_process
print("integers:", fake.quant_min, "to", fake.quant_max)
print("scheme:  ", fake.qscheme, "along dimension", fake.ch_axis)
print("observer:", type(watcher).__base__.__name__)
counts = [len(list(m.parameters())) for m in (start, qat)]
print("parameters to train, before and after:", *counts)

# %% [markdown]
# Each `FakeQuantize` holds an {term}`observer`, which watches the range and sets the scale, and the
# operator from above, which rounds. Neither adds a parameter to train. (The class that the wrapper uses
# is derived from the one named here: it may also keep to a share of the range, for the search that
# [](ch07) tries.) Activations are rounded too, to 8 bits and with one scale for each tensor; [](ch05)
# says why.
#
# ## Why train mode
#
# Upstream prepares only a model in train mode. The reason is batch norm: after {term}`fusion`, the
# convolution and its batch norm are one module, which must know whether it still follows batch
# statistics. `QuantWrapper` switches the mode for you and says so in its documentation; upstream
# stops.

# %%
net = nn.Sequential(
    nn.Conv2d(3, 8, 3, stride=2),
    nn.BatchNorm2d(8),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(4),
    nn.Flatten(),
    nn.Linear(128, 5),
)
try:
    ao.prepare_qat(net.eval())
except AssertionError as error:
    print(error)

# %% [markdown]
# The mode also decides what a forward pass may move. In train mode, scales and batch-norm statistics
# follow the batch. In eval mode the wrapper stops both; only the scales of the weights are brought
# up to date with the weights, once, and then looking changes nothing any more.


# %%
def changed_by(action, model):
    before = copy.deepcopy(model.state_dict())
    action()
    moved = {
        key.split(".")[-1]
        for key, value in model.state_dict().items()
        if not torch.equal(before[key], value)
    }
    kinds = ("weight", "scale", "running_mean", "running_var")
    return [kind for kind in kinds if kind in moved]


small = QuantWrapper(net).prepare_qat(weight_bits=4)
batches = list(task.train)  # four batches of 25 images
_ = small(batches[0][0])  # the first look: observers start from nothing
print("train mode:", changed_by(lambda: small(batches[1][0]), small))
_ = small.eval()
for look in ("first", "second"):
    changed = changed_by(lambda: small(batches[2][0]), small)
    print(f"eval mode, {look} look:", changed)

# %% [markdown]
# ## The loop stays an ordinary loop
#
# Everything that quantization needs is now inside the model. The loop of the recipe is left: cross
# entropy, stochastic gradient descent with learning rate 0.001 and momentum 0.9. Here it is for the
# small network in plain PyTorch, with the one habit of `fit` that the recipe does not have, a limit
# on the norm of the gradient.


# %%
def plain_loop(model, steps):
    descent = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    model.train()
    losses = []
    for images, labels in islice(cycle(batches), steps):
        descent.zero_grad()
        error = F.cross_entropy(model(images), labels)
        error.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        descent.step()
        losses.append(error.item())
    return losses


# %% [markdown]
# And `fit`, from the same start, on the same batches. The losses are compared bit for bit.

# %%
sgd = partial(torch.optim.SGD, lr=0.001, momentum=0.9)
twin = copy.deepcopy(small)
losses = plain_loop(small, steps=12)
history = fit(twin, batches, steps=12, optimizer=sgd, schedule="constant")
print("same losses:", losses == history.loss)
same = torch.equal(small.model[0].weight, twin.model[0].weight)
print("same weights:", same)

# %% [markdown]
# ## Freezing the grid
#
# While observers run, the grid moves under the weights, and batch norm keeps rescaling what the
# grid has to cover. For the last stretch of training we hold both still with `freeze`, so that the
# weights adapt to the very grid that they will be stored on. What a few more steps change before
# and after:

# %%
more = partial(
    fit, small, batches, steps=4, optimizer=sgd, schedule="constant"
)
print("before:", changed_by(more, small))
small.freeze()
print("after: ", changed_by(more, small))

# %% [markdown]
# ## Training, twice
#
# Now the real network. First the float control, then the fake-quantized one: the same start, the
# same 120 steps on the same batches. For the second we freeze before step 96, which leaves a fifth
# of the steps for the fixed grid.

# %%
control = copy.deepcopy(start)
control_history = fit(
    control, task.train, steps=120, optimizer=sgd, schedule="constant"
)

# %%
# the integers without any training
before = qat.calibrate(task.train, batches=1).convert()
qat = QuantWrapper(start).prepare_qat(weight_bits=4)
qat_history = fit(
    qat,
    task.train,
    steps=120,
    optimizer=sgd,
    schedule="constant",
    at={96: qat.freeze},
)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Training loss over 120 steps for the float network and for the network with 4-bit weights. Both start near the same value and fall together; the 4-bit curve lies slightly above or on the float one."}}
curves(
    {"float": control_history.loss, "QAT, 4 bits": qat_history.loss},
    xlabel="step",
    ylabel="training loss",
)

# %% tags=["nbval-ignore-output"]
loss = qat_history.loss
first, last = np.mean(loss[:10]), np.mean(loss[-10:])
print(f"QAT loss, mean of 10 steps: first {first:.3f}, last {last:.3f}")
print(f"float, last 10 steps: {np.mean(control_history.loss[-10:]):.3f}")
glue("ch06-first-loss", float(first), display=False)
glue("ch06-last-loss", float(last), display=False)

# %% [markdown]
# With every weight shown to the network in one of sixteen values, the loss went from
# {glue:text}`ch06-first-loss:.2f` to {glue:text}`ch06-last-loss:.2f`. The bar, set before looking,
# was to halve it.

# %%
print("loss at least halved:", last < first / 2)

# %% [markdown]
# :::{admonition} Before you read on
# The optimizer has moved every hidden weight for 120 steps. Which share of the integers has changed: half
# of them, a tenth, a hundredth?
# :::
#
# ## The hands and the Head
#
# What moved? Every float, a little; and some integers. We compare the integers of the convolutions
# with those that the untrained start would have been stored as.


# %%
def stored_integers(model):
    weights = [getattr(m, "weight", None) for m in model.modules()]
    packed = [weight() for weight in weights if callable(weight)]
    return torch.cat([weight.int_repr().flatten() for weight in packed])


served = qat.convert()
moved = stored_integers(served) != stored_integers(before)
print("weights stored as integers:", f"{moved.numel():,}")

# %% tags=["nbval-ignore-output"]
layer, origin = qat.model.layer3[0].conv2, start.layer3[0].conv2
shift = (layer.weight - origin.weight).detach().abs().flatten(1)
in_steps = shift / choose_scale(origin.weight.flatten(1), bits=4)[0]
count, share = moved.sum().item(), moved.float().mean()
print(f"integers that changed: {count:,} ({share:.1%})")
print(f"a typical hidden weight moved by {in_steps.median():.3f} of a step")
glue("ch06-moved", moved.float().mean().item(), display=False)
glue("ch06-shift", in_steps.median().item(), display=False)

# %%
print("hidden weights moved:", not torch.equal(layer.weight, origin.weight))
print("integers changed:", moved.sum().item() > 0)

# %% [markdown]
# A typical hidden weight of that layer moved by {glue:text}`ch06-shift:.3f` of a step, far less than
# it takes to be rounded differently; {glue:text}`ch06-moved:.1%` of all integers changed. A weight
# that moves so little changes its integer only if it stood near an edge. The power was in the
# weights all along; a nudge in the right places was enough.
#
# ## First trap: trained on one scale, served with another
#
# For convolutions, upstream has no ready setting below 8 bits (for embeddings it has one,
# `default_embedding_qat_qconfig_4bit`). The obvious way is to take `FusedMovingAvgObsFakeQuantize`,
# which its default qconfig for training uses, and to narrow its range. It trains, and it converts.
# But the scale that it rounds with during training is not the one that conversion reads from it. One
# convolution is enough to see that.


# %%
def narrowed(bits):
    top = 2 ** (bits - 1)
    return ao.FusedMovingAvgObsFakeQuantize.with_args(
        observer=ao.MovingAveragePerChannelMinMaxObserver,
        quant_min=-top,
        quant_max=top - 1,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
    )


conv = nn.Conv2d(16, 64, 3, bias=False)
with torch.no_grad():
    conv.weight.copy_(draw(*conv.weight.shape))


# %%
def two_scales(make):
    fake = make()
    fake(conv.weight)  # what a training step does
    converted, _ = fake.calculate_qparams()
    return fake.scale, converted  # rounds with, converts with


print("bits  trained scale / converted scale")
for bits in (8, 4, 3, 2):
    trained, converted = two_scales(narrowed(bits))
    ratio = trained / converted
    print(f"{bits:4}  {ratio.min():.4f} to {ratio.max():.4f}")

# %% [markdown]
# At 8 bits nobody would notice. At 2 bits a channel may be served on steps of quite another size
# than those it was trained on. The two formulas are
#
# $$ s_{\text{trained}} = \max\!\Big(\frac{\max w}{1}, \frac{-\min w}{2}\Big), \qquad s_{\text{converted}} = \frac{\max |w|}{3/2}, $$
#
# for two bits: the fused kernel, a compiled routine that observes and rounds in one go, makes the
# range fit on each side by itself; the observer fits a grid that is symmetric.

# %%
trained, converted = two_scales(narrowed(2))
flat = conv.weight.detach().flatten(1)  # (64, 144)
sides = torch.maximum(flat.amax(1) / 1, flat.amin(1) / -2)
print("trained with: ", torch.equal(trained, sides))
ours, _ = choose_scale(flat, bits=2)
print("converted with:", torch.equal(converted, ours.flatten()))

# %% tags=["hide-input"] mystnb={"image": {"alt": "One point for each of 64 channels, trained scale against converted scale at 2 bits. Most points lie well below the dotted line of equality, a few on or above it."}}
scatter(
    trained.numpy(),
    converted.numpy(),
    xlabel="scale it trains with",
    ylabel="scale it is converted with",
)

# %% [markdown]
# The companion uses the module that is not fused, `FakeQuantize`. It asks the observer that it holds
# for the scale, in training as at conversion, so there is only one. A {term}`qconfig` says so for the
# whole network:

# %%
qconfig = make_qconfig(2, "x86", ao)
print("same scale:", torch.equal(*two_scales(qconfig.weight)))

# %% [markdown]
# And it is conversion, not our reading of it, that decides. We send the same convolution through
# upstream's own prepare and convert with either qconfig, and look at the scale of the result.


# %%
def served_scale(weight):
    model = nn.Sequential(copy.deepcopy(conv)).train()
    model.qconfig = ao.QConfig(activation=qconfig.activation, weight=weight)
    ao.prepare_qat(model, inplace=True)
    model(torch.ones(1, 16, 8, 8))
    trained = model[0].weight_fake_quant.scale.clone()
    packed = ao.convert(model.eval())[0].weight()
    return torch.equal(trained, packed.q_per_channel_scales().float())


print("the trained scale is the served scale:")
print("narrowed upstream:", served_scale(narrowed(2)))
print("the companion's:  ", served_scale(qconfig.weight))

# %% [markdown]
# ## Second trap: a tie that falls the other way
#
# With one scale for both, one more difference is possible. The scale of a channel is its largest
# $|w|$ over half the width of the grid, so the largest weight of every channel sits exactly
# half-way between two integers. Then batch norm is folded into the convolution, which multiplies
# the channel by $\gamma / \sqrt{\sigma^2 + \varepsilon}$. Training and conversion compute that
# factor along two different ways, whose last bit may differ, and the tie falls the other way. At 8
# bits that is one step of 255. At 2 bits it is one of three, for the largest weight there is.
#
# A convolution with 256 channels, batch norm as after some training, activations calibrated:

# %%
net = nn.Sequential(
    nn.Conv2d(3, 256, 3, bias=False), nn.BatchNorm2d(256), nn.ReLU()
)
with torch.no_grad():
    net[0].weight.copy_(draw(256, 3, 3, 3))
    net[1].weight.copy_(draw(256).abs() + 0.5)
    net[1].running_var.copy_(draw(256).abs() + 0.5)
x = draw(8, 3, 16, 16)
prepared = QuantWrapper(net).prepare_qat(weight_bits=2).calibrate([x])

# %% [markdown]
# The integers that the prepared model works with, next to those that upstream's `convert` stores
# and those of the companion:

# %%
layer = prepared.model[0]
bn, rounding = layer.bn, layer.weight_fake_quant
fold = bn.weight / torch.sqrt(bn.running_var + bn.eps)  # (256,)
folded = layer.weight * fold.reshape(-1, 1, 1, 1)
s = rounding.scale.reshape(-1, 1, 1, 1)
trained = torch.round(rounding(folded) / s).flatten()
upstream = ao.convert(copy.deepcopy(prepared))
companion = prepared.convert()
for name, model in {"upstream": upstream, "companion": companion}.items():
    stored = stored_integers(model)
    differ = not torch.equal(stored.float(), trained)
    print(f"{name}: integers {stored.unique().tolist()},", end=" ")
    print("some differ from training:", differ)

# %% [markdown]
# `QuantWrapper.convert` sets every weight to its grid point before it hands the model over. A grid
# point is no tie, so nothing is left to fall. The outputs, in steps of the 8-bit output grid:

# %%
with torch.no_grad():
    step = companion.model[0].scale
    for name, model in (("upstream", upstream), ("companion", companion)):
        gap = (model(x) - prepared(x)).abs().max() / step
        print(f"{name}: at most one step apart:", gap.item() < 1.5)

# %% [markdown]
# ## When the curtain opens
#
# Last, the ResNet that we trained at 4 bits. Behind the curtain it computed in floats that looked
# like integers; converted, it computes in integers. Do both give the same answer to the same image?
# We asked, before looking, that they agree on at least 99 % of the test images. Some slack is
# needed: a sum of floats and a sum of integers may differ in the last digit, and an activation on
# the edge of a step then falls the other way. [](ch07) looks at every width.

# %% tags=["nbval-ignore-output"]
fake_answers, labels = predict(qat, task.test)
real_answers, _ = predict(served, task.test)
agreement = np.mean(fake_answers == real_answers)
print(f"agreement {agreement:.4f} on {len(labels)} test images")
accuracy = np.mean(real_answers == labels)
print(f"accuracy of the converted network {accuracy:.3f}")
glue("ch06-agreement", float(agreement), display=False)
glue("ch06-accuracy", float(accuracy), display=False)

# %%
print("fake and converted agree on 99 % or more:", agreement >= 0.99)

# %% [markdown]
# They agree on {glue:text}`ch06-agreement:.1%` of the images. The accuracy of the converted network,
# {glue:text}`ch06-accuracy:.3f`, means little alone: whether training was worth its price, and
# against what, is the question of [](ch07).
#
# ## Quiz
#
# ```{quiz} ch06
# Three questions, each answer explained: they stand in `_quizzes/ch06.md` beside this notebook.
# ```
#
# ## Exercises
#
# ```{exercise} Who is heard
# :label: ch06-ste
# Write `mask(w, scale, bits)`, the straight-through gradient: a float tensor of the shape of `w`,
# 1 where the weight is inside the signed grid of that width and 0 where it is clipped. Replace the
# `...` and run the cell.
# ```


# %%
def mask(w, scale, bits): ...  # your turn


check("ch06-ste", mask)

# %% [markdown]
# ```{solution} ch06-ste
# :class: dropdown
# The rounded value decides, not the weight: anything that rounds to an end of the grid is inside.
# ```


# %% tags=["hide-cell"]
def mask(w, scale, bits):
    steps = torch.round(w * (1 / scale))
    half = 2 ** (bits - 1)
    return ((steps >= -half) & (steps < half)).float()


check("ch06-ste", mask)

# %% [markdown]
# ```{exercise} A nudge
# :label: ch06-latent
# Hidden weights `w` on a grid with steps of `scale` and signed integers of `bits` all move by
# `delta`. Write `flips(w, scale, bits, delta)`, the number of integers that change. Replace the
# `...` and run the cell.
# ```


# %%
def flips(w, scale, bits, delta): ...  # your turn


check("ch06-latent", flips)

# %% [markdown]
# ```{solution} ch06-latent
# :class: dropdown
# Quantize before and after, and count the differences. A weight that stays clipped keeps its
# integer, however far it moves.
# ```


# %% tags=["hide-cell"]
def flips(w, scale, bits, delta):
    ends = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    steps = [torch.round(v * (1 / scale)) for v in (w, w + delta)]
    before, after = (s.clamp(*ends) for s in steps)
    return (before != after).sum().item()


check("ch06-latent", flips)

# %% [markdown]
# ```{exercise} An experiment: when to freeze
# :label: ch06-experiment
# Train at two bits, and freeze before step 0, 60, 96 and 119. Which of them ends best on validation? Predict the order first.
# ```
#
# ```{solution} ch06-experiment
# :class: dropdown
# What you see depends on the seed, so draw at least three. Frozen from the start the grid is that of the untrained weights; never
# frozen it still moves in the last step. Where the differences lie inside the intervals, say so.
# ```
#
# ## What we saw
#
# - Fake quantization rounds and clips but returns floats; the true gradient of that is zero, so
#   nothing would ever train.
# - The straight-through estimator passes the gradient inside the grid, ends included, and stops it
#   where a weight is clipped. By hand, with the companion and with upstream it is the same, bit for
#   bit.
# - `prepare_qat` adds observers and rounding, and no parameter; the loop that trains is the loop
#   you know. Late in training, `freeze` holds the grid still.
# - The scale used in training must be the scale that is served (upstream's fused module breaks that
#   when narrowed), and ties must fall the same way. The companion takes care of both, and the
#   converted network agrees with the one we trained.
#
# :::{epigraph}
# "Then you are the Wizard?" said Dorothy. "The Wizard writes the cards," said the small man. "I keep
# the ruler." He laid it down, for the lesson was over, and the bricks stayed where they were: the Head
# went on speaking, and nobody in the audience could have told when the hands had left it.
# :::
#
# ## References
#
# - {cite:t}`bengio2013`: gradients through rounding, and the straight-through estimator.
# - {cite:t}`jacob2018`: training with simulated quantization and folded batch norm.
# - {cite:t}`krishnamoorthi2018`: practice of quantization-aware training, freezing included.
# - {cite:t}`nagel2021`: a survey of both roads, with the choices behind them.
