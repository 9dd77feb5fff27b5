# %% [markdown]
# (ch15)=
# # Many roads out of the Emerald City
#
# ![Toto, with an eyeglass, reads a card on which rows of bricks are written.](_static/tale/ch15.svg)
#
# :::{epigraph}
# On the last morning she wrote the model out on four cards, for the four gates of the city. At each
# gate they used other letters. Toto watched every figure go over. "Why do you look so sternly?" she
# asked him. "It is the very number that we practised with." "Then it will not mind being read at every
# gate," said the Scarecrow. So they read the cards back, brick by brick. And only then did she knock
# together the heels of the silver shoes, which had been on her feet all along.
# :::
#
# Up to here the few-bit integers were smaller, not faster: PyTorch unpacks them and multiplies floats.
# Now the model leaves. It becomes a file that somebody else's program opens, and there are several such
# programs, each with a kind of file of its own. What is served has to be what was trained: not a model
# *like* it, quantized once more by somebody's exporter, but these integers.
#
# **What you will learn**
#
# - four formats, and where one and the same integer stands in each of them, byte by byte, and a fifth,
#   for phones;
# - to prove that a file holds what was trained: integers, logits, answers, and the metric in pairs;
# - the two places where a served model still differs from the trained one: how inputs are rounded, and
#   in which order products are added;
# - how fast it is, how far from the limit that memory sets, and which road to take.
#
# *Running time: about a minute and a half on two cores.*

# %% tags=["hide-input"]
import json
import logging
import tempfile
import textwrap
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import onnx
import pandas as pd
import torch
from gguf import GGUFReader
from matplotlib.patches import Rectangle
from onnx.numpy_helper import to_array
from safetensors.torch import load_file
from torch import nn

from companion import (
    W2,
    W3,
    W4,
    W8,
    W8A8,
    Activations,
    QuantScheme,
    convert,
    export_compressed_tensors,
    export_executorch,
    export_gguf,
    export_onnx,
    fit,
    load_pretrained,
    load_task,
    model_bytes,
    prepare_qat,
    save_quantized,
)
from companion.course.check import check
from companion.course.figures import COLOURS, STYLE, bars_with_limits
from companion.course.sources import load_tokenizer
from companion.errors import UnsupportedModel
from companion.evaluation.language import document_losses, loss_difference
from companion.formats.executorch.export import as_served
from companion.formats.executorch.model import ExecuTorchModel
from companion.formats.executorch.stored import read_executorch
from companion.formats.onnx.model import OnnxModel
from companion.formats.onnx.stored import read_integers
from companion.formats.parity import parity
from companion.formats.registry import FORMATS
from companion.numerics.activations import fake_quantize_activations
from companion.numerics.packing import unpack
from companion.numerics.scheme import BLOCK8

warnings.filterwarnings("ignore")
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
task = load_task("language-reference", batch_size=4, block_size=128)
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# A model to serve: docs-lm, fine-tuned on the language reference by the default recipe of [](ch11), at
# four bits in groups of 32, its {term}`embedding <tied embedding>` included.

# %%
teacher = load_pretrained("docs-lm")
fit(teacher, task.train, steps=45, lr=5e-4, seed=0, progress=False)
# %%
student = prepare_qat(teacher, W4, "lsq", embeddings=True)
fit(
    student,
    task.train,
    steps=15,
    lr=5e-4,
    seed=1,
    teacher=teacher,
    progress=False,
)
model = convert(student)
print(model.quantization.scheme)

# %% [markdown]
# ## Four roads
#
# An {term}`engine` is a program that reads a model from its file and computes its answers. Four files,
# then, for the engines that people ask for most:
#
# - **companion**: our own folder. PyTorch computes with it, and after `import companion` so does
#   transformers' `from_pretrained`.
# - **ONNX**: for ONNX Runtime, which runs on most systems and in most languages.
# - **GGUF**: for llama.cpp, and for the many programs that are built on it. The tokenizer is inside.
# - **compressed-tensors**: a folder for vLLM, which serves many people at once. We open it with
#   transformers; vLLM itself we have not run.

# %%
tokenizer = load_tokenizer("docs-lm")
path = export_onnx(model, folder / "model.onnx")
files = {
    "companion": save_quantized(model, folder / "own"),
    "ONNX": path,
    "GGUF": export_gguf(model, folder / "model.gguf", tokenizer),
    "compressed-tensors": export_compressed_tensors(
        model, folder / "vllm", zero_points=True
    ),
}


# %%
def megabytes(file):
    """Of a file, or of the weights in a folder."""
    parts = file.glob("*.safetensors") if file.is_dir() else [file]
    return sum(part.stat().st_size for part in parts) / 1e6


print(f"float32: {model_bytes(teacher) / 1e6:.2f} MB")
for name, file in files.items():
    print(f"{name}: {megabytes(file):.2f} MB")

# %% [markdown]
# Why do the sizes differ, if the integers are the same? ONNX Runtime wants its scales in float32, where
# the others take float16. GGUF carries the tokenizer. And the format of vLLM has embeddings and output
# layers in floating point only: those of docs-lm, almost a third of the model, lie there with the values that
# they were rounded to.
#
# ## The same integer in four files
#
# Take eight neighbouring weights of one layer. `convert` made {term}`integers <grid>` of them, from -8
# to 7, which share one {term}`scale`:

# %% tags=["nbval-ignore-output"]
name = "model.layers.0.mlp.down_proj"
layer = model.get_submodule(name)
row = int((layer.scale[:, 0] > 0).nonzero()[0])
integers = unpack(layer.integers, 4, layer.columns)
print("integers:", integers[row, :8].tolist())
print("scale:   ", f"{layer.scale[row, 0]:.5f}")

