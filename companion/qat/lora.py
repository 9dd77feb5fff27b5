"""Low-rank adapters and rounding: inside it, where merging is exact, or outside, as it is shipped.

Built in chapter 11 (inside) and in chapter 13 (outside, saved, configured).

References
----------
Hu et al., "LoRA: low-rank adaptation of large language models", ICLR 2022. Dettmers et al., "QLoRA:
efficient finetuning of quantized LLMs", NeurIPS 2023 (adapters on a rounded base).
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from types import MethodType
from typing import Any

from torch import nn

from companion.errors import (
    SourceUnavailable,
    UnknownLayer,
    UnsupportedModel,
    WrongStage,
    extra,
)
from companion.files import write_atomically
from companion.numerics.scheme import QuantScheme
from companion.qat.layers import FakeQuantConv1D, FakeQuantLinear
from companion.qat.prepare import empty_packed, own_forward, prepare_qat, replace_modules
from companion.qat.ranges import Absmax, fingerprint_of

RECORD = "companion.json"
"""Beside a saved adapter: which rounding of which weights it was trained in."""
_KEPT = {
    "r", "lora_alpha", "use_rslora", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_type",
    "auto_mapping", "peft_version", "runtime_config",
}  # fmt: skip
"""Settings of a LoraConfig that move nothing: which layers, how large, how it begins."""
_INITS = (True, False, "gaussian")  # others change the weights of the base


def lora_qat(
    model: nn.Module,
    scheme: QuantScheme,
    adapter: Any = 8,
    *,
    skip: Iterable[str] = (),
    calibration: Iterable | None = None,
) -> nn.Module:
    """Prepare a model, freeze it, and add low-rank adapters inside its fake quantization.

    PEFT adds its update to the *parameter*, before it is rounded; so what trains is
    ``fake_quantize(W + B A)``, and merging changes not one bit. An adapter around a rounded
    layer, ``fake_quantize(W) x + B A x``, cannot be merged so: the sum lies on no grid, and
    `convert` refuses it (`lora_outside` trains such ones).

    It trains in `fit`, in Trainer and in SFTTrainer, and is saved as PEFT saves it, by
    ``save_pretrained(folder)``, with a note of the rounding. (Under autocast ``B A`` is multiplied in
    half precision; what is merged is what the model computes without it.)

    Parameters
    ----------
    model : nn.Module
        In floating point; left as it is.
    scheme : QuantScheme
    adapter : int, peft.LoraConfig or path
        A rank (twice as much is alpha, every rounded layer is adapted); a configuration, whose
        ``target_modules`` choose among the rounded layers; or the folder of a saved adapter, which
        goes onto the same base in the same scheme again and may train on.
    skip, calibration
        As in `prepare_qat`; of a saved adapter those it was trained with.

    Returns
    -------
    peft.PeftModel
        ``merge_and_unload()`` gives the prepared model back, ready for `convert`.

    Raises
    ------
    UnsupportedModel
        If the configuration asks for what cannot go inside or would not merge exactly: dropout, DoRA,
        whole modules to save, biases, initialisations that change the base.
    UnknownLayer
        If ``target_modules`` names a layer that is not rounded.
    WrongStage
        If a saved adapter was trained in another rounding, or on other weights.
    SourceUnavailable
        If the folder holds no adapter.

    Examples
    --------
    >>> import torch
    >>> from companion import W4, convert
    >>> adapted = lora_qat(nn.Sequential(nn.Linear(64, 8)), W4, 2)
    >>> x = torch.ones(1, 64)
    >>> before = adapted(x)
    >>> torch.equal(convert(adapted.merge_and_unload())(x), before)
    True
    """
    peft = _peft()
    saved = Path(adapter) if isinstance(adapter, (str, Path)) else None
    config = _read_config(saved) if saved else _config(adapter)
    _check(config, "inside the rounding", _KEPT | ({"target_parameters"} if saved else set()))
    prepared = _frozen(model, scheme, skip, calibration)
    record = _record(prepared)
    if saved:
        _check_record(saved, record)
        adapted = peft.PeftModel.from_pretrained(prepared, saved, is_trainable=True)
    else:
        targets = [f"{name}.weight" for name in _targets(config, prepared)]
        config.target_modules, config.target_parameters = [], targets
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        adapted = _adapt(prepared, config)
    adapted.rounding = record
    adapted.save_pretrained = MethodType(_save_adapter, adapted)
    return adapted


def lora(
    model: nn.Module,
    scheme: QuantScheme,
    task: Any = None,
    skip: Sequence[str] = (),
    *,
    rank: int = 8,
) -> nn.Module:
    """Call `lora_qat` with the signature of `Arm.prepare`.

    Parameters
    ----------
    model, scheme, skip
        As in `lora_qat`.
    task : Task, optional
        Not used.
    rank : int
        Of the adapters of every rounded layer.

    Returns
    -------
    peft.PeftModel

    Examples
    --------
    >>> from companion import W4
    >>> type(lora(nn.Sequential(nn.Linear(64, 8)), W4, rank=2)).__name__
    'PeftModel'
    """
    return lora_qat(model, scheme, rank, skip=skip)


def lora_outside(
    model: nn.Module,
    scheme: QuantScheme,
    adapter: Any = 8,
    *,
    skip: Iterable[str] = (),
    calibration: Iterable | None = None,
) -> nn.Module:
    """Round and freeze a model, and add low-rank adapters in floating point beside its layers.

    That is how adapters are usually trained on a quantized model: ``fake_quantize(W) x + B A x``. It
    has to be served so, too, in two parts (`convert_base`): merged, the sum lies on no grid.

    Parameters
    ----------
    model, scheme, skip, calibration
        As in `lora_qat`.
    adapter : int or peft.LoraConfig
        May have dropout, and ranks and alphas by layer.

    Returns
    -------
    peft.PeftModel
        For training, and then for `convert_base`.

    Raises
    ------
    UnsupportedModel
        If the configuration trains more than adapters, or changes the base; or if the model is made
        of GPT-2's Conv1D.
    UnknownLayer
        If ``target_modules`` names a layer that is not rounded.

    Examples
    --------
    >>> import torch
    >>> from companion import W4
    >>> adapted = lora_outside(nn.Sequential(nn.Linear(64, 8)), W4, 2).eval()
    >>> x = torch.ones(1, 64)
    >>> torch.equal(convert_base(adapted)(x), adapted(x))
    True
    """
    config = _config(adapter)
    outside = {"lora_dropout", "rank_pattern", "alpha_pattern"}
    _check(config, "outside the rounding", _KEPT | outside)
    prepared = _frozen(model, scheme, skip, calibration)
    targets = _targets(config, prepared)
    if any(isinstance(prepared.get_submodule(name), FakeQuantConv1D) for name in targets):
        raise UnsupportedModel(
            "PEFT takes a prepared Conv1D for a Linear layer, which keeps its weight the other way "
            "round: train adapters inside the rounding, with lora_qat"
        )
    config.target_modules = targets
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    return _adapt(prepared, config)


def convert_base(model: nn.Module) -> nn.Module:
    """Return a copy of what `lora_outside` made: packed integers below, adapters in float beside them.

    Parameters
    ----------
    model : peft.PeftModel

    Returns
    -------
    peft.PeftModel
        In eval mode; computes bit for bit what the given model does there. Its ``save_pretrained``
        writes the adapter alone.

    Raises
    ------
    WrongStage
        If there is no prepared layer under the adapters, or they are inside its rounding; or if the
        rounding is paused.

    Examples
    --------
    >>> from companion import W4
    >>> convert_base(lora_outside(nn.Sequential(nn.Linear(64, 8)), W4)).training
    False
    """
    inside = any(type(module).__name__ == "ParamWrapper" for module in model.modules())
    converted = own_forward(copy.deepcopy(model))
    layers = [m for m in converted.modules() if isinstance(m, FakeQuantLinear)]
    if inside or not layers or not hasattr(converted, "get_base_model"):
        raise WrongStage(
            "convert_base() needs a model from lora_outside(): for others use convert(), for adapters "
            "inside the rounding after merge_and_unload()"
        )
    if not all(layer.quantizer.enabled for layer in layers):
        raise WrongStage("the rounding of this model is paused: call start_rounding(model) first")
    new = {layer: empty_packed(layer, layer.quantizer.scheme).store(layer) for layer in layers}
    replace_modules(converted, new)
    own_forward(converted.get_base_model())
    return converted.eval().requires_grad_(False)


def _peft() -> Any:
    with extra("peft"):
        import peft

    return peft


def _config(adapter: Any) -> Any:
    """A configuration of one's own, which may be changed."""
    config_class = _peft().LoraConfig
    if isinstance(adapter, config_class):
        return copy.copy(adapter)
    if isinstance(adapter, int) and not isinstance(adapter, bool):
        return config_class(r=adapter, lora_alpha=2 * adapter)
    raise UnsupportedModel(
        f"{type(adapter).__name__} says nothing of adapters that go together with rounding: give a "
        "rank or a peft.LoraConfig"
    )


