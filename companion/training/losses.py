"""What training minimises: the labels' cross-entropy, or the distance to a teacher's answers.

Built in chapters 2 (cross-entropy) and 11 (distillation).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from companion.data.text import IGNORED
from companion.errors import NothingToTrain, UnsupportedModel
from companion.evaluation.logits import LazyLogits, LazyLoss, put_off
from companion.training.batches import count_rows
from companion.training.chunked import Imitation, TopK, chunked_loss
from companion.training.state import kept_modes

LossFn = Callable[[nn.Module, Any], Tensor]
_IN_PLACE = ("TokenClassification", "MaskedLM", "PreTraining")
NOTHING_SCORED = (
    "no prediction of the batch is scored: all its labels are -100 (or padding). Does the prompt fill "
    "the whole context, or was the answer cut off? Shorten prompts or leave such rows out"
)


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy for ``(inputs, labels)`` pairs; the model's own loss for dict batches.

    Where that is the cross-entropy of transformers, the logits are computed only where a label is
    scored, and a piece at a time; the loss is the same but for rounding, and can be differentiated
    once.

    Examples
    --------
    >>> float(default_loss(nn.Identity(), (torch.zeros(1, 2), torch.tensor([0]))))
    0.6931471824645996
    """
    if isinstance(batch, Mapping):
        loss = _own_loss(_ask(model, batch))
        return chunked_loss(loss.logits, loss) if isinstance(loss, LazyLoss) else loss
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)


def distillation_loss(
    teacher: nn.Module, temperature: float = 1.0, share: float = 1.0, *, reverse: bool = False
) -> LossFn:
    """Return a loss that draws a model's predictions to those of a teacher.

    ``share * T**2 * KL(teacher || student) + (1 - share) * default_loss``, the divergence taken
    between softmax outputs at temperature T and averaged over the predictions that are scored:

    - in language models those whose label is not -100, so that prompts are left out. The
      prediction at position t is scored by the label at t + 1, in encoders that fill in masked
      words or label tokens, and in encoder-decoders, by the label at t. Without labels every token
      counts;
    - in either case padding, where `attention_mask` is 0, does not count;
    - in classifiers every example counts: labels do not matter.

    Of language models of transformers, only the logits of such predictions are computed, a piece at
    a time.

    Parameters
    ----------
    teacher : nn.Module
        Usually the float model that was rounded, fine-tuned. Not trained: it computes in eval mode
        and without gradients, on the device of the model.
    temperature : float
        Above 1 flattens both distributions, so that improbable answers weigh more.
    share : float
        Of the divergence in the loss, 0 to 1; the rest is the cross-entropy with the labels.
    reverse : bool
        Take ``KL(student || teacher)``. Forward, the student is drawn to cover all that the teacher
        might say; reverse, to say nothing that the teacher would not.

    Returns
    -------
    callable
        ``loss(model, batch)``, as `fit` takes it.

    Raises
    ------
    NothingToTrain
        By the loss, if no prediction of a batch is scored, or if a model is its own teacher.

    References
    ----------
    Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015. Gu et al.,
    "MiniLLM: knowledge distillation of large language models", ICLR 2024 (the reverse divergence).

    Examples
    --------
    >>> teacher, batch = nn.Linear(2, 3), (torch.ones(4, 2), torch.zeros(4, dtype=torch.int64))
    >>> student = nn.Linear(2, 3)
    >>> _ = student.load_state_dict(teacher.state_dict())
    >>> abs(float(distillation_loss(teacher)(student, batch))) < 1e-6
    True
    """
    teacher.eval()
    return Distillation(teacher, temperature, share, reverse)