# %% [markdown]
# Now open the four files, without the help of whoever wrote them, and look at the bytes that begin this
# row. Two integers of four bits share a byte, one in its lower half and one in its upper half. A byte is
# written with two hexadecimal digits, and the second of them is the lower half.

# %% tags=["nbval-ignore-output"]
own = load_file(files["companion"] / "model.safetensors")
served = {t.name: to_array(t) for t in onnx.load(path).graph.initializer}
(blocks,) = (
    t.data
    for t in GGUFReader(files["GGUF"]).tensors
    if t.name == "blk.0.ffn_down.weight"
)
vllm = load_file(files["compressed-tensors"] / "model.safetensors")
starts = {
    "companion": own[f"{name}.integers"][row].numpy(),
    "ONNX": served[f"model.{name}.blocks.integers"][row, 0],
    "GGUF": blocks[row],
    "compressed-tensors": vllm[f"{name}.weight_packed"][row]
    .view(torch.uint8)
    .numpy(),
}
for form, found in starts.items():
    print(f"{form:19}", " ".join(f"{byte:02x}" for byte in found[:8]))

# %% mystnb={"image": {"alt": "Four rows of boxes, one for each format, with the bytes that begin the row in the file, in hexadecimal. The half of a byte that holds the first integer is orange, that of the second one blue, and the two bytes of a scale are green. In companion, ONNX and compressed-tensors the first byte holds both integers, the first in its lower half; in companion as two's complement, in the other two plus eight. In GGUF two bytes of scale come first, and the first two integers stand in the lower halves of the next two bytes, plus eight."}} tags=["nbval-ignore-output", "hide-input"]
written = {
    "companion": "two's complement",
    "ONNX": "plus 8",
    "GGUF": "plus 8",
    "compressed-tensors": "plus 8",
}
halves = {form: {(0, 0): 0, (0, 1): 1} for form in starts}  # byte, half
halves["GGUF"] = {(2, 0): 0, (3, 0): 1}
with plt.rc_context(STYLE | {"axes.grid": False}):
    fig, ax = plt.subplots(figsize=(7.2, 3.9))
for line, (form, found) in enumerate(starts.items()):
    for place, byte in enumerate(found[:6]):
        scale = form == "GGUF" and place < 2
        for half in (0, 1):  # the lower half is written second
            which = halves[form].get((place, half))
            colour = "0.94" if which is None else COLOURS[4 + which]
            colour = "#bfe3d8" if scale else colour
            left = 1.15 * place + 0.5 * (1 - half)
            ax.add_patch(
                Rectangle((left, -line - 0.78), 0.5, 0.6, facecolor=colour)
            )
            ax.text(
                left + 0.25,
                -line - 0.49,
                f"{byte >> (4 * half) & 15:x}",
                ha="center",
                va="center",
                family="monospace",
                fontsize=14,
            )
        ax.add_patch(
            Rectangle((1.15 * place, -line - 0.78), 1, 0.6, fill=False)
        )
    ax.text(-0.25, -line - 0.38, form, ha="right", va="center")
    ax.text(
        -0.25,
        -line - 0.64,
        written[form],
        ha="right",
        va="center",
        fontsize=9,
        color="0.35",
    )
for place, (text, colour) in enumerate(
    {
        f"first integer: {integers[row, 0]}": COLOURS[4],
        f"second: {integers[row, 1]}": COLOURS[5],
        "scale": "#bfe3d8",
    }.items()
):
    left = (-0.2, 3.0, 5.3)[place]
    ax.add_patch(Rectangle((left, 0.12), 0.3, 0.3, facecolor=colour))
    ax.text(left + 0.42, 0.27, text, va="center")
ax.set_xlim(-3.3, 7.0)
ax.set_ylim(-4, 0.55)
ax.axis("off")
fig.tight_layout(pad=0.2)
plt.close(fig)
fig

# %% [markdown]
# Four ways to write one number. Our own folder keeps two's complement, as processors do. The
# other three add 8, so that nothing is negative and 8 stands for zero. Three put neighbours into one
# byte. llama.cpp puts the scale first, two bytes of it, and then pairs a weight with the one that comes
# sixteen places later, since its kernel takes all lower halves at once and then all upper ones.
#
# So to read them back, by hand, takes three short rules:


# %% tags=["nbval-ignore-output"]
def neighbours(found):
    """Lower and upper half of each byte, in turns."""
    return np.stack([found & 15, found >> 4], -1).flatten().astype(int)


block = starts["GGUF"][2:18]  # after the scale
by_hand = {
    "companion": (neighbours(starts["companion"]) + 8) % 16 - 8,
    "ONNX": neighbours(starts["ONNX"]) - 8,
    "GGUF": np.concatenate([block & 15, block >> 4]).astype(int) - 8,
    "compressed-tensors": neighbours(starts["compressed-tensors"]) - 8,
}
for form, found in by_hand.items():
    print(f"{form:19}", found[:8].tolist())

# %%
same = [
    np.array_equal(found[:32], integers[row, :32].numpy())
    for found in by_hand.values()
]
print("all 32 of the group, in all four:", all(same))

# %% [markdown]
# One thing the figure does not show. A learned or searched scale may be negative ([](ch11): the grid is
# turned around where its one extra integer, -8, is of more use on the other side). ONNX and GGUF keep
# the sign. The format of vLLM takes positive scales only. There `export_compressed_tensors` turns both,
# integer and scale, which leaves their product as it was; and where a group uses -8, whose opposite four
# bits do not hold, it needs the *zero points* that we allowed above. A model prepared with
# `method="absmax"` has positive scales to begin with.
#
# ## What an ONNX file is made of
#
# Operators, and tensors. Each quantized layer is one `MatMulNBits`, an operator that ONNX Runtime adds
# to the standard; the embedding is one `GatherBlockQuantized`. The routine behind such an operator is a
# {term}`kernel`: it carries out one operation, for one kind of number, on one kind of processor.

