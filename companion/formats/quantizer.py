"""The method "companion" as transformers' `from_pretrained` calls it.

`companion.formats.registration` registers it. Built in chapter 15.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from companion.errors import UnsupportedModel
from companion.formats.hub import check_folder, header
from companion.formats.registration import METHOD, register_with_transformers
from companion.qat.packed import Packed
from companion.qat.saved import finish, renamed, replace_layers


class CompanionConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a folder that a converted model was saved to.

    Parameters
    ----------
    **description
        As `companion.qat.saved.describe` gives it, with the format and the files' hashes.

    Examples
    --------
    >>> from companion import W4
    >>> CompanionConfig(scheme=W4.to_dict(), layers=["lm_head"]).to_dict()["layers"]
    ['lm_head']
    """

    def __init__(self, **description: Any) -> None:
        self.__dict__.update(description)
        self.quant_method = METHOD

    def get(self, key: str, default: Any = None) -> Any:
        """Read like the dictionary that config.json holds, which transformers also takes."""
        return getattr(self, key, default)


class CompanionHfQuantizer(HfQuantizer):
    """Puts packed layers into a model of transformers before its weights are loaded.

    What comes out computes bit for bit what was saved. A ``dtype`` other than the saved one is
    given to it afterwards, as ``model.to(dtype)`` would. The empty ``weight`` of each layer in
    the file is for versions of transformers without companion, which would otherwise draw random
    weights: to them it has the wrong shape.

    Parameters
    ----------
    quantization_config : CompanionConfig
    """

    requires_calibration = True  # only what convert() made can be loaded

    def __init__(self, quantization_config: CompanionConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.description = quantization_config.to_dict()
        self.asked: torch.dtype | None = None

    def update_device_map(self, device_map: Any) -> Any:
        """Refuse the disk, from which packed layers cannot compute."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise UnsupportedModel(
                "packed layers cannot be offloaded to disk: leave 'disk' out of device_map"
            )
        return device_map

    def update_attn_implementation(self, config: Any) -> Any:
        """Attend as the saved model did, unless asked for something else."""
        if config._attn_implementation is None:
            config._attn_implementation = self.description.get("attention")
        return config

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Build in float32, for the sake of the buffers that are computed, not loaded."""
        self.asked = dtype
        return torch.float32

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        told = self.description.pop("types", {}) | self.description["narrowed"]
        types: dict[str, torch.dtype] = {}
        if checkpoint_files:  # else the caller has read and checked them
            check_folder(checkpoint_files, model.config.name_or_path)
            for file in checkpoint_files:
                types |= header(file)
        types |= {name: getattr(torch, dtype) for name, dtype in told.items()}
        empty = (rf"(^|\.){re.escape(name)}\.weight$" for name in self.description["layers"])
        ignored = {*(model._keys_to_ignore_on_load_unexpected or ()), *empty}
        self.description = renamed(self.description, lambda name: _place(model, name))
        _tie_head(model, self.description)
        replace_layers(model, self.description)
        known = {_place(model, name): dtype for name, dtype in types.items()}
        saved = getattr(torch, self.description["dtype"])
        drawn = {
            n: saved for n, p in model.named_parameters() if p.is_floating_point()
        }  # a new head
        for name, dtype in (drawn | known).items():
            _set_type(model, name, dtype)
        packed = {name for name, module in model.named_modules() if isinstance(module, Packed)}
        model.all_tied_weights_keys = {
            name: first for name, first in model.all_tied_weights_keys.items()
            if not {name.rpartition(".")[0], first.rpartition(".")[0]} & packed
        }  # fmt: skip
        for name, first in self.description["aliases"].items():
            owner, _, key = name.rpartition(".")
            module = model.get_submodule(owner)
            if owner in packed and module is not model.get_submodule(first.rpartition(".")[0]):
                module._buffers.pop(key, None)  # not looked for in the file; finish() ties it
        model._keys_to_ignore_on_load_unexpected = ignored

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        del model._keys_to_ignore_on_load_unexpected
        # these make transformers refuse what a converted model can: .float(), a Trainer's evaluation
        for name in ("is_quantized", "quantization_method"):
            model.__dict__.pop(name, None)
        finish(model, self.description)
        saved = getattr(torch, self.description["dtype"])
        if self.asked not in (None, saved):
            model.to(self.asked)
        for config in (model.config, *(getattr(model.config, k) for k in model.config.sub_configs)):
            if config is not None:
                config.dtype = self.asked or saved
        return model

    def is_serializable(self) -> bool:
        """It is saved by its own `save_pretrained`."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Integers do not train."""
        return False


def _place(model: nn.Module, name: str) -> str | None:
    """What a module or tensor of the saved class is called in this one, with or without a head."""
    base = f"{model.base_model_prefix}."
    for candidate in (name, base + name, name.removeprefix(base)):
        owner, _, key = candidate.rpartition(".")
        try:
            if hasattr(model.get_submodule(owner), key):
                return candidate
        except AttributeError:
            pass
    # a tensor of a layer that is not packed yet
    owner, _, key = name.rpartition(".")
    if key in ("integers", "scale", "factor"):
        found = _place(model, owner)
        return None if found is None else f"{found}.{key}"
    return None


def _tie_head(model: nn.Module, description: dict[str, Any]) -> None:
    """Round a head too that the saved model did not have, and that is tied to a rounded embedding."""
    for name, first in model.all_tied_weights_keys.items():
        head, embedding = name.rpartition(".")[0], first.rpartition(".")[0]
        if embedding in description["layers"] and head not in description["layers"]:
            description["layers"].append(head)
            description["computes"][head] = description["computes"][embedding]
            for key in ("integers", "scale"):
                description["aliases"][f"{head}.{key}"] = f"{embedding}.{key}"


def _set_type(model: nn.Module, name: str | None, dtype: torch.dtype) -> None:
    """Let a tensor that is still to be loaded have its type in the saved model."""
    if name is None:
        return
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    for tensors in (module._parameters, module._buffers):
        tensor: Tensor | None = tensors.get(key)
        if tensor is not None and tensor.dtype != dtype:
            typed = torch.empty_like(tensor, dtype=dtype)
            tensors[key] = nn.Parameter(typed) if tensors is module._parameters else typed


register_with_transformers()  # where this module is what made transformers import its tables
