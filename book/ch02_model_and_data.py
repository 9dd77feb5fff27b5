# %% [markdown]
# (ch02)=
# # Step 1: a pre-trained model and data
#
# ![A pair of silver shoes on the yellow brick road, their tips towards the green city.](_static/tale/ch02.svg)
#
# :::{epigraph}
# The silver shoes had belonged to somebody else, and they had walked before. They had never seen
# the yellow road, and they did not know the way to the city. But they knew how to walk, and so
# Dorothy, who had only a few days, did not have to learn that first.
# :::
#
# **What you will learn**
#
# - what fine-tuning changes about training, and a measurement of when it pays;
# - which data this road uses, and how it is split so that a number means something;
# - where pre-trained weights come from, and what a ResNet-18 is made of;
# - what is inside `fit`, the one training loop of this book, and how it survives a power cut.
#
# *Running time: about a minute on two cores. If no chapter has run before, the stand-in is
# pre-trained first, once.*

# %% tags=["hide-input"]
import tempfile
from contextlib import suppress
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from myst_nb import glue
from safetensors import safe_open
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torchvision.models import ResNet18_Weights

from companion import accuracy, fit, load_pretrained, load_task
from companion.course.check import check
from companion.course.figures import curves, images
from companion.course.models import new_resnet18
from companion.evaluation.estimates import paired, predict, proportion

# %% [markdown]
# ## Training that does not start from nothing
#
# Training walks downhill from some starting point $\theta_0$,
#
# $$ \theta_{k+1} = \theta_k - \eta\, \nabla_\theta L(\theta_k) . $$
#
# From scratch, $\theta_0$ is drawn at random. {term}`Fine-tuning <fine-tuning>` is the same walk
# from weights that were trained on another, larger task. Nothing else changes. The hope is that
# it pays when labels or steps are few: what the early layers of a network compute (edges,
# strokes, their arrangement) serves many tasks {cite}`yosinski2014`, so that less is left to
# learn. Language models are fine-tuned for the same reason; on this first road an image network
# stands in for them, since it trains in seconds. The last section measures how far the hope
# carries here, and it does not carry all the way.
#
# ## Data: scanned digits
#
# The images are digits written by hand and scanned {cite}`alpaydin1998`. scikit-learn carries
# them, so nothing is downloaded.

# %%
scans = load_digits()
ink = scans.images
print("shape:", ink.shape, "  ink:", ink.min(), "to", ink.max())
print("images of each digit:", np.bincount(scans.target).tolist())

# %% [markdown]
# A ResNet halves the sides of its image five times; after three halvings an 8 x 8 scan is a
# single point. So the scans are enlarged, scaled to -1 to 1, and repeated for three colours.


# %%
def enlarge(scans):
    """Turn scans of shape (n, 8, 8) into images of shape (n, 3, 32, 32)."""
    ink = torch.tensor(scans, dtype=torch.float32)[:, None]  # (n, 1, 8, 8)
    smooth = F.interpolate(ink / 8 - 1, size=(32, 32), mode="bilinear")
    return smooth.repeat(1, 3, 1, 1)


# %% [markdown]
# The digits 0 to 4 are what the model was pre-trained on; the task is to tell 5 from 6, 7, 8
# and 9. Different classes keep the comparison honest: had the pre-training seen a single 7, a
# good score on sevens could be memory. The images of 5 to 9 are shuffled once, with a
# fixed seed, and cut into three parts.

# %%
late_digits = np.flatnonzero(scans.target >= 5)
order = np.random.RandomState(0).permutation(late_digits)
pictures = enlarge(scans.images[order])  # (n, 3, 32, 32)
labels = torch.tensor(scans.target[order] - 5)  # (n,), 0 to 4
n = len(order)
validation, pool, test = range(100), range(100, n - 596), range(n - 596, n)
print(n, "=", len(validation), "+", len(pool), "+", len(test))

# %% [markdown]
# From the pool, training gets the first 20 images of each class and no more, for few labels
# are the point. (Taking them is the first exercise.) The companion's `load_task` does all this.

# %%
task = load_task("digits-5-9", batch_size=25)
x_validation, y_validation = next(iter(task.validation))  # 100 images
chosen = torch.as_tensor(task.train.dataset.indices)  # (100,)
ours = [
    torch.equal(x_validation, pictures[:100]),
    torch.equal(y_validation, labels[:100]),
    set(chosen.tolist()) <= set(pool),
]
print("✓" if all(ours) else "✗", "the split that we made by hand")
print("training images per class:", torch.bincount(labels[chosen]).tolist())

