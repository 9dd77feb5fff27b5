# %% [markdown]
# (ch04)=
# # The integer grid
#
# ![Glowing points fall at night onto a row of yellow bricks; two have landed, and a mallet sets the next brick.](_static/tale/ch04.svg)
#
# :::{epigraph}
# The road of yellow bricks had one rule: you may stand on a brick, never between two. "Then I
# cannot stop where I like," said Dorothy. "No," said the old paver who was laying it, "but you are
# never more than half a brick away from it." She knocked another one into place. "Unless the road
# ends before you do," she added. "So the first thing to settle is how long a brick should be."
# :::
#
# **What you will learn**
#
# - how a scale, a zero point, rounding and clipping turn real numbers into integers and back;
# - why PyTorch multiplies by the reciprocal of the scale, and which numbers notice;
# - what a scale per tensor, per channel and per group each cost in bits and in error;
# - how an observer chooses a range from data, and what one outlier does to it;
# - that every formula of this chapter is, bit for bit, what PyTorch computes.
#
# *Running time: under fifteen seconds on two cores, once chapter 2 has put the pre-trained model
# into the cache.*

# %% tags=["hide-input"]
import dataclasses
import math
import textwrap
import warnings
from functools import partial

import torch
from torch.ao import quantization as ao
from torch.nn import functional as F

from companion import (
    choose_scale,
    dequantize,
    fake_quantize,
    load_pretrained,
    quantize,
)
from companion.course.check import check
from companion.course.figures import curves, histogram
from companion.errors import SchemeError
from companion.numerics.affine import to_groups

# upstream announces its removal; chapter 5 says where
warnings.filterwarnings("ignore")

# %% [markdown]
# ## Round, clip, and come back
#
# :::{figure-md} fig-number-line
#
# ![Eight dots above a road of sixteen bricks, numbered from -8 to 7. A line leads from each dot to
# the nearest brick: -7, -3, -2, -1, 0, 1, 2 and 3 are used, eight bricks are not. Below, the weight
# 0.18 becomes the integer 1, and the integer comes back as 0.137.](_static/figures/number-line.svg)
#
# The eight weights that the next cells round, above the road that they are to walk on. A brick is
# as long as the scale, 0.1373. The red weight is 0.18, which is 1.31 bricks from zero; the nearest
# brick has the number 1, and it lies at 1 · 0.137.
#
# :::
#
# {term}`Quantization` replaces real numbers by integers of a few bits. With $b$ bits there are
# $2^b$ of them, from $q_{\min} = -2^{b-1}$ to $q_{\max} = 2^{b-1} - 1$. The {term}`scale` $s$ is
# the length of one step in units of the weights. On a symmetric {term}`grid` the largest
# magnitude decides it, so that the steps just span all values:
#
# $$ s = \frac{\max |w|}{(q_{\max} - q_{\min}) / 2}. $$
#
# Eight weights and four bits are enough to see it.

# %%
w = torch.tensor([-1.03, -0.36, -0.21, -0.08, 0.05, 0.18, 0.29, 0.41])
bits = 4
qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
scale = w.abs().max() / ((qmax - qmin) / 2)
print(f"integers {qmin} to {qmax}, scale {scale:.4f}")

# %% [markdown]
# Going there is {term}`rounding` and {term}`clipping`, coming back is one multiplication:
#
# $$ q = \operatorname{clip}\!\big(\operatorname{round}(w \cdot \tfrac{1}{s}),\; q_{\min},\, q_{\max}\big),
# \qquad \hat w = s\, q. $$

# %%
integers = torch.clamp(torch.round(w * (1 / scale)), qmin, qmax)
back = scale * integers
print("integers:", integers.int().tolist())
print("back:    ", [round(v, 3) for v in back.tolist()])
print(f"largest error, in steps: {((back - w).abs().max() / scale):.3f}")

