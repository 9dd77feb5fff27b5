# %% [markdown]
# (ch16)=
# # Beyond one machine
#
# ![The Scarecrow and the Woodman carry a heavy basket on a pole, and the Lion walks ahead; at the roadside a milestone.](_static/tale/ch16.svg)
#
# :::{epigraph}
# Some way along the road the basket had become so heavy that Dorothy could not lift it. The Woodman
# took one handle, the Scarecrow the other, and she and the Lion divided what did not fit. "Won't we
# walk apart, with our different legs?" asked the Scarecrow. "Not if we stop at every milestone," said
# the Woodman, "and all agree on where we are." So they did, and it was as if one person walked.
# :::
#
# Our models fit on a laptop. Yours may not. This chapter takes the same `fit` to several processes,
# adds up what memory goes where, and says which of it we ran and which we only reckoned.
#
# **What you will learn**
#
# - to train with several processes or devices, with the `fit` you know;
# - what mixed precision does to a rounded weight;
# - where the memory goes at a billion parameters, and at seventy, by an arithmetic that a measurement
#   confirms;
# - the ways to need less of it: checkpointing, LoRA, sharding.
#
# *Running time: about two minutes on two cores.*

# %% tags=["hide-input"]
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pandas as pd
import torch

from companion import W4, load_pretrained, load_task, prepare_qat
from companion.course.check import check
from companion.course.figures import stacked_bars
from companion.training.memory import training_memory

warnings.filterwarnings("ignore")
torch.manual_seed(0)
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## One batch, several processes
#
# Suppose that every row of a batch has the same number of tokens that count. Then the loss of the batch is
# a mean over its rows, and its gradient is the mean of the gradients of its parts, each weighted by its
# share of the rows:
#
# $$ \nabla \frac1n \sum_{i=1}^{n} \ell_i \;=\; \sum_{p} \frac{n_p}{n} \, \nabla \Bigl(
# \frac{1}{n_p} \sum_{i \in p} \ell_i \Bigr) . $$
#
# If every process computes one part and they average their gradients, all of them take the step that
# one process would have taken with the whole batch. By hand, with three rows in parts of one and two:

# %%
task = load_task("language-reference", batch_size=4, block_size=64)
qat = prepare_qat(load_pretrained("docs-lm"), W4)
ids = next(iter(task.validation))["input_ids"][:3]  # (3, 64)


def gradient(rows):
    loss = qat(input_ids=rows, labels=rows).loss
    return torch.autograd.grad(loss, list(qat.parameters()))


# %%
whole, first, second = gradient(ids), gradient(ids[:1]), gradient(ids[1:])
parts = [a / 3 + 2 * b / 3 for a, b in zip(first, second, strict=True)]
print(
    "gradient of the whole batch:",
    all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-6)
        for a, b in zip(whole, parts, strict=True)
    ),
)

# %% [markdown]
# Nobody writes this by hand. `fit` runs on Hugging Face's Accelerate: started by `torchrun` or by
# `accelerate launch`, it notices its fellow processes, takes its share of every batch, and lets PyTorch's
# `DistributedDataParallel` average the gradients. A script needs nothing special:

# %%
script = folder / "train.py"
script.write_text("""
import json, sys
from accelerate import PartialState
from companion import W4, fit, load_pretrained, load_task, prepare_qat

task = load_task("language-reference", batch_size=4, block_size=64)
qat = prepare_qat(load_pretrained("docs-lm"), W4)
history = fit(qat, task.train, steps=8, lr=5e-4, checkpoint_dir=sys.argv[1])
# what stands after fit runs in every process
if PartialState().is_main_process:
    print(json.dumps([PartialState().num_processes, history.loss]))
""")


def run(*command):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, command)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


count_one, one = run(script, folder / "one")
count_two, two = run(
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    2,
    script,
    folder / "two",
)

# %% [markdown]
# The second command is what `torchrun --nproc-per-node 2 train.py` does. Two processes, one curve:

