# %% [markdown]
# (ch05)=
# # Step 3: `QuantWrapper`
#
# ![The glowing model stands between two red doors in a castle wall; one of them is ajar.](_static/tale/ch05.svg)
#
# :::{epigraph}
# The two doors were painted on the castle wall, one on either side of her model, and they were
# beautifully painted: there was even a keyhole. Dorothy leaned against the first and fell
# straight through. "That shows where a door belongs," said the Wizard. "A door is made by a
# carpenter, and he will ask you two things: how wide, and for whom."
# :::
#
# The doors are called stubs. This chapter hangs them, and then carries a trained network through
# them into integers without training it any further.
#
# **What you will learn**
#
# - that a wrapper with its stubs is the identity until somebody prepares it;
# - what has to be settled before: a qconfig, fused layers, additions that are modules;
# - what calibration chooses, and why on x86 it uses only half of the integers;
# - what an int8 layer computes, by hand and to the last integer;
# - how to compare a quantized model with the float model it came from.
#
# *Running time: under a minute on two cores.*

# %% tags=["hide-input"]
import copy
import re
import textwrap
import warnings
from functools import partial

import torch
from myst_nb import glue
from torch import nn
from torch.ao import quantization as ao
from torch.nn import functional as F

from companion import (
    QuantWrapper,
    accuracy,
    fit,
    load_pretrained,
    load_task,
    model_bytes,
)
from companion.course.check import check
from companion.course.figures import histogram
from companion.errors import UnsupportedModel, WrongStage
from companion.evaluation.estimates import paired, predict

# upstream announces removal at every call; see below
warnings.filterwarnings("ignore")

# %% [markdown]
# ## Marks on the road
#
# A {term}`stub` is a module that returns what it is given. By hand, the wrapper of the recipe is
# three modules in a row; upstream and the companion each have a class for it. All of them are the
# identity around the model, and all of its parameters are still ordinary ones.

# %%
task = load_task("digits-5-9", batch_size=25)
# weights="auto" takes ImageNet weights where a network allows
model = load_pretrained("resnet18", classes=5, weights="digits").eval()
images, labels = next(iter(task.test))  # (100, 3, 32, 32), (100,)
wrappers = {
    "by hand": nn.Sequential(ao.QuantStub(), model, ao.DeQuantStub()),
    "companion": QuantWrapper(model),
    "upstream": ao.QuantWrapper(model),
}
# %%
with torch.no_grad():
    bare = model(images)
    for name, wrapper in wrappers.items():
        same = torch.equal(wrapper.eval()(images), bare)
        kinds = [
            isinstance(m, ao.FakeQuantizeBase) for m in wrapper.modules()
        ]
        print(
            f"{name:9}: output unchanged {same}, "
            f"{sum(kinds)} fake-quantization modules"
        )

# %% [markdown]
# So the third step of the recipe does nothing by itself. It says *where* integers begin and end;
# what they look like, and who makes them, is still open.
#
# :::{admonition} A road that is being taken up
# :class: note
# All of `torch.ao.quantization` is deprecated upstream. The calls that prepare or convert a model say
# so each time: `quantize_dynamic`, `prepare`, `prepare_qat` and `convert`. Other parts keep silent
# about it, among them `fuse_modules`, `FakeQuantize` and `MinMaxObserver`. In the PyTorch that this
# course pins, everything works. We walk this road because the recipe does, and because nothing shows
# the parts as plainly. New projects should start from the right-hand column:
#
# | here | its successor, in torchao |
# |---|---|
# | `quantize_dynamic`, `prepare` and `convert` on `Linear` | `torchao.quantization.quantize_(model, config)` |
# | `prepare_qat` and `convert` on `Linear` | `quantize_` with `QATConfig(config, step="prepare")`, later `step="convert"` |
# | `quantize_fx.prepare_fx`, `convert_fx` | `prepare_pt2e`, `convert_pt2e` in `torchao.quantization.pt2e.quantize_pt2e` |
# | `prepare_qat` on convolutions | `prepare_qat_pt2e`, in the same place |
# | `torch.ao.quantization.quantize_pt2e` | already gone: `torchao.quantization.pt2e.quantize_pt2e` |
# | stubs, `FloatFunctional`, fusing by name | none: the pt2e flow exports the whole graph and finds these places itself |
# :::
#
# ## The carpenter's two questions: a qconfig
#
# Upstream asks for a {term}`qconfig`: a pair of constructors, one for whatever watches
# activations, one for whatever watches weights. It holds constructors and no finished observers,
# because each layer needs an observer of its own, to be made when the layer is prepared.

