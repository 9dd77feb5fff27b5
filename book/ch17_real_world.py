# %% [markdown]
# (ch17)=
# # Real-world examples
#
# ![Three models on the road: a small one with wings, one with many speech bubbles, and a huge one with a crown.](_static/tale/ch17.svg)
#
# :::{epigraph}
# Word of the light basket went before them. In the next town three people were waiting, each with a
# model of their own: one small and quick, one that spoke many tongues, and one that came from a palace
# and was said to weigh fifty-four gigabytes. "Does your road take all of these?" they asked. "It's the
# same three steps," said Dorothy. "But let me first read you what other travellers wrote down, and
# where they forgot to write how many they had asked."
# :::
#
# The models of this course are small so that every number can be computed again. This chapter runs the
# same calls on the architectures people use, reads what larger teams have published with the
# questions of [](ch07) and [](ch14) in hand, and shows the ways out: to torchao, to an evaluation
# harness, and from the old API to the new one.
#
# **What you will learn**
#
# - to take a model of your own, or of the Hub, down the whole road;
# - what Gemma, Llama, Qwen and others got from QAT, and which question each report leaves open;
# - to hand the trained integers to torchao, and to evaluate with lm-eval;
# - to move from `torch.ao.quantization` to what replaces it, snippet by snippet.
#
# *Running time: about a minute on two cores.*

# %% tags=["hide-input"]
import copy
import logging
import math
import os
import tempfile
import warnings
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from companion import (
    W2,
    W4,
    convert,
    export_onnx,
    fit,
    load_pretrained,
    load_task,
    model_bytes,
    perplexity,
    prepare_qat,
    to_torchao,
)
from companion.course.check import check
from companion.course.figures import bars
from companion.course.sources import load_tokenizer
from companion.formats.onnx.model import OnnxModel

warnings.filterwarnings("ignore")
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)

# %% [markdown]
# ## The same three calls
#
# One variable names the model, a folder or an id of the Hugging Face Hub; another may name a text of your
# own, of ten paragraphs at least. Without a network it is docs-lm; with one, set them and run the same
# cells.
#
# ```
# COMPANION_MODEL=HuggingFaceTB/SmolLM2-135M COMPANION_TEXT=$PWD/notes.txt make lab
# ```

# %%
name = os.environ.get("COMPANION_MODEL", "docs-lm")
text = os.environ.get("COMPANION_TEXT", "language-reference")
task = load_task(
    text, batch_size=4, block_size=128, tokenizer=load_tokenizer(name)
)
model = load_pretrained(name, head="lm")
rate = (
    5e-4 if name == "docs-lm" else 5e-5
)  # larger models want smaller ones
history = fit(
    model, task.train, steps=30, lr=rate, progress=False
)  # first in floating point

# %% [markdown]
# Then prepare, train, convert. Nothing in it knows how large the model is:

# %%
nearest = convert(
    prepare_qat(model, W2, "absmax")
)  # rounded, untrained: the row to beat
qat = prepare_qat(model, W2)  # 1. on a copy, rounded as it computes
fit(
    qat,
    task.train,
    steps=15,
    lr=rate,
    seed=1,
    teacher=model,
    progress=False,
)  # 2.
small = convert(qat)  # 3. packed integers
print("layers rounded:", len(small.quantization.layers))
print(f"of float32:     {model_bytes(small) / model_bytes(model):.2f}")

# %% tags=["nbval-ignore-output"]
ways = {"float": model, "rounded": nearest, "trained": small}
found = {way: perplexity(m, task.test) for way, m in ways.items()}
for way, estimate in found.items():
    print(f"{way:8} perplexity {estimate}")

# %%
print(
    "trained under rounding, below rounded:",
    found["trained"].value < found["rounded"].value,
)

# %% [markdown]
# (Fifteen steps at two bits, so that the page is quick. [](ch11) has the comparison with intervals and
# controls; the rate for a larger model is a guess, see [](ch14).)
#
# ### The architectures people use
#
# Offline we cannot fetch SmolLM2, Qwen3 or Gemma 3. But their code is installed, and code is what
# the calls depend on. So here is each architecture, tiny, with random weights, taken down the whole road:
# prepared, trained for two steps, converted, handed to torchao, served by ONNX Runtime.