@dataclass(frozen=True)
class Distillation:
    """What `distillation_loss` returns: a loss that can be described and counted."""

    teacher: Any
    temperature: float
    share: float
    reverse: bool = False

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 < self.share <= 1:
            raise ValueError("temperature must be above 0, and share above 0 and at most 1")

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        if model is self.teacher:
            raise NothingToTrain(
                "the teacher is the model itself, whose answers it gives already: pass the float "
                "model that was prepared, or a copy.deepcopy of the model from before"
            )
        student, cross_entropy = answer(model, batch, labelled=self.share < 1)
        counted = counted_of(model, batch, student)
        target = self.target(model, batch, counted)
        if student.shape != target.shape:
            raise ValueError(
                f"the teacher answers with shape {tuple(target.shape)}, the model with "
                f"{tuple(student.shape)}: both need the same head and vocabulary"
            )
        if not counted.any():
            raise NothingToTrain(NOTHING_SCORED)
        if isinstance(student, LazyLogits) and isinstance(target, (LazyLogits, TopK)):
            return self._in_pieces(student, target, counted, cross_entropy)
        student, target = (t.whole() if isinstance(t, LazyLogits) else t for t in (student, target))
        if isinstance(cross_entropy, LazyLoss):
            cross_entropy = chunked_loss(cross_entropy.logits, cross_entropy)
        given = F.log_softmax(student[counted] / self.temperature, -1)
        if isinstance(target, TopK):
            wanted = target.log_probs_of(counted.flatten().nonzero()[:, 0], given.detach())
        else:
            wanted = F.log_softmax(target[counted] / self.temperature, -1)
        one, other = (wanted, given) if self.reverse else (given, wanted)
        divergence = F.kl_div(one, other, reduction="batchmean", log_target=True)
        loss = self.share * self.temperature**2 * divergence
        return loss if cross_entropy is None else loss + (1 - self.share) * cross_entropy

    def _in_pieces(
        self,
        student: LazyLogits,
        target: LazyLogits | TopK,
        counted: Tensor,
        cross_entropy: Tensor | None,
    ) -> Tensor:
        factor = self.share * self.temperature**2
        imitation = Imitation(target, counted, self.temperature, factor, self.reverse)
        if not isinstance(cross_entropy, LazyLoss):
            loss = chunked_loss(student, imitation=imitation)
            return loss if cross_entropy is None else loss + (1 - self.share) * cross_entropy
        return chunked_loss(student, cross_entropy, imitation, 1 - self.share)

    def scored(self, model: nn.Module, batch: Any) -> int:
        """Predictions that the divergence is a mean over."""
        labels, tokens = _labels(batch), isinstance(batch, Mapping) and batch.get("input_ids")
        if labels is not None and (labels.dim() == 1 or labels.is_floating_point()):
            return count_rows(batch)  # of a classifier, whose labels do not matter
        if not isinstance(batch, Mapping):
            return count_rows(batch) if labels is None else int((labels != IGNORED).sum())
        if labels is None and (not isinstance(tokens, Tensor) or _answers_by_row(model)):
            return count_rows(batch)
        shape = (tokens if labels is None else labels).shape
        return int(_token_mask(model, batch, shape).sum())

    def target(self, model: nn.Module, batch: Any, counted: Tensor) -> Tensor | LazyLogits | TopK:
        """Return what the predictions of a batch are drawn to."""
        place, own = (next(m.parameters(), None) for m in (model, self.teacher))
        if place is not None and own is not None and own.device != place.device:
            self.teacher.to(place.device)
        # layers that it shares with the model train on in the modes that they had
        with torch.no_grad(), kept_modes(self.teacher):
            self.teacher.eval()
            return answer(self.teacher, batch)[0]


