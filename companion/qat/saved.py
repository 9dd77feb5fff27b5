"""`save_quantized` and `load_quantized`: one safetensors file and a config.json, hash-checked.

Built in chapter 10.
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from companion.errors import DamagedFile, UnsupportedModel, WrongStage, extra
from companion.files import sha256, write_atomically
from companion.numerics.scheme import Activations, QuantScheme
from companion.qat.layers import Packed
from companion.qat.prepare import empty_packed, replace_modules
from companion.qat.selection import Quantization

WEIGHTS, CONFIG = "model.safetensors", "config.json"
KEY = "companion"  # what this package adds to config.json stands under it
FORMAT = 1


def save_quantized(model: nn.Module, folder: str | Path) -> Path:
    """Write a converted model: packed integers, scales, what stayed float, and its config.

    Parameters
    ----------
    model : nn.Module
        From `convert`.
    folder : path
        Receives ``model.safetensors`` and ``config.json``; made if needed.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    WrongStage
        If the model was not converted.

    Examples
    --------
    >>> import tempfile
    >>> from companion import W4, convert, load_quantized, prepare_qat, save_quantized
    >>> model = nn.Sequential(nn.Linear(64, 8))
    >>> q = convert(prepare_qat(model, W4))
    >>> folder = save_quantized(q, tempfile.mkdtemp())
    >>> x = torch.ones(1, 64)
    >>> torch.equal(load_quantized(folder, model)(x), q(x))
    True
    """
    record: Quantization | None = getattr(model, "quantization", None)
    if record is None or not any(isinstance(m, Packed) for m in model.modules()):
        raise WrongStage("save_quantized() needs a model from convert(): convert it first")
    folder = Path(folder)
    state = model.state_dict()
    tensors, aliases = _distinct(state)
    write_atomically(folder / WEIGHTS, lambda p: save_file(tensors, p, metadata={"format": "pt"}))
    config = model.config.to_dict() if hasattr(model, "config") else {}
    description = {
        "format": FORMAT,
        "class": type(model).__name__,
        "scheme": _scheme_to_json(record.scheme),
        "method": record.method,
        "layers": record.layers,
        "skipped": record.skipped,
        "aliases": aliases,
        # what state_dict() does not say: the types it computes in, and its attention kernel
        "computes": {n: _name(m.dtype) for n, m in model.named_modules() if isinstance(m, Packed)},
        "buffers": {n: _name(b.dtype) for n, b in model.named_buffers() if n not in state},
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
        "sha256": sha256(folder / WEIGHTS),
    }
    config = json.loads(json.dumps({**config, KEY: description}, default=str))
    config[KEY]["config_sha256"] = _hash(config)
    text = json.dumps(config, indent=1)
    write_atomically(folder / CONFIG, lambda p: p.write_text(text + "\n"))
    return folder


def load_quantized(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Read a model that `save_quantized` wrote; it computes bit for bit what was saved.

    Parameters
    ----------
    folder : path
    model : nn.Module, optional
        A float model of the same architecture, needed only where the class is not one of
        transformers' and cannot be rebuilt from config.json. Left as it is.

    Returns
    -------
    nn.Module
        In eval mode.

    Raises
    ------
    DamagedFile
        If a file is missing, truncated or edited.
    UnsupportedModel
        If the class cannot be rebuilt, or `model` is of another architecture.

    Examples
    --------
    See `save_quantized`.

    >>> load_quantized("no/such/folder")
    Traceback (most recent call last):
    companion.errors.DamagedFile: no/such/folder/config.json is missing: give the folder that ...
    """
    folder = Path(folder)
    config, description = _read_config(folder)
    scheme = _scheme_from_json(description["scheme"])
    try:
        tensors = load_file(folder / WEIGHTS)
    except Exception as error:
        raise DamagedFile(f"{folder / WEIGHTS} cannot be read ({error}): copy it again") from None
    model = _rebuild(config, description) if model is None else copy.deepcopy(model)
    try:
        new = {}
        for name in description["layers"]:
            layer = model.get_submodule(name)
            new[layer] = packed = empty_packed(layer, scheme)
            packed.dtype = getattr(torch, description["computes"][name])
        model = replace_modules(model, new)
        aliases = {name: tensors[first] for name, first in description["aliases"].items()}
        model.load_state_dict(tensors | aliases, assign=True)  # keeps types and sharing
        for name, dtype in description["buffers"].items():
            owner, _, key = name.rpartition(".")
            module = model.get_submodule(owner)
            setattr(module, key, getattr(module, key).to(getattr(torch, dtype)))
    except (AttributeError, RuntimeError, ValueError) as error:
        raise UnsupportedModel(
            f"the model given does not fit the file, which holds a {description['class']}: {error}"
        ) from None
    model.quantization = Quantization(
        scheme, description["method"], description["layers"], description["skipped"]
    )
    return model.eval().requires_grad_(False)


def _distinct(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Keep one of the names that share a tensor; the format refuses shared memory."""
    first: dict[tuple, str] = {}
    tensors, aliases = {}, {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.dtype)
        if tensor.numel() and place in first:
            aliases[name] = first[place]
        else:
            first[place] = name
            tensors[name] = tensor.detach().cpu().contiguous()
    return tensors, aliases


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read_config(folder: Path) -> tuple[dict, dict]:
    path = folder / CONFIG
    if not path.exists():
        raise DamagedFile(f"{path} is missing: give the folder that save_quantized() wrote")
    try:
        config = json.loads(path.read_text())
        description = config[KEY]
        stored = description.pop("config_sha256")
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        raise DamagedFile(
            f"{path} was not written by save_quantized(), or was damaged since: copy it again"
        ) from None
    if not (folder / WEIGHTS).exists():
        raise DamagedFile(f"{folder / WEIGHTS} is missing: copy the whole folder")
    if stored != _hash(config) or description["sha256"] != sha256(folder / WEIGHTS):
        raise DamagedFile(
            f"the files in {folder} are not those that were saved (their hash differs): they were "
            "truncated, edited or mixed up. Copy the folder again, or save the model anew"
        )
    if description["format"] != FORMAT:
        raise DamagedFile(f"{path} has format {description['format']}; this version reads {FORMAT}")
    del config[KEY]
    return config, description


def _rebuild(config: dict, description: dict) -> nn.Module:
    with extra("language"):
        import transformers

    name = description["class"]
    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise UnsupportedModel(
            f"{name} is no model class of transformers, so it cannot be rebuilt from config.json: "
            f"pass a float model of this class, load_quantized(folder, model=...)"
        )
    return kind._from_config(
        kind.config_class.from_dict(config),
        attn_implementation=description["attention"],
        dtype=torch.float32,
    )


def _hash(config: dict) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _scheme_to_json(scheme: QuantScheme) -> dict:
    return {**asdict(scheme), "scale_dtype": _name(scheme.scale_dtype)}


def _scheme_from_json(saved: dict) -> QuantScheme:
    form = saved["activations"]
    if form is not None:
        integers = form["range"] and tuple(form["range"])
        form = Activations(**{**form, "range": integers})
    return QuantScheme(
        saved["weight_bits"], saved["group_size"], getattr(torch, saved["scale_dtype"]), form
    )