# %%
qconfig = ao.QConfig(
    activation=ao.MinMaxObserver.with_args(
        dtype=torch.quint8, reduce_range=True
    ),
    weight=ao.PerChannelMinMaxObserver.with_args(
        dtype=torch.qint8, qscheme=torch.per_channel_symmetric
    ),
)
first, second = qconfig.activation(), qconfig.activation()
print(type(first).__name__, "and another one:", first is not second)
print("integers for activations:", first.quant_min, "to", first.quant_max)
second = qconfig.weight()
print("integers for weights:    ", second.quant_min, "to", second.quant_max)

# %% [markdown]
# Weights get signed integers and a scale per channel, as [](ch04) recommends. Activations get
# unsigned ones and a single scale, because the kernels, the compiled routines that multiply them,
# want it so; the range stops at 127, of which more below. The {term}`observer` in either place comes
# from chapter 4.
#
# ## Fusion: batch norm disappears into the convolution
#
# :::{figure-md} fig-batch-norm-folding
#
# ![Above, an input of 2 passes a convolution, 0.3 times x, becomes 0.6, passes a batch norm, 2
# times (x minus 0.5) plus 0.1, and becomes 0.3. Below, it passes one convolution, 0.6 times x minus
# 0.9, and becomes 0.3 as well.](_static/figures/batch-norm-folding.svg)
#
# One channel with one weight. In eval mode the batch norm multiplies by a gain, here 2, and shifts;
# both can be moved into the weight and the bias beforehand, and 0.6 · 2 − 0.9 is the same 0.3.
#
# :::
#
# An integer kernel computes convolution, batch norm and ReLU in one go, and in eval mode this
# costs nothing: batch norm is then a fixed multiplication and addition per channel, and both can
# be folded into the convolution. With $g = \gamma / \sqrt{\sigma^2 + \epsilon}$ per channel,
#
# $$ \gamma\, \frac{(W * x) - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta \;=\; (g\,W) * x + (\beta - g\,\mu). $$
#
# A small network with statistics that are not 0 and 1:

# %%
generator = torch.Generator().manual_seed(0)


def draw(*shape):  # in double, so that every machine draws the same numbers
    drawn = torch.randn(*shape, generator=generator, dtype=torch.double)
    return drawn.float()


small = nn.Sequential(
    nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()
).eval()
conv, bn, _ = small
with torch.no_grad():
    conv.weight.copy_(0.3 * draw(8, 3, 3, 3))
    bn.weight.copy_(1 + 0.2 * draw(8))
    bn.bias.copy_(0.1 * draw(8))
    bn.running_mean.copy_(0.5 * draw(8))
    bn.running_var.copy_(1 + draw(8) ** 2)
x = draw(16, 3, 16, 16)  # (batch, channels, height, width)

# %%
with torch.no_grad():
    gain = bn.weight / torch.sqrt(bn.running_var + bn.eps)  # (8,)
    weight = conv.weight * gain.view(-1, 1, 1, 1)  # (8, 3, 3, 3)
    bias = bn.bias - gain * bn.running_mean  # (8,)
    folded = F.conv2d(x, weight, bias).relu()
    same = torch.allclose(folded, small(x), atol=1e-5)
print("folded = convolution, batch norm, ReLU:", same)

# %% [markdown]
# Upstream's `fuse_modules` does this {term}`fusion` for a model in eval mode, given the names of
# the modules. For training there is `fuse_modules_qat`, which leaves the batch norm in place but
# puts the three under one roof: its statistics still move, so nothing can be folded for good.