# %% tags=["nbval-ignore-output"]
print(pd.DataFrame({"one process": one, "two": two}).round(6).to_string())

# %%
print("processes:", count_one, "and", count_two)
print(
    "within a thousandth:",
    max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-3,
)
print("files of two:  ", [path.name for path in (folder / "two").iterdir()])

# %% [markdown]
# Not equal to the last digit: two processes add up their gradients in another order, and where that
# moves a weight past the middle between two grid points, it is rounded to the other one.
#
# There is one file, since only the first process writes; and only the first shows a progress bar. The
# checkpoint is still ours: safetensors and JSON. (Accelerate's own `save_state` writes pickles.)
#
# Three things differ from one process. A range of activations that is taken over a whole batch (W8A8)
# and the statistics of batch norm come from each process's own rows. The random numbers of dropout are
# the same in each. And where a loss compares all rows with each other, as in retrieval, `fit` refuses
# to share them.
#
# ## Half the bytes to compute in
#
# Mixed precision keeps the weights in float32 and multiplies in bfloat16. The launcher decides:
#
# ```
# accelerate launch --mixed_precision bf16 train.py
# ACCELERATE_MIXED_PRECISION=bf16 torchrun --nproc-per-node 8 train.py
# ```
#
# bfloat16 has eight binary digits for a value. An integer of four bits times a scale of float16, which
# has eleven, does not fit, so the rounded weight is rounded a second time. How much is that, beside the
# rounding we train for?

# %%
layer = qat.model.layers[0].mlp.down_proj
with torch.no_grad():
    weight, rounded = layer.weight, layer.quantizer(layer.weight)
    twice = rounded.to(torch.bfloat16).float()
error = (twice - rounded).norm() / (rounded - weight).norm()
print("a fiftieth of the rounding, or less:", (error < 0.02).item())

# %% [markdown]
# At four bits it is little. (At eight bits the first rounding is sixteen times finer. The second stays as
# coarse as it is, and so weighs sixteen times as much beside it.) Convert and measure in float32 all the
# same: the model that is served does not have this second rounding, or has another one.
#
# ## Where the memory goes
#
# :::{figure-md} fig-training-memory
#
# ![Bars of bytes for each parameter. To serve in float32: 4. To serve in four bits: 0.56. To train
# with AdamW: weight 4, two moments 8, gradient 4, together 16. With a teacher: 4 more, 20. Below,
# dashed boxes for the activations, which grow with the
# tokens.](_static/figures/training-memory.svg)
#
# Bytes for one parameter, all in float32 except where it says otherwise: 4 + 8 + 4 = 16 to train,
# and 4 more for a teacher that only computes. Four bits in groups of 32 with a float16 scale take
# 4/8 + 2/32 = 0.5625.
#
# :::
#
# Count bytes for each parameter. AdamW keeps two moments:
#
# | | bytes | lives |
# |---|---|---|
# | weight | 4 | always |
# | two moments | 8 | from the first step on |
# | gradient | 4 | from the backward pass to the step |
#
# :::{admonition} Before you read on
# Sixteen bytes, then, in floating point. How many more does a parameter take that is rounded while it
# trains, at the fullest moment?
# :::
#
# And the rounding? The matrix multiplication needs the *rounded* weight again for its own backward
# pass, and a learned step also needs to know what was clipped and by how much. Fake quantization as
# it is usually written keeps all of that, for every layer, from the forward pass on: 4 bytes for the
# rounded copy and 5 for the rest.
#
# When is the memory fullest? There are two candidates. At the end of the forward pass all copies are
# there and no gradient is. At the end of the backward pass all gradients are there and the copies are
# gone, for each layer drops its own as it passes. The peak is whichever of the two is larger:
#
# $$ \text{float: } 4 + 8 + 4 = 16, \qquad
# \text{everything kept: } 4 + 8 + \max(4,\; 4 + 5) = 21 \text{ bytes.} $$
#
# But what is kept can be had again. Weight and scale are still there when the gradient comes by, and
# rounding a weight takes far less time than multiplying by it. So the companion keeps nothing: its
# backward pass rounds each weight a second time, in memory that one layer lends the next. What is
# left is that a learned step is a parameter, too, one for each group of 32 weights.

