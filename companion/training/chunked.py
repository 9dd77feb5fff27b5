"""Losses over a large vocabulary whose logits never exist at once.

The gradient of a softmax is known as soon as the softmax is. So each piece of the logits gives its
loss and its gradients and is forgotten; the backward pass finds them computed.
Built in chapter 11.

References
----------
Hsu et al., "Liger Kernel: efficient Triton kernels for LLM training", 2024 (the linear layer and
the cross-entropy fused, gradients computed in the forward pass).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from companion.data.text import IGNORED
from companion.evaluation.logits import LazyLogits, LazyLoss, pieces


@dataclass(frozen=True)
class TopK:
    """A teacher's most probable tokens, and what is left of its probability in one bucket.

    Compared are the k tokens and the bucket, for which the student's probabilities of all other
    tokens are added up. That divergence is never above the whole one, and equal to it where k is
    all tokens.

    Parameters
    ----------
    tokens : Tensor of int64, shape (predictions, k)
    log_probs : Tensor, shape (predictions, k)
    rest : Tensor, shape (predictions,)
        Logarithm of the bucket's probability.
    places : Tensor of int64, shape (all,)
        For each of a batch's predictions the one here; any number where it does not count.
    shape : tuple of int
        Of the teacher's logits.

    Examples
    --------
    >>> top = TopK(torch.tensor([[2]]), torch.tensor([[0.5]]).log(), torch.tensor([0.5]).log(),
    ...            torch.tensor([0]), (1, 3))
    >>> top.log_probs_of(torch.tensor([0]), torch.tensor([[0.6, 0.2, 0.2]]).log()).exp()
    tensor([[0.3750, 0.1250, 0.5000]])
    """

    tokens: Tensor
    log_probs: Tensor
    rest: Tensor
    places: Tensor
    shape: tuple[int, ...]

    def log_probs_of(self, index: Tensor, given: Tensor) -> Tensor:
        """Complete the teacher's distribution by spreading the bucket as the student does.

        The divergence between k + 1 outcomes, and its gradient, are then those of a full
        distribution that is held fixed, in either direction.

        Parameters
        ----------
        index : Tensor of int64, shape (rows,)
            Which of the batch's predictions.
        given : Tensor, shape (rows, words)
            The student's log-probabilities, without a gradient.
        """
        place = self.places[index]
        tokens, log_probs = self.tokens[place], self.log_probs[place].to(given.dtype)
        if tokens.shape[1] == given.shape[1]:
            return torch.empty_like(given).scatter_(1, tokens, log_probs)
        elsewhere = given.scatter(1, tokens, -torch.inf).logsumexp(1, keepdim=True)
        bucket = self.rest[place, None].to(given.dtype) - elsewhere
        return (given + bucket).scatter_(1, tokens, log_probs)


@dataclass(frozen=True)
class Imitation:
    """What `chunked_loss` draws predictions to.

    Parameters
    ----------
    teacher : LazyLogits or TopK
        Of the shape of the student's. Stored answers were given at this temperature.
    counted : Tensor of bool
        Which predictions the divergence is a mean over.
    temperature : float
    factor : float
        Of the mean divergence in the loss.
    reverse : bool
        KL(student || teacher) instead of KL(teacher || student).
    """

    teacher: LazyLogits | TopK
    counted: Tensor
    temperature: float = 1.0
    factor: float = 1.0
    reverse: bool = False


def chunked_loss(
    logits: LazyLogits,
    labels: LazyLoss | None = None,
    imitation: Imitation | None = None,
    share: float = 1.0,
) -> Tensor:
    """Compute cross-entropy with labels, divergence from a teacher, or both, piece by piece.

    Parameters
    ----------
    logits : LazyLogits
    labels : LazyLoss, optional
        The cross-entropy of these logits.
    imitation : Imitation, optional
    share : float
        Of the cross-entropy in the loss.

    Returns
    -------
    Tensor
        A float32 scalar (float64 for logits in float64). Its gradients reach the output layer's
        inputs, weight and bias; it can be differentiated once.

    Examples
    --------
    >>> logits = LazyLogits(torch.zeros(1, 2, 3), torch.ones(4, 3))
    >>> chunked_loss(logits, LazyLoss(logits, torch.tensor([[1, -100]])))
    tensor(1.3863)
    """
    targets = weights = counts = scored = None
    if labels is not None:
        targets = labels.targets.flatten()
        has_label = targets != IGNORED
        items = has_label.sum() if labels.items is None else torch.as_tensor(labels.items)
        weights = has_label * (share / items.to(logits.device))
        targets = targets.where(has_label, 0)
        scored = has_label
    if imitation is not None:
        counted = imitation.counted.flatten()
        counts = counted * (imitation.factor / counted.sum())
        scored = counted if scored is None else scored | counted
    index = scored.nonzero()[:, 0]
    inputs = logits.inputs.flatten(0, -2)[index]
    if not len(index):
        return inputs.sum() / 0  # the mean of nothing
    targets, weights, counts = (t if t is None else t[index] for t in (targets, weights, counts))
    score = _Score(logits, index, targets, weights, imitation, counts)
    return _Chunked.apply(inputs, logits.weight, logits.bias, score, torch.is_grad_enabled())


@dataclass(frozen=True)
class _Score:
    """The loss of rows of logits, and how it changes with them."""

    logits: LazyLogits
    index: Tensor  # which predictions the rows are
    targets: Tensor | None
    weights: Tensor | None
    imitation: Imitation | None
    counts: Tensor | None

    def __call__(self, rows: Tensor, part: slice, differentiate: bool) -> tuple[Tensor, Tensor]:
        """Return the loss, summed, and its derivative by the output layer's product."""
        if not self.logits.tail:
            return self._score(rows, part)
        with torch.set_grad_enabled(differentiate):
            finished = self.logits.finish(rows.requires_grad_(differentiate))
        loss, gradient = self._score(finished.detach(), part)
        if differentiate:
            (gradient,) = torch.autograd.grad(finished, rows, gradient.to(finished.dtype))
        return loss, gradient

    def _score(self, rows: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        if rows.dtype != torch.float64:
            rows = rows.float()
        loss, gradient = rows.new_zeros(()), None
        if self.imitation is not None:
            loss, gradient = self._imitate(rows, part)
        if self.targets is not None:
            targets, weights = self.targets[part, None], self.weights[part, None].to(rows.dtype)
            logs = rows.log_softmax(-1)
            loss = loss - (weights * logs.gather(1, targets)).sum()
            slope = logs.exp_().mul_(weights).scatter_add_(1, targets, -weights)
            gradient = slope if gradient is None else gradient.add_(slope)
        return loss, gradient

    def _imitate(self, rows: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        temperature, counts = self.imitation.temperature, self.counts[part, None].to(rows.dtype)
        teacher = self.imitation.teacher
        if isinstance(teacher, TopK):
            given = (rows / temperature).log_softmax(-1)
            wanted = teacher.log_probs_of(self.index[part], given)
        else:
            target = teacher.rows(self.index[part]).to(rows.dtype)
            wanted = target.div_(temperature).log_softmax(-1)
            given = (rows / temperature).log_softmax(-1)
        if self.imitation.reverse:
            apart, given = given - wanted, given.exp_()
            mean = (given * apart).sum(1, keepdim=True)
            return (mean * counts).sum(), apart.sub_(mean).mul_(given).mul_(counts / temperature)
        apart = wanted - given
        wanted, given = wanted.exp_(), given.exp_()
        loss = (apart.mul_(wanted).sum(1, keepdim=True) * counts).sum()
        return loss, given.sub_(wanted).mul_(counts / temperature)


class _Chunked(torch.autograd.Function):
    """A linear layer and a loss of its rows, neither kept whole."""

    @staticmethod
    def forward(ctx, inputs, weight, bias, score, differentiate):
        ctx.save_for_backward(inputs, weight, bias)
        ctx.score = score
        needed = tuple(n and differentiate for n in ctx.needs_input_grad[:3])
        loss, ctx.gradients = _compute(inputs, weight, bias, score, needed)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():  # by create_graph
            raise RuntimeError(
                "this loss is differentiated once: for second derivatives pass a loss_fn of your "
                "own, such as lambda model, batch: model(**batch).loss"
            )
        operands = ctx.saved_tensors  # raises if one was changed since
        # handed over and not kept, so that no copy is made of them; asked again, computed again
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            _, gradients = _compute(*operands, ctx.score, ctx.needs_input_grad[:3])
        if upstream.device.type != "cpu" or upstream != 1:
            gradients = [g if g is None else g.mul_(upstream.to(g.dtype)) for g in gradients]
        return (*gradients, None, None)


def _compute(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, score: _Score, needed: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the loss and its gradients by the first three, None for what is not needed."""
    wide = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    total = torch.zeros((), dtype=wide, device=inputs.device)
    by_inputs = torch.empty_like(inputs) if needed[0] else None
    by_weight = by_bias = None
    start = 0
    for part in pieces(score.index, len(weight)):
        rows = slice(start, start := start + len(part))
        product = F.linear(inputs[rows], weight, bias)
        loss, gradient = score(product, rows, any(needed))
        del product
        total += loss
        gradient = gradient.to(inputs.dtype)
        if needed[0]:
            torch.mm(gradient, weight, out=by_inputs[rows])
        if needed[1]:  # sums in float32, whatever is multiplied in
            if by_weight is None:
                by_weight = (gradient.t() @ inputs[rows]).to(wide)
            elif inputs.dtype == wide:
                by_weight.addmm_(gradient.t(), inputs[rows])
            else:
                by_weight += gradient.t() @ inputs[rows]
        if needed[2]:
            piece = gradient.sum(0, dtype=wide)
            by_bias = piece if by_bias is None else by_bias.add_(piece)
    return total, [g if g is None else g.to(t.dtype) for g, t in
                   zip((by_inputs, by_weight, by_bias), (inputs, weight, bias), strict=True)]  # fmt: skip
