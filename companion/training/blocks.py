"""Training block by block: each block of a rounded model learns to give back what its original gives.

A step of one block needs neither the rest of the model nor its vocabulary, so that many of them cost
what few steps of the whole do. Built in chapter 11.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from tqdm import tqdm

from companion.errors import EmptyLoader, UnsupportedModel, WrongStage, expect
from companion.evaluation.forward import evaluating, run
from companion.training.fit import History, fit


def fit_blocks(
    model: nn.Module,
    loader: Iterable,
    *,
    teacher: nn.Module,
    batches: int = 32,
    steps: int = 200,
    lr: float = 1e-3,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, History]:
    """Train the repeated blocks of a prepared model in order, each to do what the teacher's does.

    A block is given what comes out of the rounded blocks before it, and learns by the squared error
    to give back what the teacher's block gives on the way of the unrounded model; so it also makes up
    for errors made before it. No label is read. Train the whole model with `fit` afterwards, or convert
    it as it is. What lies outside the blocks, as a head does, stays as it was.

    Parameters
    ----------
    model : nn.Module
        From `prepare_qat`; trained in place.
    loader : iterable of batches
        As for `fit`; what ``attention_mask`` masks does not count.
    teacher : nn.Module
        The float model that `model` was prepared from, or one of the same form.
    batches : int
        How many batches are read. The hidden states of each, for both models, are kept in memory.
    steps : int
        Optimizer steps of each block, each on one of the batches.
    lr : float
        Learning rate; it falls to zero in a straight line.
    seed : int
    checkpoint_dir : path, optional
        Folder that keeps the last checkpoint of every block.
    resume : bool
        Go on from there; the result is that of a run that was never interrupted.
    progress : bool

    Returns
    -------
    dict of str to History
        By the name of the block. ``loss`` is the squared error over the mean square of what was to be
        given back.

    Raises
    ------
    EmptyLoader
        If there is no batch.
    WrongStage, UnsupportedModel
        If the model was not prepared, or has no blocks that run in a row, each once and on what the
        one before gave back; if the teacher is none of its kind.

    References
    ----------
    Li et al., "BRECQ: pushing the limit of post-training quantization by block reconstruction", ICLR
    2021. Chen et al., "EfficientQAT: efficient quantization-aware training for large language models",
    2024 (weights and steps together, and the whole model after it).

    Examples
    --------
    >>> from companion import QuantScheme, prepare_qat
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(2)))
    >>> x = torch.randn(32, 64)
    >>> qat = prepare_qat(model, QuantScheme(2))
    >>> histories = fit_blocks(qat, [(x, None)], teacher=model, steps=50, progress=False)
    >>> [(name, history.loss[-1] < history.loss[0] / 2) for name, history in histories.items()]
    [('0', True), ('1', True)]
    """
    expect("fit_blocks", "model", model, nn.Module)
    expect("fit_blocks", "teacher", teacher, nn.Module)
    names = _blocks(model, teacher)
    calibration = list(islice(loader, batches))
    if not calibration:
        raise EmptyLoader("the loader gave no batch to train blocks on: is the data set empty?")
    originals = [teacher.get_submodule(name) for name in names]
    given = [_calls(teacher, originals, b, whole=not i) for i, b in enumerate(calibration)]
    inputs, calls = zip(*given, strict=True)
    wanted = inputs
    histories = {}
    bar = tqdm(names, desc="blocks", leave=False, **({} if progress else {"disable": True}))
    for place, name in enumerate(bar):
        block, here = model.get_submodule(name), [call[place] for call in calls]
        wanted = _outputs(originals[place], wanted, here)
        histories[name] = fit(
            block, [torch.tensor([number]) for number in range(len(calibration))], steps=steps,
            loss_fn=_GivenBack(inputs, wanted, here), lr=lr, weight_decay=0.0, schedule="linear",
            clip_norm=None, seed=seed, resume=resume, progress=False, checkpoint_every=steps,
            checkpoint_dir=None if checkpoint_dir is None else Path(checkpoint_dir) / name,
        )  # fmt: skip
        inputs = _outputs(block, inputs, here)
        bar.set_postfix(error=f"{histories[name].loss[-1]:.4f}")
    return histories


def block_of(name: str) -> str:
    """Name the repeated block that a layer belongs to: its path down to the first number.

    Examples
    --------
    >>> block_of("model.layers.3.mlp.up_proj"), block_of("classifier")
    ('model.layers.3', 'classifier')
    """
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: first + 1])


def _blocks(model: nn.Module, teacher: nn.Module) -> list[str]:
    """Names of the numbered blocks that hold prepared layers, in order."""
    record = getattr(model, "quantization", None)
    if record is None:
        raise WrongStage("this model was not prepared: give prepare_qat(model, scheme)")
    found = dict.fromkeys(block_of(name) for name in record.layers)
    names = [name for name in found if name.rpartition(".")[2].isdigit()]
    if not names:
        raise UnsupportedModel(
            f"{type(model).__name__} has no numbered blocks of layers: train it as a whole, with fit"
        )
    for name in names:
        try:
            original = teacher.get_submodule(name)
        except AttributeError:
            original = None
        if original is None or any(
            p.shape != dict(model.get_submodule(name).named_parameters())[key].shape
            for key, p in original.named_parameters()
        ):
            raise UnsupportedModel(
                f"the teacher has no block {name} of the same form: give the float model that "
                "this one was prepared from"
            )
    return names


@dataclass
class _Call:
    """How a block is called with one batch, and where that batch holds more than padding."""

    args: tuple
    named: dict[str, Any]
    mask: Tensor | None

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        return _first(block(hidden, *self.args, **self.named))


class _Enough(Exception):
    """What is wanted of a pass has been seen."""


def _calls(
    model: nn.Module, blocks: list[nn.Module], batch: Any, whole: bool = False
) -> tuple[Tensor, list[_Call]]:
    """What the first block is given of a batch, and how each of them is called.

    A pass ends with the last block, unless the `whole` is to be seen: whether they run once more.
    """
    calls: list[_Call] = []
    first: list[Tensor] = []
    latest: list[Tensor] = []  # what the block before gave back
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def before(block: nn.Module, args: tuple, named: dict) -> None:
        in_turn = len(calls) < len(blocks) and block is blocks[len(calls)] and args
        if not in_turn or (calls and not _same(args[0], latest[0])):
            raise UnsupportedModel(_NOT_IN_A_ROW)
        rest, named = tree_map(
            lambda x: None if _is_cache(x) else x, (args[1:], named), is_leaf=_is_cache
        )
        calls.append(_Call(rest, named, mask))
        first[:] = first or args[:1]

    def after(block: nn.Module, _, output: Any) -> None:
        latest[:] = [_first(output)]
        if block is blocks[-1] and not whole:
            raise _Enough

    hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    hooks += [block.register_forward_hook(after) for block in blocks]
    try:
        with evaluating(model):
            run(model, batch)
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    if len(calls) < len(blocks):
        raise UnsupportedModel(_NOT_IN_A_ROW)
    return first[0], calls


def _same(given: Tensor, returned: Tensor) -> bool:
    return given is returned or torch.equal(given, returned)


_NOT_IN_A_ROW = (
    "the blocks of this model do not run in a row, each once and on what the one before gave back: "
    "train it as a whole, with fit"
)


def _is_cache(value: Any) -> bool:
    """Whether this is a cache of transformers, which would remember one pass in the next."""
    return hasattr(value, "get_seq_length")


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def _outputs(block: nn.Module, inputs: Sequence[Tensor], calls: list[_Call]) -> list[Tensor]:
    with evaluating(block):
        return [call(block, hidden) for call, hidden in zip(calls, inputs, strict=True)]


class _GivenBack:
    """Squared error of what a block gives back, over the mean square of what it should."""

    def __init__(self, inputs: Sequence[Tensor], wanted: list[Tensor], calls: list[_Call]) -> None:
        self.inputs, self.wanted, self.calls = inputs, wanted, calls
        squares = [_mean(y.float().square(), c.mask) for y, c in zip(wanted, calls, strict=True)]
        self.size = torch.stack(squares).mean()

    def __call__(self, block: nn.Module, batch: Tensor) -> Tensor:
        number = int(batch)
        call = self.calls[number]
        error = call(block, self.inputs[number]).float() - self.wanted[number].float()
        return _mean(error.square(), call.mask) / self.size


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens and channels, without what is masked."""
    if mask is None:
        return values.mean()
    return (values.mean(-1) * mask.to(values.device)).sum() / mask.sum()