# %% [markdown]
# No value is further from home than half a step. Zero comes back as exactly zero, which matters
# more than it seems: padding and the zeros of a ReLU stay what they are.
#
# :::{admonition} Before you read on
# Now halve the scale, and keep the sixteen integers. What happens to the error of a typical weight, and
# what to the largest error?
# :::
#
# What happens to a value beyond the end of the grid is the other half of the formula. With a
# scale half as long, the grid is twice as fine and covers only half of the weights' range; the
# rest is clipped, and its error has no bound.

# %%
fine = scale / 2
clipped = fine * torch.clamp(torch.round(w * (1 / fine)), qmin, qmax)
for name, values in [("full range", back), ("half range", clipped)]:
    error = (values - w).abs()
    median, largest = error.median(), error.max()
    print(f"{name}: median error {median:.3f}, largest {largest:.3f}")

# %% [markdown]
# The typical error shrinks, the largest one grows. Every method for choosing a range, in this
# chapter and beyond it, is a bargain between these two.
#
# ## Ties, and why the order of two operations matters
#
# Halfway between two integers, PyTorch rounds to the even one, as IEEE arithmetic does. Rounding
# every half upwards would shift the mean.

# %%
halves = torch.arange(-4, 4) + 0.5  # -3.5, -2.5, ..., 3.5
print("halves:      ", halves.tolist())
even, up = torch.round(halves), torch.floor(halves + 0.5)
print("half to even:", even.int().tolist())
print("half up:     ", up.int().tolist())
print("their means: ", even.mean().item(), up.mean().item())

# %% [markdown]
# Ties sound rare, but the formula above makes one in every group of weights that shares a
# scale: the largest magnitude, divided by the scale, lies in the middle between two integers.
# The last digit then decides on which side it falls. Our most negative weight shows it: PyTorch's
# kernels (the compiled routines that carry out its operations) compute $1/s$ once and multiply,
# since a division costs more, and in float32 that is not quite the same number.

# %%
ways = {"divided   ": w[0] / scale, "multiplied": w[0] * (1 / scale)}
for name, value in ways.items():
    nearest = torch.round(value).int().item()
    print(f"{name}: {value.item():.7f} rounds to {nearest}")

# %% [markdown]
# Here are a thousand groups of 32 random weights, rounded in both ways. (They are drawn in double
# precision so that every machine draws the same ones.)

# %%
generator = torch.Generator().manual_seed(0)
groups = torch.randn(1000, 32, generator=generator, dtype=torch.double)
groups = groups.float()
scales = groups.abs().amax(1, keepdim=True) / 7.5  # (1000, 1)
multiplied = torch.round(groups * (1 / scales))
divided = torch.round(groups / scales)
differ = (multiplied != divided).any(1).sum().item()
print("groups that round differently:", differ)
stored = multiplied.clamp(qmin, qmax) != divided.clamp(qmin, qmax)
print("of which the stored integer differs:", stored.any(1).sum().item())

# %% [markdown]
# These are not errors worth worrying about: each is half a step either way. But whoever wants to
# *show* that two implementations agree has to know about them. Throughout this book we multiply
# by the reciprocal, and equality then means `torch.equal`.
#
# ## The same with the companion, and with PyTorch
#
# The companion's functions treat the last dimension as one group. `fake_quantize` goes to the
# integers and back in one call and stays in floating point.

# %%
scale_c, zero_point = choose_scale(w, bits=4)  # shapes (1,), (1,)
q = quantize(w, scale_c, zero_point, bits=4)
print(q.dtype, q.tolist())
print("same integers:", torch.equal(q.float(), integers))
print("same values:  ", torch.equal(dequantize(q, scale_c), back))

# %% [markdown]
# Upstream's operator for this is `torch.fake_quantize_per_tensor_affine`. We compare on the
# 32,000 random weights with one scale for all of them, at four widths.