def _read_config(folder: Path) -> Any:
    if not (folder / "adapter_model.safetensors").exists():
        raise SourceUnavailable(
            f"{folder} holds no adapter_model.safetensors: name the folder that the adapter was "
            "saved in, by its save_pretrained(folder)"
        )
    config = _peft().PeftConfig.from_pretrained(folder)
    if not getattr(config, "target_parameters", None):
        raise WrongStage(
            f"the adapter in {folder} was trained around layers, not inside their rounding: merge it "
            "into the float model that it belongs to, and prepare that"
        )
    return config


def _check(config: Any, where: str, allowed: Iterable[str]) -> None:
    """Refuse settings that PEFT would ignore there, or that train or change more than an update."""
    usual = type(config)()
    other = [
        f"{part.name}={getattr(config, part.name)!r}"
        for part in fields(config)
        if part.name not in allowed and getattr(config, part.name) != getattr(usual, part.name)
    ]
    if config.init_lora_weights not in _INITS:
        other.append(f"init_lora_weights={config.init_lora_weights!r}")
    if other:
        raise UnsupportedModel(
            f"an adapter {where} cannot have {', '.join(other)}, which would train or change more "
            "than the update that is merged, or be left out in silence: leave the setting at its "
            "default"
        )


def _frozen(
    model: nn.Module, scheme: QuantScheme, skip: Iterable[str], calibration: Iterable | None
) -> nn.Module:
    """Ranges by a search that nothing has to learn: all of the base stays as it is."""
    prepared = prepare_qat(model, scheme, "mse", skip=skip, calibration=calibration)
    for module in prepared.modules():
        if isinstance(module, Absmax):
            module.fingerprint = None  # these weights may change while frozen: merging is exact
    return prepared.requires_grad_(False)