# %%
file = onnx.load(path)
operators = Counter(
    node.op_type
    for node in file.graph.node
    if node.domain == "com.microsoft"
)
print(dict(operators))

# %% [markdown]
# docs-lm's output layer is tied to its embedding: one matrix, used twice. An exporter that
# forgets this writes it twice. Here both operators read one tensor:

# %%
vocabulary = load_pretrained("docs-lm").config.vocab_size
print(
    [
        name
        for name, array in served.items()
        if array.shape[:1] == (vocabulary,)
    ]
)

# %% [markdown]
# :::{admonition} Before you read on
# The four files hold the same integers. In which of them will the logits be furthest from those of the
# model that was trained, and what could move them at all?
# :::
#
# ## The same model?
#
# Equal integers are necessary, not sufficient: the graph around them has to be right as well. So each
# file is opened by its engine, and asked four questions, from strict to what users feel. Are the
# integers and scales of *all* layers equal? How far apart are the logits? (For a language model we
# compare logarithms of probabilities, since a number added to all logits changes nothing.) Is the
# likeliest token the same? And how many nats apart are the two predictions, on average over the tokens?
# The last is the *divergence*; zero would be the same model.

# %%
prompt = tokenizer("The for statement is", return_tensors="pt").input_ids
reports = {
    name: parity(model, file, prompt=prompt) for name, file in files.items()
}

# %% tags=["nbval-ignore-output"]
table = pd.DataFrame(
    {
        form: {
            "engine": report.engine,
            "integers": "equal" if report.integers else "NOT equal",
            "scales": "equal" if report.scales else "NOT equal",
            "logits apart": f"{report.logits:.0e}",
            "same choice": f"{report.argmax:.0%}",
            "nats": f"{max(report.divergence, 0):.0e}",
        }
        for form, report in reports.items()
    }
).T
print(table.to_string())

# %%
print(
    "integers and scales equal in all four:",
    all(r.integers and r.scales for r in reports.values()),
)
apart = {form: report.logits for form, report in reports.items()}
print("companion: the very same logits:", apart["companion"] == 0)
print("ONNX: within 0.0001:            ", apart["ONNX"] < 1e-4)
print(
    "compressed-tensors: within 0.02:",
    apart["compressed-tensors"] < 0.02,
)
print("GGUF: within 0.002 nats a token:", reports["GGUF"].divergence < 2e-3)
print(
    "ONNX goes on with the same words:",
    reports["ONNX"].theirs == reports["ONNX"].ours,
)

# %% [markdown]
# The margins were fixed beforehand. Our own folder gives the same numbers to the last bit. The ONNX file
# differs in the fifth digit after the point. The compressed-tensors folder differs in the third, because
# with zero points this version of transformers makes its weights floats in float16, before it computes
# with them. And the GGUF file, with exactly the same integers, is furthest away. Why, the next two
# sections say.
#
# And the metric, document by document, for the ONNX file:

# %%
exact = parity(model, path, task)

# %% tags=["nbval-ignore-output"]
print(exact)

# %%
print("logits within 0.0001:        ", exact.logits < 1e-4)
print(
    "loss within 0.0001, in pairs:",
    max(abs(exact.difference.low), exact.difference.high) < 1e-4,
)

# %% [markdown]
# ## Where served and trained differ: the inputs
#
# A layer multiplies weights with inputs, and an engine may round those, too. llama.cpp always does. ONNX
# Runtime leaves us the choice, which it calls the {term}`accuracy level`. Level 0 turns each block of
# integers into floats and multiplies those; that was the file above. Level 4 rounds the layer's *inputs*
# to eight bits first, block by block,
#
# $$ s_x = \frac{\max |x|}{127}, \qquad \hat x = s_x \cdot \operatorname{round}(x / s_x) , $$
#
# multiplies integers with integers, and scales once for each block. It is a rounding that training has
# not seen. By hand, on one layer:

# %%
generator = torch.Generator().manual_seed(0)
x = torch.randn(8, 256, generator=generator)
one = nn.Sequential(nn.Linear(256, 64, bias=False))
one[0].weight.data = torch.randn(64, 256, generator=generator) / 16
small = convert(prepare_qat(one, W4, "absmax"))

blocks = x.unflatten(-1, (-1, 32))  # (8, blocks, 32)
s = blocks.abs().amax(-1, keepdim=True) / 127
by_hand = (torch.round(blocks * (1 / s)) * s).flatten(-2)
ours = fake_quantize_activations(x, BLOCK8, group_size=32)
print(
    "companion rounds inputs so, too: ",
    torch.allclose(by_hand, ours, atol=1e-6),
)

layers = {
    level: OnnxModel(
        export_onnx(
            small,
            folder / f"one{level}.onnx",
            accuracy_level=level,
            example=x,
        )
    )
    for level in (0, 4)
}
weight = small[0].weight
print(
    "level 0 is x @ W:                ",
    torch.allclose(layers[0](x), x @ weight.T, atol=1e-5),
)
print(
    "level 4 is rounded x @ W:        ",
    torch.allclose(layers[4](x), ours @ weight.T, atol=1e-5),
)
print(
    "and the two differ:              ",
    not torch.allclose(layers[0](x), layers[4](x), atol=1e-3),
)

# %% [markdown]
# And the whole model, at level 4 and in llama.cpp. How much of the distance is this rounding? The report
# measures the divergence a second time, from the converted model with the inputs of all its layers
# rounded in the same way:

# %%
fast = export_onnx(model, folder / "fast.onnx", accuracy_level=4)
rounds = {
    "ONNX, level 4": parity(model, fast, prompt=prompt),
    "GGUF": reports["GGUF"],
}

