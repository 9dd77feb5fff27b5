"""How well a language model predicts: perplexity, paired losses, the share that training recovers.

Built in chapters 8 (perplexity) and 10 (recovery).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from companion.data.text import IGNORED
from companion.errors import expect
from companion.evaluation.estimates import TAILS, Estimate, Scores, summed
from companion.evaluation.forward import losses, rows_of


@dataclass(frozen=True)
class DocumentLosses:
    """Negative log-likelihood of a model on each document, in nats, and the tokens scored.

    Parameters
    ----------
    loss : ndarray of float, shape (documents,)
        Summed over the document's tokens.
    tokens : ndarray of int, shape (documents,)
    """

    loss: np.ndarray
    tokens: np.ndarray

    @property
    def mean(self) -> float:
        """Mean loss per token: long documents weigh more, as in perplexity."""
        return float(self.loss.sum() / self.tokens.sum())

    def resampled(self, seed: int = 0) -> np.ndarray:
        """Mean loss per token of 10,000 bootstrap resamples of the documents.

        Equal seeds draw equal documents, which pairs the resamples of two models.
        """
        return Scores(self.loss, self.tokens).resampled(seed)


def document_losses(model: nn.Module, loader: Iterable) -> DocumentLosses:
    """Measure a model's loss on each document (or example) of a loader, in eval mode.

    Parameters
    ----------
    model : nn.Module
        Language models are called with ``input_ids`` (and what else the batch has), and their
        output carries ``logits`` of shape (rows, tokens, vocabulary); classifiers answer with
        one row of scores for each example, or for each token (models of transformers that end
        in ``ForTokenClassification``).
    loader : iterable of dict, or of (inputs, labels)
        ``labels``, int64: shape (rows, tokens), -100 is not scored, each token is predicted
        from those before it; or shape (rows,) for classifiers. Rows with equal ``document``
        belong together; without it each row is a document.

    Returns
    -------
    DocumentLosses
        For classifiers each example counts as one token.

    Raises
    ------
    EmptyLoader
        If there is no batch, or no token to score.
    UnsupportedModel
        If the model has no head for these labels.
    UnreadableBatch
        If the model does not take what the batches hold.
    """
    sums = summed(by_row(losses(model, loader)))
    return DocumentLosses(sums.total, sums.weight)


def by_row(
    measured: Iterable[tuple[Any, Tensor, Tensor]],
) -> Iterator[tuple[Any, float, int]]:
    """Add up what was measured of each token, row by row.

    Parameters
    ----------
    measured : iterable of (batch, values, labels)
        As from `companion.evaluation.forward.losses`.

    Yields
    ------
    document, total, scored tokens
    """
    rows = 0
    for batch, found, labels in measured:
        yield from zip(
            rows_of(batch, labels, rows),
            found.reshape(len(labels), -1).cpu().double().sum(1).tolist(),
            (labels != IGNORED).reshape(len(labels), -1).sum(1).tolist(),
            strict=True,
        )
        rows += len(labels)


def perplexity(model: nn.Module, loader: Iterable) -> Estimate:
    """Token-weighted perplexity with a bootstrap 95 % interval over documents.

    The exponential of the mean negative log-likelihood per token (Jelinek et al., 1977).
    Documents are resampled, not tokens, because the tokens of a document go together.

    Parameters
    ----------
    model : nn.Module
    loader : iterable of dict
        As in `document_losses`.

    Returns
    -------
    Estimate
        n is the number of documents.

    Examples
    --------
    >>> import torch
    >>> from types import SimpleNamespace
    >>> class Uniform(nn.Module):
    ...     def forward(self, input_ids):
    ...         return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 50))
    >>> tokens = torch.zeros(4, 8, dtype=torch.int64)
    >>> print(perplexity(Uniform(), [{"input_ids": tokens, "labels": tokens}]))
    50.000 [50.000, 50.000] (n = 4)
    """
    expect("perplexity", "model", model, nn.Module)
    return as_perplexity(document_losses(model, loader))


def as_perplexity(losses: DocumentLosses) -> Estimate:
    """Turn measured losses into a perplexity with its interval.

    Examples
    --------
    >>> print(as_perplexity(DocumentLosses(np.array([2.0, 2.0]), np.array([1, 1]))))
    7.389 [7.389, 7.389] (n = 2)
    """
    low, high = np.quantile(losses.resampled(), TAILS)
    values = (float(np.exp(x)) for x in (losses.mean, low, high))
    return Estimate(*values, len(losses.loss), "bootstrap over documents")


def loss_difference(first: DocumentLosses, second: DocumentLosses) -> Estimate:
    """Mean loss per token of the first model minus the second, paired by document, in nats.

    Parameters
    ----------
    first, second : DocumentLosses
        On the same documents.

    Examples
    --------
    >>> a = DocumentLosses(np.array([2.0, 4.0]), np.array([1, 1]))
    >>> b = DocumentLosses(np.array([1.0, 3.0]), np.array([1, 1]))
    >>> print(loss_difference(a, b))
    1.000 [1.000, 1.000] (n = 2)
    """
    if not np.array_equal(first.tokens, second.tokens):
        raise ValueError("the two models were not measured on the same documents")
    low, high = np.quantile(first.resampled() - second.resampled(), TAILS)
    n = len(first.loss)
    return Estimate(first.mean - second.mean, float(low), float(high), n, "paired bootstrap")


@dataclass(frozen=True)
class Recovery:
    """How much of the damage of rounding a trained model took back.

    Parameters
    ----------
    share : Estimate or None
        1 means all of it; None where there was nothing to recover.
    damage : Estimate
        Loss of the rounded control minus the control's, in nats per token.
    """

    share: Estimate | None
    damage: Estimate

    def __str__(self) -> str:
        if self.share is None:
            return f"nothing to recover (damage {self.damage})"
        return f"{self.share.value:.0%} [{self.share.low:.0%}, {self.share.high:.0%}]"


def recovery(control: DocumentLosses, ptq: DocumentLosses, qat: DocumentLosses) -> Recovery:
    """Share of the damage of rounding that training took back: (ptq - qat) / (ptq - control).

    Parameters
    ----------
    control : DocumentLosses
        The float model fine-tuned for as many steps, on the same batches, as `qat`.
    ptq : DocumentLosses
        That control, rounded to nearest.
    qat : DocumentLosses
        The model trained under fake quantization, from the same start.

    Returns
    -------
    Recovery
        Its share is None ("nothing to recover") where the damage is not clearly above zero.

    Examples
    --------
    >>> tokens = np.full(3, 10)
    >>> arms = [DocumentLosses(np.full(3, x), tokens) for x in (30.0, 40.0, 32.0)]
    >>> print(recovery(*arms))
    80% [80%, 80%]
    """
    expect("recovery", "control", control, DocumentLosses)
    expect("recovery", "ptq", ptq, DocumentLosses)
    expect("recovery", "qat", qat, DocumentLosses)
    damage = loss_difference(ptq, control)
    if damage.low <= 0:
        return Recovery(None, damage)
    loss_difference(qat, control)  # the same documents, or an error
    c, p, q = (arm.resampled() for arm in (control, ptq, qat))
    low, high = np.quantile((p - q) / (p - c), TAILS)
    value = (ptq.mean - qat.mean) / (ptq.mean - control.mean)
    n = len(ptq.loss)
    return Recovery(Estimate(value, float(low), float(high), n, "paired bootstrap"), damage)
