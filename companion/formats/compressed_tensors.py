"""`export_compressed_tensors`: a converted model in the format that vLLM and transformers load.

Built in chapter 15.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from companion.errors import (
    DamagedFile,
    MissingExtra,
    UnsupportedModel,
    WrongStage,
    expect,
    extra,
    readable,
)
from companion.files import read_json, sha256, write_folder
from companion.formats.hub import (
    CONFIG,
    GENERATION,
    INDEX,
    index_of,
    quiet,
    remove_stale,
    split,
)
from companion.formats.served import Matrix
from companion.numerics.activations import Activations
from companion.numerics.packing import narrowest, pack, unpack
from companion.numerics.scheme import QuantScheme, integer_range
from companion.qat.packed import Packed, QuantizedLinear, is_pretrained
from companion.qat.saved import describe, refuse_foreign

HASHES = "companion_sha256"
"""Where config.json has the hashes of the folder; other readers leave it alone."""
INT8_TOKENS = Activations(8, "token", symmetric=True)
"""The only rounding of inputs that compressed-tensors' int8 kernels compute as it was trained."""


def export_compressed_tensors(
    model: nn.Module,
    folder: str | Path,
    *,
    bits: int | None = None,
    zero_points: bool = False,
    max_shard_size: int | str = "50GB",
) -> Path:
    """Write a converted model of transformers in compressed-tensors' own format.

    Integers and scales are those that were trained. Weights of up to four bits are stored in
    four, others in eight (``pack-quantized``); with ``Activations(8, "token", symmetric=True)``
    and one scale per row, in ``int-quantized`` (where a token's largest input is negative, -127.5
    steps, a last bit decides between two integers). transformers opens the folder with the package
    compressed-tensors; vLLM, which the format is for, was not run.

    A negative scale, which learned and searched ranges may have, becomes positive by changing the
    signs of its group's integers. Where one of them is the smallest, such as -8, whose opposite
    four bits do not hold, say what to give up for it: `bits` or `zero_points`.

    Parameters
    ----------
    model : PreTrainedModel
        From `convert`. Embeddings and the output layer are written in floating point, with the
        values that they were rounded to: vLLM takes no others.
    folder : path
        Made if needed. Other files in it, such as a tokenizer's, stay.
    bits : {4, 8}, optional
        Width in which a weight is stored. Eight hold the opposite of every shorter integer.
    zero_points : bool
        Allow zero points (``symmetric: false``), which move a turned grid by one: half a byte for
        each group, the same values. transformers 5.23 opens such a folder with
        ``quantization_config=CompressedTensorsConfig(dequantize=True)`` alone.
    max_shard_size : int or str
        The most bytes of one file, such as ``"2GB"``.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    WrongStage
        If the model was not converted.
    UnsupportedModel
        If it is none of transformers', has layers other than Linear, rounds its inputs in
        another way, or has negative scales that cannot be turned.

    Examples
    --------
    >>> import tempfile, transformers
    >>> from companion import W4, convert, prepare_qat
    >>> config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...                                   num_hidden_layers=1, num_attention_heads=2)
    >>> q = convert(prepare_qat(transformers.LlamaForCausalLM(config), W4, "absmax"))
    >>> folder = export_compressed_tensors(q, tempfile.mkdtemp())
    >>> json.loads((folder / "config.json").read_text())["quantization_config"]["format"]
    'pack-quantized'
    """
    expect("export_compressed_tensors", "model", model, nn.Module)
    expect("export_compressed_tensors", "folder", folder, str | Path)
    refuse_foreign(model, "export_compressed_tensors")
    packed = {name: m for name, m in model.named_modules() if isinstance(m, Packed)}
    if not packed:
        raise WrongStage(
            "export_compressed_tensors() needs a model from convert(): convert it first"
        )
    if not is_pretrained(model):
        raise UnsupportedModel(
            f"export_compressed_tensors() writes models of transformers, and this is a "
            f"{type(model).__name__}: use save_quantized()"
        )
    scheme = next(iter(packed.values())).scheme
    _check_activations(scheme)
    kinds = _float_kinds(model)
    tables = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    exported = {
        name: layer for name, layer in packed.items()
        if isinstance(layer, QuantizedLinear) and id(layer) not in tables
    }  # fmt: skip
    others = [name for name in exported if kinds[name] is not nn.Linear]
    if others:
        raise UnsupportedModel(
            f"compressed-tensors takes nn.Linear layers, and {others[0]} is a "
            f"{kinds[others[0]].__name__}: use export_onnx() or save_quantized()"
        )
    if not exported:
        raise UnsupportedModel(
            "only embeddings or the output layer of this model are rounded, which are written in "
            "floating point: use save_quantized()"
        )
    heads = [name for name, layer in packed.items() if isinstance(layer, QuantizedLinear)
             and name not in exported]  # fmt: skip
    if heads and scheme.activations is not None:
        raise UnsupportedModel(
            f"{heads[0]} rounds its inputs, and vLLM takes output layers in floating point only: "
            f"prepare the model with skip={heads}"
        )
    least = 4 if scheme.weight_bits <= 4 else 8
    bits = least if bits is None else bits
    if bits not in (4, 8) or bits < least:
        raise ValueError(
            f"bits={bits} cannot store {scheme.weight_bits}-bit weights here: choose 4 or 8, "
            f"{least} at least"
        )
    tensors, description = describe(model)
    grids = {name: _positive(layer, bits) for name, layer in exported.items()}
    shifted = any(zero.any() for _, _, zero in grids.values())
    if shifted and (scheme.activations is not None or not zero_points):
        raise UnsupportedModel(_negative(grids, bits, scheme))
    for name, layer in packed.items():
        for key in ("integers", "scale", "factor"):
            tensors.pop(f"{name}.{key}", None)
        if name in grids:
            integers, scale, zero = grids[name]
            if scheme.activations is not None:
                tensors |= {f"{name}.weight": integers, f"{name}.weight_scale": scale}
            else:
                tensors |= _pack_quantized(name, integers, scale, zero if shifted else None, bits)
        elif f"{name}.integers" not in description["aliases"]:
            tensors[f"{name}.weight"] = narrowest(layer.weight)
    config = model.config.to_dict() | {
        "architectures": [type(model).__name__],
        "dtype": description["dtype"],
        "quantization_config": _description(
            scheme, bits, shifted,
            [name for name, kind in kinds.items() if kind is nn.Linear and name not in exported],
        ),
    }  # fmt: skip
    shards = split(tensors, max_shard_size)

    def write(partial: Path) -> None:
        for file, names in shards.items():
            shard = {name: tensors[name].cpu().contiguous() for name in names}
            save_file(shard, partial / file, metadata={"format": "pt"})
        if len(shards) > 1:
            (partial / INDEX).write_text(json.dumps(index_of(tensors, shards), indent=1) + "\n")
        if getattr(model, "generation_config", None) is not None:
            (partial / GENERATION).write_text(model.generation_config.to_json_string())
        told = json.loads(json.dumps(config, default=str))
        told[HASHES] = hashes_of(partial, told)
        (partial / CONFIG).write_text(json.dumps(told, indent=1) + "\n")

    write_folder(folder, write, last=CONFIG)
    remove_stale(Path(folder), shards)
    return Path(folder)