# %% [markdown]
# One scan as it comes, then the first training image of each class:

# %% tags=["hide-input"] mystnb={"image": {"alt": "A blocky scan of 8 by 8 grey squares beside five smooth, enlarged images of the handwritten digits 5, 6, 7, 8 and 9."}}
firsts = chosen[::20]
row = [scans.images[order[firsts[0]]], *pictures[firsts, 0].numpy()]
images(row, ["scan", *task.classes])

# %% [markdown]
# ### Three parts, and why not two
#
# A number measured on images that were trained on says how well a model remembers. A number
# measured on images that were *chosen by*, such as those on which you compared learning rates,
# is too good as well, if less so: the winner of many trials is partly the lucky one. So
# choices are made on the validation part, and the test part is read when they are done.
# Whether the parts are really apart can be tested, on the bytes of the images.


# %%
def as_bytes(loader):
    """Return the set of a loader's images, each as bytes."""
    return {x.numpy().tobytes() for x, _ in loader.dataset}


parts = {
    name: as_bytes(getattr(task, name))
    for name in ("train", "validation", "test")
}
parts["pre-training"] = as_bytes(load_task("digits-0-4").train)
counted = [f"{name} {len(part)}" for name, part in parts.items()]
print("different images:", ", ".join(counted))
for a, b in combinations(parts, 2):
    print(f"in both {a} and {b}: {len(parts[a] & parts[b])}")

# %% [markdown]
# One thing the split does not separate are the writers, whom the data does not name. The
# test tells how the model does on new images, not on new hands.
#
# ## The model
#
# `load_pretrained` returns a ResNet-18 {cite}`he2016` with a fresh classifier of the size you
# ask for. Its `provenance` says what it holds, so that no result can be mistaken for another's.

# %%
# weights="auto" takes ImageNet weights where a network allows
model = load_pretrained("resnet18", classes=5, weights="digits")
print(model.provenance)

# %% [markdown]
# With `weights="auto"` the call tries torchvision's ImageNet weights first, and falls back on
# the stand-in, with a logged notice, where there is no network. Behind it stands an enum:

# %%
weights = ResNet18_Weights.DEFAULT
print(weights)
file = weights.url.rpartition("/")[2]
print(f"{weights.meta['num_params']:,} parameters, in {file}")

# %% [markdown]
# A member of the enum, such as the `IMAGENET1K_V1` that was printed, names one set of weights for
# good and knows the preprocessing they expect. `DEFAULT` does not: it stands for the best set that
# torchvision has at the moment, and moves on when a better one is added, as it has for some other
# networks. Whoever wants to repeat a result writes down the member. The older `pretrained=True` is
# the one that stays put, for it still means the first set, `IMAGENET1K_V1`; it has been deprecated
# since such enums exist. The hex digits in the file's name are the beginning of its hash, which the
# companion asks torchvision to check.
#
# The source recipe goes further astray with `torch.hub.load("owner/repository", ...)`: it downloads
# a repository and *runs* its `hubconf.py`. That is a stranger's code with your rights, in whatever
# state its main branch is today, where all you wanted was a file of numbers.
#
# What is pre-trained, then, and what is fresh?

# %%
again = load_pretrained("resnet18", classes=5, weights="digits")
scratch = new_resnet18(5)  # nothing pre-trained
classifier = {"fc.weight", "fc.bias"}
for name, weight in model.named_parameters():
    # loading twice gives the same
    assert torch.equal(weight, again.get_parameter(name))
changed = {
    n
    for n, w in model.named_parameters()
    if not torch.equal(w, scratch.get_parameter(n))
}
kept, fresh = len(changed - classifier), len(classifier)
print(f"{kept} pre-trained tensors, and {fresh} fresh ones")

# %% [markdown]
# ### A tour of its shapes
#
# Here is a batch on its way through the network. Each `layerN` is two blocks of two
# convolutions with batch norm; the image shrinks while the channels multiply.

# %%
model.eval()
with torch.no_grad():
    h = x_validation[:25]
    # the last two are stubs: chapter 5
    for name, part in list(model.named_children())[:-2]:
        h = part(h.flatten(1) if name == "fc" else h)
        print(f"{name:8s} {tuple(h.shape)}")
    print("that is all it does:", torch.equal(h, model(x_validation[:25])))

# %% [markdown]
# Where do its parameters sit? The next chapter turns on this table.