def answer(model: nn.Module, batch: Any, labelled: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return the logits of one forward pass, classes last, and if asked the cross-entropy.

    Examples
    --------
    >>> answer(nn.Identity(), (torch.zeros(1, 2), torch.tensor([0])))
    (tensor([[0., 0.]]), None)
    """
    if isinstance(batch, Mapping):
        output = _ask(model, batch)
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise UnsupportedModel(
                f"{type(model).__name__} answers without logits, which a teacher is imitated "
                "by: write a loss_fn that compares what it does answer"
            )
        images = logits.dim() > 3  # (batch, classes, height, width)
        return logits.movedim(1, -1) if images else logits, _own_loss(output) if labelled else None
    inputs, labels = batch
    logits = model(inputs)
    return (
        logits.movedim(1, -1) if logits.dim() > 2 else logits,
        F.cross_entropy(logits, labels) if labelled else None,
    )


def count_scored(loss_fn: LossFn, model: nn.Module, batch: Any) -> int:
    """Count what the loss of a batch is a mean over: labelled tokens or pixels, otherwise rows.

    A batch without tensors counts as one.

    A loss function of your own can say it by a method ``scored(model, batch)``; otherwise the labels
    decide, as for `default_loss`.

    Examples
    --------
    >>> labels = torch.tensor([[-100, -100, 7, 8], [1, 2, 3, -100]])
    >>> count_scored(default_loss, nn.Identity(), {"labels": labels})  # the first of a row is given
    4
    """
    if hasattr(loss_fn, "scored"):
        return loss_fn.scored(model, batch)
    labels = _labels(batch)
    if labels is None or labels.is_floating_point() or labels.dim() == 0:
        return count_rows(batch, default=1)
    if isinstance(batch, Mapping) and labels.dim() == 2 and _predicts_the_next(model):
        labels = labels[:, 1:]
    return int((labels != IGNORED).sum())


def _ask(model: nn.Module, batch: Mapping) -> Any:
    """Return a model's answer, whose logits and loss may be lazy."""
    given = {key: value for key, value in batch.items() if key != "document"}
    return put_off(model, lambda: model(**given), loss=True)


def _own_loss(output: Any) -> Tensor:
    loss = getattr(output, "loss", None)
    if loss is None:
        raise NothingToTrain(
            "the model returned no loss: put 'labels' into the batch, or pass a loss_fn (a teacher "
            "needs no labels)"
        )
    return loss


def _labels(batch: Any) -> Tensor | None:
    if isinstance(batch, Mapping):
        labels = batch.get("labels")
    else:
        labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    return labels if isinstance(labels, Tensor) else None


def counted_of(model: nn.Module, batch: Any, logits: Tensor) -> Tensor:
    """Mark the predictions that count; their classes are the last dimension of the logits.

    Examples
    --------
    >>> batch = {"labels": torch.tensor([[-100, -100, 7]])}  # the second token predicts the third
    >>> counted_of(nn.Identity(), batch, torch.zeros(1, 3, 9))
    tensor([[False,  True, False]])
    """
    everything = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    labels = _labels(batch)
    if labels is not None and labels.is_floating_point():
        labels = None
    if logits.dim() == 2 or (isinstance(batch, Mapping) and logits.dim() > 3):
        return everything
    if labels is not None and labels.dim() > 1 and labels.shape != everything.shape:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} do not say which of the model's "
            f"{tuple(everything.shape)} predictions count: give one label for each"
        )
    if isinstance(batch, Mapping):
        return _token_mask(model, batch, everything.shape).to(logits.device)
    return everything if labels is None else labels != IGNORED


def _token_mask(model: nn.Module, batch: Mapping, shape: torch.Size) -> Tensor:
    """Mark the tokens whose prediction counts, by labels and padding."""
    decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    mask = batch.get("decoder_attention_mask" if decoder else "attention_mask")
    mask = mask.bool() if isinstance(mask, Tensor) and mask.shape == shape else None
    labels = _labels(batch)
    if labels is None or labels.shape != shape or labels.is_floating_point():
        return torch.ones(shape, dtype=torch.bool) if mask is None else mask
    kept = labels != IGNORED if mask is None else (labels != IGNORED) & mask
    if not _predicts_the_next(model):
        return kept
    last = torch.zeros_like(kept[:, :1])
    return torch.cat([kept[:, 1:], last], 1)


def _predicts_the_next(model: nn.Module) -> bool:
    """Whether the prediction at a token is of the one after it, as transformers shifts labels."""
    names = f"{getattr(model, 'loss_type', None)} {type(model).__name__}"
    decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return not decoder and not any(name in names for name in _IN_PLACE)


def _answers_by_row(model: nn.Module) -> bool:
    names = f"{getattr(model, 'loss_type', None)} {type(model).__name__}"
    return "Classification" in names and "TokenClassification" not in names