# %%
flat = groups.flatten()  # (32000,)
for bits in (8, 4, 3, 2):
    scale, zero_point = choose_scale(flat, bits)
    ours = fake_quantize(flat, scale, zero_point, bits)
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    theirs = torch.fake_quantize_per_tensor_affine(
        flat, scale.item(), 0, qmin, qmax
    )
    same, used = torch.equal(ours, theirs), ours.unique().numel()
    print(f"{bits} bits: equal {same}, {used} values in use")

# %% [markdown]
# Not every integer is in use. At 8 bits some have no weight near them. At the narrow widths one is
# missing, the lowest. The grid reaches one step further below zero than above it, and only the
# weight of largest magnitude could land on that last step; when that weight is positive, it lands
# on the upper end of the grid instead, and the lower end stays empty.
#
# ## Moving the zero: asymmetric grids
#
# :::{figure-md} fig-zero-point
#
# ![A histogram of values that leave a GELU: a peak around zero, none far below it, a long slope
# upwards. Under it, the symmetric road has eight bricks below zero that nobody stands on. The
# asymmetric road has sixteen bricks of half the length, all of them under the histogram; zero lies
# on the brick with the integer 1.](_static/figures/zero-point.svg)
#
# The same activations over two roads of sixteen bricks. The symmetric one reaches as far down as
# up, with a step of 4.83 / 7.5 = 0.644; the asymmetric one spans only what occurs, with a step of
# (4.83 + 0.17) / 15 = 0.333. (The columns are drawn by their square root, so that the tail can be
# seen.)
#
# :::
#
# Weights scatter around zero, so a symmetric grid suits them. Activations often do not: many of the
# values that leave a GELU are below zero, but none is far below it, while upwards they go as far as
# their inputs do. A symmetric grid must reach as far down as up, so nearly all of its integers below
# zero stand idle. An asymmetric grid runs from the smallest to the largest value instead, and the
# {term}`zero point` $z$ is the integer that stands for 0:
#
# $$ s = \frac{x_{\max} - x_{\min}}{q_{\max} - q_{\min}}, \qquad
# z = q_{\min} - \operatorname{round}\!\Big(\frac{x_{\min}}{s}\Big), \qquad
# q = \operatorname{clip}\!\big(\operatorname{round}(x \cdot \tfrac1s) + z,\; q_{\min},\, q_{\max}\big). $$

# %%
x = F.gelu(1.5 * flat[:4096])  # activations
low, high = x.min().clamp(max=0), x.max().clamp(min=0)  # 0 lies inside
qmin, qmax = 0, 15  # four bits, unsigned
scale = (high - low) / (qmax - qmin)
zero_point = int(qmin - torch.round(low / scale))
shifted = torch.round(x * (1 / scale)) + zero_point
integers = shifted.clamp(qmin, qmax)
by_hand = (integers - zero_point) * scale
print(f"range {low:.2f} to {high:.2f}")
print(f"scale {scale:.3f}, zero point {zero_point}")

# %% [markdown]
# Since $z$ is an integer, 0.0 sits on the grid here too. The companion and PyTorch agree with
# the lines above, and the two kinds of grid differ by what one expects.

# %%
scale_c, zero_c = choose_scale(x, bits=4, signed=False, symmetric=False)
ours = fake_quantize(x, scale_c, zero_c, bits=4, signed=False)
theirs = torch.fake_quantize_per_tensor_affine(
    x, scale.item(), zero_point, 0, 15
)
print("companion = by hand:", torch.equal(ours, by_hand))
print("PyTorch   = by hand:", torch.equal(theirs, by_hand))


# %%
def mse(original, rounded):
    return (rounded - original).double().square().mean().item()


symmetric = fake_quantize(x, *choose_scale(x, bits=4), bits=4)
print(f"mean squared error, symmetric:  {mse(x, symmetric):.5f}")
print(f"mean squared error, asymmetric: {mse(x, ours):.5f}")

