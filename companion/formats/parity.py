"""Whether a served file computes what was trained: integers, scales, logits, answers, the metric.

One report for every format of `companion.formats.registry`. Built in chapter 15.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from companion.data.task import Task
from companion.errors import UnsupportedModel
from companion.evaluation.estimates import Estimate
from companion.evaluation.forward import evaluating, outputs
from companion.evaluation.metrics import METRICS
from companion.formats.llama_cpp import LlamaCppModel
from companion.formats.registry import FORMATS, format_at
from companion.formats.served import Matrix, ServedModel
from companion.numerics.activations import fake_quantize_activations
from companion.numerics.packing import unpack
from companion.numerics.scheme import Activations
from companion.qat.packed import Packed, QuantizedLinear
from companion.study.tables import across_seeds

FAR = 0.02
"""Nats a token, or a logit of a model without tokens to choose, beyond which two models are not the
same, however their sums are ordered and their inputs rounded to 8 bits."""


@dataclass(frozen=True)
class Parity:
    """How a served model differs from the converted one.

    Parameters
    ----------
    layers : int
        Matrices in the file, where those that are tied stand once (by W8A8 twice).
    integers, scales : bool
        Whether all of them are equal to the trained ones.
    logits : float, optional
        Largest difference of a logit; of a language model, of the logarithm of a probability.
    argmax : float, optional
        Share of the answers (a token, a class) that are the same.
    metric : str, optional
    difference : Estimate, optional
        Of the task's metric, served minus converted, in pairs.
    format, engine : str
    turned : int
        Groups whose scale has the other sign in the file, and whose integers have, too.
    rounded_scales : int
        Matrices with scales that are the trained ones in bfloat16.
    floats : int
        Matrices, among the layers, that the format holds in floating point, with equal values.
    divergence : float, optional
        Kullback and Leibler's, in nats a token, of the served model from the converted one.
    places : int
        Answers that `logits`, `argmax` and `divergence` are of.
    rounded : float, optional
        `divergence` from the converted model with its inputs rounded as the engine rounds them,
        where it does.
    ours, theirs : tuple of int
        What the converted and the served model go on with, greedily.
    """

    layers: int
    integers: bool
    scales: bool
    logits: float | None
    argmax: float | None
    metric: str | None = None
    difference: Estimate | None = None
    format: str = "onnx"
    engine: str = "ONNX Runtime"
    turned: int = 0
    floats: int = 0
    divergence: float | None = None
    places: int = 0
    rounded: float | None = None
    rounded_scales: int = 0
    ours: tuple[int, ...] = ()
    theirs: tuple[int, ...] = ()

    def rows(self) -> list[tuple[str, str]]:
        """The report as a table: what was asked, and what was found.

        Returns
        -------
        list of (str, str)
        """
        found = [
            ("integers", f"{_equal(self.integers)} in {self.layers - self.floats} matrices"),
            ("scales", _equal(self.scales) + (
                f": rounded to bfloat16 in {self.rounded_scales} matrices" if self.rounded_scales else "") + (
                f", with both signs turned in {self.turned:,} groups" if self.turned else "")),
        ]  # fmt: skip
        if self.floats:
            found.append(("in floating point", f"{self.floats} matrices, values equal"))
        if self.logits is not None:
            found.append(("logits", f"at most {self.logits:.1e} apart"))
            found.append(("the same first choice", f"{self.argmax:.1%} of {self.places:,}"))
        if self.divergence is not None:
            found.append(("divergence", f"{self.divergence:.1e} nats a token"))
        if self.rounded is not None:
            found.append(
                ("with inputs rounded as there", f"divergence {self.rounded:.1e} nats a token")
            )
        if self.difference is not None:
            d = self.difference
            found.append((f"{self.metric}, served minus trained",
                          f"{d.value:+.1e} [{d.low:+.1e}, {d.high:+.1e}] (n = {d.n})"))  # fmt: skip
        return found

    @property
    def verdict(self) -> str:
        """The report in a sentence."""
        if self.integers and not self.scales and self.rounded_scales:
            return (
                "The file holds the integers that were trained, but not their scales, which it has "
                "rounded to bfloat16: train with scale_dtype=torch.bfloat16 to have them equal."
            )
        if not (self.integers and self.scales):
            wrong = " and ".join(
                name for name, same in (("integers", self.integers), ("scales", self.scales))
                if not same
            )  # fmt: skip
            return f"This is another model: its {wrong} are not those that were trained."
        if self.logits is None:
            return "The file holds the integers and scales that were trained."
        distance = self.logits if self.divergence is None else self.divergence
        if (distance if self.rounded is None else min(distance, self.rounded)) > FAR:
            return (
                "The file holds the integers and scales that were trained, but "
                f"{self.engine} computes something else with them: export it again, and if that "
                "does not help, report it."
            )
        if self.rounded is not None:
            return (
                "The file holds the integers and scales that were trained; what differs is that "
                f"{self.engine} also rounds the inputs of its layers to 8 bits."
            )
        return (
            f"The file holds the integers and scales that were trained, and {self.engine} computes "
            f"the same with them, up to {self.logits:.0e} in a logit."
        )

    def __str__(self) -> str:
        table = self.rows()
        width = max(len(name) for name, _ in table)
        return "\n".join(f"{name:{width}}  {value}" for name, value in table)


def parity(
    model: nn.Module,
    path: str | Path,
    task: Task | None = None,
    *,
    batches: int = 4,
    prompt: Tensor | None = None,
    max_new_tokens: int = 24,
    served: nn.Module | None = None,
) -> Parity:
    """Compare an exported file with the converted model that it was made from.

    Parameters
    ----------
    model : nn.Module
        The converted model.
    path : path
        In any format of `companion.formats.registry.FORMATS`.
    task : Task, optional
        Its test split gives the metric; without a prompt, its validation split the logits.
    batches : int
        Of the validation split.
    prompt : Tensor, int64, shape (1, length), optional
        What both go on with, greedily; the logits are then those of this text and of what the
        converted model went on with. For a model that does not generate, a text to answer.
    max_new_tokens : int
        Of what they go on with.
    served : nn.Module, optional
        The file opened by its engine, where that was done already.

    Returns
    -------
    Parity

    Raises
    ------
    UnsupportedModel
        If the path holds none of the formats.

    Examples
    --------
    >>> import tempfile
    >>> from companion import W4, convert, prepare_qat, save_quantized
    >>> q = convert(prepare_qat(nn.Sequential(nn.Linear(64, 8)), W4))
    >>> folder = save_quantized(q, tempfile.mkdtemp())
    >>> print(parity(q, folder, served=q).verdict)
    The file holds the integers and scales that were trained.
    """
    name = format_at(path)
    if name is None:
        raise UnsupportedModel(
            f"{path} is in none of the formats {', '.join(FORMATS)}: give what was exported"
        )
    form = FORMATS[name]
    found = list(_matches(model, form.read(Path(path), model)))
    served = form.open(Path(path)) if served is None else served
    ours: tuple[int, ...] = ()
    theirs: tuple[int, ...] = ()
    batch: Iterable = ()
    if prompt is not None and _generates(model):
        ours, theirs = (tuple(greedy(m, prompt, max_new_tokens)) for m in (model, served))
        batch = [{"input_ids": torch.cat([prompt, torch.tensor([ours], dtype=torch.int64)], 1)}]
    elif prompt is not None:
        batch = [{"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}]
    elif task is not None:
        batch = list(islice(task.validation, batches))
    rounding = form.rounds(Path(path))
    seen = _compared(model, served, batch)
    rounded = None
    if rounding is not None and seen is not None and _generates(model):
        with rounding_inputs(model, *rounding):
            rounded = _compared(model, served, batch).divergence
    difference = None
    if task is not None:
        measure = METRICS[task.metric].measure
        before, after = measure(model, task).scores, measure(served, task).scores
        difference = across_seeds(
            after.resampled() - before.resampled(), [after.value - before.value], len(after.total)
        )
    return Parity(
        len(found), all(m.integers for m in found), all(m.scales for m in found),
        seen and seen.logits, seen and seen.argmax,
        task and task.metric, difference, name, form.engine,
        sum(m.turned for m in found), sum(m.floats for m in found),
        seen and seen.divergence, seen.places if seen else 0, rounded,
        sum(m.rounded for m in found) if all(m.scales or m.rounded for m in found) else 0, ours, theirs,
    )  # fmt: skip


@contextmanager
def rounding_inputs(
    model: nn.Module, form: Activations, block: int | None = None
) -> Iterator[None]:
    """Let a converted model round the inputs of its layers as engines do.

    Layers that were trained with inputs rounded so do it already.

    Parameters
    ----------
    model : nn.Module
        From `convert`.
    form : Activations
    block : int, optional
        Inputs that share a scale, where the form is by blocks.

    Examples
    --------
    >>> from companion import W4, convert, prepare_qat
    >>> from companion.numerics.scheme import BLOCK8
    >>> q = convert(prepare_qat(nn.Sequential(nn.Linear(64, 8)), W4))
    >>> x = torch.linspace(-1, 1, 64)[None]
    >>> with rounding_inputs(q, BLOCK8, 32):
    ...     rounded = q(x)
    >>> 0 < float((rounded - q(x)).abs().max()) < 0.1
    True
    """

    def round_(layer: nn.Module, inputs: tuple) -> tuple:
        return (fake_quantize_activations(inputs[0], form, block), *inputs[1:])

    hooks = [layer.register_forward_pre_hook(round_) for layer in model.modules()
             if isinstance(layer, QuantizedLinear) and layer.scheme.activations != form]  # fmt: skip
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def greedy(model: nn.Module, prompt: Tensor, tokens: int) -> list[int]:
    """Let a language model of any engine go on with a text, taking the likeliest token each time.

    Parameters
    ----------
    model : nn.Module
    prompt : Tensor, int64, shape (1, length)
    tokens : int
        New ones at most, without the one that ends the text.

    Returns
    -------
    list of int
    """
    if isinstance(model, ServedModel):
        ends = model.description.stop
        found = list(model.generate(prompt, max_new_tokens=tokens, temperature=0.0))
    else:
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = [ends] if isinstance(ends, int) else ends or []
        with torch.no_grad():
            whole = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                                   max_new_tokens=tokens, pad_token_id=0)  # fmt: skip
        found = whole[0, prompt.shape[1] :].tolist()
    return found[:-1] if found and found[-1] in ends else found


@dataclass(frozen=True)
class _Seen:
    logits: float
    argmax: float
    divergence: float | None
    places: int


def _compared(model: nn.Module, served: nn.Module, batches: Iterable) -> _Seen | None:
    """Logits of both on the same batches; of padding, and where a place says nothing, neither."""
    largest, same, divergences, predicts = 0.0, [], [], _generates(model)
    batches = list(batches)
    answers = _vectors if hasattr(model, "embed") else _logits
    for batch, ours, theirs in zip(
        batches, answers(model, batches), answers(served, batches), strict=True
    ):
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if mask is not None and mask.shape == ours.shape[:-1]:
            ours, theirs = ours[mask.bool()], theirs[mask.bool()]
        ours, theirs = ours.flatten(0, -2).double(), theirs.flatten(0, -2).double()
        if predicts:
            ours, theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
            told = _told(served, theirs)
            divergences.append(_divergence(ours, theirs, told))
            largest = max(largest, float((ours - theirs)[told].abs().max()))
        else:
            largest = max(largest, float((ours - theirs).abs().max()))
        same.append(ours.argmax(-1) == theirs.argmax(-1))
    if not same:
        return None
    every = torch.cat(same)
    mean = float(torch.cat(divergences).mean()) if predicts else None
    return _Seen(largest, float(every.float().mean()), mean, len(every))


def _told(served: nn.Module, logs: Tensor) -> Tensor:
    """Which tokens an engine says something of: all, but of llama.cpp the likeliest it was asked for."""
    if not isinstance(served, LlamaCppModel):
        return torch.ones_like(logs, dtype=torch.bool)
    kept = torch.zeros_like(logs, dtype=torch.bool)
    return kept.scatter(-1, logs.topk(min(served.told, logs.shape[-1]), -1).indices, True)


def _divergence(ours: Tensor, theirs: Tensor, told: Tensor) -> Tensor:
    """Of each place; tokens that nothing was told of count together, as one."""
    apart = (ours.exp() * (ours - theirs)).masked_fill(~told, 0).sum(-1)
    if told.all():
        return apart
    left, other = (
        (logs.exp().masked_fill(told, 0).sum(-1)).clamp(min=1e-12) for logs in (ours, theirs)
    )
    return apart + left * (left / other).log()


def _logits(model: nn.Module, batches: list) -> list[Tensor]:
    return [logits.detach().cpu() for _, logits in outputs(model, batches)]


def _vectors(model: nn.Module, batches: list) -> list[Tensor]:
    with evaluating(model):
        return [model.embed(b["input_ids"], b["attention_mask"]).detach().cpu() for b in batches]


def _generates(model: nn.Module) -> bool:
    return getattr(model, "can_generate", lambda: False)()


@dataclass(frozen=True)
class _Match:
    integers: bool
    scales: bool
    turned: int = 0
    floats: bool = False
    rounded: bool = False


def _matches(model: nn.Module, found: dict[str, Matrix]) -> Iterator[_Match]:
    """Whether the integers and the scales of each matrix are those of the file."""
    names: dict[int, set[str]] = {}
    layers = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, Packed):
            names.setdefault(layer.integers.data_ptr(), set()).add(name)
            layers[layer.integers.data_ptr()] = layer
    for place, layer in layers.items():
        in_file = names[place] & found.keys()  # two for W8A8: no operator shares an embedding
        if not in_file:
            yield _Match(False, False)
        for name in in_file:
            yield _match(layer, found[name])


def _match(layer: Packed, stored: Matrix) -> _Match:
    if stored.values is not None:
        same = np.array_equal(stored.values, layer.weight.detach().cpu().float().numpy())
        return _Match(same, same, floats=True)
    integers, scales = stored.integers, stored.scales
    ours = unpack(layer.integers, layer.scheme.weight_bits, layer.columns).cpu().numpy()
    scale = layer.scale.cpu().float().numpy()
    if scales.shape[1] % scale.shape[1] or integers.shape[1] < layer.columns:
        return _Match(False, False)
    scale = scale.repeat(scales.shape[1] // scale.shape[1], axis=1)
    brain = torch.from_numpy(scale).bfloat16().float().numpy()
    rounded = not np.array_equal(abs(scales), abs(scale)) and np.array_equal(
        abs(scales), abs(brain)
    )
    if rounded:  # ExecuTorch has no other scales, and was asked for these
        scale = brain
    turned = (scale * scales < 0) & (scale == -scales)  # then -q times -s is q times s
    ours = np.pad(ours.astype(np.int16), ((0, 0), (0, integers.shape[1] - layer.columns)))
    size = math.ceil(ours.shape[1] / scales.shape[1])
    signs = np.where(turned, -1, 1).repeat(size, axis=1)[:, : ours.shape[1]]
    return _Match(
        np.array_equal(integers, ours * signs),
        not rounded and np.array_equal(np.where(turned, -scales, scales), scale),
        int(turned.sum()),
        rounded=rounded,
    )


def _equal(same: bool) -> str:
    return "equal" if same else "NOT equal"