# %%
with_steps = 1e9 * (1 + 1 / 32)
in_float, rounded = training_memory(1e9), training_memory(with_steps, 1e9)
print(
    "companion:",
    in_float.peak / 1e9,
    "and",
    round(rounded.peak / 1e9, 1),
    "bytes for each parameter",
)

# %% [markdown]
# **LoRA** ([](ch11)) trains a small share of the parameters, so gradients and moments all but vanish.
# One copy comes back: the adapter stands *inside* the rounding, what is rounded is the sum of weight
# and adapter, and that sum is a tensor of its own, which has to wait for the backward pass.
#
# **Checkpointing** {cite:p}`chen2016` (of gradients, not of runs) throws away what a block of the
# network keeps, and computes it again when the backward pass comes by. It is known for saving
# activations. With adapters it has a second use: only the sums of *one* block have to wait at a time,
# instead of those of all blocks.

# %% [markdown]
# ### Measured
#
# Arithmetic is patient. So a process trains the blocks of SmolLM2-135M, twelve of them, two steps in
# each way, and samples its own memory:

# %%
script = folder / "measure.py"
script.write_text("""
import json, sys
import peft, torch
from transformers import LlamaConfig, LlamaForCausalLM
from companion import W4, fit, prepare_qat
from companion.qat.lora import lora
from companion.training.memory import PeakMemory

way, *more = sys.argv[1].split(", ")
config = LlamaConfig(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=12,
    vocab_size=1024, num_attention_heads=9, num_key_value_heads=3,
    tie_word_embeddings=True,
)
ids = torch.arange(16)[None]
small = [(torch.ones(1, 1), torch.tensor([0]))]
# loads what fit needs
fit(torch.nn.Linear(1, 2), small, steps=1, progress=False)
model = LlamaForCausalLM(config)
if way != "float":
    model = lora(model, W4) if way == "LoRA" else prepare_qat(model, W4)
if more == ["checkpointed"]:
    model.gradient_checkpointing_enable()
layers = [m for m in model.modules() if hasattr(m, "quantizer")]
rounded = sum(layer.weight.numel() for layer in layers)
trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
parameters = sum(p.numel() for p in model.parameters())
weights = sum(p.nbytes for p in model.parameters())
with PeakMemory() as peak:
    fit(model, [{"input_ids": ids, "labels": ids}], steps=2, progress=False)
print(json.dumps([parameters, rounded, trained, weights + peak.bytes]))
""")
os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # see below
ways = ("float", "rounded", "LoRA", "LoRA, checkpointed")
measured = {way: run(script, way) for way in ways}

# %%
reckoned = {}
for way, (parameters, rounded, trained, _) in measured.items():
    adapters = trained if "LoRA" in way else None  # on top of the rest
    reckoned[way] = training_memory(
        parameters - (adapters or 0),
        rounded,
        trained=adapters,
        segments=12 if "checkpointed" in way else 1,
    )
print(
    {way: f"{memory.peak / 1e6:.0f} MB" for way, memory in reckoned.items()}
)

# %% tags=["nbval-ignore-output"]
print({way: f"{found[-1] / 1e6:.0f} MB" for way, found in measured.items()})

# %%
for way in ways:
    print(
        f"{way + ':':20}",
        "within 15 %:",
        abs(measured[way][-1] / reckoned[way].peak - 1) < 0.15,
    )

