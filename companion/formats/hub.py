"""The folder of a converted model: safetensors and settings that transformers opens, hash-checked.

`save_quantized` and `save_pretrained` write it; `load_quantized` and, for models of transformers,
``AutoModel....from_pretrained`` after ``import companion`` read it. Built in chapter 15.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from companion.errors import (
    DamagedFile,
    SourceUnavailable,
    UnsupportedModel,
    WrongStage,
    expect,
    extra,
    readable,
)
from companion.files import read_json, sha256, write_folder
from companion.formats.registration import METHOD
from companion.formats.served import Matrix
from companion.numerics.packing import unpack
from companion.qat.packed import Packed, is_pretrained
from companion.qat.saved import describe, fill, refuse_foreign, renamed

WEIGHTS, CONFIG = "model.safetensors", "config.json"
INDEX, GENERATION = "model.safetensors.index.json", "generation_config.json"
FORMAT = 3
OLD = "companion"
"""Where formats 1 and 2, of one file and unknown to transformers, had their description."""


def save_quantized(
    model: nn.Module,
    folder: str | Path,
    *,
    max_shard_size: int | str = "50GB",
    state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a converted model: packed integers, scales, what stayed float, and its settings.

    Nothing is rounded: a large float32 tensor is stored in 16 bits where these hold all its
    values, such as an embedding of a bfloat16 checkpoint that was not trained. A model of
    transformers is opened by its ``from_pretrained``, too, after ``import companion``; its own
    ``save_pretrained`` writes the same.

    Parameters
    ----------
    model : nn.Module
        From `convert`.
    folder : path
        Receives ``model.safetensors`` (or several), ``config.json`` and, where the model has
        settings for generating, ``generation_config.json``; made if needed. Other files in it,
        such as a tokenizer's, stay. A wrapper around one model of transformers, such as
        `BiEncoder`, is written as what it wraps.
    max_shard_size : int or str
        The most bytes of one file, such as ``"2GB"``.
    state : mapping of str to Tensor, optional
        The model's state dict, where it had to be gathered from several processes.

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
    expect("save_quantized", "model", model, nn.Module)
    expect("save_quantized", "folder", folder, str | Path)
    refuse_foreign(model, "save_quantized")
    if getattr(model, "quantization", None) is None or not any(
        isinstance(m, Packed) for m in model.modules()
    ):
        raise WrongStage("save_quantized() needs a model from convert(): convert it first")
    tensors, description = describe(model, state)
    inside = _inside(model)
    if inside:
        description = renamed(description, lambda name: name.removeprefix(inside))
        tensors = {name.removeprefix(inside): tensor for name, tensor in tensors.items()}
    description = {"quant_method": METHOD, "format": FORMAT, **description, "inside": inside}
    whole = model.get_submodule(inside.rstrip("."))
    if is_pretrained(whole):
        empty = torch.empty(0, dtype=getattr(torch, description["dtype"]))
        # where transformers expects a weight of another shape, it stops instead of drawing it
        tensors |= {f"{name}.weight": empty for name in description["layers"]}
    folder = Path(folder)
    shards = split(tensors, max_shard_size)

    def write(partial: Path) -> None:
        for file, names in shards.items():
            shard = {name: tensors[name].cpu().contiguous() for name in names}
            save_file(shard, partial / file, metadata={"format": "pt"})
        if len(shards) > 1:
            _write(partial / INDEX, index_of(tensors, shards))
        if getattr(whole, "generation_config", None) is not None:
            (partial / GENERATION).write_text(whole.generation_config.to_json_string())
        config = whole.config.to_dict() if hasattr(whole, "config") else {}
        if is_pretrained(whole):
            config |= {"architectures": [type(whole).__name__], "dtype": description["dtype"]}
        hashes = {path.name: sha256(path) for path in sorted(partial.iterdir())}
        config["quantization_config"] = description | {"sha256": hashes}
        config = json.loads(json.dumps(config, default=str))
        config["quantization_config"]["config_sha256"] = _hash(config)
        _write(partial / CONFIG, config)

    write_folder(folder, write, last=CONFIG)
    remove_stale(folder, shards)
    return folder


def load_quantized(
    folder: str | Path,
    model: nn.Module | None = None,
    *,
    cache: bool = True,
    revision: str | None = None,
) -> nn.Module:
    """Read a model that `save_quantized` wrote; it computes bit for bit what was saved.

    Only what the file holds takes memory: no float weight is made that is going to be replaced.

    Parameters
    ----------
    folder : path or str
        A folder, or the id of a model on the Hub, such as ``"owner/model"``.
    model : nn.Module, optional
        A float model of the same architecture, needed only where the class is not one of
        transformers' and cannot be rebuilt from config.json. Left as it is.
    cache : bool
        As in `convert`: keep the matrix that each layer dequantizes at its first forward.
    revision : str, optional
        Of a model on the Hub.

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
    SourceUnavailable
        If the Hub has no such model or cannot be reached.

    Examples
    --------
    See `save_quantized`.

    >>> load_quantized("no/such/folder")
    Traceback (most recent call last):
    companion.errors.DamagedFile: no/such/folder/config.json is missing: give the folder that ...
    """
    folder = _local(folder, revision)
    with readable(folder):
        return _load(folder, model, cache)


def _load(folder: Path, model: nn.Module | None, cache: bool) -> nn.Module:
    config, description = _read_config(folder)
    if model is None:
        loaded = _rebuild(folder, config, description)
    else:
        inside = description["inside"]
        if inside:
            description = renamed(description, lambda name: inside + name)
        try:
            tensors = _read_tensors(folder, description)
        except Exception as error:
            raise DamagedFile(
                f"{folder / WEIGHTS} cannot be read ({error}): copy it again"
            ) from None
        whole = {inside + name: tensor for name, tensor in tensors.items()}
        loaded = fill(model, description, whole, cache=cache)
        if GENERATION in description["sha256"]:
            _set_generation(loaded, folder)
    for module in loaded.modules():
        if isinstance(module, Packed):
            module.cache = cache
    return loaded


def read_folder(folder: str | Path, model: nn.Module) -> dict[str, Matrix]:
    """Read the integers and scales out of a folder's files, past every loader.

    Parameters
    ----------
    folder : path
        From `save_quantized`.
    model : nn.Module
        Whose layers are asked for.

    Returns
    -------
    dict of str to Matrix
        By the name of a layer; those that are tied stand under one of their names.

    Raises
    ------
    DamagedFile
        If a file is missing, truncated or edited.
    """
    _, description = _read_config(Path(folder))
    with readable(folder):
        tensors, found = _read_tensors(Path(folder), description), {}
        bits, inside = description["scheme"]["weight_bits"], description["inside"]
        for name, layer in model.named_modules():
            place = name.removeprefix(inside)
            if isinstance(layer, Packed) and f"{place}.integers" in tensors:
                integers = unpack(tensors[f"{place}.integers"], bits, layer.columns)
                scales = tensors[f"{place}.scale"].float()
                found[name] = Matrix(integers.numpy(), scales.numpy())
    return found


def is_saved(folder: str | Path) -> bool:
    """Whether a folder was written by `save_quantized`, in this or an earlier format.

    Examples
    --------
    >>> is_saved("no/such/folder")
    False
    """
    try:
        config = read_json(Path(folder, CONFIG))
        return OLD in config or config["quantization_config"].get("quant_method") == METHOD
    except (ValueError, TypeError, KeyError, AttributeError, OSError):
        return False


def read_config(folder: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what the model was made of, and what was quantized in it, from a folder's config.json.

    Parameters
    ----------
    folder : path
        From `save_quantized`; its hashes are not looked at.

    Returns
    -------
    config, description : dict
        transformers' settings, and ours as `companion.qat.saved.describe` gives them.

    Raises
    ------
    DamagedFile
        If it was not written by `save_quantized`.
    """
    path = Path(folder, CONFIG)
    if not path.exists():
        raise DamagedFile(f"{path} is missing: give the folder that save_quantized() wrote")
    try:
        config = read_json(path)
        if OLD in config:
            config.pop("quantization_config", None)
            description = {"narrowed": {}, "inside": "", **config.pop(OLD)}
            hashes = {WEIGHTS: description.pop("sha256")}
            if "generation_sha256" in description:
                hashes[GENERATION] = description.pop("generation_sha256")
            description["sha256"] = hashes
        else:
            description = config.pop("quantization_config")
        _ = description["config_sha256"], description["format"]
        if not all(Path(name).name == name != ".." for name in description["sha256"]):
            raise ValueError("a file outside of the folder")
        _ = {**description["sha256"]}
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
        raise DamagedFile(
            f"{path} was not written by save_quantized(), or was damaged since: copy it again"
        ) from None
    return config, description