# %% [markdown]
# ## Who shares a scale
#
# :::{figure-md} fig-granularity
#
# ![Three copies of a matrix of 4 by 8 weights with one giant in it. One scale for all: all 32
# weights get the giant's step. One scale for each row: 8 do. One scale for each group of four: 4
# do.](_static/figures/granularity.svg)
#
# A frame holds the weights that share a scale. The step of a frame is set by its largest weight, so
# whoever stands in the giant's frame, shown in red, is rounded coarsely. Smaller frames protect
# more weights and need more scales.
#
# :::
#
# A convolution's weight has shape (out, in, height, width). It can have one scale in all
# ({term}`per-tensor`), one for each output channel ({term}`per-channel`), or one for every few
# neighbours along a row; how many those are is the {term}`group size`. All three are the same
# arithmetic on another view. Our example has one channel that is eight times as large as the
# others, a caricature of what training does.

# %%
shape = (64, 32, 3, 3)
drawn = torch.randn(shape, generator=generator, dtype=torch.double)
weight = 0.05 * drawn.float()
weight[5] *= 8
views = {
    "per tensor": weight.reshape(1, 1, -1),  # (1, 1, 18432)
    "per channel": to_groups(weight),  # (64, 1, 288)
    "groups of 32": to_groups(weight, 32),  # (64, 9, 32)
}
for name, view in views.items():
    scale, _ = choose_scale(view, bits=4)
    print(f"{name:12}: view {tuple(view.shape)}, {scale.numel()} scales")

# %% [markdown]
# A row has to be a whole number of groups. The first convolution of a ResNet shows when it is
# not, and the companion says what would fit.

# %%
try:
    to_groups(torch.zeros(64, 3, 7, 7), 32)
except SchemeError as error:
    print(textwrap.fill(str(error), 76))

# %% [markdown]
# PyTorch's operator is called `fake_quantize_per_channel_affine`; on the grouped view, laid out
# with one group per row, it computes per-group quantization as well.

# %%
same = {}
for name, view in views.items():
    rows = view.flatten(0, 1)  # (all groups, group size)
    scale, zero_point = choose_scale(rows, bits=4)
    ours = fake_quantize(rows, scale, zero_point, bits=4)
    theirs = torch.fake_quantize_per_channel_affine(
        rows, scale.flatten(), zero_point.flatten(), 0, -8, 7
    )
    same[name] = torch.equal(ours, theirs)
ok = "✓" if all(same.values()) else "✗"
print(ok, "equal to torch:", ", ".join(same))

# %% [markdown]
# ## Error against bits
#
# Now we can ask what a bit buys. The error of each view, at every width:


# %%
def rounding_error(view, bits):
    return mse(view, fake_quantize(view, *choose_scale(view, bits), bits))


errors = {
    name: {bits: rounding_error(view, bits) for bits in range(2, 9)}
    for name, view in views.items()
}
print("bits        ", *(f"{bits:7d}" for bits in range(2, 9)))
for name, line in errors.items():
    print(f"{name:12}", *(f"{e:.1e}" for e in line.values()))

# %% tags=["hide-input"] mystnb={"image": {"alt": "Three falling lines on a logarithmic axis: mean squared error against bits from 2 to 8. The line of one scale per tensor starts flat and lies far above the line of one scale per channel; groups of 32 lie lowest. From 5 bits on, all three fall at the same slope."}}
curves(
    errors,
    xlabel="bits per integer",
    ylabel="mean squared error",
    log_y=True,
)

# %% [markdown]
# At few bits the per-tensor line is flat: the one large channel makes the step so long that
# nearly all other weights round to zero, and an error cannot get larger than the weights. From
# there on the three lines are parallel, and that has a reason. If the values spread evenly over
# the steps, the error is uniform between $-s/2$ and $s/2$, and its mean square is
#
# $$ \frac1s \int_{-s/2}^{s/2} e^2\, \mathrm{d}e = \frac{s^2}{12}. $$
#
# One more bit halves $s$ and so divides the error by four. The signal-to-noise ratio, which is the
# mean square of the values over the mean square of their errors, then grows by
# $10 \log_{10} 4 \approx 6$ decibels: the *6 dB per bit* of audio engineers. On uniform values,
# measured and predicted:

