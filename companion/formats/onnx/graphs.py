"""What is traced of a model: its inputs and outputs by kind, and which models no file can hold.

Built in chapter 15.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from textwrap import shorten

import torch
from torch import Tensor, nn

from companion.data.biencoder import BiEncoder
from companion.errors import UnsupportedModel

KEY = "companion"  # of the file's metadata
ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")
"""Kinds of layers, as transformers name them, that keep keys and values and nothing else."""
STAY = "serve it in PyTorch, with save_quantized() and load_quantized()"


@dataclass(frozen=True)
class Description:
    """What an exported file says about itself.

    Parameters
    ----------
    kind : {"decoder", "encoder", "retrieval", "module"}
    past : tuple of (int, int, int)
        Of a decoder, for each layer: heads of its keys and values, width of a key, of a value.
    context : int
        Most tokens that it takes, 0 where that is unknown.
    stop : tuple of int
        Tokens that end a text.
    loss_type : str
        As transformers name it.
    quantization : str
        What was quantized, and how.
    generation : dict
        The model's generation settings, as in generation_config.json.
    """

    kind: str
    past: tuple[tuple[int, int, int], ...] = ()
    context: int = 0
    stop: tuple[int, ...] = ()
    loss_type: str = ""
    quantization: str = ""
    generation: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """What the exporter needs: a module, inputs to trace it with, and names.

    Parameters
    ----------
    module : nn.Module
    inputs, shapes : tuple
        Tensors, and which of their dimensions are free.
    names, outputs : sequence of str
        Of inputs and outputs, in the order of the tensors.
    description : Description
    """

    module: nn.Module
    inputs: tuple
    shapes: tuple
    names: Sequence[str]
    outputs: Sequence[str]
    description: Description


class _Decoder(nn.Module):
    """Logits and the new keys and values, given those of the tokens before."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: list) -> tuple:
        from transformers import DynamicCache, DynamicLayer

        cache = DynamicCache()
        for keys, values in past:
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        options = {}
        if self.takes_positions:
            options["position_ids"] = positions(attention_mask)[:, -input_ids.shape[1] :]
        output = self.model(input_ids=input_ids, attention_mask=attention_mask,
                            past_key_values=cache, use_cache=True, **options)  # fmt: skip
        layers = output.past_key_values.layers
        return output.logits, [(layer.keys, layer.values) for layer in layers]


