# %% [markdown]
# (ch15)=
# # Dorothy deploys
#
# ![Toto, with an eyeglass, reads a card on which rows of bricks are written.](_static/tale/ch15.svg)
#
# :::{epigraph}
# On the last morning she wrote the model out on a card, to be read by people who had neither
# curtain nor ruler. Toto watched every figure go over. "Why do you look so sternly?" she asked him.
# "It is the very number that we practised with." "Then it will not mind being read twice," said the
# Scarecrow. So they read the card back, brick by brick. And only then did she knock together the heels
# of the silver shoes, which had been on her feet all along.
# :::
#
# Up to here the few-bit integers were smaller, not faster: PyTorch unpacks them and multiplies floats.
# Now the model leaves. It becomes a file that a runtime without any of our Python serves, and what it
# serves has to be what was trained: not a model *like* it, quantized once more by somebody's exporter,
# but these integers.
#
# **What you will learn**
#
# - a weight's way from training into a file, byte by byte, and back to logits;
# - to prove that a file holds what was trained: integers, logits, answers, and the metric in pairs;
# - what a kernel's *accuracy level* trades, and whether training should see it;
# - why eight bits are seven in one place;
# - how fast it is, and how far from the limit that memory sets.
#
# *Running time: about a minute on two cores.*

# %% tags=["hide-input"]
import json
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import torch
from onnx.numpy_helper import to_array
from torch import nn

from companion import (
    W3,
    W4,
    W8A8,
    QuantScheme,
    convert,
    dequantize,
    export_onnx,
    fit,
    load_pretrained,
    load_task,
    model_bytes,
    prepare_qat,
)
from companion.course.check import check
from companion.course.figures import bars_with_limits, byte_by_byte
from companion.course.sources import load_tokenizer
from companion.evaluation.language import document_losses, loss_difference
from companion.formats.onnx.layers import pack_unsigned
from companion.formats.onnx.model import OnnxModel
from companion.formats.onnx.parity import parity, read_integers
from companion.numerics.activations import fake_quantize_activations
from companion.numerics.scheme import BLOCK8

warnings.filterwarnings("ignore")
task = load_task("language-reference", batch_size=4, block_size=128)
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# A model to serve: docs-lm, fine-tuned on the language reference by the default recipe of [](ch11), at
# four bits in groups of 32, its {term}`embedding <tied embedding>` included.

# %%
teacher = load_pretrained("docs-lm")
fit(teacher, task.train, steps=45, lr=5e-4, seed=0, progress=False)
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
path = export_onnx(model, folder / "model.onnx")
print(model.quantization.scheme)

# %% [markdown]
# ## A weight's way, byte by byte
#
# Eight weights of one row, all in the same group. Training left floats behind. `convert` made of
# them {term}`integers <grid>` and one {term}`scale`:

# %%
name = "model.layers.0.mlp.down_proj"
layer = student.get_submodule(name)
integers, scales = layer.quantizer.integers(layer.weight.detach())
print("integers:", tuple(integers.shape), integers.dtype)
print("scales:  ", tuple(scales.shape), scales.dtype)

# %% [markdown]
# The routine that multiplies with them is a {term}`kernel`: it carries out one operation, for one kind of
# number, on one kind of processor. ONNX Runtime's kernel wants the integers unsigned, from 0 to 15, so
# that 8 stands for zero; and two to a byte, the first in the lower half:

# %%
unsigned = (integers.int() + 8).to(torch.uint8)  # 0 to 15
stored = unsigned[:, 0::2] | unsigned[:, 1::2] << 4  # (rows, columns / 2)
print(
    "companion packs the same:",
    torch.equal(stored, pack_unsigned(integers, 4)),
)

# %% [markdown]
# That was by hand. Now open the file and look:

# %%
file = onnx.load(path)
tensors = {
    tensor.name: to_array(tensor) for tensor in file.graph.initializer
}
in_file = tensors[f"model.{name}.blocks.integers"]  # (rows, blocks, bytes)
print(in_file.shape, in_file.dtype)
print(
    "bytes in the file are these: ",
    np.array_equal(in_file.reshape(stored.shape), stored),
)
print(
    "scales in the file are these:",
    np.array_equal(tensors[f"model.{name}.blocks.scales"], scales.float()),
)

# %% mystnb={"image": {"alt": "Five rows of boxes for eight weights. The trained weight, a decimal number; the integer, from -8 to 7; the same plus 8 as four binary digits; a byte in the file for every two of them, in hexadecimal; and the integer times the scale, close to the trained one."}} tags=["nbval-ignore-output", "hide-input"]
served = dequantize(integers[0, :32], scales[0, :1].float())
byte_by_byte(
    {
        "trained": [f"{w:.3f}" for w in layer.weight[0, :8].tolist()],
        "integer": [str(q) for q in integers[0, :8].tolist()],
        "plus 8": [f"{q:04b}" for q in unsigned[0, :8].tolist()],
        "in the file": [
            f"0x{byte:02x}" for byte in in_file[0, 0, :4].tolist()
        ],
        f"times {scales[0, 0]:.3f}": [
            f"{w.round(decimals=3) + 0.0:.3f}" for w in served[:8]
        ],
    }
)