def check_folder(files: list[str], source: str) -> None:
    """Compare the files that transformers is about to read with the hashes they were saved with.

    Parameters
    ----------
    files : list of str
        Those that hold weights.
    source : str
        What `from_pretrained` was given: a folder, or the id of a model on the Hub, of which
        files without weights may not be downloaded yet.

    Raises
    ------
    DamagedFile
        If one is missing, truncated or edited.
    """
    folder = Path(files[0]).parent
    _, description = _read_config(folder, whole=Path(source).is_dir())
    expected = {name for name in description["sha256"] if name.endswith(".safetensors")}
    inside = folder.absolute().is_relative_to(Path(source).absolute()) or not Path(source).is_dir()
    # an index may say ../other
    if (
        {folder / n for n in expected} != set(map(Path, files))
        or ".." in folder.parts
        or not inside
    ):
        raise _damaged(folder)


def header(file: str | Path) -> dict[str, torch.dtype]:
    """Types of the tensors in a safetensors file, by name.

    Parameters
    ----------
    file : path
    """
    with safe_open(file, "pt") as opened:
        return {name: _TYPES[opened.get_slice(name).get_dtype()] for name in opened.keys()}  # noqa: SIM118


_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip


def _inside(model: nn.Module) -> str:
    """The name, with its dot, of a model of transformers that makes up all of this one."""
    if is_pretrained(model):
        return ""
    for name, child in model.named_children():
        inside = f"{name}."
        if is_pretrained(child) and all(n.startswith(inside) for n in model.state_dict()):
            return inside
    return ""