# %% [markdown]
# Here the measured values lie a little above the reckoned ones. What the arithmetic leaves out are a few
# activations and the temporary tensors of a single layer. The line about `MALLOC_MMAP_THRESHOLD_` makes
# Linux's C library give back each tensor that is freed. By default it keeps them for later, and a small
# tensor in the hole of a large one splits it; under rounding, where large and small ones alternate, a
# process comes to hold far more than it needs. If Linux swaps, try that variable first. (Elsewhere it
# does nothing, and the measurement may lie higher.)
#
# ### And the time
#
# Rounding twice instead of keeping is paid for in time. How much, a benchmark measured on two cores:
# forward and backward of SmolLM2-135M, one text of 128 tokens or of 512, weights at four bits in groups
# of 32, beside the same step in floating point and beside torchao's fake quantization.
#
# ```
# python -m benchmarks.step_cost
# ```

# %% tags=["hide-input"]
content = json.loads(
    (Path("..") / "benchmarks" / "results" / "step_cost.json").read_text()
)
steps = {
    r["row"].split(", ")[1]: r
    for r in content["records"]
    if r["row"].startswith("SmolLM2") and r["scheme"] == "W4"
}
arms = {"float": "float", "absmax": "absmax", "learned": "lsq"}
arms["torchao"] = "torchao"
times = pd.DataFrame(
    {
        text: {
            arm: r["ms"][key] / r["ms"]["float"]
            for arm, key in arms.items()
        }
        for text, r in steps.items()
    }
)
peaks = pd.DataFrame(
    {
        text: {arm: r["peak MB"][key] for arm, key in arms.items()}
        for text, r in steps.items()
    }
)
print("times of the step in floating point")
print(times.round(2).to_string())
print("\nMB at the peak, beyond the weights")
print(peaks.round(0).to_string())

# %%
print(
    "memory within 3 % of float: ",
    bool((peaks.loc["learned"] < 1.03 * peaks.loc["float"]).all()),
)
print(
    "faster than torchao's step: ",
    bool((times.loc["learned"] < times.loc["torchao"]).all()),
)
print(
    "less costly in longer texts:",
    bool((times["512 tokens"] < times["128 tokens"])[1:].all()),
)
short = steps["128 tokens"]
moved = short["bytes a weight"]
print(
    "bytes a weight that have to be read:",
    moved["must"],
    "and that operations read and write:",
    moved["absmax"],
)
roof = short["roofline"] - 1
print(f"if memory sets the pace: {1 + roof:.2f}")
every = roof * moved["absmax"] / moved["must"]
print(f"if each of those bytes came from memory: {1 + every:.2f}")

# %% [markdown]
# The work of rounding grows with the weights, that of multiplying also with the tokens; so a longer text
# pays a smaller share. The last two lines say what is paid for. All that rounding has to do is to read
# each weight once in the forward pass and once in the backward pass, which would hardly show. But PyTorch
# does it one operation after the other (scale, multiply, round, clip, multiply), and each operation reads
# what the one before it wrote. The companion hands them pieces that fit into the processor's cache, which
# saves some of that traffic; the calls themselves cost some. Whoever fuses the operations into one comes
# nearer to what memory allows. `torch.compile` can, where there is a compiler: `prepare_qat` first, then
# compile, and then measure, for it does not gain everywhere.
#
# ### At a billion, and at seventy

# %%
cases = {
    "1B, float": training_memory(1e9),
    "1B, rounded": training_memory(with_steps, 1e9),
    "1B, LoRA, bf16": training_memory(
        1e9, 1e9, trained=1e7, weight_bytes=2
    ),
    "1B, the same, checkpointed": training_memory(
        1e9, 1e9, trained=1e7, weight_bytes=2, segments=16
    ),
    "70B, float": training_memory(70e9),
    "70B, rounded": training_memory(70 * with_steps, 70e9),
    "70B, 64 GPUs": training_memory(70 * with_steps, 70e9, processes=64),
    "70B, LoRA, bf16, checkpointed": training_memory(
        70e9, 70e9, trained=2e8, weight_bytes=2, segments=80
    ),
}
rows = {
    name: {
        "weights": m.weights,
        "moments": m.optimizer,
        "gradients": m.gradients,
        "sums, at once": m.rounding / m.segments,
        "peak": m.peak,
    }
    for name, m in cases.items()
}
print("gigabytes, on each device, without activations")
print((pd.DataFrame(rows).T / 1e9).round(1).to_string())