def _targets(config: Any, prepared: nn.Module) -> list[str]:
    """The rounded layers that a configuration chooses; none that it names may be in floating point."""
    from peft.tuners.tuners_utils import check_target_module_exists

    rounded, given = prepared.quantization.layers, config.target_modules
    everything = given in (None, "all-linear")

    def matched(names: Iterable[str], target_modules: Any) -> list[str]:
        one = copy.copy(config)
        one.target_modules = target_modules
        return [name for name in names if check_target_module_exists(one, name)]

    names = [name for name, _ in prepared.named_modules()]
    for pattern in () if everything else [given] if isinstance(given, str) else sorted(given):
        found = matched(names, pattern if pattern is given else [pattern])
        if not found or not set(found) <= {*rounded}:
            outside = next((name for name in found if name not in rounded), None)
            raise UnknownLayer(
                f"target_modules: {pattern!r} matches {outside or 'no layer'}"
                f"{', which stays in floating point' if outside else ''}: adapters go together with "
                f"rounded layers, of which there are {', '.join(rounded[:8])}"
            )
    targets = matched(rounded, list(rounded) if everything else given)
    if not targets:
        raise UnknownLayer("this configuration leaves out every rounded layer: see exclude_modules")
    return targets


def _adapt(prepared: nn.Module, config: Any) -> nn.Module:
    with warnings.catch_warnings():  # peft reads a property that transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        return _peft().get_peft_model(prepared, config)


def _record(prepared: nn.Module) -> dict:
    """What an adapter's meaning hangs on: the scheme, the frozen weights, and their ranges."""
    layers = [prepared.get_submodule(name) for name in prepared.quantization.layers]
    return {
        "scheme": prepared.quantization.scheme.to_dict(),
        "weights": sum(fingerprint_of(layer.weight) for layer in layers),
        "ranges": sum(fingerprint_of(layer.quantizer.ratio) for layer in layers),
    }


def _check_record(folder: Path, here: dict) -> None:
    path = folder / RECORD
    there = json.loads(path.read_text()) if path.exists() else {}
    differ = [what for what in here if there.get(what) != here[what]]
    if differ:
        why = f"other {', '.join(differ)}" if there else f"there is no {RECORD} that says which"
        raise WrongStage(
            f"the adapter in {folder} does not belong to this rounding ({why}): load it onto the "
            "same float model, with the scheme, skip and calibration that it was trained with"
        )


def _save_adapter(self: nn.Module, save_directory: str | Path, *args, **kwargs) -> None:
    type(self).save_pretrained(self, save_directory, *args, **kwargs)
    if kwargs.get("is_main_process", True):
        text = json.dumps(self.rounding)
        write_atomically(Path(save_directory) / RECORD, lambda partial: partial.write_text(text))