# %% tags=["nbval-ignore-output"]
for form, report in rounds.items():
    print(
        f"{form}: {report.divergence:.1e} nats from the trained model, "
        f"{report.rounded:.1e} from it with inputs rounded"
    )

# %%
close = rounds["ONNX, level 4"]
print(
    "ONNX: less than half as far, with inputs rounded:",
    close.rounded < close.divergence / 2,
)

# %% [markdown]
# On this short text, in the run shown, that explains ONNX Runtime's distance altogether. llama.cpp stays
# away further: it also keeps the keys and values of earlier tokens in float16, for one thing. And rounding
# makes small differences large. An input that two engines compute differently in its last digit may be
# rounded up by one of them and down by the other, so that on more text than this, as in the next report,
# ONNX Runtime is not quite equal either.
#
# What does the metric say? Margin, fixed beforehand: 0.002 nats for the whole interval.

# %%
rounded = parity(model, fast, task)

# %% tags=["nbval-ignore-output"]
print(rounded)

# %%
d = rounded.difference
print("integers and scales equal:   ", rounded.integers and rounded.scales)
print("logits differ by over 0.0001:", rounded.logits > 1e-4)
print("loss within 0.002, in pairs: ", -0.002 < d.low <= d.high < 0.002)

# %% [markdown]
# ### Should training see it?
#
# *Train with the arithmetic you deploy* is good advice, and `QuantScheme(4, activations=BLOCK8)` follows
# it: its fake quantization rounds inputs as level 4 does, and `export_onnx` sets the level. Does it
# help? The same steps from the same teacher, both served at level 4, compared in pairs:

# %%
seen = prepare_qat(
    teacher, QuantScheme(4, activations=BLOCK8), "lsq", embeddings=True
)
fit(
    seen,
    task.train,
    steps=15,
    lr=5e-4,
    seed=1,
    teacher=teacher,
    progress=False,
)
same = OnnxModel(export_onnx(convert(seen), folder / "seen.onnx"))
gain = loss_difference(
    document_losses(OnnxModel(fast), task.test),
    document_losses(same, task.test),
)

# %% tags=["nbval-ignore-output"]
print("loss at level 4, training without it minus training with it:", gain)

# %%
print(
    "less than 0.005 nats, either way:",
    max(abs(gain.low), abs(gain.high)) < 0.005,
)

# %% [markdown]
# It moved next to nothing, and in the run shown it moved the wrong way. There was next to nothing to win:
# what level 4 costs stands above. (This is one seed and fifteen steps, and we ask only whether the
# difference is smaller than the margin.) The advice matters where the served rounding is coarse. With
# inputs in eight bits and blocks of 32 it is not.
#
# ## Where served and trained differ: the sums
#
# The second place is quieter. A layer adds up hundreds of products, and every engine adds them in the
# order that suits its kernel. In exact arithmetic the order would not matter. In float32 each addition
# rounds, and it does:

# %%
products = 1 / np.arange(1, 4097, dtype=np.float32)
exactly = products.astype(np.float64).sum()
lanes = np.cumsum(products.reshape(-1, 8), 0)[-1]  # eight sums side by side
orders = {
    "from the left": np.cumsum(products)[-1],
    "from the right": np.cumsum(products[::-1])[-1],
    "in eight lanes": np.cumsum(lanes)[-1],
}
for order, total in orders.items():
    print(f"{order:15} off by {float(total) - exactly:+.1e}")

# %% [markdown]
# Whoever adds the small numbers first loses less of them. Differences of this size are all that separates
# the ONNX file at level 0 from the model that was trained. No training can see it and none needs to. There is one case, though, where a sum
# goes wrong for good.
#
# ### Why eight bits are seven
#
# W8A8 multiplies integers, too: `MatMulInteger`, one scale for each row of weights and one range for all
# inputs. {term}`VNNI` is a set of newer instructions, which multiply bytes and add the products in 32
# bits. On processors that have AVX2 but not these, the kernel multiplies unsigned inputs by signed weights
# and adds neighbouring products, two by two, in 16 bits. What goes beyond 32,767 stays there: it
# {term}`saturates <saturation>`, and no error is raised. By hand, the largest pairs:

# %%
for bits in (8, 7):
    for weight in (127, -128):
        pair = 2 * (2**bits - 1) * weight
        kept = np.clip(pair, -(2**15), 2**15 - 1)
        print(
            f"inputs of {bits} bits: {pair:8,}  kept: {kept:8,}  exact: "
            f"{pair == kept}"
        )

# %% [markdown]
# So the companion keeps inputs within seven bits, from 0 to 127, and lets the weights have all eight.
# Training rounds the same: `W8A8` has the range (0, 127). The worst case for the sums of the exported
# layer, against sums in Python (a processor with VNNI would pass it with eight bits, too; yours may
# not have it, and your users' may not):

# %%
extreme = nn.Sequential(nn.Linear(256, 8, bias=False))
extreme[0].weight.data = torch.tensor([1.0, -1.0] * 4)[:, None].repeat(
    1, 256
)
eight = convert(prepare_qat(extreme, W8A8, "absmax"))
ones = torch.ones(2, 256)
answer = OnnxModel(export_onnx(eight, folder / "w8a8.onnx", example=ones))(
    ones
)
w, w_scale = read_integers(folder / "w8a8.onnx")["0"]
exactly = 127 * w.astype(int).sum(1) * w_scale[:, 0] / 127
print("served exactly:", np.allclose(answer.numpy(), exactly, rtol=1e-6))

# %% [markdown]
# ## An encoder
#
# The same call takes encoders. MiniLM for retrieval ([](ch12)), at W8A8: text in, vector out.

