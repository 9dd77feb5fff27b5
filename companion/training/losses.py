"""What training minimises: the labels' cross-entropy, or the distance to a teacher's answers.

Built in chapters 2 (cross-entropy) and 11 (distillation).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LossFn = Callable[[nn.Module, Any], Tensor]


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy for ``(inputs, labels)`` pairs; the model's own loss for dict batches.

    Examples
    --------
    >>> float(default_loss(nn.Identity(), (torch.zeros(1, 2), torch.tensor([0]))))
    0.6931471824645996
    """
    if isinstance(batch, Mapping):
        return model(**{key: value for key, value in batch.items() if key != "document"}).loss
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)


def distillation_loss(teacher: nn.Module, temperature: float = 1.0, share: float = 1.0) -> LossFn:
    """Return a loss that draws a model's predictions to those of a teacher.

    ``share * T**2 * KL(teacher || student) + (1 - share) * default_loss``, the divergence taken
    between softmax outputs at temperature T and averaged over predictions (tokens, or examples);
    padding, where `attention_mask` is 0, does not count.

    Parameters
    ----------
    teacher : nn.Module
        Usually the float model that was rounded, fine-tuned. Put into eval mode, not trained.
    temperature : float
        Above 1 flattens both distributions, so that improbable answers weigh more.
    share : float
        Of the divergence in the loss, 0 to 1; the rest is the cross-entropy with the labels.

    Returns
    -------
    callable
        ``loss(model, batch)``, as `fit` takes it.

    References
    ----------
    Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015.

    Examples
    --------
    >>> teacher, batch = nn.Linear(2, 3), (torch.ones(4, 2), torch.zeros(4, dtype=torch.int64))
    >>> abs(float(distillation_loss(teacher)(teacher, batch))) < 1e-6
    True
    """
    if temperature <= 0 or not 0 < share <= 1:
        raise ValueError("temperature must be above 0, and share above 0 and at most 1")
    teacher.eval()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if (first := next(model.parameters(), None)) is not None:
            teacher.to(first.device)
        student, cross_entropy = _answer(model, batch)
        with torch.no_grad():
            target, _ = _answer(teacher, batch)
        if student.shape != target.shape:
            raise ValueError(
                f"the teacher answers with shape {tuple(target.shape)}, the model with "
                f"{tuple(student.shape)}: both need the same head and vocabulary"
            )
        counted = _counted(batch, student)
        divergence = F.kl_div(
            F.log_softmax(student[counted] / temperature, -1),
            F.log_softmax(target[counted] / temperature, -1),
            reduction="batchmean",
            log_target=True,
        )
        return share * temperature**2 * divergence + (1 - share) * cross_entropy

    return loss


def _answer(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Return a model's logits and its cross-entropy from one forward pass."""
    if isinstance(batch, Mapping):
        output = model(**{key: value for key, value in batch.items() if key != "document"})
        return output.logits, output.loss
    inputs, labels = batch
    logits = model(inputs)
    return logits, F.cross_entropy(logits, labels)


def _counted(batch: Any, logits: Tensor) -> Tensor:
    """Mark the predictions that count: all, or the tokens that are no padding."""
    if isinstance(batch, Mapping) and "attention_mask" in batch and logits.dim() == 3:
        return batch["attention_mask"].bool()
    return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
