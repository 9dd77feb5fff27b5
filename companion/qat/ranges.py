"""How the range of the weights is chosen while training, by method.

Built in chapters 10 and 11.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from companion.errors import SchemeError, WrongStage
from companion.numerics.affine import as_stored, quantize, symmetric_scale
from companion.numerics.rounding import Grid, can_be_fused, held_of, round_weight, rounded_linear
from companion.numerics.scheme import QuantScheme
from companion.numerics.search import best_ratio


class Absmax(nn.Module):
    """The grid follows the weights: the largest of each group always sits at its end.

    The scale is computed anew in every forward and rounded to the scheme's `scale_dtype`, so
    that training already sees the scale that conversion stores.

    Parameters
    ----------
    scheme : QuantScheme
    weight : Tensor, shape (rows, columns), optional
        The weights that it will round; methods that learn a range start from them.
    importance : Tensor, shape (columns,), optional
        What the errors of a column's weights count in a search: see `best_ratio`.

    Examples
    --------
    >>> quantizer = Absmax(QuantScheme(weight_bits=2, group_size=2))
    >>> quantizer(torch.tensor([[0.2, -1.5, 3.0, 1.0]]))
    tensor([[ 0., -2.,  2.,  0.]])
    """

    gradient_at_ends = True
    searches = False
    """Whether the range starts from a search that knows what the weights meet."""

    def __init__(
        self,
        scheme: QuantScheme,
        weight: Tensor | None = None,
        importance: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.enabled = True
        self.fingerprint: int | None = None  # of weights that nothing has trained so far
        self._importance: Tensor | None = None
        if weight is not None:
            self.restart(weight, importance)

    def restart(self, weight: Tensor, importance: Tensor | None = None) -> None:
        """Choose the ranges anew for the weights of this moment; a learned one stays a parameter.

        Parameters
        ----------
        weight : Tensor, shape (rows, columns)
        importance : Tensor, shape (columns,), optional
        """
        self._importance = importance
        self.start(weight)
        self._importance = None

    def start(self, weight: Tensor) -> None:
        """Choose the first range for these weights; nothing to do where it follows them."""

    def best_ratio(self, groups: Tensor) -> Tensor:
        """Search the ratio to start with, shape (..., groups, 1)."""
        importance = self._importance
        if importance is not None:
            importance = importance.view(groups.shape[-2:])
        return best_ratio(groups, self.scheme, importance)

    def groups(self, weight: Tensor) -> Tensor:
        """View the last dimension as (groups, group_size)."""
        return weight.view(*weight.shape[:-1], -1, self.scheme.group_size or weight.shape[-1])

    def scale(self, groups: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return one scale per group, shape (..., groups, 1).

        `rows` says which rows of the matrix these are, for embeddings; None means all.
        """
        return symmetric_scale(groups, self.scheme.weight_bits, self.scheme.scale_dtype)

    def forward(self, weight: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the fake-quantized weight, of the same shape and dtype."""
        self._notice_training(weight)
        if not self.enabled:
            return weight
        groups = self.groups(weight)
        return self.fake(groups, self.scale(groups, rows)).view_as(weight)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute ``F.linear(x, self(weight), bias)``, in one pass over the weight where it can."""
        if not (self.enabled and self._is_as_written() and can_be_fused(x, weight)):
            return F.linear(x, self(weight), bias)
        self._notice_training(weight)
        held = held_of(self, weight)
        scale = None if held is None else held.scale
        if scale is None:
            scale = self.scale(self.groups(weight))
            if held is not None and type(self).scale in _WITHOUT_GRADIENT:
                held.scale = scale
        return rounded_linear(x, weight, scale, bias, self.grid, held)

    def _notice_training(self, weight: Tensor) -> None:
        if self.fingerprint is not None and weight.requires_grad:
            self.fingerprint = None

    def _is_as_written(self) -> bool:
        """Whether nobody changed what `forward` does: a method of one's own, Accelerate, a hook."""
        return (
            type(self).fake is Absmax.fake
            and type(self).forward is Absmax.forward
            and not ("forward" in vars(self) or self._forward_hooks or self._forward_pre_hooks)
        )

    def check_rows(self, rows: int) -> None:
        """Raise if the matrix had another number of rows when its ranges were found."""

    def _load_from_state_dict(self, *args) -> None:
        self.fingerprint = None
        super()._load_from_state_dict(*args)

    @property
    def grid(self) -> Grid:
        """The integers, and where the straight-through gradient passes."""
        return Grid(*self.scheme.integers, self.scheme.scale_dtype, self.gradient_at_ends)

    def fake(self, groups: Tensor, scale: Tensor) -> Tensor:
        """Round to the grid with a straight-through gradient."""
        return round_weight(groups, scale, self.grid)

    @torch.no_grad()
    def integers(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return int8 of the weight's shape and scales of shape (..., groups): what is stored."""
        groups = self.groups(weight)
        scale = as_stored(self.scale(groups), self.scheme.scale_dtype)
        return quantize(groups, scale, bits=self.scheme.weight_bits).view_as(weight), scale[..., 0]

    def extra_repr(self) -> str:
        return f"{self.scheme.weight_bits} bits, group size {self.scheme.group_size or 'row'}"


class AbsmaxTorchaoGradient(Absmax):
    """Absmax with the gradient of torchao 0.18: none where a weight sits at an end of the grid.

    torchao rounds, then clamps; its gradient is that of a clamp applied to the rounded value.
    Kept as an arm to compare with; the forward is the same.

    Examples
    --------
    >>> weight = torch.tensor([[0.2, -1.5, 3.0, 1.0]], requires_grad=True)
    >>> AbsmaxTorchaoGradient(QuantScheme(weight_bits=2, group_size=2))(weight).sum().backward()
    >>> weight.grad
    tensor([[1., 0., 0., 1.]])
    """

    gradient_at_ends = False


class MSEClipped(Absmax):
    """The range that rounds the starting weights with the smallest squared error.

    Each group keeps the clip ratio found at the start; the scale is that ratio of the absmax
    scale, so the grid still follows the weights. A negative ratio turns the grid around: its
    one extra integer, -2**(bits - 1), then lies on the side where the group needs it. The idea
    of a signed scale is that of llama.cpp's Q4_0 format; it costs no byte.

    References
    ----------
    Sung et al., "Resiliency of deep neural networks under quantization", 2015 (the search for
    the step that minimises the squared error).

    Examples
    --------
    >>> weight = torch.tensor([[1.0, 1.0, 1.0, 2.0]])
    >>> MSEClipped(QuantScheme(2, 4, torch.float32), weight)(weight).round(decimals=1)
    tensor([[1., 1., 1., 2.]])
    """

    ratio: Tensor
    searches = True

    def start(self, weight: Tensor) -> None:
        groups = self.groups(weight.detach())
        self.register_buffer("ratio", self.best_ratio(groups))

    def check_rows(self, rows: int) -> None:
        _check_shape((rows, *self.ratio.shape[1:]), self.ratio)

    def scale(self, groups: Tensor, rows: Tensor | None = None) -> Tensor:
        ratio = _of_rows(self.ratio, groups, rows)
        absmax = symmetric_scale(groups, self.scheme.weight_bits)
        return as_stored(absmax * ratio, self.scheme.scale_dtype)


_WITHOUT_GRADIENT = Absmax.scale, MSEClipped.scale
"""Scales that may be kept while weights do not change: the graph of any other serves one way back."""


class LearnedStepSize(Absmax):
    """LSQ: the scale of each group is a parameter, with a gradient of its own.

    It starts where `MSEClipped` does. What the optimizer sees is `step`, the scale divided by
    its first value: one learning rate then moves scales by the same share of themselves in
    every layer, which is what their "own learning rate" has to achieve.

    A group with next to no weights, such as those of a layer that starts from zeros, offers no
    range to start from: a step fitted to it would clip every update away. Such a group `follows`:
    its scale grows with its weights as `MSEClipped`'s does, and `first` holds the ratio.

    References
    ----------
    Esser et al., "Learned step size quantization", ICLR 2020.

    Examples
    --------
    >>> weight = torch.tensor([[0.4, -0.9, 3.0, 1.2]])
    >>> quantizer = LearnedStepSize(QuantScheme(2, 2, torch.float32), weight)
    >>> quantizer(weight).sum().backward()
    >>> quantizer.step.grad.shape
    torch.Size([1, 2, 1])
    """

    first: Tensor
    follows: Tensor
    searches = True

    def start(self, weight: Tensor) -> None:
        groups = self.groups(weight.detach())
        ratio, quiet = self.best_ratio(groups), _is_quiet(groups)
        fitted = symmetric_scale(groups, self.scheme.weight_bits) * ratio
        self._start(torch.where(quiet, ratio, fitted), quiet)

    def start_at(self, scale: Tensor) -> None:
        """Begin with given scales, shape (rows, groups, 1): after GPTQ, for example."""
        nothing = scale.detach().abs() <= _SCALE_OF_NOTHING
        self._start(scale.detach().float().masked_fill(nothing, 1), nothing)

    def check_rows(self, rows: int) -> None:
        _check_shape((rows, *self.first.shape[1:]), self.first)

    def _start(self, first: Tensor, follows: Tensor) -> None:
        self.fingerprint = None
        self.register_buffer("first", first)
        self.register_buffer("follows", follows.squeeze(-1))
        if isinstance(getattr(self, "step", None), nn.Parameter):  # which an optimizer may hold
            self.step.data.fill_(1)
        else:
            self.step = nn.Parameter(torch.ones_like(first))
        self._some_follow = bool(follows.any())  # kept, since asking a GPU takes time

    def scale(self, groups: Tensor, rows: Tensor | None = None) -> Tensor:
        step, first = _of_rows(self.step, groups, rows), _of_rows(self.first, groups, rows)
        if self._some_follow:
            places = self.follows if rows is None else self.follows[rows]
            absmax = symmetric_scale(groups[places], self.scheme.weight_bits)
            first = first.index_put((places,), (absmax * first[places]).to(first.dtype))
        return step * first

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # a state saved before groups could follow
        state_dict.setdefault(f"{prefix}follows", torch.zeros_like(self.follows))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._some_follow = bool(self.follows.any())


def _of_rows(kept: Tensor, groups: Tensor, rows: Tensor | None) -> Tensor:
    """What is kept per group, for the rows that were looked up or for the whole matrix."""
    if rows is not None:
        return kept[rows]
    _check_shape((*groups.shape[:-1], 1), kept)
    return kept


def _check_shape(shape: tuple[int, ...], kept: Tensor) -> None:
    if shape != kept.shape:
        raise WrongStage(
            f"a weight of {shape[0]} rows with {shape[1]} groups does not fit the ranges found "
            f"when it had {len(kept)} with {kept.shape[1]}: change the model "
            "(resize_token_embeddings and the like) before prepare_qat()"
        )


def _is_quiet(groups: Tensor) -> Tensor:
    """Which groups hold next to nothing, beside the others and beside a usual initialisation."""
    largest = groups.float().abs().amax(-1, keepdim=True)
    columns = groups.shape[-1] * groups.shape[-2]
    usual = largest.median().clamp(min=columns**-0.5)
    return largest < _QUIET * usual


def fingerprint_of(weight: Tensor) -> int:
    """Sum the bytes of a weight as integers: exact, and the same on any number of threads.

    Examples
    --------
    >>> fingerprint_of(torch.zeros(2, 2)), fingerprint_of(torch.ones(2, 2)) != 0
    (0, True)
    """
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return int(weight.detach().contiguous().view(integers).sum(dtype=torch.int64))


_QUIET = 0.1
"""Below this share of a usual group's largest weight a group has its growing still to do."""
_SCALE_OF_NOTHING = 2 * torch.finfo(torch.float32).eps
"""`choose_scale` gives groups of zeros the smallest scale it has; nothing above it is one."""

METHODS: dict[str, type[Absmax]] = {
    "absmax": Absmax,
    "absmax-torchao-gradient": AbsmaxTorchaoGradient,
    "mse": MSEClipped,
    "lsq": LearnedStepSize,
}


def make_quantizer(
    scheme: QuantScheme,
    method: str | type[Absmax] = "absmax",
    weight: Tensor | None = None,
    importance: Tensor | None = None,
) -> Absmax:
    """Return a fresh weight quantizer of a method, by name or by class.

    Parameters
    ----------
    scheme : QuantScheme
    method : str or subclass of Absmax
    weight : Tensor, shape (rows, columns), optional
        What it will round, for methods whose range starts from the weights.
    importance : Tensor, shape (columns,), optional
        For methods whose range starts from a search.

    Examples
    --------
    >>> make_quantizer(QuantScheme(weight_bits=4))
    Absmax(4 bits, group size 32)
    """
    if method in METHODS:
        method = METHODS[method]
    elif not (isinstance(method, type) and issubclass(method, Absmax)):
        raise SchemeError(f"method {method!r} is unknown: choose one of {', '.join(METHODS)}")
    # a class of one's own need not know of the last argument
    return method(scheme, weight, **({} if importance is None else {"importance": importance}))