# %%
import transformers

size = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
torch.manual_seed(0)
families = {
    "SmolLM2 (Llama)": transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**size, tie_word_embeddings=True)
    ),
    "Qwen3": transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            **size, head_dim=16, tie_word_embeddings=True
        )
    ),
    "Gemma 3": transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**size, head_dim=16, sliding_window=8)
    ),
}
ids = torch.randint(10, 500, (2, 20))
folder = Path(tempfile.mkdtemp())


# %%
@torch.no_grad()
def whole_road(family):
    with torch.enable_grad():
        prepared = prepare_qat(family, W4, embeddings=True)
        fit(
            prepared,
            [{"input_ids": ids, "labels": ids}],
            steps=2,
            progress=False,
        )
    converted = convert(prepared.eval())
    served = OnnxModel(export_onnx(converted, folder / "model.onnx"))
    logits = converted(ids).logits
    return {
        "layers": len(converted.quantization.layers),
        "converted": torch.equal(prepared(ids).logits, logits),
        "torchao": torch.equal(to_torchao(converted)(ids).logits, logits),
        "served": torch.allclose(served(ids).logits, logits, atol=1e-4),
    }, converted


roads = {name: whole_road(family) for name, family in families.items()}
print(
    pd.DataFrame(
        {name: row for name, (row, _) in roads.items()}
    ).T.to_string()
)

# %% [markdown]
# Equal bit for bit where that is promised, in all three. Gemma's embedding is a class of its own: it looks
# a row up and multiplies it by a constant. `prepare_qat` tries such a class on a small copy before it
# takes it. What it leaves in floating point a model says itself. Without `embeddings=True`:

# %%
report = prepare_qat(families["Gemma 3"], W4).quantization
for layer, reason in report.skipped.items():
    print(f"{layer}: {reason}")

# %% [markdown]
# ## What others found
#
# :::{admonition} Before you read on
# Thirteen published comparisons, from 1 to 8 billion parameters. What is the smallest share of the damage
# that came back in them, and what the largest?
# :::
#
# Four things make a report of QAT worth something: the float model, the model rounded *without* training,
# the trained one, and a float control that was trained as long. Most give three. What we read of them
# stands in `book/case_studies.json`, each figure with the place where it is printed (the report on
# Gemma we read in copies). The share recovered is computed here, from the three cells:

# %%
cases = pd.read_json("case_studies.json")
cases["recovered"] = (cases["ptq"] - cases["qat"]) / (
    cases["ptq"] - cases["float"]
)
cases["recovered"] = cases["recovered"].round(3) + 0  # no -0
columns = [
    "case",
    "metric",
    "float",
    "ptq",
    "spinquant",
    "qat",
    "recovered",
]
print(cases[columns].round(3).to_string(index=False, na_rep=""))

# %% mystnb={"image": {"alt": "Bars of the share recovered for thirteen published results, from nothing for HellaSwag with Llama 3.2 3B, over about forty percent for Gemma 3 4B, to over one hundred percent for GSM8K with Llama 3.2 1B."}} tags=["hide-input"]
bars(
    (
        100
        * cases.set_index(cases["case"] + ", " + cases["metric"])[
            "recovered"
        ]
    ).to_dict(),
    xlabel="share of the damage recovered (%)",
    form="{:.0f}",
)

# %% [markdown]
# From nothing to more than everything. And what it costs, and buys:

# %%
costs = pd.read_json("case_costs.json")
print(costs[["case", "what", "value", "unit"]].to_string(index=False))