# %%
u = torch.rand(100_000, generator=generator, dtype=torch.double).float()
u = 2 * u - 1
power = u.double().square().mean().item()
before = None
for bits in range(2, 9):
    s = choose_scale(u, bits)[0].item()
    db = 10 * math.log10(power / rounding_error(u, bits))
    gain = "" if before is None else f", gained {db - before:.2f} dB"
    ratio = rounding_error(u, bits) / (s**2 / 12)
    print(f"{bits} bits: error / (s²/12) = {ratio:.3f}{gain}")
    before = db

# %% [markdown]
# The first bits gain a little more than 6 dB, since $2^b - 1$ steps more than double when there
# are few of them. The distance between the lines of the figure is the second message; where
# they are parallel, the same rule says how many bits it is worth.

# %%
for name in ("per channel", "groups of 32"):
    ratio = errors["per tensor"][8] / errors[name][8]
    worth = math.log2(ratio) / 2
    print(f"{name}: per-tensor error / {ratio:.0f}, worth {worth:.1f} bits")

# %% [markdown]
# ## A real layer
#
# The example was made up. This is a convolution of the ResNet-18 that chapter 2 pre-trained,
# with the grid of two bits drawn in: four bricks for all weights of the layer.

# %%
# weights="auto" takes ImageNet weights where a network allows
model = load_pretrained(
    "resnet18", classes=5, weights="digits", progress=False
)
real = model.layer1[0].conv1.weight.detach()  # (64, 64, 3, 3)
real_views = {
    "per tensor": real.reshape(1, 1, -1),
    "per channel": to_groups(real),
    "groups of 32": to_groups(real, 32),
}
scale, _ = choose_scale(real_views["per tensor"], bits=2)
grid = (scale * torch.arange(-2, 2)).flatten().tolist()

# %% tags=["hide-input"] mystnb={"image": {"alt": "Histogram of the weights of a convolution: a bell around zero. Four vertical lines mark the grid of two bits. Nearly all of the bell lies closer to the line at zero than to the next one; the outermost lines stand where the bell has all but ended."}}
histogram(
    real.numpy(), xlabel="weight", marks={"2-bit grid, one scale": grid}
)

# %% [markdown]
# Nearly everything is nearest to the brick at zero: a two-bit layer with one scale is almost an
# empty layer. This weight was trained, so its digits differ a little from machine to machine, and
# we print verdicts with room to spare: at every width, a scale per channel beats one per tensor
# by at least a quarter of the error, and so do groups of 32 over channels; and two bits with one
# scale set more than two thirds of the weights to zero.

# %%
real_errors = {
    name: {bits: rounding_error(view, bits) for bits in (8, 4, 3, 2)}
    for name, view in real_views.items()
}
tensor, channel, group = real_errors.values()
rows_help = all(channel[b] < 0.75 * tensor[b] for b in tensor)
groups_help = all(group[b] < 0.75 * channel[b] for b in tensor)
two_bits = quantize(real_views["per tensor"], scale, bits=2)
zeros = (two_bits == 0).float().mean().item()
print("per channel below 3/4 of per tensor:   ", rows_help)
print("groups of 32 below 3/4 of per channel: ", groups_help)
print("more than 2/3 become zero at 2 bits:   ", zeros > 2 / 3)

# %% [markdown]
# ## What the scales cost
#
# Smaller groups mean a smaller error and more scales to store. With $b$ bits per integer, scales
# of 16 bits and groups of $g$, each weight takes $b + 16/g$ bits.

# %%
from companion import QuantScheme