# %%
fused = ao.fuse_modules(small, [["0", "1", "2"]])
print([type(m).__name__ for m in fused])
print("same weight:", torch.allclose(fused[0][0].weight, weight))
print("same bias:  ", torch.allclose(fused[0][0].bias, bias, atol=1e-6))
copied = copy.deepcopy(small).train()
for_training = ao.fuse_modules_qat(copied, [["0", "1", "2"]])
print("fused:", [type(m).__name__ for m in for_training])
print("of:   ", [type(m).__name__ for m in for_training[0]])

# %% [markdown]
# torchvision's quantizable ResNet knows the names of its own parts.


# %%
def batch_norms(net):
    return sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())


fused_resnet = copy.deepcopy(model)
fused_resnet.fuse_model(is_qat=False)
left = batch_norms(fused_resnet)
print("batch norms before and after:", batch_norms(model), left)
with torch.no_grad():
    same = torch.allclose(fused_resnet(images), bare, atol=1e-3)
print("same outputs:", same)

# %% [markdown]
# ## Prepare, watch, convert
#
# Now upstream's three calls on the small network. `prepare` puts observers where the qconfig says,
# a forward pass lets them watch ({term}`calibration`), and `convert` replaces layers by integer
# ones. This is {term}`static quantization`: unlike in [](ch03), the ranges of the activations are
# settled before the model is used. (The first line of the cell chooses the *quantized engine*, the
# library of kernels with which PyTorch does its integer arithmetic.)

# %%
torch.backends.quantized.engine = "x86"
upstream = ao.QuantWrapper(fused).eval()
upstream.qconfig = qconfig
prepared = ao.prepare(upstream)
watching = [isinstance(m, ao.ObserverBase) for m in prepared.modules()]
print("observers:", sum(watching))
with torch.no_grad():
    prepared(x)
served = ao.convert(prepared)
layer = served.module[0]
print([m._get_name() for m in (served.quant, layer, served.dequant)])

# %% [markdown]
# There is no mystery in what that layer computes. Its inputs are integers $q_x$ with zero point
# $z_x$, its weights integers $q_w$. It sums their products, which are integers too, multiplies
# by the two scales, adds the bias, and rounds to the grid of its output:
#
# $$ q_y = \operatorname{clip}\!\Big( \operatorname{round}\!\Big( \frac{ s_x s_w \sum (q_x - z_x)\, q_w + b }{ s_y } \Big) + z_y \Big). $$

# %%
from companion import choose_scale, quantize
from companion.numerics.affine import to_groups

rows = to_groups(weight)  # (8, 1, 27): one scale per output channel
s_w, _ = choose_scale(rows, bits=8)
q_w = quantize(rows, s_w, bits=8).view_as(weight)
same = torch.equal(q_w, layer.weight().int_repr())
print("weights, as in chapter 4:", same)

s_x, z_x = served.quant.scale, served.quant.zero_point
q_x = torch.clamp(torch.round(x * (1 / s_x)) + z_x, 0, 255)
same = torch.equal(q_x.byte(), served.quant(x).int_repr())
print("inputs:                  ", same)

# %%
# whole numbers; double holds them exactly
sums = F.conv2d(q_x.double() - z_x, q_w.double())
step = s_x.double() * s_w.double().view(-1, 1, 1)
values = sums * step + bias.double().view(-1, 1, 1)
zero = layer.zero_point
q_y = torch.clamp(torch.round(values / layer.scale) + zero, zero, 255)
theirs = layer(served.quant(x)).int_repr()
apart = (q_y - theirs.double()).abs()
print("outputs at most one step apart:", apart.max().item() <= 1)
equal = (apart == 0).double().mean().item()
print("equal in more than 99 of 100:  ", equal > 0.99)

# %% [markdown]
# ReLU is nowhere to be seen: it is the lower end of the clipping. We allow a step between ours and
# theirs, since engines differ in how they round the bias, and ask that more than 99 of 100 outputs
# be the same integer.
#
# The companion takes the same steps with three calls. Its `prepare_qat` inserts
# {term}`fake quantization`, which rounds *and* watches, so that one preparation serves
# calibration here and training in [](ch06).