# %% [markdown]
# What a practitioner takes from each:
#
# **Gemma 3** {cite:p}`gemma2025`. Google publishes four-bit checkpoints, trained for a few thousand steps
# with the float model's own probabilities as targets (section 2.3): short, late, a teacher, a format that
# common runtimes serve. That is our default recipe, in large. The report prints bytes, not quality: with
# it, the weights of the largest fall to about a quarter. The three rows above are others'
# training of the 4B model {cite:p}`torchao2026qat`; one model, three metrics, three shares. The largest is
# the one that [](ch14) took apart: two questions of three.
#
# **Llama 3.2** {cite:p}`llama2024card`. Meta gives what few give: plain rounding, a rotation that needs no
# training of weights (SpinQuant {cite:p}`liu2025spinquant`), and QAT with LoRA, on every benchmark, with
# the bill. QAT wins on MMLU. On IFEval SpinQuant is ahead of it; compare the two bills above. On
# HellaSwag at 3B the trained model is where rounding was. And GSM8K ends above the float model,
# which had two rounds of fine-tuning less: that's not recovery, it's training, and the control is missing
# ([](ch10)).
#
# **torchao and torchtune** {cite:p}`or2024`. Llama 3 8B, trained long: two thirds of the perplexity and
# nearly all of HellaSwag came back. Two rows further, the same library, model and number of steps brought
# back far less {cite:p}`torchao2024readme`. There the inputs stay in float and the rate is a tenth; both
# changed at once, so the table cannot say which did it. Training under rounding cost a third of the
# speed there, and few gigabytes, with checkpointing: [](ch16) says why so few.
#
# **Qwen3** {cite:p}`torchtune2025`. One model, two metrics, and the share halves. It even depends on the
# scale on which one and the same metric is read:

# %%
qwen = cases[cases["case"] == "Qwen3 1.7B"].iloc[0]
nats = {arm: math.log(qwen[arm]) for arm in ("float", "ptq", "qat")}
share = (nats["ptq"] - nats["qat"]) / (nats["ptq"] - nats["float"])
print(f"of perplexity {qwen['recovered']:.0%}, of nats {share:.0%}")

# %% [markdown]
# Perplexity stretches what is bad, so the same three numbers recover more of it. Say which. (This course
# counts nats.)
#
# **EfficientQAT** {cite:p}`chen2025efficientqat` trains block after block and brings Llama 2 70B to two
# bits on one GPU in two days, three points below float: that is checkpointing taken to its end.
# **ParetoQ** {cite:p}`liu2025paretoq` trains everything, long: its smallest model at four bits ends
# *below* the float perplexity, so once more it was trained further, not repaired; at two bits it stays
# above.
#
# And a warning. After reinforcement learning, QAT with the usual loss is reported unstable, and imitating
# the float model is not {cite:p}`xin2026qad`. A teacher is the safer choice whenever you do not have the
# data that made the model.
#
# ## Hand the integers on: torchao
#
# `to_torchao` makes PyTorch's own layers with torchao's tensors, our integers and scales in them. From
# there the model needs no companion, and `torch.export` takes it, as our tests check. It is one road of
# several. Those to ONNX Runtime, llama.cpp and ExecuTorch and to the format that vLLM loads were walked in [](ch15),
# each with the same integers; vLLM itself we have not run. Where an engine wants positive scales, a model
# prepared with `method="absmax"` has only such.

# %%
theirs = to_torchao(small)
ids = next(iter(task.test))["input_ids"]
with torch.no_grad():
    print(
        "logits equal:", torch.equal(theirs(ids).logits, small(ids).logits)
    )
print(
    type(theirs.get_submodule(small.quantization.layers[0]).weight).__name__
)