class _Encoder(nn.Module):
    """The logits of a head, or the last hidden state where there is none."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        takes = "position_ids" in inspect.signature(model.forward).parameters
        # a decoder with a head for classes; an encoder counts places, by rules of its own
        self.counts_tokens = takes and _is_causal(model)
        # RotaryEmbedding of ONNX wants a position for each token, not one row for all texts
        self.counts_places = takes and _is_rotary(model) and not self.counts_tokens

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        options = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        if self.counts_tokens:
            options["position_ids"] = positions(attention_mask)
        if self.counts_places:
            options["position_ids"] = positions(torch.ones_like(attention_mask))
        return _answer(
            self.model(input_ids=input_ids, attention_mask=attention_mask, **options), self.model
        )


class _Embedder(nn.Module):
    """One vector for each text."""

    def __init__(self, model: BiEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.embed(input_ids, attention_mask)


def positions(attention_mask: Tensor) -> Tensor:
    """Count the tokens of each row, so that padding on the left moves nothing.

    Parameters
    ----------
    attention_mask : Tensor of int, shape (batch, length)
        1 at tokens, 0 at padding.

    Examples
    --------
    >>> positions(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]))
    tensor([[0, 0, 0, 1],
            [0, 1, 2, 2]])
    """
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def graph_of(model: nn.Module, example: Tensor | None = None) -> Graph:
    """Choose what to trace of a model.

    Parameters
    ----------
    model : nn.Module
        In float32, in eval mode.
    example : Tensor, optional
        An input for a module of one input.

    Raises
    ------
    UnsupportedModel
        If its kind has no place in a file, and why.
    """
    quantization = str(getattr(model, "quantization", "") or "float32")
    if example is not None:
        return Graph(model, (example,), ({0: "batch"},), ("input",), ("output",),
                     Description("module", quantization=quantization))  # fmt: skip
    if not isinstance(model, BiEncoder):
        _refuse(model)
    ids, mask = torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if isinstance(model, BiEncoder):
        return _texts(_Embedder(model), inputs, "sentence_embedding",
                      Description("retrieval", quantization=quantization))  # fmt: skip
    if model.can_generate():
        return _decoder_graph(model, inputs, quantization)
    if _distinguishes_segments(model):
        inputs["token_type_ids"] = torch.zeros_like(ids)
    module = _Encoder(model)
    _run(model, module, inputs)
    return _texts(module, inputs, "logits", Description(
        "encoder", loss_type=getattr(model, "loss_type", None) or "", quantization=quantization
    ))  # fmt: skip


def _texts(module: nn.Module, inputs: dict, output: str, description: Description) -> Graph:
    shapes = ({0: "batch", 1: "length"},) * len(inputs)
    return Graph(module, tuple(inputs.values()), shapes, tuple(inputs), (output,), description)


def _decoder_graph(model: nn.Module, inputs: dict, quantization: str) -> Graph:
    ids, before = inputs["input_ids"], 3
    shapes = _past_shapes(model, inputs)
    past = [tuple(torch.zeros(len(ids), heads, before, width) for width in widths)
            for heads, *widths in shapes]  # fmt: skip
    mask = torch.ones(len(ids), before + ids.shape[1], dtype=torch.int64)
    text, one = {0: "batch", 1: "length"}, {0: "batch", 2: "past"}
    free = (text, {0: "batch", 1: "past_and_length"}, [(one, one)] * len(past))
    parts = [f"{layer}.{part}" for layer in range(len(past)) for part in ("key", "value")]
    config = model.config.get_text_config(decoder=True)  # models that also see have one inside
    return Graph(
        _Decoder(model), (ids, mask, past), free,
        ("input_ids", "attention_mask", *(f"past_key_values.{part}" for part in parts)),
        ("logits", *(f"present.{part}" for part in parts)),
        Description("decoder", shapes, getattr(config, "max_position_embeddings", 0) or 0,
                    _stop(model), "ForCausalLM", quantization, _generation(model)),
    )  # fmt: skip


def _past_shapes(model: nn.Module, inputs: dict) -> tuple[tuple[int, int, int], ...]:
    """Heads and widths of what each layer keeps, from one run: no config says it for all models."""
    from transformers import DynamicCache, DynamicLayer

    name = type(model).__name__
    output = _run(model, model, inputs | {"past_key_values": DynamicCache(), "use_cache": True})
    layers = getattr(getattr(output, "past_key_values", None), "layers", ())
    if not layers or not all(type(layer) is DynamicLayer for layer in layers):
        raise UnsupportedModel(
            f"{name} gives no keys and values of the tokens it has read, so a file could not go on "
            f"from them token by token: {STAY}"
        )
    return tuple((layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])
                 for layer in layers)  # fmt: skip


def _run(model: nn.Module, module: nn.Module, inputs: dict):
    """Run it once in PyTorch, whose own words say better than the exporter's what is wrong.

    The layers of ONNX Runtime give zeros there, of the right shapes.
    """
    try:
        with torch.no_grad():
            return module(**inputs)
    except UnsupportedModel:
        raise
    except Exception as error:
        raise cannot_be_traced(model, error) from error


def cannot_be_traced(model: nn.Module, error: BaseException) -> UnsupportedModel:
    """Name what stopped PyTorch's exporter, and the way that is left."""
    root = error.__cause__ or error
    reason = shorten(str(root), 160, placeholder=" ...").rstrip(".")
    return UnsupportedModel(
        f"{type(model).__name__} cannot be traced for ONNX ({type(root).__name__}: {reason}): {STAY}"
    )