# %%
ours = QuantWrapper(small).prepare_qat(weight_bits=8).calibrate([x])
int8 = ours.convert()
with torch.no_grad():
    steps = (int8(x) - ours(x)).abs().max().item() / int8.model[0].scale
agree = {
    "weights": torch.equal(int8.model[0].weight().int_repr(), q_w),
    "input scale": torch.equal(int8.quant.scale, s_x),
    "fake and served within a step": steps < 1.5,
}
ok = "✓" if all(agree.values()) else "✗"
print(ok, "as upstream:", ", ".join(agree))

# %% [markdown]
# One thing this road does not do: below 8 bits, the integers still sit in 8-bit containers. Fewer
# bits show what the accuracy would be, not what the file would weigh.

# %%
for bits in (8, 4, 2):
    watched = QuantWrapper(small).prepare_qat(bits).calibrate([x])
    converted = watched.convert()
    used = converted.model[0].weight().int_repr().unique().numel()
    size = model_bytes(converted)
    print(f"{bits} bits: {used:3} different integers, {size} bytes")

# %% [markdown]
# ## Half of the integers
#
# Activations have integers from 0 to 255, yet the observers above aim at 127. The reason is an
# instruction. On x86 processors without VNNI (instructions of newer ones, which add up products of
# bytes in 32 bits), a kernel multiplies unsigned by signed bytes, and adds two neighbouring products
# in 16 bits; what does not fit is cut off without notice.

# %%
print("room in 16 bits:          ", 2**15 - 1)
print("two products, up to 255:  ", 2 * 255 * 128)
print("two products, up to 127:  ", 2 * 127 * 128)

# %% [markdown]
# A bit of resolution is the price for products that always fit. Upstream calls this
# `reduce_range`. The companion spreads the observed range over 0 to 127 as well, but leaves
# the integers above it in use, in training as in serving: a value beyond the range that was seen
# is then not cut off at once. (Two such values side by side can still be too much for such a
# processor.)
#
# ## Additions have to be modules
#
# A residual block adds two activations. On integers this needs a scale for the sum, and a bare
# `+` has no place to keep one. `FloatFunctional` is a module that does: in floating point it just
# adds, and it can be observed and converted like any other.

# %%
add = torch.ao.nn.quantized.FloatFunctional()
a, b = draw(4), draw(4)
print("the same sum:", torch.equal(add.add(a, b), a + b))
print("observable:  ", isinstance(add.activation_post_process, nn.Module))

# %% [markdown]
# It has to be created in `__init__`, one for each addition. torchvision's ordinary ResNet-18 writes
# `+=` instead. Upstream prepares and converts it without complaint and fails when it is used;
# the companion traces the model and refuses beforehand.


# %%
def through_upstream(net):
    """Prepare, calibrate, convert, and say what the first use does."""
    net = ao.QuantWrapper(copy.deepcopy(net)).eval()
    net.qconfig = qconfig
    ao.prepare(net, inplace=True)
    try:
        with torch.no_grad():
            net(images[:4])
            ao.convert(net, inplace=True)(images[:4])
    except NotImplementedError as error:
        return "fails at " + re.search(r"aten::\w+", str(error))[0]
    return "runs"


plain = load_pretrained(
    "resnet18", classes=5, weights="digits", quantizable=False
)
print("upstream: ", through_upstream(plain))
try:
    QuantWrapper(plain).prepare_qat()
except UnsupportedModel as error:
    print(textwrap.fill(f"companion: {error}", 76))

# %% [markdown]
# The quantizable variant of torchvision has modules for its additions, but also stubs of its own.
# Inside a wrapper, two of them then stand one behind the other at the entrance: the outer one turns
# the image into integers, and the inner one, which expects floats, is given those integers and
# fails. The companion takes the inner ones out and keeps its own.

# %%
print("upstream: ", through_upstream(model))
wrapper = QuantWrapper(model).prepare_qat()
for name in ("quant", "dequant"):
    nets = (model, wrapper.model)
    was, now = (type(net.get_submodule(name)).__name__ for net in nets)
    print(f"companion: inner {name} was {was}, is {now}")