# %% mystnb={"image": {"alt": "Stacked bars of gigabytes for a model of a billion parameters. In float: weights 4, moments 8, gradients 4; rounded: hardly more. LoRA on a bfloat16 model: weights 2 and as much again for the sums that are rounded; with checkpointing little more than its weights."}} tags=["hide-input"]
small = {
    name: {part: amount / 1e9 for part, amount in memory.at_peak.items()}
    for name, memory in cases.items()
    if name.startswith("1B")
}
stacked_bars(small, xlabel="gigabytes at the peak, a billion parameters")

# %% [markdown]
# **What these sums leave out.** They hold neither the best weights so far, which `validate` keeps, nor
# anything that imitation asks for. The default recipe of [](ch11) imitates, so count it in:
#
# - *Its weights.* A teacher adds 4 bytes for each parameter, or 2 in bfloat16, but neither gradients nor
#   moments, since it does not train.
# - *Its time.* Every step that imitates has one more forward pass, the teacher's. None of the times above
#   has it. The column *time* in [](ch11) does: of docs-lm, such a step takes nearly half as long again.
# - *Its logits.* A language model answers each token with one number for every token of its vocabulary, and
#   imitation needs such a row from the student and one from the teacher. With long texts and a large
#   vocabulary they can outgrow the weights. `fit` takes them piece by piece where it can, so that they are
#   never there all at once. A loop of your own that calls both models and compares their answers holds
#   both in full, and a gradient besides.
#
# So rounding asks for hardly any memory of its own. The road for a small machine is that of training in
# floating point: gradient checkpointing for the activations, which costs about one more forward pass;
# then LoRA, which takes the moments away. Training all weights of seventy billion is for those with
# many devices.
#
# ## Sharding: FSDP2
#
# When weights, gradients and moments do not fit together, each process keeps a part of them, and they
# lend each other a block at a time. PyTorch's `fully_shard` {cite:p}`zhao2023` does that; it wants to be
# called on each block, then on the whole, *after* `prepare_qat`:
#
# ```python
# from torch.distributed.fsdp import fully_shard
#
# qat = prepare_qat(model, W4)
# for block in qat.model.layers:
#     fully_shard(block)
# fully_shard(qat)
# fit(qat, task.train, steps=200)
# ```
#
# `fit` sees the sharded parameters and leaves the averaging to them; every process rounds the block that
# it was lent. (That block, with its gradient, comes on top of the peak.) Afterwards gather the weights,
# convert an unsharded copy, and go on as always:
#
# ```python
# from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
#
# options = StateDictOptions(full_state_dict=True, cpu_offload=True)
# weights = get_model_state_dict(qat, options=options)  # in every process; the first gets them
# if PartialState().is_main_process:
#     whole = prepare_qat(model, W4)
#     whole.load_state_dict(weights)
#     save_quantized(convert(whole), "mine")
# ```
#
# As it stands every process first loads the whole model, so this is for what fits in a machine's memory
# and not in a device's.
#
# **What was run.** `DistributedDataParallel` and FSDP2, in two processes on one CPU with gloo:
# `tests/test_processes.py` does it at every change, and holds both to the curve of one process. **What was
# not run.** Several GPUs, NCCL, several machines, and anything of the 70B rows but their arithmetic.
# A sharded model cannot be written by `checkpoint_dir`; take `torch.distributed.checkpoint`. All
# machines must see the same `checkpoint_dir`, otherwise.
#
# ## Notes on GPUs
#
# Written from the code, which asks for the device of the parameters everywhere; no GPU was at hand when
# this chapter was checked.
#
# - `fit` trains where the parameters are: `model.to("cuda")` before, or a launcher, which gives each
#   process its device. Batches and a teacher follow. `perplexity`, `convert` and `save_quantized` take the
#   model where it is; `export_onnx` takes it to the CPU.
# - `PeakMemory("cuda")` reads PyTorch's own count, which is exact.
# - W8A8 on a GPU computes what training simulated, since the int8 kernel is the CPU's. Weight-only
#   models multiply floats there, too: for speed hand them on to torchao ([](ch17)).
# - Curves on a CPU and on a GPU differ after some steps, and CUDA's default kernels may add up in another
#   order each time.
#
# ## Quiz
#
# ```{quiz} ch16
# Three questions, each answer explained: they stand in `_quizzes/ch16.md` beside this notebook.
# ```
#
# ## Exercises
#
# ```{exercise} How many cards?
# :label: ch16-cards
# Write `cards(parameters, gigabytes)`: the fewest devices of `gigabytes` (of $10^9$ bytes) that hold
# weights, gradients and moments of float32 training, shared evenly, nothing else counted. Replace the
# `...` and run the cell.
# ```