# %%
encoder = load_pretrained(
    "sentence-transformers/all-MiniLM-L6-v2", head="retrieval"
)
int8 = convert(prepare_qat(encoder, W8A8, "absmax", skip=["pooler"]))
finder = OnnxModel(export_onnx(int8, folder / "finder.onnx"))
texts = [
    "How do I sort a list?",
    "sorted() returns a new list.",
    "A lake is water among land.",
]
tokens = load_tokenizer("sentence-transformers/all-MiniLM-L6-v2")(
    texts, padding=True, return_tensors="pt"
)
vectors = finder.embed(tokens.input_ids, tokens.attention_mask)  # (3, 384)
near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
print("the answer is nearer than the lake:", bool(near > far + 0.2))
with torch.no_grad():
    reference = int8.embed(tokens.input_ids, tokens.attention_mask)
print(
    "vectors as PyTorch's int8 kernel computes them:",
    bool((vectors - reference).abs().max() < 0.01),
)

# %% [markdown]
# ## A fifth road, into a pocket
#
# On a phone there is no Python to open a folder, and often no room for one of the engines above.
# **ExecuTorch** is PyTorch's own runtime for such devices. Its file ends in `.pte` and holds a whole
# program: the operators in the order in which they run, the memory that each will need, and the
# weights. Most of the arithmetic is left to *XNNPACK*, a library of kernels for small processors, and it
# is XNNPACK that sets the conditions:
#
# - weights of up to four bits in groups of a multiple of 32, or of up to eight with one scale for each row;
# - scales in bfloat16, positive ones;
# - inputs rounded to eight bits while it runs, each token over its own range, always.
#
# Our model fits none too well: its learned scales are in float16, and some are negative. The exporter
# could round them in silence. It says so instead:

# %% tags=["nbval-ignore-output"]
try:
    export_executorch(model, folder / "model.pte")
except UnsupportedModel as error:
    refusal = str(error)
print(textwrap.fill(refusal, 76))

# %%
print("nothing was written:", not (folder / "model.pte").exists())

# %% [markdown]
# So whoever wants to go there says so before training, with the scheme. What follows would be the same
# for a trained model; to keep it short, a fresh one of one layer is rounded to nearest.

# %%
from transformers import LlamaConfig, LlamaForCausalLM

pocket = QuantScheme(4, 32, scale_dtype=torch.bfloat16)
torch.manual_seed(0)
fresh = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
).eval()
light = convert(prepare_qat(fresh, pocket, "absmax"))
pte = export_executorch(light, folder / "light.pte", max_length=32)

found = read_executorch(pte, light)
linear = light.model.layers[0].mlp.down_proj
stands = found["model.layers.0.mlp.down_proj"]
print(
    "integers equal, of one layer:",
    np.array_equal(
        stands.integers, unpack(linear.integers, 4, linear.columns)
    ),
)
report = parity(light, pte)
print("of all:", report.integers, "and scales:", report.scales)

# %% [markdown]
# Its logits are to be compared with the right model. `as_served` copies ours and rounds the inputs of its
# layers as XNNPACK does. Margin, fixed beforehand: a tenth of what that rounding changes at all.

# %%
ids = torch.arange(5, 29)[None]
with torch.no_grad():
    plain, alike = light(ids).logits, as_served(light)(ids).logits
    phone = ExecuTorchModel(pte)(ids).logits
moved = (plain - alike).abs().mean()
away = (phone - alike).abs().mean()
print("rounding inputs moves the logits:", bool(moved > 1e-5))
print("the file is within a tenth of that:", bool(away < moved / 10))

# %% [markdown]
# The embedding is left in floating point here, and for a reason. With a rounded one this margin was not kept:
# some of its rows have a largest and a smallest weight that are exactly opposite. Then the zero of the inputs
# falls in the middle between two integers, the last bit of a division decides which of them it becomes, and
# XNNPACK may decide otherwise than PyTorch. Such a token is rounded on another grid, as fine as the first, and
# whatever attends to it moves along. Nothing is wrong with either; but do not expect equal digits there.
#
# Take this road where the model has to run without Python, on a phone or smaller. Train for it:
# `QuantScheme(4, 32, torch.bfloat16)` with `method="absmax"`, or with inputs rounded in sight, as `W4A8`
# does. Elsewhere the other four ask for less. (We ran the file here with ExecuTorch's own runtime, on this
# processor. A phone we have not held in our hands.)
#
# ## One model through five formats
#
# Does this hold beyond a small example? The benchmark sends docs-lm and SmolLM2-135M, at four and at two
# bits, through every format and its engine. One converted model each time, all of its matrices rounded to
# nearest, with scales in bfloat16, which all five formats can hold. The table has what is measured so far;
# SmolLM2's rows are not among it, and the command adds those that are missing.
#
# ```
# python -m benchmarks.ways_out
# ```

# %% tags=["hide-input"]
ways = json.loads(
    (Path("..") / "benchmarks" / "results" / "ways_out.json").read_text()
)["records"]
shown = pd.DataFrame(
    {
        (r["model"], r["scheme"].split()[0], r["format"]): {
            "integers": "equal" if r["integers"] else "NOT equal",
            "scales": "equal" if r["scales"] else "NOT equal",
            "logits apart": f"{r['logits']:.0e}",
            "nats": f"{max(r['nats'], 0):.0e}",
            "inputs alike": "–"
            if r["nats, inputs rounded"] is None
            else f"{max(r['nats, inputs rounded'], 0):.0e}",
            "same choice": f"{r['same choice']:.0%}",
            "within": "yes" if r["within"] else "NO",
            "MB": f"{r['bytes'] / 1e6:.1f}",
            "export, s": f"{r['export seconds']:.0f}",
        }
        for r in ways
    }
).T
print(shown.to_string())