# %% [markdown]
# ## Out of order
#
# Preparing, calibrating or training, and converting have an order. Upstream does not insist on it:
# it converts a model whose observers have seen nothing, with a default scale that means nothing.

# %%
blind = ao.convert(ao.prepare(upstream))
print("scale of the inputs without any data:", blind.quant.scale.item())

# %% [markdown]
# The companion keeps track of the stage and says what is missing.


# %%
def fresh():
    return QuantWrapper(model)


mistakes = {
    "convert before prepare": lambda: fresh().convert(),
    "convert before any data": lambda: fresh().prepare_qat().convert(),
    "prepare twice": lambda: fresh().prepare_qat().prepare_qat(),
    "train the integers": lambda: int8.train(),
}
for name, mistake in mistakes.items():
    try:
        mistake()
    except WrongStage as error:
        indent = {"initial_indent": "    ", "subsequent_indent": "    "}
        print(f"{name}:", textwrap.fill(str(error), 76, **indent), sep="\n")

# %% [markdown]
# ## ResNet-18, quantized after training
#
# Now for the real thing. First the float model learns the new digits: {term}`fine-tuning`, with
# the setting that all chapters of this part share.

# %%
sgd = partial(torch.optim.SGD, lr=0.001, momentum=0.9)
history = fit(
    model, task.train, steps=120, optimizer=sgd, schedule="constant"
)
# %% [markdown]
# Then {term}`post-training quantization`. The training images serve for calibration; labels are
# not used, and no weight is trained. We keep the batches in a list, because their order will
# matter in a moment.

# %%
torch.manual_seed(0)
batches = [batch for batch, _ in task.train]  # 4 of shape (25, 3, 32, 32)
fake = QuantWrapper(model).prepare_qat(8).calibrate(batches)
int8 = fake.convert()
print("first layer:", int8.model.conv1._get_name())
print(
    "its weights:",
    int8.model.conv1.weight().dtype,
    "in",
    int8.model.conv1.weight().int_repr().dtype,
)
print("batch norms left:", batch_norms(int8))

# %% [markdown]
# That every layer has become an integer layer can be read from the size, which does not depend on
# what was learned. (`prepare_qat` had worked on a copy: `model` is still the float model.)

# %%
before, after = model_bytes(model), model_bytes(int8)
print(f"{before / 1e6:.2f} MB before, {after / 1e6:.2f} MB after")
print(f"{after / before:.3f} of it")

# %% [markdown]
# A quarter, and a little more for the scales. In [](ch03) `quantize_dynamic` had left all the
# convolutions alone.
#
# :::{admonition} Before you read on
# Every weight and every activation is now one of 256 integers at the most. On how many of a hundred test
# images, would you say, will the two models name different digits?
# :::
#
# ### Does it still recognize digits?
#
# Both models answer the same test images, so we compare them pair by pair: the
# {term}`paired difference` in accuracy with its 95 % interval ([](ch07) explains it). What counts as
# equal was fixed before any of this ran: we call the two equivalent if that whole interval lies
# within 0.02 of zero, here as in [](ch07).

# %% tags=["nbval-ignore-output"]
answers, truth = predict(model, task.test)
answers_int8, _ = predict(int8, task.test)
result = paired(answers_int8, answers, truth)
print("float:     ", accuracy(model, task.test))
print("int8:      ", accuracy(int8, task.test))
print("difference:", result.difference)
glue("ch05-float", float((answers == truth).mean()), display=False)
glue("ch05-int8", float((answers_int8 == truth).mean()), display=False)
low, high = result.difference.low, result.difference.high
equal = low > -0.02 and high < 0.02
verdict = "by that margin they are equivalent"
undecided = "one seed and these images cannot call them equivalent"
glue("ch05-verdict", verdict if equal else undecided, display=False)
glue("ch05-agree", float(result.agreement), display=False)