def _answer(output, model: nn.Module) -> Tensor:
    """The one tensor that a file of an encoder answers with."""
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(output, name, None), Tensor):
            return found
    names = ", ".join(output) if hasattr(output, "keys") else type(output).__name__
    raise UnsupportedModel(
        f"{type(model).__name__} answers with {names}, and a file with one tensor: wrap it in a "
        "module of one input that gives one tensor, and pass an input for it, example=..."
    )


def _refuse(model: nn.Module) -> None:
    """Raise for models whose kind is known to have no place in a file."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if config is None or not hasattr(model, "can_generate"):
        raise UnsupportedModel(
            f"{name} is no model of transformers: pass an input for it, example=..."
        )
    arguments = inspect.signature(model.forward).parameters
    if "decoder_input_ids" in arguments:
        raise UnsupportedModel(
            f"{name} is an encoder-decoder, and a file holds one network that reads one text: "
            f"{STAY}, or export an encoder or a language model by itself"
        )
    if model.main_input_name != "input_ids":
        raise UnsupportedModel(
            f"{name} takes {model.main_input_name!r} and no tokens: pass an input for it, "
            "example=..."
        )
    kinds = getattr(config.get_text_config(decoder=True), "layer_types", None) or ()
    others = sorted(set(kinds) - set(ATTENTION))
    if getattr(model, "_is_stateful", False) or others:
        kinds = f" ({', '.join(others)})" if others else ""
        raise UnsupportedModel(
            f"{name} has recurrent or other layers{kinds} "
            "whose state is no list of keys and values, and the decoders of export_onnx keep "
            f"nothing else: {STAY}"
        )
    if any(_turns_with_length(module) for module in model.modules()):
        raise UnsupportedModel(
            f"{name} has rotary embeddings of type 'dynamic', whose frequencies change with the "
            f"length of a text, and a file holds one set of them: {STAY}"
        )
    if _is_causal(model) and "ForSequenceClassification" in name and _pad_token(config) is None:
        raise UnsupportedModel(
            f"{name} reads its answer at the last token and does not know the token that fills up "
            "a batch: set model.config.pad_token_id = tokenizer.pad_token_id first"
        )


def _is_causal(model: nn.Module) -> bool:
    return any(getattr(module, "is_causal", False) is True for module in model.modules())


def _is_rotary(model: nn.Module) -> bool:
    return any("Rotary" in type(module).__name__ for module in model.modules())


def _turns_with_length(module: nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)
    return "dynamic" in (kinds.values() if isinstance(kinds, dict) else (kinds,))


def _pad_token(config) -> int | None:
    return getattr(config.get_text_config(), "pad_token_id", None)


def _distinguishes_segments(model: nn.Module) -> bool:
    return (
        "token_type_ids" in inspect.signature(model.forward).parameters
        and (getattr(model.config, "type_vocab_size", 0) or 0) > 1
    )


def _stop(model: nn.Module) -> tuple[int, ...]:
    """All tokens that end a text: those of the generation settings, or else the config's."""
    text = model.config.get_text_config(decoder=True)
    for source in (getattr(model, "generation_config", None), model.config, text):
        if (found := getattr(source, "eos_token_id", None)) is not None:
            return tokens(found)
    return ()


def tokens(given: int | Sequence[int]) -> tuple[int, ...]:
    """One token or several, as transformers' settings have them.

    Examples
    --------
    >>> tokens(7), tokens([9, 7])
    ((7,), (7, 9))
    """
    return (given,) if isinstance(given, int) else tuple(sorted(set(given)))


def _generation(model: nn.Module) -> dict:
    """The settings that differ from those of transformers, in JSON's types."""
    settings = getattr(model, "generation_config", None)
    return {} if settings is None else json.loads(settings.to_json_string(use_diff=True))