for size in (288, 96, 32, 8):
    view = to_groups(weight, size)
    scheme = QuantScheme(weight_bits=4, group_size=size)
    storage = 4 + 16 / size
    assert storage == scheme.bits_per_weight(in_features=288)
    error = rounding_error(view, 4)
    print(
        f"groups of {size:3}: {storage:.2f} bits per weight, "
        f"error {error:.1e}"
    )

# %% [markdown]
# Groups of 8 cost nearly two more bits per weight than one scale per row, for half the error. By
# the rule above, two bits spent on the integers would divide it by sixteen. Very small groups are
# a poor bargain; between 32 and 128 weights to a scale are usual at 4 bits and below.
#
# A `QuantScheme` is the companion's one description of a number format. It checks itself when it
# is made and cannot be changed afterwards, so that what was prepared is what is converted.

# %%
from companion import W2, W4

print(W4)
try:
    W4.weight_bits = 2
except dataclasses.FrozenInstanceError as error:
    print("refused:", error)
print(dataclasses.replace(W4, weight_bits=2) == W2)
try:
    QuantScheme(weight_bits=9)
except SchemeError as error:
    print("refused:", error)

# %% [markdown]
# The presets, for a layer with 512 inputs. A letter A means that activations are integers, too, and
# groups of None mean one scale per row.

# %%
from companion import W3, W4A8, W8, W8A8

names = ("W8A8", "W8", "W4A8", "W4", "W3", "W2")
schemes = (W8A8, W8, W4A8, W4, W3, W2)
for name, scheme in zip(names, schemes, strict=True):
    a, (low, high) = scheme.activations, scheme.integers
    inputs = "float" if a is None else f"{a.bits} bits per {a.granularity}"
    print(
        f"{name:4}: {low} to {high}, groups of {scheme.group_size}, "
        f"{scheme.bits_per_weight(512):.2f} bits, inputs {inputs}"
    )

# %% [markdown]
# The default `scale_dtype` is float16, as in the files that deployed models are stored in. The
# scale is computed in float32 and then rounded. That moves the end of the grid by a hair, so that
# the largest weight of a group need no longer lie exactly in the middle between two integers. The
# error hardly changes.

# %%
rows = to_groups(weight, 32)
for dtype in (torch.float32, torch.float16):
    scale, _ = choose_scale(rows, bits=4, scale_dtype=dtype)
    extremes = rows.abs().amax(-1, keepdim=True) * (1 / scale.float())
    error = mse(rows, fake_quantize(rows, scale, bits=4))
    off = (extremes - 7.5).abs().max()
    print(f"{dtype}: error {error:.3e}, extremes up to {off:.4f} off 7.5")

# %% [markdown]
# ## Observers: ranges from data
#
# :::{figure-md} fig-calibration
#
# ![Five short bars, the ranges of five batches, and one dot far to the right of the third. Below,
# two roads with equally many bricks: the min-max road reaches out to the dot, and its bricks are
# long; the moving average's road ends a little beyond the bars.](_static/figures/calibration.svg)
#
# The five batches of the next cell; every brick in the drawing stands for sixteen of the 256. The
# min-max observer spans from −0.17 to 30, of which nearly all is empty; the moving average lets one
# batch count for a tenth and ends at 5.16. Both are compared with the step that the batches would
# have had without the stray value.
#
# :::
#
# Weights lie still and can be measured at any time. Activations pass by, batch after batch, and
# something has to watch them: an {term}`observer`. Letting it watch is {term}`calibration`. The
# simplest remembers the smallest and largest value ever seen; a gentler one keeps a moving
# average, so that no single batch decides. Five batches, the third with one stray value:

# %%
batches = [F.gelu(flat[i * 1000 : (i + 1) * 1000]) for i in range(5)]
batches[2][17] = 30.0  # one stray value

low, high = torch.tensor(0.0), torch.tensor(0.0)
for batch in batches:
    low = torch.minimum(low, batch.min())
    high = torch.maximum(high, batch.max())