# %% [markdown]
# The lower half of a byte is its second hexadecimal digit, so each byte reads from right to left. The last
# row is the integer times the scale of this group. (A scale may be negative: the search of [](ch11) turns
# a grid around where its one extra integer, -8, is of more use on the other side. A positive weight then
# has a negative integer, and the product has its sign back.) That is what the layer multiplies with, there
# as here:

# %%
whole = dequantize(
    integers.unflatten(-1, (-1, 32)), scales.float()[..., None]
).flatten(1)
print(
    "served weights are the converted ones:",
    torch.equal(whole, model.get_submodule(name).weight),
)

# %% [markdown]
# ## What is in the file
#
# Operators, and tensors. Each quantized layer is one `MatMulNBits`, an operator that ONNX Runtime adds
# to the standard; the embedding is one `GatherBlockQuantized`. `onnx.checker` has passed what of it is
# standard, otherwise `export_onnx` would not have written it.

# %%
operators = Counter(
    node.op_type
    for node in file.graph.node
    if node.domain == "com.microsoft"
)
versions = {
    entry.domain or "ONNX": entry.version for entry in file.opset_import
}
print(dict(operators))
print("opset:", versions["ONNX"], " IR:", file.ir_version)

# %% [markdown]
# docs-lm's output layer is tied to its embedding: one matrix, used twice. An exporter that
# forgets this writes it twice. Here both operators read one tensor:

# %%
vocabulary = load_pretrained("docs-lm").config.vocab_size
print(
    [
        name
        for name, array in tensors.items()
        if array.shape[:1] == (vocabulary,)
    ]
)

# %%
size = path.stat().st_size
print(f"float32: {model_bytes(teacher) / 1e6:.2f} MB")
print(
    f"served:  {size / 1e6:.2f} MB, {size / model_bytes(teacher):.3f} of it"
)
print(f"packed:  {model_bytes(model) / 1e6:.2f} MB by save_quantized")

# %% [markdown]
# Why is the served file larger than the packed one? Its scales are float32, as the kernel wants them,
# and it carries its graph. Three bits have no kernel; they are served in a container of four. The values
# are exact, the bytes are not saved:

# %%
three = export_onnx(
    convert(prepare_qat(teacher, W3, "absmax", embeddings=True)),
    folder / "w3.onnx",
)
print(f"three bits, served: {three.stat().st_size / 1e6:.2f} MB")

# %% [markdown]
# ## The same model?
#
# Equal integers are necessary, not sufficient: the graph around them has to be right as well. Four
# questions, from strict to what users feel. Are the integers and scales of *all* layers equal? How far
# apart are the logits? Is the likeliest token the same? And what is the difference of the task's metric,
# document by document? The margin was fixed beforehand: logits within 0.0001.

# %%
exact = parity(model, path, task)

# %% tags=["nbval-ignore-output"]
print(exact)

# %%
print(
    f"{exact.layers} matrices, integers equal: {exact.integers}, scales "
    f"equal: {exact.scales}"
)
print("logits within 0.0001:        ", exact.logits < 1e-4)
print(
    "loss within 0.0001, in pairs:",
    max(abs(exact.difference.low), exact.difference.high) < 1e-4,
)

# %% [markdown]
# ## The accuracy level
#
# The kernel has a second way to multiply. Level 0 turns each block of integers into floats and
# multiplies those. Level 4 rounds the layer's *inputs* to eight bits first, block by block,
#
# $$ s_x = \frac{\max |x|}{127}, \qquad \hat x = s_x \cdot \operatorname{round}(x / s_x) , $$
#
# multiplies integers with integers, and scales once for each block. How much time that saves, a table
# further down says. It is a rounding that training has not seen. By hand, on one layer:

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
# And the whole model, at level 4. The integers are the same. The logits aren't; what does the metric
# say? Margin, fixed beforehand: 0.002 nats for the whole interval.

