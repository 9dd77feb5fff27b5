"""Logits only where they are scored: the last product of a language model, put off.

At 49,152 words the logits are the largest tensor of a small model, and most of what is done with
them is to copy them. Here a model runs as it always does, but its output layer hands on what it
would multiply. Who scores the answer then chooses the tokens and multiplies piece by piece.
Built in chapter 8.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from companion.data.text import IGNORED

PIECE_BYTES = 2**25
"""Of float32 logits computed at a time on a CPU, an eighth of those on a GPU: rows enough to be
multiplied at full speed, and few beside a model."""

_READ = {"__get__", "size", "dim", "numel", "is_floating_point"}
_ELEMENTWISE = {"add", "sub", "mul", "div", "neg", "tanh", "float", "to", "contiguous"}
_LOSSES = {"ForCausalLMLoss": True, "ForMaskedLMLoss": False}
"""Losses of transformers that are known here, and whether they score the token before a label."""
_computes: dict[bool, weakref.WeakSet[nn.Module]] = {
    loss: weakref.WeakSet() for loss in (False, True)
}
"""Models that need their logits on the way, without a loss and with it."""


class NeedsLogits(RuntimeError):
    """The model does something with its logits that cannot be put off."""


class _PutOff(Tensor):
    """Has the shape and type of a tensor; asked for a value it raises `NeedsLogits`."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ not in _READ:
            raise NeedsLogits(func.__name__)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NeedsLogits(str(func))


class LazyLogits(_PutOff):
    """The logits of a model before they are multiplied.

    Scaling or capping each one is noted and done later; anything else cannot wait.

    Parameters
    ----------
    inputs : Tensor, shape (..., features)
        Of the output layer, as its product takes them.
    weight : Tensor, shape (words, features)
    bias : Tensor, shape (words,), optional
    tail : sequence of callable
        What happens to the product.

    Examples
    --------
    >>> logits = LazyLogits(torch.ones(2, 3, 4), torch.eye(4)) / 2
    >>> logits.shape, logits.rows(torch.tensor([5]))
    (torch.Size([2, 3, 4]), tensor([[0.5000, 0.5000, 0.5000, 0.5000]]))
    """

    def __new__(cls, inputs: Tensor, weight: Tensor, bias: Tensor | None = None, tail: tuple = ()):
        shape = (*inputs.shape[:-1], len(weight))
        dtype = _apply(tail, inputs.new_empty(0, len(weight)), len(shape)).dtype
        lazy = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=inputs.device)
        lazy.inputs, lazy.weight, lazy.bias, lazy.tail = inputs, weight, bias, tail
        return lazy

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name, kwargs = func.__name__, kwargs or {}
        if name not in _ELEMENTWISE:
            return super().__torch_function__(func, types, args, kwargs)
        places = [place for place, value in enumerate(args) if isinstance(value, cls)]
        others = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if len(places) != 1 or any(value.requires_grad for value in others):
            raise NeedsLogits(name)
        self = args[places[0]]

        def step(logits: Tensor) -> Tensor:
            return func(*(logits if isinstance(value, cls) else value for value in args), **kwargs)

        empty = torch.empty(*[0] * (self.dim() - 1), self.shape[-1], dtype=self.dtype,
                            device=self.device)  # fmt: skip
        after = step(empty)  # keeps its shape only if every row meets the same numbers
        if after.shape != empty.shape or after.device != empty.device:
            raise NeedsLogits(name)
        return cls(self.inputs, self.weight, self.bias, (*self.tail, step))

    def rows(self, index: Tensor | slice) -> Tensor:
        """Compute the logits of some predictions, counted through all leading dimensions."""
        inputs = self.inputs.flatten(0, -2)[index]
        return self.finish(F.linear(inputs, self.weight, self.bias))

    def finish(self, rows: Tensor) -> Tensor:
        """Do to some rows of the product what the model does to all of them."""
        return _apply(self.tail, rows, self.dim())

    def whole(self) -> Tensor:
        """Compute all of them."""
        return self.rows(slice(None)).view(self.shape)