print(f"min-max:        {low:.3f} to {high:.3f}")

momentum = 0.1
low_ma, high_ma = batches[0].min(), batches[0].max()
for batch in batches[1:]:
    low_ma = low_ma + momentum * (batch.min() - low_ma)
    high_ma = high_ma + momentum * (batch.max() - high_ma)
print(f"moving average: {low_ma:.3f} to {high_ma:.3f}")

# %% [markdown]
# Upstream's observers are modules that return what they are given and take notes. Theirs and
# ours agree to the last bit.

# %%
minmax = ao.MinMaxObserver(dtype=torch.quint8)
moving = ao.MovingAverageMinMaxObserver(
    averaging_constant=momentum, dtype=torch.quint8
)
for batch in batches:
    minmax(batch), moving(batch)
same = (minmax.min_val, minmax.max_val) == (low, high)
same_ma = (moving.min_val, moving.max_val) == (low_ma, high_ma)
print("min-max equal:       ", same)
print("moving average equal:", same_ma)

# %% [markdown]
# Their `calculate_qparams` turns a range into scale and zero point, by the formula above. The
# observer for weights, `PerChannelMinMaxObserver`, keeps one range per row.

# %%
scale, zero_point = minmax.calculate_qparams()
ends = torch.stack([low, high])
ours = choose_scale(ends, bits=8, signed=False, symmetric=False)
same = torch.equal(scale, ours[0]), torch.equal(zero_point, ours[1])
print("activations:", all(same))

per_channel = ao.PerChannelMinMaxObserver(
    ch_axis=0, dtype=torch.qint8, qscheme=torch.per_channel_symmetric
)
per_channel(weight)
scale, _ = per_channel.calculate_qparams()  # (64,)
ours, _ = choose_scale(to_groups(weight), bits=8)
print("weights:    ", torch.equal(scale, ours.flatten()))

# %% [markdown]
# What did the stray value do? For one value of five thousand, the min-max observer stretched the
# step for all of them; the moving average did so, too, but much less.

# %%
every = torch.cat(batches)
ordinary = every[every < 30]
unsigned = partial(choose_scale, bits=8, signed=False, symmetric=False)
step_all, step_ordinary = (unsigned(v)[0].item() for v in (every, ordinary))
step_moving = moving.calculate_qparams()[0].item()
print(f"without the stray value: step {step_ordinary:.4f}")
print(f"min-max:                 {step_all / step_ordinary:.1f} times that")
times = step_moving / step_ordinary
print(f"moving average:          {times:.1f} times that")

# %% [markdown]
# A third way is to try several ranges and keep the one with the least error. By hand: shrink the
# range in steps of a twentieth, round, measure.


# %%
def search(x, bits):
    step, zero_point = choose_scale(x, bits, signed=False, symmetric=False)
    tried = {}
    for twentieths in range(1, 21):
        shorter = step * (twentieths / 20)
        rounded = fake_quantize(x, shorter, zero_point, bits, signed=False)
        tried[twentieths] = mse(x, rounded)
    best = min(tried, key=tried.get)
    return best / 20, tried[best] / tried[20]


for bits in (8, 4, 3):
    share, ratio = search(every, bits)
    print(
        f"{bits} bits: best at {share:.2f} of the range, "
        f"error {ratio:.2f} of the full range's"
    )

# %% [markdown]
# At 8 bits the full range wins in spite of the stray value: a squared error punishes clipping one
# value by a lot more than it rewards a finer step for all others. The fewer the bits, the longer
# the step, and the more it pays to clip. Upstream's `HistogramObserver` makes such a search on a
# histogram of the data. It assumes 256 levels, so here it keeps the whole range, too.

# %%
searching = ao.HistogramObserver(dtype=torch.quint8)
searching(every)
share = searching.calculate_qparams()[0].item() / step_all
print(f"share of the range kept: {share:.2f}")

