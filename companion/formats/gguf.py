"""`export_gguf`: a converted language model as a file for llama.cpp, integer by integer.

llama.cpp stores weights in blocks of 32 that share a float16 scale. What was trained in groups of 32, or
of a multiple of it, is such blocks already: nothing is rounded again, and no scale is estimated anew.
Built in chapter 15.

References
----------
The GGUF format and its block types, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from companion.errors import DamagedFile, UnsupportedModel, WrongStage, expect, extra, readable
from companion.files import BLANK, is_sealed, seal, write_atomically
from companion.formats.served import Matrix
from companion.numerics.packing import unpack
from companion.numerics.scheme import BLOCK8
from companion.qat.packed import Packed
from companion.qat.saved import refuse_foreign

if TYPE_CHECKING:
    import gguf

BLOCK = 32
"""Weights that share a scale in Q4_0 and Q8_0."""
HALF = 2**3
"""What Q4_0 adds to its integers, so that they are not negative."""


@dataclass(frozen=True)
class Family:
    """What llama.cpp calls a kind of model, and where its weights differ from transformers'.

    Parameters
    ----------
    name : str
        Of the architecture in the file.
    interleaved : bool
        Whether llama.cpp rotates neighbouring channels of queries and keys instead of the two halves of
        a head: their rows are then put in that order.
    """

    name: str
    interleaved: bool = False


FAMILIES = {
    "llama": Family("llama", interleaved=True),
    "mistral": Family("llama", interleaved=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
}
"""By ``model_type`` of the configuration."""
PRE_TOKENIZERS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt-2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}
"""llama.cpp's name of the expression that cuts a text into words before pairs of letters are merged."""


