"""The one loop of evaluation: a model over a loader, in eval mode and without gradients.

Every metric reads its numbers off this loop. Built in chapters 2 (accuracy) and 8 (perplexity).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from companion.data.text import IGNORED
from companion.errors import UnreadableBatch, UnsupportedModel
from companion.evaluation.logits import put_off, token_divergences, token_losses
from companion.numerics.rounding import HeldWeights, hold_weights

BOOKKEEPING = ("labels", "document")
"""What a batch says about itself, and no model is asked with."""
IN_PLACE = ("ForTokenClassification", "ForMaskedLM")
"""Losses of transformers that score a token by the logits at its own place."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside; afterwards each module has its own mode back.

    Examples
    --------
    >>> model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
    >>> with evaluating(model):
    ...     model[0].training
    False
    >>> model[0].training, model[1].training
    (True, False)
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            if type(module).train is nn.Module.train:
                module.training = mode  # its children have modes of their own
            else:
                module.train(mode)  # QuantWrapper's also switches its observers


def run(model: nn.Module, batch: Any) -> Any:
    """Run a model on the inputs of a batch, without its labels, on the model's device.

    Parameters
    ----------
    model : nn.Module
    batch : mapping, (inputs, labels) or Tensor
        Of a mapping all but ``labels`` and ``document`` go to the model, by name; encoder-decoder
        models get the labels too, since they make the decoder's input out of them.

    Returns
    -------
    object
        What the model answers.

    Raises
    ------
    UnreadableBatch
        If a mapping holds something that the model does not take, or a sequence is no pair.
    """
    device = device_of(model)

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        left_out = ("document",) if _is_encoder_decoder(model) else BOOKKEEPING
        names = _known(model, batch, [name for name in batch if name not in left_out])
        return model(**{name: moved(batch[name]) for name in names})
    if isinstance(batch, (tuple, list)):
        if len(batch) > 2:
            raise UnreadableBatch(
                f"a batch of {len(batch)} parts does not say which are inputs: give (inputs, "
                "labels), or a dictionary whose keys are the arguments of the model's forward"
            )
        batch = batch[0]
    return model(moved(batch))


def outputs(model: nn.Module, loader: Iterable) -> Iterator[tuple[Any, Tensor]]:
    """Yield each batch of a loader with the model's logits for it.

    Between two batches every module is in the mode that it was in before. Fake-quantized weights
    are rounded once for all of them (`hold_weights`), so do not write to a weight's ``.data``.

    Parameters
    ----------
    model : nn.Module
        Answers with a tensor, or with an object that has ``logits``.
    loader : iterable of mapping, of (inputs, labels), or of Tensor

    Raises
    ------
    UnsupportedModel
        If the answer holds no logits, as that of an encoder without a head.
    UnreadableBatch
        As in `run`.

    Examples
    --------
    >>> [(batch, logits)] = outputs(nn.Identity(), [(torch.eye(2), torch.tensor([0, 1]))])
    >>> logits.argmax(-1)
    tensor([0, 1])
    """
    held = HeldWeights()
    for batch in loader:
        with evaluating(model), hold_weights(held):
            logits = _logits(model, run(model, batch))
        yield batch, logits


def scored(model: nn.Module, loader: Iterable) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Yield each batch with its logits and the labels that they are judged by, place by place.

    Where each token has a label, a language model's logits are those of the token before it.

    Parameters
    ----------
    model, loader
        As in `outputs`; ``labels`` are class numbers, of shape (rows,) or (rows, tokens).

    Yields
    ------
    batch, logits, labels
        Logits (rows, classes) or (rows, tokens, classes); labels of the same shape without
        classes, -100 where nothing is scored.

    Raises
    ------
    UnsupportedModel
        If logits and labels do not fit: the model was made for another task.
    UnreadableBatch
        If a batch has no labels, or some that are no class numbers.

    Examples
    --------
    >>> tokens = torch.tensor([[0, 1, 1]])
    >>> language = nn.Embedding.from_pretrained(torch.eye(2))
    >>> [(_, logits, labels)] = scored(language, [(tokens, tokens)])
    >>> logits.argmax(-1), labels
    (tensor([[0, 1]]), tensor([[1, 1]]))
    """
    for batch, logits in outputs(model, loader):
        labels = labels_of(batch).to(logits.device)
        if labels.dim() == 2 and logits.dim() == 3 and _predicts_the_next(model):
            logits, labels = logits[:, :-1], labels[:, 1:]
        check_fit(model, logits, labels)
        yield batch, logits, labels


def losses(model: nn.Module, loader: Iterable) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Yield each batch with the cross-entropy of each of its tokens (or rows), and its labels.

    As by `scored`, but the logits of a language model are computed only where a label is scored,
    and a piece at a time.

    Parameters
    ----------
    model, loader
        As in `scored`.

    Yields
    ------
    batch, losses, labels
        Losses in float32, 0 where the label is -100, of the shape of the labels. Where each token
        has one, both stand at the token that predicts it.

    Raises
    ------
    UnsupportedModel, UnreadableBatch
        As in `scored`.

    Examples
    --------
    >>> tokens = torch.tensor([[0, 1, 1]])
    >>> language = nn.Embedding.from_pretrained(torch.zeros(2, 4))
    >>> [(_, found, labels)] = losses(language, [(tokens, tokens)])
    >>> found, labels
    (tensor([[1.3863, 1.3863, 0.0000]]), tensor([[   1,    1, -100]]))
    """
    held = HeldWeights()
    for batch in loader:
        with evaluating(model), hold_weights(held):
            logits, labels = _put_off(model, batch)
            found = token_losses(logits, labels)
        yield batch, found, labels


