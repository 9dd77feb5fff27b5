"""Which layers of a model can be rounded, which stay as they are, and which models are refused.

Built in chapter 10.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fnmatch import fnmatch

import torch
from torch import nn

from companion.errors import SchemeError, UnsupportedModel, WrongStage
from companion.numerics.scheme import QuantScheme
from companion.qat.layers import FakeQuantEmbedding, FakeQuantLinear, Packed


@dataclass
class Quantization:
    """What was quantized in a model and what was not, and why: its attribute `quantization`.

    Parameters
    ----------
    scheme : QuantScheme
    method : str
    layers : list of str
        Names of the layers that are quantized.
    skipped : dict of str to str
        Names of layers that stayed in floating point, with the reason.
    """

    scheme: QuantScheme
    method: str
    layers: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        skipped = "".join(f"\n  {name}: {why}" for name, why in self.skipped.items())
        return (
            f"{len(self.layers)} layers quantized ({self.scheme.weight_bits} bits, group size "
            f"{self.scheme.group_size or 'row'}, {self.method}); {len(self.skipped)} stay in "
            f"floating point{':' if skipped else ''}{skipped}"
        )


def kind_of(module: nn.Module) -> str | None:
    """Name what can be quantized; a subclass may compute with its weight in ways of its own."""
    if type(module) in (nn.Linear, nn.Embedding):
        return type(module).__name__
    is_conv1d = type(module).__name__ == "Conv1D" and type(module).__module__.startswith(
        "transformers"
    )
    return "Conv1D" if is_conv1d else None


def choose_layers(
    targets: dict[str, nn.Module], skip: tuple[str, ...], embeddings: bool, record: Quantization
) -> list[str]:
    """Decide layer by layer; tied layers share one fate."""
    why: dict[str, str] = {}
    for name, module in targets.items():
        pattern = next((p for p in skip if matches(name, p)), None)
        if pattern is not None:
            why[name] = f"skipped by {pattern!r}"
        elif kind_of(module) is None:
            why[name] = f"{type(module).__name__} is a subclass with a forward of its own"
        elif isinstance(module, nn.Embedding) and not embeddings:
            why[name] = "embedding (embeddings=False)"
    tied: dict[int, list[str]] = {}
    for name, module in targets.items():
        tied.setdefault(id(module.weight), []).append(name)
    for names in tied.values():
        if kept := [name for name in names if name in why]:
            why |= {name: f"tied to {kept[0]}" for name in names if name not in why}
    record.skipped = {name: why[name] for name in targets if name in why}
    return [name for name in targets if name not in why]


def matches(name: str, pattern: str) -> bool:
    """Whether a layer's name, its end, or a block around it fits a pattern."""
    return any(fnmatch(f".{name}.", f"*.{pattern}.{end}") for end in ("", "*"))


def check_divisible(targets: dict[str, nn.Module], chosen: list[str], scheme: QuantScheme) -> None:
    """Raise where the group size does not divide a layer's inputs, and offer sizes that do."""
    columns = {
        name: targets[name].weight.shape[int(kind_of(targets[name]) != "Conv1D")] for name in chosen
    }
    size = scheme.group_size
    wrong = [name for name, n in columns.items() if size is not None and n % size]
    if wrong:
        common = math.gcd(*columns.values())
        fits = [s for s in range(1, common + 1) if common % s == 0][-6:]
        raise SchemeError(
            f"group_size {size} does not divide the {columns[wrong[0]]} inputs of {wrong[0]}"
            f"{f' (and {len(wrong) - 1} more layers)' if len(wrong) > 1 else ''}; for all layers it "
            f"could be {', '.join(map(str, fits))}, or None for one scale per row"
        )


def refuse_quantized(model: nn.Module) -> None:
    """Raise if a layer is prepared, converted or quantized by someone else already."""
    for name, module in model.named_modules():
        kind = type(module)
        if isinstance(module, (FakeQuantLinear, FakeQuantEmbedding)) or hasattr(
            module, "weight_fake_quantizer"
        ):
            raise WrongStage(f"this model is prepared already ({name}): train it, then convert()")
        if isinstance(module, Packed):
            raise WrongStage(f"this model is converted already ({name}): prepare the float model")
        weight = getattr(module, "weight", None)
        quantized = kind.__module__.startswith("torch.ao.nn") or hasattr(module, "qweight")
        if isinstance(weight, torch.Tensor):
            quantized |= type(weight.data) is not torch.Tensor or not weight.is_floating_point()
        if quantized:
            raise UnsupportedModel(
                f"{name or 'the model'} ({kind.__name__}) holds quantized weights already, which do "
                "not train: load the model in floating point and prepare that"
            )


def refuse_unseen_weights(model: nn.Module, skip: tuple[str, ...]) -> None:
    """Refuse blocks that compute with weights no swapped layer would round."""
    for name, module in model.named_modules():
        if any(matches(name, p) for p in skip):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{key}"
            if parameter.dim() == 3 and "expert" in f"{full} {type(module).__name__}".lower():
                raise UnsupportedModel(
                    f"{full} fuses the weights of {parameter.shape[0]} experts into one tensor of "
                    f"shape {tuple(parameter.shape)}, which prepare_qat cannot round: leave it in "
                    f"floating point with skip=[{name!r}], or '*.{name.split('.')[-1]}' for all layers"
                )
        if (
            isinstance(module, nn.TransformerEncoderLayer)
            and torch.backends.mha.get_fastpath_enabled()
        ):
            raise UnsupportedModel(
                f"{name} (nn.TransformerEncoderLayer) bypasses its Linear layers in eval mode: call "
                "torch.backends.mha.set_fastpath_enabled(False) first, or skip it"
            )