class LazyLoss(_PutOff):
    """The mean cross-entropy of a model's own loss function before it is computed.

    Parameters
    ----------
    logits : LazyLogits
    targets : Tensor, int64
        Of each prediction; -100 is left out.
    items : int or Tensor, optional
        What the sum is divided by, if not by the number of targets.
    """

    def __new__(cls, logits: LazyLogits, targets: Tensor, items: int | Tensor | None = None):
        lazy = Tensor._make_wrapper_subclass(cls, (), dtype=torch.float32, device=logits.device)
        lazy.logits, lazy.targets, lazy.items = logits, targets.to(logits.device), items
        return lazy


def put_off(model: nn.Module, run: Callable[[], Any], *, loss: bool = False) -> Any:
    """Run a model; the logits in its answer, and a loss made of them, may be lazy.

    The model's own code runs, whatever it does around the output layer. If it needs the logits,
    or anything goes wrong, it runs once more as always, with the same random draws; and from then
    on only so.

    Parameters
    ----------
    model : nn.Module
        Of transformers, or such a one with adapters of PEFT. Others just run.
    run : callable
        Calls the model and returns its answer.
    loss : bool
        Whether the loss may be lazy as well.

    Returns
    -------
    object
        The answer. Its ``logits`` may be `LazyLogits`, its ``loss`` a `LazyLoss`.

    Examples
    --------
    >>> put_off(nn.Identity(), lambda: 5)
    5
    """
    owner = model.get_base_model() if hasattr(type(model), "get_base_model") else model
    head = _output_layer(owner)
    if head is None or model in _computes[loss]:
        return run()
    drawn = torch.get_rng_state()
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    drawn_on_gpu = torch.cuda.get_rng_state() if on_gpu else None
    try:
        with _without_product(head), _without_loss(owner) if loss else nullcontext():
            return run()
    except Exception:  # whatever it is: what is wrong without this shows below
        pass
    torch.set_rng_state(drawn)
    if drawn_on_gpu is not None:
        torch.cuda.set_rng_state(drawn_on_gpu)
    answer = run()
    _computes[loss].add(model)
    return answer