# %%
kinds = {
    "convolution": nn.Conv2d,
    "batch norm": nn.BatchNorm2d,
    "linear": nn.Linear,
}
total = sum(p.numel() for p in model.parameters())
for name, kind in kinds.items():
    layers = [m for m in model.modules() if isinstance(m, kind)]
    count = sum(p.numel() for m in layers for p in m.parameters())
    print(f"{name:12s} {len(layers):3d} layers {count:12,} parameters")
print(f"{'all':12s}            {total:12,}")

# %% [markdown]
# ## The training loop
#
# By hand, as you know it: draw a batch, compute the loss, go back, take a step. One thing is
# added. The shuffle is seeded at the start of each pass, with the number of the pass, so that
# the run can be repeated, or picked up in the middle.

# %%
sgd = partial(torch.optim.SGD, lr=0.001, momentum=0.9)


def train(model, loader, passes):
    optimizer = sgd(model.parameters())
    model.train()
    for number in range(passes):
        torch.manual_seed(number)
        for x, y in loader:  # (25, 3, 32, 32), (25,)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


# %% [markdown]
# A model of one layer is enough to compare it with the companion's `fit`. Two passes over four
# batches are eight steps.


# %%
def tiny(seed=0):
    """One linear layer from pixels to classes."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5))


by_hand, by_fit = tiny(), tiny()
print("batches per pass:", len(task.train))
train(by_hand, task.train, passes=2)
plainly = {"optimizer": sgd, "schedule": "constant", "clip_norm": None}
history = fit(by_fit, task.train, steps=8, **plainly)
same = torch.equal(by_hand[1].weight, by_fit[1].weight)
print("same weights, bit for bit:", same)
print("losses recorded:", len(history.loss))

# %% [markdown]
# So there is no secret in `fit`. What it has on top: a number of *steps* instead of passes, so
# that runs on different data compare; gradients clipped and the learning rate lowered towards
# the end unless you say otherwise; a history; and errors where a loop would go on
# without training anything. It knows nothing of quantization, which is why every model in this
# book is trained by the same loop.
#
# ### A power cut
#
# Long runs get interrupted. With `checkpoint_dir`, `fit` keeps one file with the weights, the
# optimizer's momentum and the state of the random generators. Let the power fail before step 12,
# with a checkpoint every five steps.


# %%
def power_cut():
    raise KeyboardInterrupt


options = {"steps": 20, "optimizer": sgd, "schedule": "constant"}
folder = tempfile.TemporaryDirectory()
keep = {"checkpoint_dir": folder.name, "checkpoint_every": 5}
with suppress(KeyboardInterrupt):
    fit(tiny(), task.train, at={12: power_cut}, **options, **keep)
print("left behind:", [path.name for path in Path(folder.name).iterdir()])

# %% [markdown]
# The file is in the safetensors format. A `.pt` file is a pickle, and loading a pickle can run
# any code that somebody put into it; a safetensors file holds names and numbers and nothing
# that runs.

# %%
path = Path(folder.name, "checkpoint.safetensors")
with safe_open(path, framework="pt") as file:
    for name in sorted(file.keys()):
        print(name, tuple(file.get_slice(name).get_shape()))

# %% [markdown]
# Now resume, with another model object whose own weights do not matter, and compare with a run
# that nothing interrupted.

# %%
resumed, uninterrupted = tiny(seed=1), tiny()
late = fit(resumed, task.train, resume=True, **options, **keep)
whole = fit(uninterrupted, task.train, **options)
same = torch.equal(resumed[1].weight, uninterrupted[1].weight)
print("same weights, bit for bit:", same)
same = late.loss == whole.loss
print("same losses:", same, "over", len(late.loss), "steps")
folder.cleanup()

# %% [markdown]
# Steps 10 and 11 were done twice, since the last checkpoint was older than the cut; the shuffle
# was replayed up to where it had been. Without `resume=True` the call would have refused to touch
# the folder.
#
# ## Fine-tuned against from scratch
#
# Now the real thing, at the setting which all of Part I keeps: the optimizer and learning rate
# of the source recipe, and the same number of steps for both. Both see the same batches in the
# same order; only the start differs.


# %%
def run(start, lr=0.001):
    """Train a model for 120 steps, and return its losses."""
    sgd = partial(torch.optim.SGD, lr=lr, momentum=0.9)
    how = {"steps": 120, "optimizer": sgd, "schedule": "constant"}
    return fit(start, task.train, **how).loss


loss = {"pre-trained": run(model), "from scratch": run(scratch)}

# %% tags=["hide-input"] mystnb={"image": {"alt": "Training loss over 120 steps for two starts. Both fall from about the same height and are entangled at first; later the line from pre-trained weights lies well below the line from scratch."}}
curves(loss, xlabel="step", ylabel="training loss")

# %% [markdown]
# Both begin with a fresh classifier and look alike for a while; then the pre-trained one pulls
# ahead. But the training loss is only what the model was pushed to do. What counts is the test
# part, and with a few hundred images a share of correct answers is uncertain. So each comes with
# its 95 % {term}`Wilson interval` {cite}`wilson1927`, and the two models are compared on the same
# images: the {term}`paired difference`, with a {term}`bootstrap` interval {cite}`efron1979`.
# [](ch07) builds both by hand.

# %% tags=["nbval-ignore-output"]
tuned, truth = predict(model, task.test)  # (596,), (596,)
fresh, _ = predict(scratch, task.test)
low_rate = paired(tuned, fresh, truth)
print("pre-trained: ", proportion(tuned == truth))
print("from scratch:", proportion(fresh == truth))
print("difference:  ", low_rate.difference)
glue("ch02-tuned", proportion(tuned == truth).value, display=False)
glue("ch02-scratch", proportion(fresh == truth).value, display=False)

# %% [markdown]
# The margin was fixed before the run: the whole interval of the difference above zero.

# %%
ends = {start: np.mean(losses[-20:]) for start, losses in loss.items()}
lower = ends["pre-trained"] < ends["from scratch"]
print("lower training loss in the last 20 steps:", lower)
print("fine-tuned above from scratch:", low_rate.difference.low > 0)

# %% [markdown]
# On the machine that made this page it is {glue:text}`ch02-tuned:.3f` against
# {glue:text}`ch02-scratch:.3f`, from the same images and the same steps.
#
# :::{admonition} Before you read on
# The next section gives both models a rate twenty times as large. Will the fine-tuned one stay ahead by
# its ten points, fall back, or gain?
# :::
#
# ### Is it the start, or the learning rate?
#
# Before praising the shoes, ask what else could explain the gap. A learning rate this small
# suits weights that need a nudge, and starves weights that have everything to learn. A fair
# comparison lets both sides try the same rates, and chooses for each on the validation part. The
# second rate is the one with which the stand-in was pre-trained.

# %%
slow = {"pre-trained": model, "from scratch": scratch}
fast = {
    "pre-trained": load_pretrained("resnet18", classes=5, weights="digits"),
    "from scratch": new_resnet18(5),
}
fast_loss = {
    start: run(candidate, lr=0.02) for start, candidate in fast.items()
}

# %% tags=["nbval-ignore-output"]
choice = {}
for start in slow:
    by_rate = {
        0.001: accuracy(slow[start], task.validation),
        0.02: accuracy(fast[start], task.validation),
    }
    choice[start] = max(by_rate, key=lambda rate: by_rate[rate].value)
    for rate, estimate in by_rate.items():
        print(f"{start:12s} at {rate:5.3f}, validation: {estimate}")

# %%
print("both choose the larger rate:", set(choice.values()) == {0.02})

# %% [markdown]
# So to the test part, once, with the models that were chosen.

# %% tags=["nbval-ignore-output"]
tuned_fast, _ = predict(fast["pre-trained"], task.test)
fresh_fast, _ = predict(fast["from scratch"], task.test)
high_rate = paired(tuned_fast, fresh_fast, truth)
# from scratch at 0.02, fine-tuned at 0.001
crossed = paired(fresh_fast, tuned, truth)
print("pre-trained: ", proportion(tuned_fast == truth))
print("from scratch:", proportion(fresh_fast == truth))
print("difference:  ", high_rate.difference)
for name, got in (("tuned", tuned_fast), ("scratch", fresh_fast)):
    share = proportion(got == truth).value
    glue(f"ch02-{name}-fast", share, display=False)

# %% [markdown]
# These two margins were not fixed in the dark: trial runs had already told us that training from
# scratch catches up. So the verdict asks for little. It says that fine-tuning has no clear lead (its
# interval does not lie above zero), and that from scratch at its better rate beats fine-tuning at
# the small one.

# %%
print("fine-tuning has no clear lead:", high_rate.difference.low <= 0)
ahead = crossed.difference.low > 0
print("from scratch at 0.02 above fine-tuned at 0.001:", ahead)

# %% [markdown]
# Here it is {glue:text}`ch02-tuned-fast:.3f` against {glue:text}`ch02-scratch-fast:.3f`. On these
# digits, then, the pre-trained start was worth having at the small learning rate, at which the
# fresh start had not come as far by the last step. At the larger rate it gave no clear lead,
# whichever way the difference printed above may point. That is no verdict on fine-tuning at large.
# Our stand-in has seen a few hundred images in under a minute, and scanned digits are easy; weights
# that took millions of images or texts to train cannot be had again in a few steps at any rate, and
# this page does not measure them.
#
# Part I keeps the small rate of the source recipe all the same. Its chapters compare models that
# start and train alike and differ only in their integers. But read their accuracies as those of a
# short, gentle training, not as the best this network can do.
#
# ## Quiz
#
# ```{quiz} ch02
# Three questions, each answer explained: they stand in `_quizzes/ch02.md` beside this notebook.
# ```
#
# ## Exercises
#
# ```{exercise} The first few of each class
# :label: ch02-split
# Write `first_of_each(labels, k)`: one tensor with the positions of the first `k` labels of each
# class, the classes in increasing order, and the positions of a class in the order in which they
# occur. A class with fewer than `k` gives what it has. Replace the `...` and run the cell.
# ```


# %%
def first_of_each(labels, k):
    return ...  # your turn


check("ch02-split", first_of_each)

# %% [markdown]
# ```{solution} ch02-split
# :class: dropdown
# `labels == c` marks a class, `nonzero` turns marks into positions, and a slice keeps the first.
# Applied to the labels of the pool, it gives the training images of this chapter.
# ```


# %% tags=["hide-cell"]
def first_of_each(labels, k):
    places = [(labels == c).nonzero()[:k, 0] for c in labels.unique()]
    return torch.cat(places)


ours = first_of_each(labels[list(pool)], 20) + pool[0]
print("as in the task:", torch.equal(ours, chosen))
check("ch02-split", first_of_each)

# %% [markdown]
# ```{exercise} How linear is a network?
# :label: ch02-share
# Write `linear_share(model)`: which share of a model's parameters sits in its `nn.Linear`
# layers? [](ch03) needs it to predict the size of a file.
# ```


# %%
def linear_share(model):
    return ...  # your turn


check("ch02-share", linear_share)

# %% [markdown]
# ```{solution} ch02-share
# :class: dropdown
# `model.modules()` visits layers at any depth, so those inside a block are not forgotten.
# ```


# %% tags=["hide-cell"]
def linear_share(model):
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    inside = sum(p.numel() for m in layers for p in m.parameters())
    return inside / sum(p.numel() for p in model.parameters())


check("ch02-share", linear_share)

# %% [markdown]
# ```{exercise} An experiment: how few labels
# :label: ch02-experiment
# Take 5, 10 and 20 training images of each class (`first_of_each` from above), and compare the pre-trained start with the
# fresh one at the better learning rate. From how many labels on does the start no longer matter?
# ```
#
# ```{solution} ch02-experiment
# :class: dropdown
# Both have to see as many steps, not as many passes. Compare in pairs on the test images and look at the interval:
# where it holds zero, the start may still matter, only you cannot see it with this many images. One seed is an anecdote;
# repeat it with the images drawn anew.
# ```
#
# ## What we saw
#
# - Fine-tuning changes the start of training and nothing else. At the recipe's learning rate it
#   was clearly ahead of training from scratch; once both sides chose their rate on validation
#   images, it was not.
# - The digits 5 to 9, few labels per class, in three parts that share no image with each other
#   or with the pre-training. Choices are made on validation; the test part is read afterwards.
# - Pre-trained weights come through an enum with a hash, not by running a stranger's repository.
#   Nearly all of a ResNet-18 is convolutions; its one linear layer is a sliver.
# - `fit` gives the weights of a loop written by hand, bit for bit, and a run that was cut off and
#   resumed gives those of a run that was not.
#
# :::{epigraph}
# A barefoot girl had set out beside Dorothy and fallen behind. The next day both were told to walk
# at the pace that suited them, and at the gate neither had to wait for the other. Dorothy thanked
# the silver shoes all the same, and noted in her book how fast each of the two had been walking.
# :::
#
# ## References
#
# - {cite:t}`he2016`: the residual network used on this road.
# - {cite:t}`yosinski2014`: which features of a network transfer to another task.
# - {cite:t}`alpaydin1998`: the scanned digits.
# - {cite:t}`wilson1927` and {cite:t}`efron1979`: the intervals.
