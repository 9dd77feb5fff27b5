"""`save_quantized` and `load_quantized`: a safetensors file and its settings, hash-checked.

Built in chapter 10.
"""

from __future__ import annotations

import copy
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from companion.errors import DamagedFile, UnsupportedModel, WrongStage, extra
from companion.files import sha256, write_atomically
from companion.numerics.packing import narrowest
from companion.numerics.scheme import QuantScheme
from companion.qat.packed import Packed, refuse_save_pretrained
from companion.qat.prepare import empty_packed, replace_modules
from companion.qat.selection import Quantization

WEIGHTS, CONFIG = "model.safetensors", "config.json"
GENERATION = "generation_config.json"
KEY = "companion"  # what this package adds to config.json stands under it
FORMAT, NARROWED = 1, 2  # two: some float tensors are stored in a narrower type than they have
REFUSED = {"library": "companion", "open_with": "companion.load_quantized"}
"""What transformers finds as quantization_config. A method that it does not know only makes it warn
and draw the missing weights at random; an entry without any method makes it stop."""


def save_quantized(model: nn.Module, folder: str | Path) -> Path:
    """Write a converted model: packed integers, scales, what stayed float, and its settings.

    Nothing is rounded: a large float32 tensor is stored in 16 bits where these hold all its
    values, such as an embedding of a bfloat16 checkpoint that was not trained.

    Parameters
    ----------
    model : nn.Module
        From `convert`.
    folder : path
        Receives ``model.safetensors``, ``config.json`` and, where the model has settings for
        generating, ``generation_config.json``; made if needed.

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
    refuse_foreign(model, "save_quantized")
    record: Quantization | None = getattr(model, "quantization", None)
    if record is None or not any(isinstance(m, Packed) for m in model.modules()):
        raise WrongStage("save_quantized() needs a model from convert(): convert it first")
    folder = Path(folder)
    state = model.state_dict()
    tensors, aliases = _distinct(state)
    parameters = dict(model.named_parameters())
    computes = {name: tensor.dtype for name, tensor in tensors.items()}
    tensors |= {name: narrowest(tensors[name]) for name in tensors if name in parameters}
    narrowed = {n: _name(computes[n]) for n, t in tensors.items() if t.dtype != computes[n]}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(folder / WEIGHTS, lambda p: save_file(tensors, p, metadata={"format": "pt"}))
    config = model.config.to_dict() if hasattr(model, "config") else {}
    description = {
        "format": NARROWED if narrowed else FORMAT,
        "class": type(model).__name__,
        "scheme": record.scheme.to_dict(),
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
    if narrowed:
        description["narrowed"] = narrowed
    if getattr(model, "generation_config", None) is not None:
        settings = model.generation_config.to_json_string()
        write_atomically(folder / GENERATION, lambda p: p.write_text(settings))
        description["generation_sha256"] = sha256(folder / GENERATION)
    config["quantization_config"] = REFUSED
    config = json.loads(json.dumps({**config, KEY: description}, default=str))
    config[KEY]["config_sha256"] = _hash(config)
    text = json.dumps(config, indent=1)
    write_atomically(folder / CONFIG, lambda p: p.write_text(text + "\n"))
    return folder


def refuse_foreign(model: nn.Module, call: str) -> None:
    """Raise where a model was converted, and not by `convert`.

    Parameters
    ----------
    model : nn.Module
    call : str
        Who asks, for the message.

    Raises
    ------
    UnsupportedModel
        If its integers are those of `QuantWrapper` or torchao.
    """
    classic = ("torch.ao.nn", "companion.classic")
    if any(type(module).__module__.startswith(classic) for module in model.modules()):
        raise UnsupportedModel(
            f"{call}() cannot take this model, since the integers of QuantWrapper live in PyTorch's "
            "own int8 kernels: keep the weights of the prepared wrapper and convert() them again, "
            "or train with companion.prepare_qat() instead"
        )
    kinds = {type(parameter.data) for parameter in model.parameters()}
    if any(kind.__module__.startswith("torchao") for kind in kinds):
        raise UnsupportedModel(
            f"{call}() cannot take this model, since its weights are tensors of torchao: give the "
            "model that convert() returned, before to_torchao()"
        )


def load_quantized(
    folder: str | Path, model: nn.Module | None = None, *, cache: bool = True
) -> nn.Module:
    """Read a model that `save_quantized` wrote; it computes bit for bit what was saved.

    Only what the file holds takes memory: no float weight is made that is going to be replaced.

    Parameters
    ----------
    folder : path
    model : nn.Module, optional
        A float model of the same architecture, needed only where the class is not one of
        transformers' and cannot be rebuilt from config.json. Left as it is.
    cache : bool
        As in `convert`: keep the matrix that each layer dequantizes at its first forward.

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
    scheme = QuantScheme.from_dict(description["scheme"])
    try:
        tensors = _read_tensors(folder / WEIGHTS, description.get("narrowed", {}))
    except Exception as error:
        raise DamagedFile(f"{folder / WEIGHTS} cannot be read ({error}): copy it again") from None
    model = _rebuild(config, description) if model is None else _without_weights(model)
    try:
        new = {}
        for name in description["layers"]:
            layer = model.get_submodule(name)
            new[layer] = packed = empty_packed(layer, scheme)
            packed.dtype = getattr(torch, description["computes"][name])
            packed.cache = cache
        model = replace_modules(model, new)
        aliases = {name: tensors[first] for name, first in description["aliases"].items()}
        model.load_state_dict(tensors | aliases, assign=True)  # keeps types
        for name, first in description["aliases"].items():
            _share(model, name, first)
        for name, dtype in description["buffers"].items():
            owner, _, key = name.rpartition(".")
            module = model.get_submodule(owner)
            setattr(module, key, getattr(module, key).to("cpu", getattr(torch, dtype)))
        left = [n for n, t in chain(model.named_parameters(), model.named_buffers()) if t.is_meta]
        if left:
            raise ValueError(f"{left[0]} is not in the file")
    except (AttributeError, RuntimeError, ValueError, NotImplementedError) as error:
        raise UnsupportedModel(
            f"the model given does not fit the file, which holds a {description['class']}: {error}"
        ) from None
    if "generation_sha256" in description:
        with extra("language"):
            from transformers import GenerationConfig

        settings = json.loads((folder / GENERATION).read_text())
        model.generation_config = GenerationConfig.from_dict(settings)
    model.quantization = Quantization(
        scheme, description["method"], description["layers"], description["skipped"]
    )
    refuse_save_pretrained(model)
    return model.eval().requires_grad_(False)