# %% [markdown]
# Its home is other hardware: on a CPU these tensors were slower than float32 in [](ch15).
#
# ## Evaluate with lm-eval
#
# Published figures mostly come from EleutherAI's lm-evaluation-harness, which takes a model object. It is
# no dependency of this book, and its tasks need a network. We made these calls by hand with version
# 0.4.13, on a task of our own from a local file:
#
# ```python
# import lm_eval
# from lm_eval.models.huggingface import HFLM
# from companion import load_quantized
# from companion.course.sources import load_tokenizer
#
# model = load_quantized("my-model-w4")
# lm = HFLM(pretrained=model, tokenizer=load_tokenizer("owner/model"), batch_size=8)
# results = lm_eval.simple_evaluate(model=lm, tasks=["hellaswag"])
# ```
#
# It prints a standard error for each model. For two models on the same questions compare in pairs
# ([](ch07)): with `log_samples=True`, its default, the answers to each question stand in the results.
#
# ## From torch.ao to torchao
#
# `torch.ao.quantization` is deprecated. What takes its place, for each way of using it; below the table
# the right column runs.
#
# | you had | now | note |
# |---|---|---|
# | `quantize_dynamic(m, {nn.Linear})` | `quantize_(m, Int8DynamicActivationInt8WeightConfig())` | changes `m`; one range per token, not per call |
# | `prepare_qat(m)` for Linear layers | `quantize_(m, QATConfig(base, step="prepare"))` | say which `base`; nothing is said if nothing matched |
# | `convert(m)` | `quantize_(m, QATConfig(base, step="convert"))` | with the *same* base: a different one is not noticed |
# | `prepare_qat(m)` for convolutions | `prepare_qat_pt2e(exported, quantizer)` | on an exported graph; no layers to swap |
# | `m.train()`, `m.eval()` then | `allow_exported_model_train_eval(m)` first | an exported graph refuses both without it |
# | `convert(m)` for convolutions | `convert_pt2e(m)` | after `m.eval()`, which on a graph returns nothing |

# %%
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)
from torchao.quantization.qat import QATConfig

from companion.formats.torchao import multiplies_exactly

net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
x, labels = torch.randn(32, 64), torch.randint(0, 8, (32,))
before = torch.ao.quantization.quantize_dynamic(
    net, {nn.Linear}, dtype=torch.qint8
)
after = copy.deepcopy(net)
quantize_(after, Int8DynamicActivationInt8WeightConfig())
with torch.no_grad():
    errors = [(m(x) - net(x)).abs().max().item() for m in (before, after)]
print("the old road within 0.03 of float:", errors[0] < 0.03)
print(
    "the new one, or its product saturates:",
    errors[1] < 0.03 or not multiplies_exactly(),
)

# %% [markdown]
# Why "or"? torchao multiplies through `torch._int_mm`. On a processor whose int8 kernels add pairs of
# products in sixteen bits, sums saturate, and the result is far off without a word. `to_torchao` looks for
# that first, by the product that `multiplies_exactly` tries, and refuses.
#
# Training under rounding, Linear layers. The right column, and ours beside it:

# %%
base = IntxWeightOnlyConfig(
    weight_dtype=torch.int4, granularity=PerGroup(32)
)
trained = copy.deepcopy(net)
quantize_(trained, QATConfig(base, step="prepare"))
fit(trained, [(x, labels)], steps=5, progress=False)
rounded = trained.eval()(x).detach()
quantize_(trained, QATConfig(base, step="convert"))
print("torchao:  converted = prepared:", torch.equal(trained(x), rounded))

ours = prepare_qat(net, W4)
fit(ours, [(x, labels)], steps=5, progress=False)
rounded = ours.eval()(x).detach()
print(
    "companion, then torchao's form:",
    torch.equal(to_torchao(convert(ours))(x), rounded),
)

# %% [markdown]
# And convolutions, on an exported graph. `fit` trains that, too:

# %%
from torchao.quantization.pt2e import allow_exported_model_train_eval
from torchao.quantization.pt2e.quantize_pt2e import (
    convert_pt2e,
    prepare_qat_pt2e,
)
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

conv = nn.Sequential(
    nn.Conv2d(1, 8, 3),
    nn.BatchNorm2d(8),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(288, 5),
)
images, labels = torch.randn(16, 1, 8, 8), torch.randint(0, 5, (16,))
config = get_default_x86_inductor_quantization_config(is_qat=True)
graph = prepare_qat_pt2e(
    torch.export.export(conv, (images,)).module(),
    X86InductorQuantizer().set_global(config),
)
allow_exported_model_train_eval(graph)
history = fit(graph, [(images, labels)], steps=20, lr=1e-2, progress=False)
graph.eval()
rounded = graph(images).detach()
int8 = convert_pt2e(graph)
print("it learned:             ", history.loss[-1] < 0.5 * history.loss[0])
print(
    "converted near prepared:",
    bool((int8(images) - rounded).abs().max() < 0.1),
)