# %% [markdown]
# ## Where this leads
#
# Everything so far rounds a finished model. A model that is to be *trained* on a grid needs a
# gradient, and rounding has none: its derivative is zero nearly everywhere. Chapter 6 trains
# through it ([](ch06)); before that, chapter 5 puts the grid into a network ([](ch05)).
#
# ## Quiz
#
# ```{quiz} ch04
# Three questions, each answer explained: they stand in `_quizzes/ch04.md` beside this notebook.
# ```
#
# ## Exercises
#
# ```{exercise} The step of an asymmetric grid
# :label: ch04-scale
# Write `step(x, bits)` that returns the scale of an asymmetric grid for a whole tensor. All
# values of `x` may lie on one side of zero; zero has to be on the grid nevertheless. Replace the
# `...` and run the cell.
# ```


# %%
def step(x, bits): ...  # your turn


check("ch04-scale", step)

# %% [markdown]
# ```{solution} ch04-scale
# :class: dropdown
# The range is widened to zero before its length is divided by the number of steps, which is one
# less than the number of integers.
# ```


# %% tags=["hide-cell"]
def step(x, bits):
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    return (high - low) / (2**bits - 1)


check("ch04-scale", step)

# %% [markdown]
# ```{exercise} The error of a group size
# :label: ch04-groups
# Write `group_error(weight, group_size)`: the mean squared error of rounding a weight matrix to
# symmetric 4-bit integers when each group of neighbours along a row has its own scale.
# ```


# %%
def group_error(weight, group_size): ...  # your turn


check("ch04-groups", group_error)

# %% [markdown]
# ```{solution} ch04-groups
# :class: dropdown
# One group per row of a new view, then the four lines from the beginning of the chapter; or the
# companion's functions, which do the same.
# ```


# %% tags=["hide-cell"]
def group_error(weight, group_size):
    rows = weight.reshape(-1, group_size)
    scale = rows.abs().amax(1, keepdim=True) / 7.5
    rounded = scale * torch.clamp(torch.round(rows * (1 / scale)), -8, 7)
    return (rounded - rows).square().mean()


check("ch04-groups", group_error)

# %% [markdown]
# ```{exercise} An experiment: a grid of your own
# :label: ch04-experiment
# Invent eight weights for which *three* bits in two groups of four have a smaller error than *four* bits in one group of
# eight. Count the scales: which of the two takes more bits a weight?
# ```
#
# ```{solution} ch04-experiment
# :class: dropdown
# One giant does it: put it into one group of four, and the other four get a step of their own. With float16 scales three bits and
# half of sixteen cost more than four bits and an eighth of it do: so small a group is dear. Does it also work with
# groups of 32 and 64?
# ```
#
# ## What we saw
#
# - Scale, zero point, rounding and clipping are four small decisions; inside the grid no value
#   moves by more than half a step, outside there is no bound, and zero is always exact.
# - The largest weight of each group sits on a tie. Multiplying by the reciprocal, as PyTorch
#   does, and dividing decide some of these ties differently.
# - One scale per channel or per group lowers the error at the same width, by the worth of a bit
#   or more where channels differ in size. Scales are stored too: count them in bits per weight.
# - An observer takes a range from data; one stray value stretches it, a moving average less, and
#   a search for the least error clips only where bits are few.
# - By hand, companion and PyTorch agreed in every comparison, by `torch.equal`.
#
# :::{epigraph}
# Before midnight the spectacles lay in pieces on the paver's bench. "There is no magic in them," said
# Dorothy, "only a length, and a place to count from." "And somebody," said the old woman, "who had to
# choose the length before she knew who would be walking there."
# :::
#
# ## References
#
# - {cite:t}`jacob2018`: the affine grid with scale and zero point, and arithmetic on it.
# - {cite:t}`krishnamoorthi2018`: per-tensor and per-channel quantization of convolutions.
# - {cite:t}`nagel2021`: a survey of range setting, granularity and their effects.