def split(tensors: dict[str, Tensor], limit: int | str) -> dict[str, list[str]]:
    """Say which tensors stand in which file.

    Parameters
    ----------
    tensors : dict of str to Tensor
    limit : int or str
        The most bytes of one file, such as ``"2GB"``.

    Examples
    --------
    >>> split({"a": torch.zeros(3), "b": torch.zeros(3)}, 16)["model-00002-of-00002.safetensors"]
    ['b']
    """
    size = sum(tensor.nbytes for tensor in tensors.values())
    if limit == "50GB" and size <= 50 * 10**9:  # where transformers may be missing
        return {WEIGHTS: list(tensors)}
    with extra("language"):
        from huggingface_hub import split_state_dict_into_shards_factory
    files = split_state_dict_into_shards_factory(
        tensors, get_storage_size=lambda tensor: tensor.nbytes, max_shard_size=limit,
        filename_pattern="model{suffix}.safetensors")  # fmt: skip
    return files.filename_to_tensors


def index_of(tensors: dict[str, Tensor], shards: dict[str, list[str]]) -> dict[str, Any]:
    """Tell transformers in which of several files a tensor stands.

    Parameters
    ----------
    tensors : dict of str to Tensor
    shards : dict of str to list of str
        From `split`.
    """
    return {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }


def remove_stale(folder: Path, shards: dict[str, list[str]]) -> None:
    """Remove the weights of a model that was in the folder before, and lay in other files.

    Parameters
    ----------
    folder : Path
    shards : dict of str to list of str
        Those that stay, from `split`.
    """
    stay = {*shards, *([INDEX] if len(shards) > 1 else [])}
    for path in folder.iterdir():
        ours = re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", path.name)
        if ours and path.name not in stay:
            path.unlink()


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def _local(folder: str | Path, revision: str | None) -> Path:
    """The folder itself, or that of the Hub's cache which holds a model of this id."""
    path = Path(folder)
    if path.exists() or isinstance(folder, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", folder):
        return path
    with extra("language"):
        from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(
            folder, revision=revision, allow_patterns=["*.json", "*.safetensors"]))  # fmt: skip
    except (OSError, ValueError) as error:
        raise SourceUnavailable(
            f"{folder!r} is no folder, and could not be had from the Hub "
            f"({str(error).splitlines()[0]})"
        ) from None


def _read_config(folder: Path, whole: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the settings, and check the hashes of all files (those that are there, if not `whole`)."""
    config, description = read_config(folder)
    for name in description["sha256"]:
        if not (folder / name).is_file() and (whole or name.endswith(".safetensors")):
            raise DamagedFile(f"{folder / name} is missing: copy the whole folder")
    raw = read_json(folder / CONFIG)
    stored = raw[OLD if OLD in raw else "quantization_config"].pop("config_sha256")
    if stored != _hash(raw) or any(
        (folder / name).is_file() and sha256(folder / name) != hash_
        for name, hash_ in description["sha256"].items()
    ):
        raise _damaged(folder)
    if description["format"] not in range(1, FORMAT + 1):
        raise DamagedFile(
            f"{folder / CONFIG} has format {description['format']}; this version reads 1 to {FORMAT}: "
            "install a newer companion"
        )
    return config, description


def _damaged(folder: Path) -> DamagedFile:
    return DamagedFile(
        f"the files in {folder} are not those that were saved (their hash differs): they were "
        "truncated, edited or mixed up. Copy the folder again, or save the model anew"
    )


def _read_tensors(folder: Path, description: dict[str, Any]) -> dict[str, Tensor]:
    """Read all weights but the empty ones, which are there for transformers alone."""
    tensors = {}
    for file in description["sha256"]:
        if file.endswith(".safetensors"):
            with safe_open(folder / file, "pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    layers, inside = set(description["layers"]), description["inside"]
    for name in [f"{layer.removeprefix(inside)}.weight" for layer in layers]:
        tensors.pop(name, None)
    return tensors


def _rebuild(folder: Path, config: dict[str, Any], description: dict[str, Any]) -> nn.Module:
    with extra("language"):
        import transformers

    name = description["class"]
    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise UnsupportedModel(
            f"{name} is no model class of transformers, so it cannot be rebuilt from config.json: "
            f"pass a float model of this class, load_quantized(folder, model=...)"
        )
    if "auto_map" in config:
        raise UnsupportedModel(
            f"{folder} asks to run code that came with it, which is never done: save the model anew, "
            "as a class of transformers"
        )
    with quiet(transformers):
        if description["format"] == FORMAT:
            return kind.from_pretrained(folder, use_safetensors=True, trust_remote_code=False)
        settings = kind.config_class.from_dict(config)
        description["dtype"] = dtype = next(iter(description["computes"].values()))
        tensors = _read_tensors(folder, description)
        types = {n: str(t.dtype).removeprefix("torch.") for n, t in tensors.items()}
        settings.quantization_config = {**description, "types": types, "quant_method": METHOD}
        model = kind.from_pretrained(None, config=settings, state_dict=tensors, dtype=dtype)
        if GENERATION in description["sha256"]:
            _set_generation(model, folder)
        return model


def _set_generation(model: nn.Module, folder: Path) -> None:
    with extra("language"):
        from transformers import GenerationConfig

    settings = read_json(folder / GENERATION)
    model.generation_config = GenerationConfig.from_dict(settings)


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Let transformers show no bars, and no reports of what is there on purpose.

    Parameters
    ----------
    transformers : module
    """
    logging = transformers.utils.logging
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _hash(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