def export_gguf(
    model: nn.Module, path: str | Path, tokenizer=None, *, floats: str = "exact"
) -> Path:
    """Write a converted language model as a GGUF file that llama.cpp serves.

    Weights of up to 4 bits become Q4_0 and those of 5 to 8 bits Q8_0: integers and float16 scales are
    those of `convert`, bit for bit. Weights of 3 and 2 bits therefore take the room of 4. A scale that
    is shared by a whole row, or by a multiple of 32, is written once for each block.

    Parameters
    ----------
    model : nn.Module
        From `convert` or `load_quantized`: of the Llama, Mistral, Qwen 2 or Qwen 3 family. Weights
        only, or inputs in 8 bits by blocks of 32 (`BLOCK8`), which is what llama.cpp does with every
        model.
    path : path
        Of the file, such as ``"model.gguf"``. It is complete or not there at all.
    tokenizer : PreTrainedTokenizerFast, optional
        Byte-level BPE. Without one the file serves token numbers only.
    floats : {"exact", "F16"}
        How weights are stored that stayed in floating point, such as embeddings: in float16 where it
        holds all values and in float32 otherwise, or in float16 whatever they are.

    Returns
    -------
    Path

    Raises
    ------
    WrongStage
        If the model was not converted.
    UnsupportedModel
        If llama.cpp has no such architecture, block or tokenizer.

    Examples
    --------
    >>> import tempfile, transformers
    >>> from companion import W4, convert, prepare_qat
    >>> config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...                                   num_hidden_layers=1, num_attention_heads=2)
    >>> q = convert(prepare_qat(transformers.LlamaForCausalLM(config), W4))
    >>> export_gguf(q, tempfile.mkdtemp() + "/tiny.gguf").name
    'tiny.gguf'
    """
    expect("export_gguf", "model", model, nn.Module)
    expect("export_gguf", "path", path, str | Path)
    if floats not in ("exact", "F16"):
        raise ValueError(f"floats={floats!r} is unknown: write 'exact' or 'F16'")
    with extra("gguf"):
        import gguf
    refuse_foreign(model, "export_gguf")
    if not any(isinstance(module, Packed) for module in model.modules()):
        raise WrongStage("export_gguf() needs a model from convert(): convert it first")
    family = _family(model)
    _check_activations(model)
    vocabulary = None if tokenizer is None else _vocabulary(tokenizer, model)
    tensors = list(_tensors(model, family, floats))

    def write(partial: Path) -> None:
        writer = gguf.GGUFWriter(partial, family.name)
        writer.add_string("companion.sha256", BLANK)
        _write_settings(writer, model)
        if vocabulary is None:
            writer.add_tokenizer_model("none")
        else:
            vocabulary(writer)
        for name, array, kind in tensors:
            writer.add_tensor(name, array, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        seal(partial)

    path = Path(path)
    write_atomically(path, write)
    return path


def q4_0(integers: Tensor, scale: Tensor) -> np.ndarray:
    """Lay integers of up to 4 bits out as llama.cpp's Q4_0.

    Parameters
    ----------
    integers : Tensor, shape (rows, columns), int8, between -8 and 7
    scale : Tensor, shape (rows, groups), float16
        Each group a multiple of 32 columns.

    Returns
    -------
    ndarray of uint8, shape (rows, columns / 32 * 18)
        Of each block: the scale, then 16 bytes. The low half of byte i is weight i, the high half
        weight 16 + i, each plus 8.

    Examples
    --------
    >>> block = q4_0(torch.full((1, 32), -8, dtype=torch.int8), torch.ones(1, 1, dtype=torch.half))
    >>> block.shape, block[0, :4].tolist()
    ((1, 18), [0, 60, 0, 0])
    """
    rows = len(integers)
    shifted = (integers.numpy() + np.int8(HALF)).astype(np.uint8).reshape(rows, -1, 2, BLOCK // 2)
    halves = shifted[:, :, 0] | shifted[:, :, 1] << 4
    return _with_scales(halves, scale)


def q8_0(integers: Tensor, scale: Tensor) -> np.ndarray:
    """Lay integers of up to 8 bits out as llama.cpp's Q8_0: the scale, then 32 of them.

    Parameters
    ----------
    integers, scale
        As in `q4_0`, between -128 and 127.

    Returns
    -------
    ndarray of uint8, shape (rows, columns / 32 * 34)

    Examples
    --------
    >>> q8_0(torch.ones(2, 64, dtype=torch.int8), torch.ones(2, 1, dtype=torch.half)).shape
    (2, 68)
    """
    return _with_scales(integers.numpy().reshape(len(integers), -1, BLOCK).view(np.uint8), scale)


def open_gguf(path: str | Path) -> gguf.GGUFReader:
    """Open a file, if it is whole; lengths that it does not have are not believed.

    Parameters
    ----------
    path : path

    Raises
    ------
    DamagedFile
        If it is missing, truncated, edited or no GGUF file.
    """
    with extra("gguf"):
        from gguf import GGUFReader

    class Reader(GGUFReader):
        def _get(self, offset, dtype, count=1, override_order=None):
            if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("it ends within a field")  # where gguf reads on, for ever
            return super()._get(offset, dtype, count, override_order)

    remedy = "export it again"
    if not Path(path).is_file():
        raise DamagedFile(f"{path} is missing: give the file that export_gguf() wrote")
    if is_sealed(path) is False:
        raise DamagedFile(f"{path} is not the file that was written (its hash differs): {remedy}")
    with readable(path, remedy):
        return Reader(path)


def read_gguf(path: str | Path, model: nn.Module) -> dict[str, Matrix]:
    """Read the integers and scales out of an exported file, in the order that the model has them.

    Parameters
    ----------
    path : path
    model : nn.Module
        Whose layers are asked for: it says what llama.cpp calls them, and how it orders rows.

    Returns
    -------
    dict of str to Matrix
        By the name of a layer; those that the file does not hold in Q4_0 or Q8_0 are left out.
    """
    with extra("gguf"):
        import gguf  # noqa: F401
    with readable(path, "export it again"):
        return _read(path, model)


def _read(path: str | Path, model: nn.Module) -> dict[str, Matrix]:
    import gguf

    family = _family(model)
    tensors = {tensor.name: tensor for tensor in open_gguf(path).tensors}
    named, found = _names(model, family), {}
    for name, layer in model.named_modules():
        if not isinstance(layer, Packed):
            continue
        tensor = tensors.get(named(f"{name}.weight"))
        kinds = gguf.GGMLQuantizationType
        if tensor is None or tensor.tensor_type not in (kinds.Q4_0, kinds.Q8_0):
            continue
        blocks = tensor.data.reshape(layer.rows, layer.columns // BLOCK, -1)
        scales, stored = blocks[..., :2].copy().view(np.float16)[..., 0], blocks[..., 2:]
        if tensor.tensor_type == kinds.Q4_0:
            halves = np.concatenate([stored & 15, stored >> 4], -1)
            integers = halves.astype(np.int8) - HALF
        else:
            integers = stored.copy().view(np.int8)
        back = _order(model, family, name)(torch.arange(layer.rows)).argsort().numpy()
        found[name] = Matrix(
            integers.reshape(layer.rows, -1)[back], scales.astype(np.float32)[back]
        )
    return found


def _with_scales(bytes_: np.ndarray, scale: Tensor) -> np.ndarray:
    rows, blocks, _ = bytes_.shape
    repeated = scale.repeat_interleave(blocks // scale.shape[-1], -1).contiguous()
    stored = repeated.numpy().view(np.uint8).reshape(rows, blocks, 2)
    return np.concatenate([stored, bytes_], -1).reshape(rows, -1)


def _family(model: nn.Module) -> Family:
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in FAMILIES or not type(model).__name__.endswith("ForCausalLM"):
        raise UnsupportedModel(
            f"export_gguf() writes language models of the kinds {', '.join(FAMILIES)}, and this is "
            f"a {type(model).__name__} ({kind}): use export_onnx() or save_quantized()"
        )
    return FAMILIES[kind]


def _check_activations(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        if isinstance(layer, Packed) and layer.scheme.activations not in (None, BLOCK8):
            raise UnsupportedModel(
                f"{name} rounds its inputs in another way than llama.cpp, which always rounds them to "
                "8 bits by blocks of 32: train weights only, or with Activations as in BLOCK8"
            )


def _tensors(
    model: nn.Module, family: Family, floats: str
) -> Iterator[tuple[str, np.ndarray, gguf.GGMLQuantizationType]]:
    """Every weight under llama.cpp's name; what is tied to the embedding stands in the file once."""
    head = model.get_output_embeddings()
    tied, named = model.config.tie_word_embeddings, _names(model, family)
    packed = {n: m for n, m in model.named_modules() if isinstance(m, Packed)}
    for name, layer in packed.items():
        if not (tied and layer is head):
            yield _packed(named(f"{name}.weight"), name, layer, _order(model, family, name))
    inside = tuple(f"{name}." for name in packed)
    for name, tensor in model.state_dict().items():
        module = model.get_submodule(name.rpartition(".")[0])
        if (name.startswith(inside) and not name.endswith(".bias")) or (tied and module is head):
            continue
        yield _float(named(name), tensor, _order(model, family, name.rpartition(".")[0]), floats)


def _names(model: nn.Module, family: Family) -> Callable[[str], str]:
    """What llama.cpp calls a tensor of the model."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    (arch,) = (a for a in MODEL_ARCH if MODEL_ARCH_NAMES[a] == family.name)
    names = get_tensor_name_map(arch, model.config.num_hidden_layers)

    def named(name: str) -> str:
        found = names.get_name(name, (".weight", ".bias"))
        if found is None:
            raise UnsupportedModel(
                f"llama.cpp's {family.name} has no place for {name}: use export_onnx()"
            )
        return found

    return named


Order = Callable[[Tensor], Tensor]


def _order(model: nn.Module, family: Family, name: str) -> Order:
    """The order of rows in which llama.cpp wants the weight of a layer."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    asked = heads.get(name.rpartition(".")[2])
    if not family.interleaved or asked is None:
        return lambda rows: rows
    number = getattr(model.config, asked)

    def interleave(rows: Tensor) -> Tensor:
        halves = rows.unflatten(0, (number, 2, -1))  # (heads, halves, channels / 2, ...)
        return halves.transpose(1, 2).flatten(0, 2)

    return interleave


def _packed(place: str, name: str, layer: Packed, order: Order):
    from gguf import GGMLQuantizationType as Kind

    group = layer.scheme.group_size or layer.columns
    if group % BLOCK or layer.columns % BLOCK:
        raise UnsupportedModel(
            f"{name} has groups of {group} weights, and llama.cpp's blocks have {BLOCK}: train in "
            f"groups of a multiple of {BLOCK}"
        )
    scale = layer.scale.cpu()
    if scale.dtype != torch.float16:
        half = scale.to(torch.float16)
        if not torch.equal(half.to(scale.dtype), scale):
            raise UnsupportedModel(
                f"{name} has scales in {str(scale.dtype).removeprefix('torch.')} that float16 does not "
                "hold, and llama.cpp's blocks have no other: train with scale_dtype=torch.float16"
            )
        scale = half
    integers = unpack(layer.integers.cpu(), layer.scheme.weight_bits, layer.columns)
    integers, scale = order(integers), order(scale)
    if layer.scheme.weight_bits <= 4:
        return place, q4_0(integers, scale), Kind.Q4_0
    return place, q8_0(integers, scale), Kind.Q8_0


def _float(place: str, tensor: Tensor, order: Order, floats: str):
    from gguf import GGMLQuantizationType as Kind

    tensor = order(tensor.detach().cpu().float())
    half = tensor.half()
    # vectors are added and multiplied in float32: llama.cpp takes no other
    if tensor.dim() > 1 and (floats == "F16" or torch.equal(half.float(), tensor)):
        return place, half.contiguous().numpy(), Kind.F16
    return place, tensor.contiguous().numpy(), Kind.F32


def _write_settings(writer: gguf.GGUFWriter, model: nn.Module) -> None:
    import gguf

    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise UnsupportedModel(
            f"positions of the kind {rope['rope_type']!r} are not written yet: use export_onnx()"
        )
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10_000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, add in (
        ("temperature", writer.add_sampling_temp), ("top_k", writer.add_sampling_top_k),
        ("top_p", writer.add_sampling_top_p),
    ):  # fmt: skip
        value = getattr(getattr(model, "generation_config", None), name, None)
        if value is not None:
            add(value)


def _vocabulary(tokenizer, model: nn.Module) -> Callable[[gguf.GGUFWriter], None]:
    """Check a tokenizer, and return what writes it."""
    import json

    from gguf import TokenType

    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    kind = described["model"].get("type")
    if kind != "BPE" or described["model"].get("byte_fallback") or described["normalizer"]:
        raise UnsupportedModel(
            "export_gguf() writes byte-level BPE tokenizers, as of GPT-2, Llama 3, Qwen and SmolLM, and "
            "this one is another: leave the tokenizer out and serve token numbers"
        )
    pre = _pre_tokenizer(described["pre_tokenizer"])
    special = {token["id"]: token for token in described["added_tokens"]}
    size = model.config.vocab_size
    tokens = [f"[PAD{number}]" for number in range(size)]
    kinds = [TokenType.UNUSED] * size
    for token, number in tokenizer.get_vocab().items():
        tokens[number], kinds[number] = token, TokenType.NORMAL
        if number in special:
            control = special[number]["special"]
            kinds[number] = TokenType.CONTROL if control else TokenType.USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in described["model"]["merges"]]

    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges(merges)
        for number, add in (
            (tokenizer.bos_token_id, writer.add_bos_token_id),
            (tokenizer.eos_token_id, writer.add_eos_token_id),
            (tokenizer.unk_token_id, writer.add_unk_token_id),
            (tokenizer.pad_token_id, writer.add_pad_token_id),
        ):
            if number is not None:
                add(number)
        writer.add_add_bos_token(bool(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id))
        writer.add_add_space_prefix(False)
        if tokenizer.chat_template:
            writer.add_chat_template(tokenizer.chat_template)

    return write


def _pre_tokenizer(described: dict | None) -> str:
    """llama.cpp's name of what a tokenizer does before it merges."""
    parts = (
        [described] if (described or {}).get("type") != "Sequence" else described["pretokenizers"]
    )
    kinds = [part["type"] for part in parts if part]
    splits = [part["pattern"].get("Regex") for part in parts if part and part["type"] == "Split"]
    if kinds == ["ByteLevel"] and parts[0]["use_regex"] and not parts[0]["add_prefix_space"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and parts[1]["use_regex"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and splits[0] in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[splits[0]]
    raise UnsupportedModel(
        f"llama.cpp knows tokenizers by name, and this one ({', '.join(kinds) or 'none'}) has none that "
        "export_gguf() knows: leave the tokenizer out and serve token numbers"
    )