def pieces(index: Tensor, words: int) -> tuple[Tensor, ...]:
    """Split predictions such that the logits of each part take `PIECE_BYTES`."""
    size = PIECE_BYTES * (1 if index.device.type == "cpu" else 8)
    return index.split(max(1, size // (4 * words)))


@torch.no_grad()
def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each prediction in float32, piece by piece; 0 where the label is -100.

    Parameters
    ----------
    logits : Tensor or LazyLogits, shape (..., classes)
    labels : Tensor of int64, shape (...)

    Examples
    --------
    >>> token_losses(torch.zeros(2, 2), torch.tensor([1, -100]))
    tensor([0.6931, 0.0000])
    """
    losses, flat = torch.zeros(labels.numel(), device=logits.device), labels.flatten()
    for index in pieces((flat != IGNORED).nonzero()[:, 0], logits.shape[-1]):
        rows = rows_at(logits, index)
        losses[index] = F.cross_entropy(rows.float(), flat[index], reduction="none")
    return losses.view(labels.shape)


@torch.no_grad()
def token_divergences(logits: Tensor, others: Tensor, labels: Tensor) -> Tensor:
    """KL(p || q) of each prediction in float32, piece by piece; 0 where the label is -100.

    Parameters
    ----------
    logits, others : Tensor or LazyLogits, shape (..., classes)
        Of p and of q.
    labels : Tensor of int64, shape (...)

    Examples
    --------
    >>> p, q = torch.tensor([[0.0, 0.0]] * 2), torch.tensor([[0.0, 1.0]] * 2)
    >>> token_divergences(p, q, torch.tensor([1, -100]))
    tensor([0.1201, 0.0000])
    """
    found, flat = torch.zeros(labels.numel(), device=logits.device), labels.flatten()
    for index in pieces((flat != IGNORED).nonzero()[:, 0], logits.shape[-1]):
        p = rows_at(logits, index).float().log_softmax(-1)
        q = rows_at(others, index.to(others.device)).to(p).log_softmax(-1)
        found[index] = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    return found.view(labels.shape)


def rows_at(logits: Tensor, index: Tensor) -> Tensor:
    """Return the logits of some predictions, counted through all leading dimensions."""
    lazy = isinstance(logits, LazyLogits)
    return logits.rows(index) if lazy else logits.flatten(0, -2)[index]


class _Watched(Tensor):
    """Inputs of an output layer whose product is looked for.

    Layers that compute it in a function of their own do so for plain tensors only.
    """


class _Operands(TorchFunctionMode):
    """Return the operands of a linear layer instead of its product."""

    def __init__(self, differentiate: bool) -> None:
        super().__init__()
        self.differentiate = differentiate

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.linear:
            return func(*args, **kwargs or {})
        if not torch.is_grad_enabled():  # what is multiplied there may be overwritten afterwards
            raise NeedsLogits("a product inside a function with a gradient of its own")
        inputs, weight, bias = _operands(*args, **kwargs or {})
        if type(inputs) is _Watched:
            inputs = inputs.as_subclass(Tensor)
        if not self.differentiate:
            inputs, weight, bias = (t if t is None else t.detach() for t in (inputs, weight, bias))
        kind = inputs.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            inputs, weight, bias = (
                t if t is None or t.dtype == torch.float64 else t.to(dtype)
                for t in (inputs, weight, bias)
            )
        plain = all(type(t) in (Tensor, nn.Parameter) for t in (inputs, weight))
        # gradients are computed before the loss is scaled up, which float16 does not survive
        halves = inputs.dtype == torch.float16 and self.differentiate
        if not plain or halves or inputs.dim() < 2 or weight.dim() != 2:
            raise NeedsLogits("another product")
        return LazyLogits(inputs, weight, bias)


def _operands(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple:
    return input, weight, bias


def _apply(tail: tuple, rows: Tensor, dims: int) -> Tensor:
    if not tail:
        return rows
    logits = rows.view(*[1] * (dims - 2), *rows.shape)  # as many dimensions as the model saw
    for step in tail:
        logits = step(logits)
    return logits.view(rows.shape)


def _output_layer(model: nn.Module) -> nn.Module | None:
    """Find the layer that computes logits, of a model of transformers that nothing compiled."""
    if not (hasattr(type(model), "get_output_embeddings") and hasattr(model, "config")):
        return None
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    # in a CUDA graph nothing may depend on which labels are scored
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return None
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module) or head._forward_hooks or head._forward_pre_hooks:
        return None
    for module in (model, head):
        if module._compiled_call_impl is not None or hasattr(
            vars(module).get("forward"), "_torchdynamo_orig_callable"
        ):
            return None
    return head


@contextmanager
def _without_product(head: nn.Module) -> Iterator[None]:
    forward = head.forward

    def operands(inputs, *args, **kwargs):
        watched = inputs.as_subclass(_Watched) if type(inputs) is Tensor else inputs
        differentiate = torch.is_grad_enabled()
        with torch.enable_grad(), _Operands(differentiate):
            answer = forward(watched, *args, **kwargs)
        if type(answer) is not _Watched:
            return answer
        answer = answer.as_subclass(Tensor)
        return answer if differentiate else answer.detach()

    with _replaced(head, "forward", operands):
        yield


@contextmanager
def _without_loss(model: nn.Module) -> Iterator[None]:
    known = getattr(model, "loss_function", None)
    name = getattr(known, "__name__", "")
    if name not in _LOSSES or not known.__module__.startswith("transformers."):
        yield
        return

    def put_off_loss(
        logits, labels, vocab_size, num_items_in_batch=None, ignore_index=IGNORED,
        shift_labels=None, **kwargs,
    ):  # fmt: skip
        if not isinstance(logits, LazyLogits):
            return known(logits, labels, vocab_size, num_items_in_batch, ignore_index,
                         shift_labels=shift_labels, **kwargs)  # fmt: skip
        targets = labels
        if _LOSSES[name]:
            following = F.pad(labels[..., 1:], (0, 1), value=IGNORED)
            targets = following if shift_labels is None else shift_labels
        if (ignore_index, vocab_size) != (IGNORED, logits.shape[-1]) or (
            targets.shape != logits.shape[:-1]
        ):
            raise NeedsLogits(name)
        return LazyLoss(logits, targets, num_items_in_batch)

    with _replaced(model, "_loss_function", put_off_loss):
        yield


@contextmanager
def _replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Give a module an attribute of its own for a while."""
    missing = object()
    before = vars(module).get(name, missing)
    setattr(module, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(module, name)
        else:
            setattr(module, name, before)