# %% [markdown]
# Float classifies {glue:text}`ch05-float:.3f` of the test images correctly, int8
# {glue:text}`ch05-int8:.3f`; {glue:text}`ch05-verdict`. They give
# the same answer, right or wrong, to {glue:text}`ch05-agree:.3f` of the images. At 8 bits there is
# little to repair; [](ch06) and [](ch07) go on to the widths at which there is.
#
# The other comparison is between the integers and their rehearsal in floating point. Here we ask
# for more, again beforehand: the same class for at least 99 of 100 images.

# %%
answers_fake, _ = predict(fake, task.test)
same = (answers_fake == answers_int8).mean()
print("fake and real int8 agree on 99 %:", same >= 0.99)

# %% [markdown]
# ### The same by upstream's calls
#
# What did the wrapper save us? Upstream's own functions need the inner stubs removed, the fusing
# called and a qconfig given. With observers of the same kind and the same batches, they arrive at a
# network that differs from ours in small ways: its observers watch the float model, ours one
# whose weights are already rounded. We ask for weights of the first layer within one step of each
# other, and for the same class for at least 95 of 100 images.

# %%
theirs = copy.deepcopy(model).eval()
theirs.quant, theirs.dequant = nn.Identity(), nn.Identity()
theirs.fuse_model(is_qat=False)
theirs = ao.QuantWrapper(theirs)
moving = ao.MovingAverageMinMaxObserver.with_args(
    dtype=torch.quint8, reduce_range=True
)
theirs.qconfig = ao.QConfig(activation=moving, weight=qconfig.weight)
ao.prepare(theirs, inplace=True)
with torch.no_grad():
    for batch in batches:
        theirs(batch)
theirs = ao.convert(theirs)

# %%
first, second = (
    net.conv1.weight().int_repr().int()
    for net in (theirs.module, int8.model)
)
print("weights within a step:", (first - second).abs().max().item() <= 1)
answers_theirs, _ = predict(theirs, task.test)
same = (answers_theirs == answers_int8).mean()
print("agree on 95 %:        ", same >= 0.95)

# %% [markdown]
# ## What calibration chose
#
# The first integer layer of the network puts out convolution, batch norm and ReLU. Its range was
# chosen by a moving average of the largest activation of each batch, in which a new batch
# counts for one hundredth. By hand, on the float model:


# %%
def first_layer(batch):
    with torch.no_grad():
        return model.relu(model.bn1(model.conv1(batch)))


model.eval()
# 4 of shape (25, 64, 16, 16)
outputs = [first_layer(batch) for batch in batches]
high = outputs[0].max()
for output in outputs[1:]:
    high = high + 0.01 * (output.max() - high)
# the scale spreads the range over 127 steps
chosen = 127 * int8.model.conv1.scale
apart = abs(chosen / high.item() - 1)
print("chosen range within 5 % of ours:", apart < 0.05)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Histogram of the positive outputs of the first layer: a broad hump over the lower half of the range, then a long thin tail to the right. Two vertical lines close together at the end of the tail mark the chosen end of the range and the largest activation of all four batches."}}
every = torch.cat(outputs).flatten()
histogram(
    every[every > 0].numpy(),
    xlabel="positive activations of the first layer",
    marks={
        "end of the chosen range": [chosen],
        "largest of all batches": [every.max().item()],
    },
)

# %% [markdown]
# A scale chosen for the tail is coarse for the hump: the bargain of [](ch04) again.

# %%
lower = (every[every > 0] < chosen / 2).float().mean().item()
print("more than 8 in 10 lie in the lower half of the range:", lower > 0.8)

# %% [markdown]
# And with so few batches, the first one decides nearly everything. After four of them its share in
# the average is

# %%
print(f"{0.99**3:.3f}")

# %% [markdown]
# The same images in another order therefore give other ranges, and another model. How much does
# that matter? We turn the list around, and ask for the same class for 90 of 100 images.

# %% tags=["nbval-ignore-output"]
turned = QuantWrapper(model).prepare_qat(8).calibrate(batches[::-1])
turned = turned.convert()
answers_turned, _ = predict(turned, task.test)
print("first order: ", accuracy(int8, task.test))
print("turned round:", accuracy(turned, task.test))
pair = paired(answers_turned, answers_int8, truth)
print("difference:  ", pair.difference)