def read_compressed_tensors(folder: str | Path, model: nn.Module) -> dict[str, Matrix]:
    """Read the integers and scales out of an exported folder.

    Parameters
    ----------
    folder : path
    model : nn.Module
        Whose layers are asked for.

    Returns
    -------
    dict of str to Matrix
        By the name of a layer. Zero points are taken off the integers already; embeddings and
        output layers come as values, since the format has them in floating point.
    """
    with readable(folder):
        _check_hashes(Path(folder))
        return _read(Path(folder), model)


def hashes_of(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Hash the files of a folder, and the settings that go with them.

    Parameters
    ----------
    folder : Path
    config : dict
        Of config.json, which may hold hashes already.

    Returns
    -------
    dict
        What stands in config.json under `HASHES`.
    """
    settings = {key: value for key, value in config.items() if key != HASHES}
    text = json.dumps(settings, sort_keys=True)
    files = {path.name: sha256(path) for path in sorted(folder.iterdir())
             if path.suffix in (".safetensors", ".json") and path.name != CONFIG
             and path.name.startswith(("model", "generation"))}  # fmt: skip
    return {"files": files, "config": hashlib.sha256(text.encode()).hexdigest()}


def _check_hashes(folder: Path) -> None:
    """Refuse a folder of ours whose files are not those that were written."""
    config = read_json(folder / CONFIG)
    if HASHES in config and config[HASHES] != hashes_of(folder, config):
        raise DamagedFile(
            f"the files in {folder} are not those that were exported (their hash differs): copy the "
            "folder again, or export the model anew"
        )


def _read(folder: Path, model: nn.Module) -> dict[str, Matrix]:
    tensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(file)
    weights = _settings(folder)["config_groups"]["group_0"]["weights"]
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, Packed):
            continue
        scale = tensors.get(f"{name}.weight_scale")
        if f"{name}.weight_packed" in tensors:
            bits = weights["num_bits"]
            integers = _integers(tensors[f"{name}.weight_packed"], bits, layer.columns).short()
            if f"{name}.weight_zero_point" in tensors:
                stored = tensors[f"{name}.weight_zero_point"].t().contiguous()
                zero = _integers(stored, bits, layer.rows).t()
                integers = (integers.unflatten(-1, (zero.shape[-1], -1)) - zero[..., None]).flatten(
                    1
                )
            found[name] = Matrix(integers.numpy(), scale.float().numpy())
        elif scale is not None:
            found[name] = Matrix(tensors[f"{name}.weight"].short().numpy(), scale.float().numpy())
        elif f"{name}.weight" in tensors:
            found[name] = Matrix(values=tensors[f"{name}.weight"].float().numpy())
    return found


def open_compressed_tensors(folder: str | Path) -> nn.Module:
    """Open an exported folder in transformers, with the package compressed-tensors.

    Parameters
    ----------
    folder : path

    Returns
    -------
    PreTrainedModel
        In eval mode. Where the folder has zero points, its weights are made floats at once: this
        version of transformers computes with them in no other way.
    """
    with extra("language"):
        import transformers
    try:
        import compressed_tensors  # noqa: F401
    except ImportError as error:
        raise MissingExtra(
            "compressed-tensors, which opens this folder, is missing: pip install compressed-tensors"
        ) from error
    with readable(folder):
        _check_hashes(Path(folder))
        return _open(Path(folder), transformers)


def _open(folder: Path, transformers: Any) -> nn.Module:
    config = read_json(folder / CONFIG)
    kind = getattr(transformers, config["architectures"][0])
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise UnsupportedModel(f"{folder} names no model class of transformers: export it anew")
    if "auto_map" in config:
        raise UnsupportedModel(
            f"{folder} asks to run code that came with it, which is never done: export the model anew"
        )
    options: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}
    if not _settings(folder)["config_groups"]["group_0"]["weights"]["symmetric"]:
        whole = transformers.CompressedTensorsConfig(dequantize=True)
        options["quantization_config"] = whole
    with quiet(transformers):
        return kind.from_pretrained(folder, **options).eval()


def is_compressed_tensors(folder: str | Path) -> bool:
    """Whether a folder holds a model in this format.

    Examples
    --------
    >>> is_compressed_tensors("no/such/folder")
    False
    """
    try:
        return _settings(folder).get("quant_method") == "compressed-tensors"
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def _settings(folder: str | Path) -> dict[str, Any]:
    return read_json(Path(folder, CONFIG))["quantization_config"]


def _integers(stored: Tensor, bits: int, columns: int) -> Tensor:
    """The opposite of `words`."""
    sign = {4: 0x88, 8: 0x80}[bits]
    bytes_ = stored.contiguous().view(torch.uint8).bitwise_xor(sign)
    width = -(-columns // 8) * bits
    bytes_ = nn.functional.pad(bytes_, (0, max(0, width - bytes_.shape[-1])))[:, :width]
    return unpack(bytes_.contiguous(), bits, columns)


def words(integers: Tensor, bits: int) -> Tensor:
    """Lay integers out as compressed-tensors does: without gaps in int32, the smallest being 0.

    Parameters
    ----------
    integers : Tensor, shape (rows, columns), int8
    bits : {4, 8}
        Width of one.

    Returns
    -------
    Tensor, shape (rows, ceil(columns * bits / 32)), int32

    Examples
    --------
    >>> hex(words(torch.tensor([[-8, -7, -6, -5, -4, 0, 6, 7]], dtype=torch.int8), 4).item() % 2**32)
    '0xfe843210'
    """
    sign = {4: 0x88, 8: 0x80}[bits]  # from two's complement to an offset
    bytes_ = pack(integers, bits).bitwise_xor_(sign)
    wide = 4 * -(-integers.shape[-1] * bits // 32)
    return bytes_[:, :wide].contiguous().view(torch.int32)


def _check_activations(scheme: QuantScheme) -> None:
    form = scheme.activations
    if form is None or (form == INT8_TOKENS and scheme.weight_bits == 8 and not scheme.group_size):
        return
    raise UnsupportedModel(
        "compressed-tensors rounds inputs to 8 bits, symmetrically and by token, and then wants 8-bit "
        "weights with one scale per row, which is not what this model was trained with: train weights "
        'only, or with QuantScheme(8, None, activations=Activations(8, "token", symmetric=True))'
    )


def _float_kinds(model: nn.Module) -> dict[str, type[nn.Module]]:
    """What each module was before it was rounded: its class, by name."""
    with torch.device("meta"):
        empty = type(model)(model.config)
    return {name: type(module) for name, module in empty.named_modules()}


def _positive(layer: Packed, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integers, positive scales and zero points of the same values.

    With a negative scale the grid is turned around: of 4 bits, it ends at +8 instead of -8. Where no integer
    lies at that end, changing all signs brings it back; else the grid is moved by one.
    """
    scale = layer.scale.detach().cpu()
    integers = unpack(layer.integers.cpu(), layer.scheme.weight_bits, layer.columns)
    groups = integers.unflatten(-1, (scale.shape[-1], -1))
    turned = scale < 0
    moved = turned & (groups == integer_range(bits)[0]).any(-1)
    zero = -moved.to(torch.int8)
    signed = torch.where(turned[..., None], ~groups, groups)  # ~q is -q - 1, which never overflows
    signed = signed + (turned & ~moved)[..., None].to(torch.int8)
    return signed.flatten(-2), scale.abs(), zero


def _pack_quantized(
    name: str, integers: Tensor, scale: Tensor, zero: Tensor | None, bits: int
) -> dict[str, Tensor]:
    tensors = {
        f"{name}.weight_packed": words(integers, bits),
        f"{name}.weight_scale": scale,
        f"{name}.weight_shape": torch.tensor(integers.shape),
    }
    if zero is not None:
        tensors[f"{name}.weight_zero_point"] = words(zero.t().contiguous(), bits).t()
    return tensors


def _negative(grids: dict[str, Any], bits: int, scheme: QuantScheme) -> str:
    count = sum(int(zero.count_nonzero()) for _, _, zero in grids.values())
    groups = sum(zero.numel() for _, _, zero in grids.values())
    ways = [] if bits == 8 else ["bits=8 (the same values in twice the bytes)"]
    ways += [] if scheme.activations else ["zero_points=True (half a byte for each group)"]
    return (
        f"{count} of {groups} groups have a negative scale and use the integer {-(2 ** (bits - 1))}, "
        f"and compressed-tensors takes positive scales: {''.join(f'export with {w}, ' for w in ways)}"
        'or prepare the model with method="absmax", whose scales are positive'
    )


def _description(
    scheme: QuantScheme, bits: int, shifted: bool, ignore: list[str]
) -> dict[str, Any]:
    """The quantization_config that compressed-tensors reads."""
    common = {"type": "int", "symmetric": True, "dynamic": False}
    weights = common | {
        "num_bits": bits,
        "symmetric": not shifted,
        "strategy": "group" if scheme.group_size else "channel",
        "group_size": scheme.group_size,
    }
    inputs = None
    if scheme.activations is not None:
        inputs = common | {"num_bits": 8, "strategy": "token", "dynamic": True}
    form = "pack-quantized" if inputs is None else "int-quantized"
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {
            "targets": ["Linear"], "weights": weights, "input_activations": inputs,
            "output_activations": None, "format": form}},
        "ignore": ignore,
        "kv_cache_scheme": None,
    }  # fmt: skip
