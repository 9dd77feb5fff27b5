"""What the layers of a model are given: the weights that meet large inputs should be rounded best.

Built in chapter 11.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

from torch import Tensor, nn

from companion.errors import EmptyLoader, UnsupportedModel
from companion.evaluation.forward import evaluating, run

BATCHES = 16
DAMPING = 0.01
"""Share of the mean that is added to every channel: none may count for nothing."""


def input_squares(
    model: nn.Module, layers: Sequence[str], loader: Iterable, batches: int = BATCHES
) -> dict[nn.Parameter, Tensor]:
    """Measure the mean square of each input channel of some layers.

    Parameters
    ----------
    model : nn.Module
    layers : sequence of str
        Names of Linear and Conv1D layers; others, and those that meet nothing but zeros or no input
        at all, are left out.
    loader : iterable of batches
        As for `fit`; labels are not looked at, and what ``attention_mask`` masks does not count.
    batches : int
        At most so many are read.

    Returns
    -------
    dict of nn.Parameter to Tensor, shape (in_features,), float32
        By weight, since tied layers share theirs. Steadied by a hundredth of the channels' mean.

    Raises
    ------
    EmptyLoader
        If there is no batch.
    UnsupportedModel
        If a layer meets inputs that are not finite.

    References
    ----------
    Lin et al., "AWQ: activation-aware weight quantization for on-device LLM compression and
    acceleration", MLSys 2024 (that inputs tell which weights matter).

    Examples
    --------
    >>> import torch
    >>> model = nn.Sequential(nn.Linear(2, 3))
    >>> [squares] = input_squares(model, ["0"], [torch.tensor([[2.0, 0.0]])]).values()
    >>> squares
    tensor([4.0200, 0.0200])
    """
    sums: dict[nn.Parameter, list] = {}
    seen_mask: list[Tensor] = []  # of the batch that is running: what is padding does not count

    def watch(layer: nn.Module):
        def hook(_, inputs, named) -> None:
            x = inputs[0] if inputs else next(iter(named.values()))
            rows = x.reshape(-1, x.shape[-1]).float()
            if seen_mask and seen_mask[0].numel() == len(rows):
                rows = rows[seen_mask[0].to(rows.device)]
            total = sums.setdefault(layer.weight, [0.0, 0])
            total[0] += rows.square().sum(0).cpu().double()
            total[1] += len(rows)

        return hook

    found = {name: model.get_submodule(name) for name in layers}
    hooks = [
        layer.register_forward_pre_hook(watch(layer), with_kwargs=True)
        for layer in found.values()
        if not isinstance(layer, nn.Embedding)
    ]
    seen = 0
    try:
        with evaluating(model):
            for seen, batch in enumerate(islice(loader, batches), 1):  # noqa: B007
                mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                padded = isinstance(mask, Tensor) and mask.dim() == 2
                seen_mask[:] = [mask.flatten() != 0] if padded else []
                run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise EmptyLoader("the loader gave no batch to calibrate on: is the data set empty?")
    squares = {
        weight: (total / n).float().to(weight.device)
        for weight, (total, n) in sums.items()
        if n and total.any()
    }
    for name, layer in found.items():
        if layer.weight in squares and not squares[layer.weight].isfinite().all():
            raise UnsupportedModel(
                f"{name} meets inputs that are not finite: check the calibration batches, or "
                "calibrate the model in float32"
            )
    return {weight: s + DAMPING * s.mean() for weight, s in squares.items()}