def divergences(
    original: nn.Module, model: nn.Module, loader: Iterable
) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Yield each batch with KL(original || model) of each of its tokens (or rows), and its labels.

    Parameters
    ----------
    original, model : nn.Module
        With the same classes, or the same vocabulary.
    loader
        As in `losses`; read once.

    Yields
    ------
    batch, divergences, labels
        As by `losses`.

    Raises
    ------
    UnsupportedModel
        If the two do not score the same words, or do not fit the labels.

    Examples
    --------
    >>> model = nn.Embedding.from_pretrained(torch.eye(3))
    >>> tokens = torch.tensor([[0, 1, 1]])
    >>> [(_, found, _)] = divergences(model, model, [(tokens, tokens)])
    >>> found
    tensor([[0., 0., 0.]])
    """
    held, other_held = HeldWeights(), HeldWeights()
    for batch in loader:
        with evaluating(original), hold_weights(held):
            logits, labels = _put_off(original, batch)
        with evaluating(model), hold_weights(other_held):
            others, _ = _put_off(model, batch)
        if logits.shape != others.shape:
            raise UnsupportedModel(
                f"the original scores {logits.shape[-1]} words and the model {others.shape[-1]}: "
                "compare a model with the one that it was made of"
            )
        yield batch, token_divergences(logits, others, labels), labels


def _put_off(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Logits, which may be lazy, and the labels that each place is judged by."""
    logits = _logits(model, put_off(model, partial(run, model, batch)))
    labels = labels_of(batch).to(logits.device)
    if labels.dim() == 2 and logits.dim() == 3 and _predicts_the_next(model):
        labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    check_fit(model, logits, labels)
    return logits, labels


def device_of(model: nn.Module) -> torch.device:
    """Return where a model is; one that was converted whole has buffers only."""
    tensors = chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def labels_of(batch: Any) -> Tensor:
    """Return the class numbers that a batch carries, or say that it has none."""
    if isinstance(batch, Mapping):
        labels = batch.get("labels")
    else:
        labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    if not isinstance(labels, Tensor):
        raise UnreadableBatch(
            "the batch has no labels to measure by: give (inputs, labels), or a dictionary with "
            "'labels'"
        )
    if labels.is_floating_point():
        raise UnreadableBatch(
            "the labels are no class numbers but fractions: turn scores into classes, and one-hot "
            "rows into numbers by argmax(-1)"
        )
    return labels


def check_fit(model: nn.Module, logits: Tensor, labels: Tensor) -> None:
    """Refuse logits that cannot answer the labels: another head, or too few classes."""
    name = type(model).__name__
    if logits.shape[:-1] != labels.shape:
        raise UnsupportedModel(
            f"{name} gives scores of shape {tuple(logits.shape)} where labels have shape "
            f"{tuple(labels.shape)}: it was made for another task. Load it with a head for this "
            'one, such as load_pretrained(name, head="classification", classes=...)'
        )
    if labels.numel() and labels.max() >= logits.shape[-1]:
        raise UnsupportedModel(
            f"{name} knows {logits.shape[-1]} classes, and the labels go up to "
            f"{int(labels.max())}: it was made for another task, or for fewer classes"
        )


def rows_of(batch: Any, labels: Tensor, before: int) -> list:
    """Return which document (or, without documents, which row) each row of a batch belongs to."""
    if isinstance(batch, Mapping) and "document" in batch:
        owners = batch["document"]
        return owners.tolist() if hasattr(owners, "tolist") else list(owners)
    return list(range(before, before + len(labels)))


def _logits(model: nn.Module, output: Any) -> Tensor:
    found = getattr(output, "logits", output)
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif type(found) in (tuple, list) and found:  # return_dict=False
        found = found[0]
    if not isinstance(found, Tensor):
        raise UnsupportedModel(
            f"{type(model).__name__} gives no scores (logits), so there is nothing to measure: an "
            "encoder needs a head that was trained for the task, such as load_pretrained(name, "
            'head="classification", classes=...)'
        )
    return found


def _predicts_the_next(model: nn.Module) -> bool:
    return getattr(model, "loss_type", None) not in IN_PLACE and not _is_encoder_decoder(model)


def _is_encoder_decoder(model: nn.Module) -> bool:
    return getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True


def _known(model: nn.Module, batch: Mapping, names: list[str]) -> list[str]:
    """Those of the names that the model is called with; names it does not take are an error.

    Models of transformers swallow what they do not know, so there the arguments of all their
    modules count.
    """
    arguments = _arguments(model)
    unknown = set(names) - set(arguments)
    if hasattr(model, "base_model_prefix"):
        unknown = unknown and unknown.difference(*map(_arguments, model.modules()))
    elif inspect.Parameter.VAR_KEYWORD in arguments.values():
        unknown = set()
    refuse(model, batch, unknown)
    return [name for name in names if name not in unknown]


def refuse(model: nn.Module, batch: Mapping, unknown: Iterable[str]) -> None:
    """Refuse what a batch holds and a model does not take, unless it says nothing.

    Token types that are all 0 say nothing, and many tokenizers write them.
    """
    telling = [
        repr(name)
        for name in sorted(unknown)
        if not name.endswith("token_type_ids") or torch.as_tensor(batch[name]).any()
    ]
    if telling:
        raise UnreadableBatch(
            f"the batch holds {', '.join(telling)}, which {type(model).__name__} does not take: "
            "leave it out of the data"
        )


def _arguments(module: nn.Module) -> dict[str, Any]:
    """Name and kind of each argument of a module's forward."""
    try:
        parameters = inspect.signature(module.forward).parameters
    except (TypeError, ValueError):  # compiled to something without a signature
        return {"": inspect.Parameter.VAR_KEYWORD}
    return {name: parameter.kind for name, parameter in parameters.items()}
