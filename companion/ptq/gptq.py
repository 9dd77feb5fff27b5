"""Post-training baselines: what can be had from calibration alone, without a training loop.

Rounding to nearest is ``convert(prepare_qat(model, scheme, "absmax"))``, with method "mse" for a searched
range; `smooth` shares outliers with the weights first; here is the one that looks at data while
it rounds. Built in chapter 11.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map
from tqdm import tqdm

from companion.errors import EmptyLoader, NothingToQuantize, SchemeError, UnsupportedModel
from companion.evaluation.forward import run
from companion.numerics.activations import fake_quantize_activations
from companion.numerics.affine import as_stored, dequantize, quantize, symmetric_scale
from companion.numerics.scheme import QuantScheme
from companion.numerics.search import best_ratio
from companion.qat.layers import FakeQuantConv1D, FakeQuantLinear
from companion.qat.prepare import prepare_qat
from companion.qat.ranges import LearnedStepSize
from companion.training.blocks import block_of

COLUMNS = 128  # columns whose errors are gathered before the rest of a row is corrected


@torch.no_grad()
def gptq(
    model: nn.Module,
    scheme: QuantScheme,
    loader: Iterable,
    *,
    batches: int = 16,
    damping: float = 0.01,
    act_order: bool = False,
    skip: Iterable[str] = (),
    progress: bool = True,
) -> nn.Module:
    """Round column by column, and let the columns still to come make up for each error.

    Returns a prepared model whose weights lie on their grid: `convert` it, or train on from
    there with `fit`. Blocks of a model are rounded in order, each on inputs that come out of
    the rounded blocks before it; where they stand in a row, each runs twice over the data.

    Parameters
    ----------
    model : nn.Module
        Float; left as it is.
    scheme : QuantScheme
    loader : iterable of batches
        Calibration data, as for `fit`; labels are not looked at.
    batches : int
        How many batches of it to use.
    damping : float
        Share of the mean of the Hessian's diagonal that is added to it.
    act_order : bool
        Round the columns with the largest inputs first, so that the others can make up for them;
        each group's scale is then chosen beforehand, from the weights as they were. Columns keep
        their places, and what is stored has the same form.
    skip : iterable of str
        As in `prepare_qat`. Embeddings and the output layers tied to them stay float.
    progress : bool

    Returns
    -------
    nn.Module

    Raises
    ------
    EmptyLoader, NothingToQuantize
        If there is no batch, or a layer receives no input from them: skip it.
    UnsupportedModel, SchemeError
        If a layer's inputs are not finite or too much alike, or `damping` is not above 0.

    References
    ----------
    Frantar et al., "GPTQ: accurate post-training quantization for generative pre-trained
    transformers", ICLR 2023.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(64, 8))
    >>> x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    >>> rounded = gptq(model, QuantScheme(2), [(x, None)], progress=False)
    >>> nearest = prepare_qat(model, QuantScheme(2), "mse")
    >>> error = [float((m(x) - model(x)).square().mean()) for m in (rounded, nearest)]
    >>> error[0] < error[1]
    True
    """
    if damping <= 0:
        raise SchemeError(f"damping={damping} must be above 0, as 0.01 is: it steadies the inverse")
    calibration = list(islice(loader, batches))
    if not calibration:
        raise EmptyLoader("the loader gave no batch to calibrate on: is the data set empty?")
    prepared = prepare_qat(model, scheme, LearnedStepSize, skip=skip).eval()
    prepared.quantization.method = "gptq"
    tied: dict[int, list[str]] = {}  # layers with one weight are rounded once, for all their inputs
    for name in prepared.quantization.layers:
        tied.setdefault(id(prepared.get_submodule(name).weight), []).append(name)
    blocks = [list(names) for _, names in groupby(tied.values(), lambda names: block_of(names[0]))]
    passes = _Passes(prepared, blocks, calibration)
    bar = tqdm(blocks, desc="gptq", leave=False, **({} if progress else {"disable": True}))
    for place, block in enumerate(bar):
        hessians = _hessians(prepared, block, passes, place)
        for (name, *_), hessian in zip(block, hessians, strict=True):
            layer = prepared.get_submodule(name)
            try:
                integers, scale = round_with_compensation(
                    layer.matrix, hessian, scheme, damping, act_order
                )
            except torch.linalg.LinAlgError:
                raise UnsupportedModel(
                    f"the inputs of {name} are too much alike for damping={damping}: calibrate on "
                    "more batches, or with a damping of 0.01 or more"
                ) from None
            groups = layer.quantizer.groups(integers)
            values = dequantize(groups, scale[..., None]).view_as(integers)
            layer.quantizer.start_at(scale[..., None])
            transposed = isinstance(layer, FakeQuantConv1D)
            layer.weight.copy_(values.t() if transposed else values)
    return prepared.train(model.training)


def round_with_compensation(
    weight: Tensor,
    hessian: Tensor,
    scheme: QuantScheme,
    damping: float = 0.01,
    act_order: bool = False,
) -> tuple[Tensor, Tensor]:
    """Choose integers and scales of one layer that keep its outputs close, not its weights.

    Parameters
    ----------
    weight : Tensor, shape (rows, columns)
    hessian : Tensor, shape (columns, columns)
        Mean of x x^T over the layer's inputs.
    scheme : QuantScheme
    damping : float
    act_order : bool
        As in `gptq`.

    Returns
    -------
    integers : Tensor, shape (rows, columns), int8
    scale : Tensor, shape (rows, groups)

    Examples
    --------
    >>> weight = torch.tensor([[1.2, 1.2]])
    >>> together = torch.tensor([[1.0, 0.99], [0.99, 1.0]])  # two inputs that move as one
    >>> integers, scale = round_with_compensation(weight, together, QuantScheme(8, 2))
    >>> round(float((integers * scale).sum()), 2)
    2.4
    """
    weight = weight.detach().float().clone()
    rows, columns = weight.shape
    size = scheme.group_size or columns
    hessian = hessian.double().clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1.0
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    places = torch.arange(columns, device=weight.device)  # of each column, in its row
    if act_order:
        places = hessian.diagonal().argsort(descending=True, stable=True)
        hessian = hessian[places][:, places]
    # Row j of this upper factor says how later columns make up for an error in column j.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    # What is left of a squared error in column j once the later ones have made up for it.
    left = factor.diagonal().square().reciprocal().masked_fill(dead[places], 0)
    scale = weight.new_zeros(rows, columns // size, dtype=scheme.scale_dtype)
    if act_order:
        scale = _searched(weight, left[places.argsort()], scheme)
        weight = weight[:, places]
    groups = (places // size).tolist()
    integers = torch.zeros(rows, columns, dtype=torch.int8, device=weight.device)
    for start in range(0, columns, COLUMNS):
        end = min(start + COLUMNS, columns)
        errors = weight.new_zeros(rows, end - start)
        for j in range(start, end):
            group = groups[j]
            if j % size == 0 and not act_order:  # the first column of a group: choose its scale
                # Columns beyond this block still owe the corrections of the block; apply them.
                ahead = weight[:, j : j + size].clone()
                if j + size > end:
                    late = factor[start:j, end : j + size]
                    ahead[:, end - j :] -= errors[:, : j - start] @ late
                scale[:, group] = _searched(ahead, left[j : j + size], scheme)[:, 0]
            step = scale[:, group, None]
            integers[:, j : j + 1] = quantize(weight[:, j : j + 1], step, bits=scheme.weight_bits)
            value = dequantize(integers[:, j : j + 1], step)[:, 0]
            errors[:, j - start] = (weight[:, j] - value) / factor[j, j]
            weight[:, j + 1 : end] -= errors[:, j - start, None] * factor[j, j + 1 : end]
        weight[:, end:] -= errors @ factor[start:end, end:]
    return integers[:, places.argsort()], scale


def _searched(weight: Tensor, importance: Tensor, scheme: QuantScheme) -> Tensor:
    """Return the scales that round a weight with the smallest weighted error, (rows, groups)."""
    size = scheme.group_size or weight.shape[1]
    groups = weight.view(len(weight), -1, size)
    ratio = best_ratio(groups, scheme, importance.view(-1, size))
    scale = symmetric_scale(groups, scheme.weight_bits) * ratio
    return as_stored(scale, scheme.scale_dtype)[..., 0]


class _Passes:
    """Calibration passes that do not run anew what is rounded already.

    The passes for a block begin with the output of the second block before it, kept from the passes
    before, and end with the block. That is right where the blocks run in turn, once each, and each is
    given what the one before it returned. The first batch is run in full every time to see it; where
    it is not so, every pass is a full one.
    """

    def __init__(self, model: nn.Module, blocks: list[list[list[str]]], calibration: list) -> None:
        self.model, self.calibration = model, calibration
        paths = [block_of(names[0]) for (names, *_) in blocks]
        self.blocks = [model.get_submodule(path) for path in paths]
        self.kept: list[Any] = [None] * len(calibration)  # what the second block before gave back
        own = all(
            block_of(name) == path
            for path, block in zip(paths, blocks, strict=True)
            for names in block
            for name in names
        )
        self.in_turn = own and self._run(calibration[0]).calls == list(range(len(blocks)))

    def check(self, place: int) -> None:
        """See that a block is given the same by a short pass as by a full one."""
        if self.in_turn and place > 1:
            batch, kept = self.calibration[0], self.kept[0]
            full, short = self._run(batch, place), self._run(batch, place, kept, last=place)
            self.in_turn = full.calls.count(place) == 1 and _equal(full.given, short.given)

    def run(self, place: int) -> None:
        """Run all batches at least as far as this block."""
        for number, batch in enumerate(self.calibration):
            if self.in_turn:
                seen = self._run(batch, place, self.kept[number], last=place)
                self.kept[number] = seen.before
            else:
                self._run(batch)

    def _run(self, batch: Any, place: int = -1, kept: Any = None, last: int = -1) -> _Seen:
        """One pass: from `kept` on, if there is any, and no farther than block `last`."""
        seen, skipped = _Seen(), self.blocks[: place - 1] if kept is not None else []

        def note(number: int, _, args: tuple, kwargs: dict, output: Any) -> None:
            seen.calls.append(number)
            if number == place:
                seen.given = (args, kwargs)
            if number == place - 1:
                seen.before = output
            if number == last:
                raise _Enough

        hooks = [
            block.register_forward_hook(partial(note, number), with_kwargs=True)
            for number, block in enumerate(self.blocks)
        ]
        for block in skipped:
            block.forward = lambda *_, **__: tree_map(_copied, kept)
        try:
            run(self.model, batch)
        except _Enough:
            pass
        finally:
            for hook in hooks:
                hook.remove()
            for block in skipped:
                del block.forward
        return seen


@dataclass
class _Seen:
    """Which blocks ran, what one of them was given, and what the one before it gave back."""

    calls: list[int] = field(default_factory=list)
    given: Any = None
    before: Any = None


class _Enough(Exception):
    """What is wanted of a pass has been seen."""


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _equal(first: Any, second: Any) -> bool:
    """Whether two nests of arguments hold the same tensors."""
    pairs = [tree_flatten(nest) for nest in (first, second)]
    if pairs[0][1] != pairs[1][1]:
        return False
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else type(a) is type(b)
        for a, b in zip(pairs[0][0], pairs[1][0], strict=True)
    )


def _hessians(model: nn.Module, tied: list[list[str]], passes: _Passes, place: int) -> list[Tensor]:
    """Mean outer product of the inputs that each weight meets over the calibration batches."""
    passes.check(place)
    layers = [[model.get_submodule(name) for name in names] for names in tied]
    sums = [torch.zeros(first.matrix.shape[1], first.matrix.shape[1], dtype=torch.float64,
                        device=first.weight.device) for first, *_ in layers]  # fmt: skip
    seen = [0] * len(layers)

    latest: list[Any] = [None, None, None]  # layers that read one tensor share its product

    def product(x: Tensor, scheme: QuantScheme) -> Tensor:
        version = None if x.is_inference() else x._version  # which an inference tensor has not
        if latest[0] is not x or latest[1] != version or version is None:
            rows = x
            if scheme.activations is not None:  # as the layer will see them when served
                rows = fake_quantize_activations(x, scheme.activations, scheme.group_size)
            rows = rows.reshape(-1, x.shape[-1]).float()
            latest[:] = x, version, (rows.t() @ rows).double()
        return latest[2]

    def watch(place: int, layer: FakeQuantLinear):
        def hook(_, inputs, named):
            x = inputs[0] if inputs else next(iter(named.values()))
            sums[place] += product(x, layer.quantizer.scheme)
            seen[place] += x.numel() // x.shape[-1]

        return hook

    hooks = [
        layer.register_forward_pre_hook(watch(place, layer), with_kwargs=True)
        for place, sharing in enumerate(layers)
        for layer in sharing
    ]
    try:
        passes.run(place)
    finally:
        for hook in hooks:
            hook.remove()
    if blind := [names[0] for names, n in zip(tied, seen, strict=True) if n == 0]:
        raise NothingToQuantize(
            f"{', '.join(blind)} received no input from the calibration batches: give more of them "
            f"(batches=...), or leave it in floating point with skip={blind}"
        )
    if broken := [names[0] for names, s in zip(tied, sums, strict=True) if not s.isfinite().all()]:
        raise UnsupportedModel(
            f"{broken[0]} meets inputs that are not finite, or overflow when squared: check the "
            "calibration batches, or calibrate the model in float32"
        )
    return [total / n for total, n in zip(sums, seen, strict=True)]