# %% [markdown]
# *nats* is the divergence from the converted model; *inputs alike* that from it with its inputs rounded as
# the engine rounds them, where the engine does. *within* says whether the margin of the benchmark, fixed
# before it was run, was kept: on the logits where inputs are not rounded, and on *inputs alike* where they
# are. (Export was timed while other work was running, so it says what order of time to expect, no more.)
#
# ## How fast, and which road to take
#
# docs-lm is too small to time honestly: its layers fit into the processor's cache. So the benchmark
# serves SmolLM2-135M, the language model of [](ch08), on two threads: in PyTorch and torchao, in ONNX
# Runtime, in llama.cpp, with the very file that our weights came from and three more of its formats, and
# in OpenVINO, which reads the ONNX files that we export. Two phases matter: *prefill* reads a prompt at
# once, *decode* goes on token by token.
#
# Nothing was trained here. Each row is the float model rounded to nearest, and what that costs stands
# in a column of its own: nats per token on a text of 128 tokens from the language reference, above the
# float model. A fast model that says nothing is no fast model. (The float model is what the four-bit file
# Q4_1 of llama.cpp holds, so the weights of that row are not rounded a second time, only its inputs.)
# *exact* says that integers and scales were read back from the file and were equal to the model's; a dash
# stands where another program made the integers.
#
# ```
# python -m benchmarks.deployed_speed
# ```

# %% tags=["hide-input"]
content = json.loads(
    (
        Path("..") / "benchmarks" / "results" / "deployed_speed.json"
    ).read_text()
)
frame = pd.DataFrame(content["records"])
frame["model"] = frame["engine"].str.cat(frame["precision"], sep=", ")
decode = frame[frame["phase"] == "decode"].set_index("model")
prefill = frame[frame["phase"] == "prefill"].pivot(
    index="model",
    columns="tokens",
    values=["ms", "ratio_to_torch_float32", "ratio_to_ort_float32"],
)
shown = pd.DataFrame(
    {
        "MB": decode["bytes"] / 1e6,
        "token, ms": decode["ms"],
        "x torch": decode["ratio_to_torch_float32"],
        "64, ms": prefill["ms"][64],
        "512, ms": prefill["ms"][512],
        "512, x torch": prefill["ratio_to_torch_float32"][512],
        "nats lost": decode["text"].map(
            lambda t: t["loss_difference"][0] if t else 0.0
        ),
    }
).loc[decode.index]
exact_in_file = decode["parity"].map(
    lambda p: (
        ("yes" if p["integers"] and p["scales"] else "NO") if p else "–"
    )
)
shown = (shown.round(2) + 0.0).assign(exact=exact_in_file)  # no -0.00
print("a token after a prompt of 64; prompts of 64 and of 512 tokens")
print("(x torch: times as fast as PyTorch's float32 in the same turns)")
print(shown.to_string(index_names=False))

# %% mystnb={"image": {"alt": "Horizontal bars on a logarithmic axis: milliseconds for one token, for twenty-one ways to serve the model, each with a mark for the time that reading the weights once would take. ONNX Runtime in float32 is close to its mark. Its four and two bits at level 4 are the shortest bars, several times as long as their marks; llama.cpp follows with about twice their time. Eight and two bits at level 0, and torchao, are longer than float32."}} tags=["hide-input"]
bars_with_limits(
    decode["ms"].to_dict(),
    decode["limit_ms"].to_dict(),
    xlabel="time for one token (ms, logarithmic)",
    limit="reading the weights once",
)

# %% [markdown]
# :::{figure-md} fig-weights-read
#
# ![Four queues before the same gate, each as long as one weight has bytes: float32 4, eight bits
# 1.125, four bits 0.625, two bits 0.375.](_static/figures/weights-read.svg)
#
# The gate lets equally many bytes through in a second, whatever they mean. With a float32 scale for
# each group of 32, a weight in float32 takes 4 / 0.625 = 6.4 times as long as one of four bits.
#
# :::
#
# The marks say what memory asks for. For each token every weight is read once, which at the speed of a
# copy takes about bytes over bandwidth,
#
# $$ t \approx \frac{n \, (b / 8 + 4 / g)}{B} , $$
#
# with $n$ weights of $b$ bits, a float32 scale for every $g$ of them (no second term where there are no
# groups), and the bandwidth $B$ of a copy, measured in the same run.
#
# ONNX Runtime in float32 comes close to its mark: it waits for memory, and that is why fewer bytes
# help. Four bits at level 4 take about an eighth of the time that PyTorch takes in float32. Two things
# share in that. ONNX Runtime is faster than PyTorch in float32 already, as its own row shows; beside that
# row, four bits take about a third of the time. They also take little more than half of the time of
# llama.cpp's Q4_1, the file that our weights came from.
#
# But look at the distance to the mark, which has grown. With so few bytes to read, the time no longer
# goes mostly into reading: arithmetic counts again, and so does the sheer number of operators. That is
# why the file of two bits, which has three fifths of the bytes of the one of four, is hardly any faster.
# And its loss shows that without training nobody would want to hear what it says.
#
# Mind also the rows that are *slower* than float32: eight and two bits at level 0, for which there is no
# fast kernel here, and torchao's formats (eager, without `torch.compile`), whose home is another kind of
# processor. A format is as fast as the kernel that somebody wrote for it. On this processor levels 1 to 3
# compute what level 0 does.
#
# A word on fairness: llama.cpp comes as a ready-made package, built for processors that know AVX2 and no
# more. ONNX Runtime picks its kernels on the machine that it meets, and this one has AVX-512. On a
# processor without it the comparison is another one: run it there.
#
# A prompt is another matter. Its tokens share each reading of the weights, so arithmetic is what counts.
# W8A8 leads, which multiplies bytes by bytes, with the short prompt and with the long one. And in ONNX
# Runtime no format with weights in blocks, of whatever width and at whichever level, beats float32 on the
# long prompt. What limits it? Could a file not hold two kernels for each layer, one for prompts and one
# for tokens?