# %%
fast = export_onnx(model, folder / "fast.onnx", accuracy_level=4)
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
# ## Why eight bits are seven
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
# ## How fast
#
# At last. docs-lm is too small to time honestly: its layers fit into the processor's cache. So the
# benchmark serves SmolLM2-135M, the language model of [](ch08), on two threads. It compares *engines*: an
# {term}`engine` reads a model from its file and computes its answers, with kernels of its own. Beside
# PyTorch, torchao and ONNX Runtime stand two that people would pick instead: llama.cpp, with the very file
# that our weights came from and three more of its formats, and OpenVINO, which reads the files that we
# export. Each has its turns with the same float32 models. Two phases matter: *prefill* reads a prompt at
# once, *decode* goes on token by token.
#
# Nothing was trained here. Each row is the float model rounded to nearest, and what that costs stands
# in the last column: nats per token on a text of 128 tokens from the language reference, above the float
# model. A fast model that says nothing is no fast model. (The float model is what the four-bit file Q4_1
# of llama.cpp holds, so the weights of that row are not rounded a second time, only its inputs.)
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
frame["file"] = frame["bytes"] / 1e6
first = frame["bytes"][0]
decode = frame[frame["phase"] == "decode"].set_index("model")
columns = {
    "ms": "ms",
    "ratio_to_torch_float32": "x torch",
    "ratio_to_ort_float32": "x ORT",
    "lost": "nats lost",
}
decode["lost"] = [
    t["loss_difference"][0] if t else 0.0 for t in decode["text"]
]
print("one token, after a prompt of 64 (x: times as fast as that float32)")
shown = decode[list(columns)].rename(columns=columns)
print((shown.round(2) + 0.0).to_string(index_names=False))  # no -0.00

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

# %% tags=["hide-input"]
ratios = {
    "x torch": "ratio_to_torch_float32",
    "x ORT": "ratio_to_ort_float32",
}
prefill = pd.concat(
    {
        label: frame[frame["phase"] == "prefill"].pivot(
            index="model", columns="tokens", values=ratio
        )
        for label, ratio in ratios.items()
    },
    axis=1,
)
print("prompts of 64 and 512 tokens: times as fast as that float32")
print(prefill.loc[decode.index].round(2).to_string(index_names=False))

# %% [markdown]
# Here W8A8 leads, which multiplies bytes by bytes, with the short prompt and with the long one. Its lead is
# smaller with the long one, over either float32.
#
# In ONNX Runtime no format with weights in blocks, of whatever width and at whichever level, beats float32
# on the long prompt. The likely reason: on their way into the product such weights have to be unpacked, or
# scaled block by block, which takes time. When a single token is written, and there is a fast kernel, that
# time is more than paid back, because fewer bytes have to be read. A prompt reads each weight only once
# for all of its tokens. There is little reading to save, and the unpacking still has to be done. OpenVINO
# shows the same from another side. It is fast with prompts, and there its four bits take about as long as
# its float32; yet with the very same file ONNX Runtime writes a single token in a third of OpenVINO's
# time. A file holds integers. What becomes of them is the affair of the engine that opens it.
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
sizes = decode[["file", "peak_mb"]].rename(
    columns={"file": "bytes, MB", "peak_mb": "peak memory, MB"}
)
sizes.insert(1, "of float32", decode["bytes"] / first)
print(sizes.round(3).to_string(index_names=False))

# %% [markdown]
# Peak memory is that of a process that loads the model and answers once. The quantized rows of PyTorch and
# torchao load the float model first and quantize it there, which is why they need more than PyTorch's own
# float32.
#
# Each quantized file of ours in these tables has a twin: docs-lm, rounded (by absmax, untrained) and
# exported in the same way at the same level, held against the model it was made from.

# %%
reports = decode["parity"].dropna()
twins = pd.DataFrame(list(reports), index=reports.index).drop(
    columns=["scheme", "level"]
)
twins["loss_difference"] = [
    f"{v:.1e} [{low:.1e}, {high:.1e}]"
    for v, low, high in twins["loss_difference"]
]
print(twins.to_string(float_format="{:.1e}".format))

# %% [markdown]
# The logits of W8A8 are furthest apart. It has one range for all inputs at once, and where two engines
# compute an input that differs in its last digit, one of them rounds it up and the other down. The loss
# moves by a thousandth of a nat, here downwards, and that of two bits at level 4 by as much upwards:
# little, though the intervals keep off zero. No other row moves by two ten-thousandths.
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
# All of this without a notebook. Every command has `--help`, and says in one line what is wrong.
#
# ```
# companion finetune docs-lm --task notes.txt --scheme W4 --out mine
# companion export mine/W4-g32-default served/model.onnx
# companion generate served/model.onnx "The for statement"
# companion bench docs-lm served/model.onnx
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
# ## What we saw
#
# - From trained weight to file nothing is rounded again: integer, plus eight, two to a byte, and the
#   scale beside them. The tied embedding stands in the file once.
# - Parity is four questions: integers and scales equal, logits, answers, and the metric in pairs. At
#   level 0 all of them say "the same".
# - Level 4 also rounds the inputs. It changed the loss by less than the margin, so training with it in
#   sight had nothing to win at four bits.
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