def _read_tensors(path: Path, narrowed: dict[str, str]) -> dict[str, Tensor]:
    """Read a file, each tensor in the type that its model computes in."""
    tensors = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no dictionary
            tensor = file.get_tensor(name)
            tensors[name] = tensor.to(getattr(torch, narrowed.get(name, _name(tensor.dtype))))
    return tensors


def _share(model: nn.Module, name: str, first: str) -> None:
    """Put the parameter or buffer of one name under another one, too."""
    (owner, _, key), (origin, _, source) = name.rpartition("."), first.rpartition(".")
    setattr(model.get_submodule(owner), key, getattr(model.get_submodule(origin), source))


@torch.no_grad()
def keep_types(model: nn.Module, start: nn.Module) -> nn.Module:
    """Round what stayed in floating point to the 16 bits that it came in, in place.

    Weights of a bfloat16 checkpoint are trained in float32. Rounded back, they take the
    checkpoint's bytes again when they are saved; they are computed with in float32 as before.

    Parameters
    ----------
    model : nn.Module
        From `convert`, after training.
    start : nn.Module
        The float model as it was loaded. Only its large tensors count whose values all fit in 16
        bits.

    Returns
    -------
    nn.Module
        `model`.

    Examples
    --------
    >>> start, trained = nn.Linear(64, 64).bfloat16().float(), nn.Linear(64, 64)
    >>> weight = keep_types(trained, start).weight
    >>> torch.equal(weight, weight.bfloat16().float())
    True
    """
    came = {name: narrowest(p.detach()).dtype for name, p in start.named_parameters()}
    for name, parameter in model.named_parameters():
        if name in came and came[name].itemsize < parameter.dtype.itemsize:
            parameter.copy_(parameter.to(came[name]))
    return model


def _without_weights(model: nn.Module) -> nn.Module:
    """Copy a model but for its parameters, which are going to be replaced."""
    return copy.deepcopy(model, {id(p): _shape_only(p) for p in model.parameters()})


def _shape_only(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)


@contextmanager
def _no_weights() -> Iterator[None]:
    """Let modules that are made here (in this thread) have parameters without memory.

    Their buffers are computed as ever: those that no file holds, such as the frequencies of
    rotary positions, come from the model's own code.
    """
    here = threading.get_ident()

    def shape_only(module: nn.Module, name: str, parameter: nn.Parameter | None):
        made_here = parameter is not None and threading.get_ident() == here
        return _shape_only(parameter) if made_here else parameter

    hook = register_module_parameter_registration_hook(shape_only)
    try:
        yield
    finally:
        hook.remove()


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
            tensors[name] = tensor.detach()
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
    generation = description.get("generation_sha256")
    if generation and not (folder / GENERATION).exists():
        raise DamagedFile(f"{folder / GENERATION} is missing: copy the whole folder")
    if (
        stored != _hash(config)
        or description["sha256"] != sha256(folder / WEIGHTS)
        or (generation and generation != sha256(folder / GENERATION))
    ):
        raise DamagedFile(
            f"the files in {folder} are not those that were saved (their hash differs): they were "
            "truncated, edited or mixed up. Copy the folder again, or save the model anew"
        )
    known = sorted({FORMAT, NARROWED})
    if description["format"] not in known:
        raise DamagedFile(
            f"{path} has format {description['format']}; this version reads "
            f"{' and '.join(map(str, known))}"
        )
    del config[KEY]
    config.pop("quantization_config", None)
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
    settings = kind.config_class.from_dict(config)
    dtype = settings.dtype
    with _no_weights():  # in float32, for the sake of the buffers that are computed
        model = kind._from_config(
            settings, attn_implementation=description["attention"], dtype=torch.float32
        )
    model.config.dtype = dtype
    return model


def _hash(config: dict) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