# %% tags=["hide-input"]
own = "ONNX Runtime, "
rows = ["float32", "int4 level 0", "int4 level 4", "int8 W8A8"]
ms = prefill["ms"]
limits = pd.DataFrame(
    {
        "64, ms": [ms[64][own + row] for row in rows],
        "512, ms": [ms[512][own + row] for row in rows],
    },
    index=rows,
)
limits["a further token, ms"] = (limits["512, ms"] - limits["64, ms"]) / 448
print(limits.round(2).to_string())
levels = [ms[512][f"{own}int4 level {level}"] for level in range(5)]
best, at_4 = min(levels), levels[4]
print(
    f"512 tokens, in ms: the best of all levels {best:.0f}, level 4 "
    f"{at_4:.0f}, float32 {ms[512][own + 'float32']:.0f}"
)

# %% [markdown]
# The last column is what a further token of a prompt costs, when the weights are at hand anyway. At level
# 0 the kernel turns blocks of integers into floats and then multiplies floats: that is float32's
# arithmetic, and the unpacking beside it. At level 4 it multiplies integers, and every 32 products have to
# be scaled by a pair of floats before they may join the others: the likely reason why a further token costs
# no less. W8A8 has one scale for each row and one for all inputs, scales once at the very end, and is the
# only one whose further token costs clearly less than float32's. So the limit is arithmetic, block by
# block, and not the choice of a level: the best of them is faster than level 4 by a few hundredths, and
# none is as fast as float32. Two kernels in one file would gain next to nothing, and we left it at one.
# (OpenVINO shows the same from another side. It is fast with prompts, and there its four bits take about
# as long as its float32; yet with the very same file ONNX Runtime writes a single token in a third of
# OpenVINO's time. A file holds integers. What becomes of them is the affair of the engine that opens it.)
#
# And now look at what the rows lost.


# %%
def nats(model):
    """What a row lost to rounding, with its interval."""
    return decode["text"][model]["loss_difference"]


w8a8 = nats("ONNX Runtime, int8 W8A8")
dynamic = nats("torch quantize_dynamic, int8")
eight = nats("ONNX Runtime, int8 level 4")
four = nats("ONNX Runtime, int4 level 4")
two = nats("ONNX Runtime, int2 level 4")
print("the two with one range for all inputs lose more than half a nat:")
print("  ", w8a8[1] > 0.5, dynamic[1] > 0.5)
print(
    "eight bits at level 4 within 0.03 nats:", max(map(abs, eight)) < 0.03
)
print("four bits between 0.2 and 0.8:", 0.2 < four[1] < four[2] < 0.8)
print("two bits are lost:", two[1] > 10)

# %% [markdown]
# The fastest readers of prompts are the worst listeners. W8A8 and PyTorch's own `quantize_dynamic` give
# all inputs of a layer one range, and a single loud token ([](ch09)) takes the room of all the others: more
# than a nat is gone, more than four bits in the weights cost. Level 4 rounds its inputs to eight bits,
# too, yet in blocks of their own, and with weights of eight bits it stays within three hundredths of a
# nat. So the columns have to be read together. As they stand, untrained, eight bits at level 4 are the
# ones to serve, and four bits where size or the speed of a token matters and half a nat does not. The
# other few-bit rows of ONNX Runtime give the times of formats that would have to be *trained* before they
# are worth serving. If training mends them, which this page does not show for SmolLM2, long prompts with
# short answers would want W8A8, and short prompts with long answers four bits.
#
# On another machine the ratios are others: run the benchmark on yours. This one was:

# %%
print(
    {
        name: content["provenance"]["machine"][name]
        for name in ("cores", "vector width")
    }
)

# %% [markdown]
# Not every road takes every scheme. Here each is tried on a small model: *exact* means that it was
# written and that its integers and scales were read back equal.

# %%
by_token = Activations(8, "token", symmetric=True)
schemes = {
    "W8 g32": W8,
    "W4 g32": W4,
    "W3 g32": W3,
    "W2 g32": W2,
    "W4 row": QuantScheme(4, None),
    "W8A8, one range": W8A8,
    "W8A8, by token": QuantScheme(8, None, activations=by_token),
}
config = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
)
tiny = LlamaForCausalLM(config).eval()


# %%
def written(scheme, form, place):
    """Whether a format takes a scheme, integer by integer."""
    if form == "executorch":  # whose kernels know no float16
        scheme = replace(scheme, scale_dtype=torch.bfloat16)
    q = convert(prepare_qat(tiny, scheme, "absmax", skip=["lm_head"]))
    file = place / f"model{FORMATS[form].ending}"
    try:
        FORMATS[form].export(q, file, None)
    except UnsupportedModel:
        return "refused"
    report = parity(q, file, served=q)  # the engine is not asked here
    return "exact" if report.integers and report.scales else "NOT equal"


roads = pd.DataFrame(
    {
        form: {
            name: written(scheme, form, folder / f"{form}-{number}")
            for number, (name, scheme) in enumerate(schemes.items())
        }
        for form in FORMATS
    }
)
print(roads.to_string())

# %% [markdown]
# (For ExecuTorch the scales are in bfloat16.) In GGUF, compressed-tensors and ExecuTorch three and two bits
# take the room of four, and in ONNX three do: there are no kernels for less. The values are exact, the bytes are not saved. Our own folder saves them all.
# What the table calls refused is refused in one sentence that says what to do instead.
#
# Which road, then?
#
# - **Staying in Python**, or not sure yet: the companion's folder. It is the smallest, equal to the last
#   bit, and every other road starts from it.
# - **A program on a laptop or a server's CPU**: ONNX. Level 4 where answers are long; W8A8, trained, where
#   prompts are long and answers short; level 0 where it has to be the trained model and nothing else.
# - **Anyone with llama.cpp or a program built on it**: GGUF, which is one file with everything inside.
#   Train in groups of 32 with float16 scales, which is what `W4` is.
# - **A phone, or smaller**: ExecuTorch, trained with bfloat16 scales and positive ones.
# - **A GPU server for many people**: compressed-tensors, trained with positive scales
#   (`method="absmax"`). Try it with your vLLM before you promise it: we did not.
#
# ## It talks
#
# The served model, at level 4, token by token, keys and values kept:

# %% tags=["nbval-ignore-output"]
tokenizer = load_tokenizer("docs-lm")
talker = OnnxModel(fast)
prompt = tokenizer(
    "The for statement is used to", return_tensors="pt"
).input_ids
told = list(talker.generate(prompt, max_new_tokens=40))
print(tokenizer.decode(prompt[0].tolist() + told))

# %% [markdown]
# Greedy choice makes it repeatable: the same tokens as transformers' own `generate` on the converted
# model, as long as no two tokens are nearly as likely. At level 0:

# %%
calm = OnnxModel(path)
ours = list(calm.generate(prompt, max_new_tokens=20, stop=False))
theirs = model.generate(
    prompt, max_new_tokens=20, min_new_tokens=20, do_sample=False
)
print("the same 20 tokens:", ours == theirs[0, prompt.shape[1] :].tolist())

# %% [markdown]
# ## From a command line
#
# All of this without a notebook. `export` goes by the ending of the name, or by `--format` where a folder
# is to be written. `parity` prints the report of this chapter for any of the five, and ends with exit code
# 1 where integers or scales differ, so that a script can stop there. What was exported is then opened like
# any model.
#
# ```
# companion finetune docs-lm --task notes.txt --scheme W4 --out mine
# companion export mine/W4-g32-default served/model.onnx
# companion export mine/W4-g32-default served/model.gguf
# companion export mine/W4-g32-default served/model.pte --scales bfloat16
# companion parity served/model.gguf --reference mine/W4-g32-default
# companion generate served/model.gguf "The for statement"
# companion bench docs-lm served/model.onnx served/model.gguf
# ```
#
# ## Quiz
#
# ```{quiz} ch15
# Three questions, each answer explained: they stand in `_quizzes/ch15.md` beside this notebook.
# ```
#
# ## Exercises
#
# ```{exercise} Unsigned, and still right
# :label: ch15-unsigned
# A runtime stores eight-bit weights as `w + 128` in unsigned bytes. Write `signed_product(weights,
# inputs)`, which returns the sum of `w * x` for such weights and a tensor of int64 inputs, as a Python
# integer. Mind the type in which you add. Replace the `...` and run the cell.
# ```


# %%
def signed_product(weights, inputs): ...  # your turn


check("ch15-unsigned", signed_product)

# %% [markdown]
# ```{solution} ch15-unsigned
# :class: dropdown
# Widen first, subtract after: $\sum (w + 128) x - 128 \sum x = \sum w x$.
# ```


# %% tags=["hide-cell"]
def signed_product(weights, inputs):
    return int((weights.long() * inputs).sum() - 128 * inputs.sum())


check("ch15-unsigned", signed_product)

# %% [markdown]
# ```{exercise} As fast as memory
# :label: ch15-limit
# Write `limit_ms(weights, bits, group_size, bandwidth)`: the least time for a token in milliseconds, for
# `weights` of `bits` bits with a float32 scale for each group, at `bandwidth` gigabytes (of $10^9$ bytes)
# per second. Replace the `...` and run the cell.
# ```


# %%
def limit_ms(weights, bits, group_size, bandwidth): ...  # your turn


check("ch15-limit", limit_ms)

# %% [markdown]
# ```{solution} ch15-limit
# :class: dropdown
# Bytes over bytes per second, and a thousand milliseconds in one.
# ```


# %% tags=["hide-cell"]
def limit_ms(weights, bits, group_size, bandwidth):
    return 1000 * weights * (bits / 8 + 4 / group_size) / (1e9 * bandwidth)


check("ch15-limit", limit_ms)

# %% [markdown]
# ```{exercise} An experiment: your own machine
# :label: ch15-experiment
# Run `companion bench docs-lm` on files of your own export, at level 0 and at level 4, and reckon the limit from the bandwidth of
# your memory. Which rows are near it?
# ```
#
# ```{solution} ch15-experiment
# :class: dropdown
# docs-lm fits into a cache, so its times may lie below the limit that memory sets: that is no mistake, the limit is for weights that have
# to be fetched. With a larger model the rows in few bits move away from it, as arithmetic begins to count.
# ```
#
# ## What we saw
#
# - Four formats write the same integer in four ways: as it is or plus eight, beside its neighbour or
#   sixteen places away, with its scale before it or in another tensor. Nothing is rounded again. A fifth
#   goes to phones, and wants bfloat16 scales from the beginning.
# - Parity is four questions: integers and scales equal, logits, answers, and the metric in pairs.
# - Served and trained differ in two places. Inputs that an engine rounds to eight bits changed the loss by
#   less than the margin here, so training with it in sight had nothing to win at four bits. Sums in
#   another order change the last digits.
# - Seven bits for the inputs of W8A8, since pairs of products have to fit into sixteen.
# - In float32 a token waits for memory, so fewer bytes help, until arithmetic and overhead take over; a
#   prompt waits for arithmetic, so integers times integers help. Both only where there is a kernel.
#
# :::{epigraph}
# When the last figure had been read back, and was the one that had been trained, Toto lay down. "And how
# fast will it go?" asked the Scarecrow. "As fast as somebody has paved the road for it," said Dorothy.
# "It is light. That is our part, and it is done."
# :::
#
# ## References
#
# - {cite:t}`williams2009`: the roofline, of which our limit is one slope.
# - {cite:t}`jacob2018`: training sees the arithmetic that is served.
# - {cite:t}`onnxruntime`: the runtime and its operators.