# %% [markdown]
# [](torchao-mapping) translates name by name.
#
# ## Quiz
#
# ```{quiz} ch17
# Three questions, each answer explained: they stand in `_quizzes/ch17.md` beside this notebook.
# ```
#
# ## Exercises
#
# ```{exercise} Recovered, of what?
# :label: ch17-share
# Write `share_in_nats(control, ptq, qat)`: the share recovered, computed in nats, from three
# perplexities. Replace the `...` and run the cell.
# ```


# %%
def share_in_nats(control, ptq, qat): ...  # your turn


check("ch17-share", share_in_nats)

# %% [markdown]
# ```{solution} ch17-share
# :class: dropdown
# A perplexity is $e$ to the loss: take logarithms first, then the share as always.
# ```


# %% tags=["hide-cell"]
def share_in_nats(control, ptq, qat):
    return (math.log(ptq) - math.log(qat)) / (
        math.log(ptq) - math.log(control)
    )


check("ch17-share", share_in_nats)

# %% [markdown]
# ```{exercise} Weights or cache?
# :label: ch17-cache
# With weights of `bits` bits (scales aside), from how many tokens on does the cache of keys and values
# take more bytes than the weights? Write `longer_than(parameters, bits, layers, heads, width)`, for
# `heads` key-value heads of `width` numbers in each of `layers` layers, each number in two bytes: the
# smallest such number of tokens. Replace the `...` and run the cell.
# ```


# %%
def longer_than(parameters, bits, layers, heads, width): ...  # your turn


check("ch17-cache", longer_than)

# %% [markdown]
# ```{solution} ch17-cache
# :class: dropdown
# A token keeps a key and a value in each layer and head: $2 \cdot 2 \cdot$ layers $\cdot$ heads $\cdot$
# width bytes. Divide the bytes of the weights by it; the next whole number is the answer.
# ```


# %% tags=["hide-cell"]
def longer_than(parameters, bits, layers, heads, width):
    return int(parameters * bits / 8 // (4 * layers * heads * width)) + 1


check("ch17-cache", longer_than)

# %% [markdown]
# ```{exercise} An experiment: read a report
# :label: ch17-experiment
# Take the newest report on quantization-aware training that you can find, and fill in one row: the float model, the rounded one, the trained one, the
# control, the number of questions, the scale, and the bill. Which cells stay empty?
# ```
#
# ```{solution} ch17-experiment
# :class: dropdown
# Most often the control. Where the number of questions is given, turn the share back into counts, as the chapter on limits does, and see how many
# questions it rests on.
# ```
#
# ## What we saw
#
# - Three calls took docs-lm down the road, and tiny models of three families, equal at each station.
#   What could not be rounded said why.
# - Published shares run from nothing to more than everything. Ask each for the rounded row, the control,
#   the number of questions, the scale, and the bill. Compare with the best rounding, not the plainest.
# - The trained integers go on to torchao unchanged, and a saved model into lm-eval.
# - The old API has a successor line by line, for convolutions on exported graphs.
#
# :::{epigraph}
# The three had seen small likenesses of their models go down the road and come back the same. "And the
# great ones?" asked the one from the palace. "The road takes their shape," said Dorothy. "What the weight
# does to you on the way, only you can measure. When you write it down, write how many you asked."
# :::
#
# ## References
#
# - {cite:t}`gemma2025`, {cite:t}`llama2024card`, {cite:t}`or2024`, {cite:t}`torchao2024readme`,
#   {cite:t}`torchao2026qat`, {cite:t}`torchtune2025`: the cases, at their sources.
# - {cite:t}`chen2025efficientqat`, {cite:t}`liu2025paretoq`, {cite:t}`xin2026qad`,
#   {cite:t}`liu2025spinquant`: methods behind them.