# %%
def cards(parameters, gigabytes): ...  # your turn


check("ch16-cards", cards)

# %% [markdown]
# ```{solution} ch16-cards
# :class: dropdown
# Sixteen bytes for each parameter, divided by the bytes of a device, rounded up.
# ```


# %% tags=["hide-cell"]
def cards(parameters, gigabytes):
    return int(-(-16 * parameters // (1e9 * gigabytes)))


check("ch16-cards", cards)

# %% [markdown]
# ```{exercise} A share of the mean
# :label: ch16-mean
# Processes with `rows` (a list of counts) have found the mean losses `losses` of their parts. Write
# `mean_loss(rows, losses)`: the mean over all rows. Replace the `...` and run the cell.
# ```


# %%
def mean_loss(rows, losses): ...  # your turn


check("ch16-mean", mean_loss)

# %% [markdown]
# ```{solution} ch16-mean
# :class: dropdown
# Each part weighs its share of the rows. The plain mean of the losses is right only where all
# parts have the same size.
# ```


# %% tags=["hide-cell"]
def mean_loss(rows, losses):
    return sum(
        n * loss for n, loss in zip(rows, losses, strict=True)
    ) / sum(rows)


check("ch16-mean", mean_loss)

# %% [markdown]
# ```{exercise} An experiment: what stays in memory
# :label: ch16-experiment
# Run the measurement with 64, 256 and 1,024 tokens. From which length on do the activations, which the sums leave out, outweigh
# weights, moments and gradients? And with checkpointing?
# ```
#
# ```{solution} ch16-experiment
# :class: dropdown
# They grow with the tokens, and the rest does not; so plot the peak against the length and read off where it has doubled.
# With checkpointing the slope is smaller, and the step takes longer.
# ```
#
# ## What we saw
#
# - The same `fit`, started twice, walked the curve of one process, and wrote one file.
# - In bfloat16 a rounded weight is rounded again, at four bits by little beside what we train for.
# - A backward pass that rounds a second time keeps nothing for it: 16.5 bytes for each parameter at the
#   peak instead of 16, where keeping everything takes 21, by arithmetic; processes that trained agreed.
# - LoRA takes gradients and moments away but makes sums wait, checkpointing takes these away, sharding
#   divides the rest. Several GPUs we have not run.
# - A teacher comes on top of all these sums: its weights, a forward pass in each step, and logits as wide
#   as the vocabulary.
#
# :::{epigraph}
# At the last milestone they set the basket down and compared where they were. All stood at the same stone,
# to within a blade of grass. "And if there were forty of us, on both sides of a river?" asked the Lion.
# "That I have only reckoned," said Dorothy. "I shall tell you when I have walked it."
# :::
#
# ## References
#
# - {cite:t}`chen2016`: gradient checkpointing.
# - {cite:t}`hu2022`: LoRA.
# - {cite:t}`zhao2023`: fully sharded data parallel.