# %%
print("agree on 90 %:", (answers_turned == answers_int8).mean() >= 0.90)

# %% [markdown]
# A few images change sides for no better reason than the order of four batches. Keep this in
# mind when somebody reports a tenth of a percent. Were there more batches, the first would count
# for less. And a model can be trained while it is being watched, so that ranges and weights see
# each other: that is [](ch06).
#
# ## Quiz
#
# ```{quiz} ch05
# Three questions, each answer explained: they stand in `_quizzes/ch05.md` beside this notebook.
# ```
#
# ## Exercises
#
# ```{exercise} Fold a convolution that has a bias
# :label: ch05-fold
# Write `fold(conv, bn)` for a convolution with or without a bias of its own, followed by a batch
# norm in eval mode. Return one matrix: a row for each output channel, the folded weights flattened,
# the folded bias as the last column (`torch.cat([weight.flatten(1), bias[:, None]], 1)`).
# ```


# %%
def fold(conv, bn): ...  # your turn


check("ch05-fold", fold)

# %% [markdown]
# ```{solution} ch05-fold
# :class: dropdown
# The bias passes through the batch norm like everything else that the convolution puts out, so it
# is added before the mean is taken away.
# ```


# %% tags=["hide-cell"]
def fold(conv, bn):
    gain = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    bias = 0 if conv.bias is None else conv.bias
    weight = conv.weight * gain.view(-1, 1, 1, 1)
    bias = bn.bias + gain * (bias - bn.running_mean)
    return torch.cat([weight.flatten(1), bias[:, None]], 1)


check("ch05-fold", fold)

# %% [markdown]
# ```{exercise} Find the stubs
# :label: ch05-find
# Write `find(model)`: a list of the names of all modules in a model that are a `QuantStub` or a
# `DeQuantStub`, in the order in which the model lists them. Do not trust their names.
# ```


# %%
def find(model): ...  # your turn


check("ch05-find", find)

# %% [markdown]
# ```{solution} ch05-find
# :class: dropdown
# `named_modules` goes through nested modules too, and `isinstance` takes a tuple of classes.
# ```


# %% tags=["hide-cell"]
def find(model):
    stubs = (ao.QuantStub, ao.DeQuantStub)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, stubs)
    ]


check("ch05-find", find)

# %% [markdown]
# ```{exercise} An experiment: how many visitors does the carpenter need?
# :label: ch05-experiment
# Calibrate with one batch, two and all four, in several orders each, and write down the chosen end of the first layer's range
# and the accuracy. How many batches does it take until the order no longer matters?
# ```
#
# ```{solution} ch05-experiment
# :class: dropdown
# The end moves by a hundredth of the distance with each further batch, so with four it hardly leaves the first. Whether the
# accuracy cares is another question: compare the models in pairs, and call a tie a tie.
# ```
#
# ## What we saw
#
# - Stubs are marks. Wrapped and not prepared, a model computes exactly what it did before.
# - Before preparing, batch norm is folded or fused, additions become modules, inner stubs go; a
#   qconfig says how activations and weights are watched. The wrapper does this, or refuses and names
#   the layer.
# - Calibration chooses one range for each activation from a few batches. On x86 that range is spread
#   over half of the integers, so that sums of products fit; with few batches, the first decides.
# - An int8 layer sums products of integers, rescales and rounds. We did it by hand and met upstream's
#   result, in every output within a step.
# - We compared on the same images: int8 against float, fake against real, the wrapper against
#   upstream's calls. The file is about a quarter of the size.
#
# :::{epigraph}
# By noon the carpenter had hung both doors. "I took the width from four visitors," he said, "and I
# am afraid mostly from the first." Dorothy went in by the one and came out by the other, and on the
# far side her model answered as it had answered before, or very nearly.
# :::
#
# ## References
#
# - {cite:t}`jacob2018`: integer arithmetic for whole networks, folding of batch norm included.
# - {cite:t}`krishnamoorthi2018`: post-training quantization of convolutional networks in practice.
# - {cite:t}`nagel2021`: calibration, folding and the hardware's view of all this.
# - {cite:t}`he2016`: the residual blocks whose additions had to become modules.
