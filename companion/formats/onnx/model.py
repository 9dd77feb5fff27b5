"""`OnnxModel`: an exported file, run by ONNX Runtime and asked like the model it came from.

Built in chapter 15.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from companion.errors import DamagedFile, UnreadableBatch, UnsupportedModel, extra
from companion.evaluation.forward import refuse
from companion.formats.onnx.choice import TOP_K, active_settings, choose, draw_rules, rules
from companion.formats.onnx.graphs import KEY, Description, tokens
from companion.formats.onnx.stored import check_whole
from companion.formats.served import ServedModel


class Output(NamedTuple):
    """What a served model answers: for an encoder without a head, its last hidden state."""

    logits: Tensor


class TextModel(ServedModel):
    """A served model whose engine gives logits, from which the next token is chosen here.

    Examples
    --------
    >>> issubclass(OnnxModel, TextModel)
    True
    """

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop: bool = True,
        settings: Mapping | None = None,
    ) -> Iterator[int]:
        """Go on with a text, token by token, each as soon as it is known.

        The model's generation settings (tokens that end a text, a repetition penalty, what to
        draw from) travel in the file and hold here as they do in transformers.

        Parameters
        ----------
        input_ids : Tensor, int64, shape (1, length)
        attention_mask : Tensor, int64, shape (1, length), optional
            Places that are 0 are left out.
        max_new_tokens : int, optional
            Fewer come where the model ends the text, or its context is full. Default: what the
            settings say, or 50.
        temperature : float, optional
            0 takes the likeliest token each time. Default: what the settings say, or 0.
        top_k : int, optional
            Draw from so many of the likeliest tokens. Default: what the settings say.
        top_p : float, optional
            Draw from the fewest tokens that hold so much probability. Default: likewise.
        seed : int
            Of the draws, where the temperature is above 0.
        stop : bool
            End where the model ends the text.
        settings : mapping, optional
            To go by instead of those in the file, such as ``{"repetition_penalty": 1.2}``.

        Yields
        ------
        int

        Raises
        ------
        ValueError
            If the prompt is empty, more than one text, or leaves no room in the context.
        UnsupportedModel
            If the file holds no language model, or the settings ask for something else than one
            token after the other, such as beams.
        """
        steps = self._steps([one_text(input_ids, attention_mask)], max_new_tokens, temperature,
                            top_k, top_p, seed, stop, settings)  # fmt: skip
        return (token for (token,) in steps if token is not None)

    def _steps(
        self, told: list[list[int]], most: int | None, temperature: float | None,
        top_k: int | None, top_p: float | None, seed: int, stop: bool, settings: Mapping | None,
    ) -> Iterator[list[int | None]]:  # fmt: skip
        """Check what is asked for, and give the next token of every text until all have ended."""
        self._needs("decoder")
        asked = dict(self.description.generation if settings is None else settings)
        asked |= {name: value for name, value in (("top_k", top_k), ("top_p", top_p))
                  if value is not None}  # fmt: skip
        wanted = active_settings(asked)
        if temperature is None:
            temperature = wanted.get("temperature", 1.0) if wanted.get("do_sample") else 0.0
        if wanted.get("do_sample") and "top_k" not in asked:
            wanted["top_k"] = TOP_K
        if temperature < 0:
            raise ValueError(f"temperature={temperature} is below 0, which takes the likeliest")
        limits = [limit(self.description.context, len(text), most, wanted) for text in told]
        ends = self.description.stop
        if settings is not None and "eos_token_id" in wanted:
            ends = tokens(wanted["eos_token_id"])
        always = [rules(wanted, len(text), limits[row], ends) for row, text in enumerate(told)]
        drawn = draw_rules(wanted) if temperature else []
        rngs = [np.random.default_rng(seed + row) for row in range(len(told))]

        def choice(row: int, logits: np.ndarray) -> int:
            return choose(logits, told[row], always[row], drawn, temperature, rngs[row])

        return self._tokens(told, limits, ends if stop else (), choice)

    @abstractmethod
    def _tokens(
        self, told: list[list[int]], limits: list[int], ends: Sequence[int], choice: Callable
    ) -> Iterator[list[int | None]]:
        """Append to each text until it ends; `choice` reads it."""

    def extra_repr(self) -> str:
        return f"{self.description.kind}: {self.description.quantization}"

    def _needs(self, kind: str) -> None:
        if self.description.kind != kind:
            raise UnsupportedModel(
                f"this file holds a model of kind {self.description.kind!r}, and {kind!r} is needed"
            )


class OnnxModel(TextModel):
    """A file of `export_onnx` in ONNX Runtime, on the CPU.

    `perplexity`, `accuracy` and the metrics of the tasks take it as they take any model.

    Parameters
    ----------
    path : path
    threads : int, optional
        Default: one for each core.

    Raises
    ------
    DamagedFile
        If the file is missing, truncated or not from `export_onnx`.

    Examples
    --------
    >>> import tempfile
    >>> from companion import W4, convert, export_onnx, prepare_qat
    >>> q = convert(prepare_qat(torch.nn.Sequential(torch.nn.Linear(64, 8)), W4))
    >>> x = torch.ones(3, 64)
    >>> path = export_onnx(q, tempfile.mkdtemp() + "/layer.onnx", example=x)
    >>> torch.allclose(OnnxModel(path)(x), q(x), atol=1e-5)
    True
    """

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        with extra("deploy"):
            import onnxruntime

        super().__init__()
        check_whole(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
            saved = json.loads(self._session.get_modelmeta().custom_metadata_map[KEY])
        except KeyError:
            raise DamagedFile(f"{path} was not written by export_onnx()") from None
        except Exception as error:
            reason = str(error).split("\n")[0]
            raise DamagedFile(f"{path} cannot be read ({reason}): export it again") from None
        try:
            self.description = described(saved)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise DamagedFile(
                f"{path} was written by another version of export_onnx(): export it again"
            ) from None
        self.loss_type = self.description.loss_type
        self.eval()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Tensor
    ) -> Output | Tensor:
        """Answer a batch: logits, or for a plain module its output.

        Parameters
        ----------
        input_ids : Tensor, int64, shape (batch, length)
            Or the input of a plain module.
        attention_mask : Tensor, int64, shape (batch, length), optional
            0 at padding, on either side. Default: no padding.
        **others : Tensor
            ``token_type_ids``, where the model was trained with two kinds of segments; all 0
            where they are left out.

        Raises
        ------
        UnreadableBatch
            If the file takes no such input, or inputs do not fit each other.
        """
        if self.description.kind == "module":
            given = others | ({} if attention_mask is None else {"attention_mask": attention_mask})
            refuse(self, given, given)
            return self._run({"input": input_ids})[0]
        feed = self._texts(input_ids, attention_mask, others)
        if self.description.kind == "decoder":
            feed |= self._no_past(len(input_ids))
        return Output(self._run(feed)[0])

    def embed(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """One vector of length one for each text: shape (batch, width)."""
        self._needs("retrieval")
        return self._run(self._texts(input_ids, attention_mask, {}))[0]

    @property
    def vocabulary(self) -> int:
        """How many tokens it knows, 0 where the file does not say."""
        known = self._session.get_outputs()[0].shape[-1]
        return known if isinstance(known, int) else 0

    def generate_batch(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop: bool = True,
        settings: Mapping | None = None,
    ) -> list[list[int]]:
        """Go on with several texts at once, which share each reading of the weights.

        Parameters
        ----------
        input_ids : Tensor, int64, shape (batch, length)
        attention_mask : Tensor, int64, shape (batch, length), optional
            0 at padding, on either side. Default: no padding.
        max_new_tokens, temperature, top_k, top_p, stop, settings
            As in `generate`.
        seed : int
            Row r gets the draws that `generate` gives it with ``seed + r``.

        Returns
        -------
        list of list of int
            New tokens of each text; of different length where the model ends some earlier.

        Raises
        ------
        ValueError, UnsupportedModel
            As in `generate`.
        """
        steps = self._steps(texts(input_ids, attention_mask), max_new_tokens, temperature,
                            top_k, top_p, seed, stop, settings)  # fmt: skip
        rows = zip(*steps, strict=True)
        return [[token for token in row if token is not None] for row in rows]

    def _tokens(
        self, told: list[list[int]], limits: list[int], ends: Sequence[int], choice: Callable
    ) -> Iterator[list[int | None]]:
        """Append to each text until it ends; `choice` reads it. Shorter ones are padded on the left."""
        with extra("deploy"):
            from onnxruntime import OrtValue

        names = [node.name for node in self._session.get_outputs()]
        past = {name: OrtValue.ortvalue_from_numpy(x.numpy())
                for name, x in self._no_past(len(told)).items()}  # fmt: skip
        width = max(map(len, told))
        ids = np.array([[0] * (width - len(text)) + text for text in told])
        mask = np.array([[0] * (width - len(text)) + [1] * len(text) for text in told])
        open_ = [True] * len(told)
        while any(open_):
            feed = {name: OrtValue.ortvalue_from_numpy(x)
                    for name, x in (("input_ids", ids), ("attention_mask", mask))}  # fmt: skip
            logits, *present = self._session.run_with_ort_values(names, feed | past)
            last = logits.numpy()[:, -1]
            new = [choice(row, last[row]) if open_[row] else None for row in range(len(told))]
            for row, token in enumerate(new):
                if token is not None:
                    told[row].append(token)
                    open_[row] = token not in ends and len(told[row]) < limits[row]
            yield new
            past = dict(zip(past, present, strict=True))
            ids = np.array(
                [[token or 0] for token in new]
            )  # a text that has ended reads on, unheard
            mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)

    def _texts(self, ids: Tensor, mask: Tensor | None, others: Mapping) -> dict[str, Tensor]:
        mask = torch.ones_like(ids) if mask is None else mask
        feed = {"input_ids": ids, "attention_mask": mask, **others}
        known = [node.name for node in self._session.get_inputs()]
        refuse(self, others, set(others) - set(known))
        if "token_type_ids" in known:
            feed.setdefault("token_type_ids", torch.zeros_like(ids))
        if ids.is_floating_point():
            raise UnreadableBatch(f"input_ids are {ids.dtype}, and tokens are integers")
        feed = {name: tensor.to(torch.int64) for name, tensor in feed.items() if name in known}
        for name, tensor in feed.items():
            if tensor.dim() != 2 or tensor.shape != ids.shape:
                raise UnreadableBatch(
                    f"{name} has shape {tuple(tensor.shape)} and input_ids {tuple(ids.shape)}: both "
                    "are (batch, length)"
                )
        return feed

    def _no_past(self, batch: int) -> dict[str, Tensor]:
        return {f"past_key_values.{layer}.{part}": torch.zeros(batch, heads, 0, width)
                for layer, (heads, *widths) in enumerate(self.description.past)
                for part, width in zip(("key", "value"), widths, strict=True)}  # fmt: skip

    def _run(self, feed: dict[str, Tensor]) -> list[Tensor]:
        arrays = {name: tensor.cpu().numpy() for name, tensor in feed.items()}
        outputs = [self._session.get_outputs()[0].name]
        try:
            found = self._session.run(outputs, arrays)
        except Exception as error:  # of several classes, none of them public
            shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in arrays.items() if x.size)
            places = {node.name: node.shape for node in self._session.get_inputs()}
            takes = ", ".join(f"{name} {places[name]}" for name, x in arrays.items() if x.size)
            reason = str(error).split("Status Message:")[-1].strip().split("\n")[0]
            raise UnreadableBatch(
                f"the file takes {takes}, and cannot compute {shapes}: {reason}"
            ) from error
        return [torch.from_numpy(array) for array in found]


def described(saved: dict) -> Description:
    """Read a description back from JSON, which knows no tuples; what cannot be one is refused.

    Examples
    --------
    >>> from dataclasses import asdict
    >>> known = Description("decoder", past=((2, 8, 8),), stop=(0,))
    >>> described(json.loads(json.dumps(asdict(known)))) == known
    True
    """
    past = tuple(tuple(map(_number, layer)) for layer in saved["past"])
    stop = tuple(map(_number, saved["stop"]))
    texts = (saved[name] for name in ("kind", "loss_type", "quantization"))
    if not all(isinstance(text, str) for text in texts) or any(len(layer) != 3 for layer in past):
        raise TypeError
    return Description(**saved | {"past": past, "stop": stop, "context": _number(saved["context"]),
                                  "generation": {**saved["generation"]}})  # fmt: skip


def _number(said: object) -> int:
    if not isinstance(said, int) or isinstance(said, bool) or not 0 <= said < 2**31:
        raise TypeError
    return said


def limit(context: int, prompt: int, most: int | None, settings: Mapping) -> int:
    """Most tokens of prompt and answer together.

    Parameters
    ----------
    context : int
        Most tokens that the model takes, 0 where that is unknown.
    prompt : int
        Tokens of the prompt.
    most : int, optional
        New tokens that were asked for; otherwise the settings say how many.
    settings : mapping
        Of generation.

    Raises
    ------
    ValueError
        If no new token has room, or none is asked for.

    Examples
    --------
    >>> limit(256, 250, 50, {})
    256
    """
    if context and prompt >= context:
        raise ValueError(
            f"the prompt has {prompt} tokens and the model's context ends at {context}, which "
            f"leaves no room for a new one: shorten it to at most {context - 1}"
        )
    if most is None:
        total = settings.get("max_length", prompt + 50)
        total = prompt + settings["max_new_tokens"] if "max_new_tokens" in settings else total
    else:
        total = prompt + most
    if total <= prompt:
        raise ValueError(
            f"max_new_tokens={total - prompt} asks for no token: give 1 or more"
            if most is not None
            else f"the prompt has {prompt} tokens and the generation settings end a text at "
            f"{total}: give max_new_tokens"
        )
    return min(total, context or total)


def one_text(ids: Tensor, mask: Tensor | None = None) -> list[int]:
    """Return the tokens of one text, without its padding.

    Parameters
    ----------
    ids : Tensor, int64, shape (1, length)
    mask : Tensor, int64, shape (1, length), optional
        0 at padding.

    Raises
    ------
    ValueError
        If it is empty, or more than one.

    Examples
    --------
    >>> one_text(torch.tensor([[0, 5, 6]]), torch.tensor([[0, 1, 1]]))
    [5, 6]
    """
    if ids.dim() != 2 or len(ids) != 1:
        raise ValueError(
            f"input_ids has shape {tuple(ids.shape)}, and generate goes on with one text: give "
            "(1, length); generate_batch of an OnnxModel takes several"
        )
    return texts(ids, mask)[0]


def texts(ids: Tensor, mask: Tensor | None = None) -> list[list[int]]:
    """Return the tokens of each text of a batch, without their padding.

    Parameters
    ----------
    ids : Tensor, int64, shape (batch, length)
    mask : Tensor, int64, shape (batch, length), optional
        0 at padding.

    Raises
    ------
    ValueError
        If the two do not fit each other, or a text is empty.

    Examples
    --------
    >>> texts(torch.tensor([[0, 5], [6, 7]]), torch.tensor([[0, 1], [1, 1]]))
    [[5], [6, 7]]
    """
    if ids.dim() != 2:
        raise ValueError(f"input_ids has shape {tuple(ids.shape)}: give (batch, length)")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, and input_ids {tuple(ids.shape)}"
        )
    found = [row if mask is None else row[mask[place].bool()] for place, row in enumerate(ids)]
    if not found or not all(map(len, found)):
        raise ValueError("the prompt is empty: begin with a token, such as tokenizer.bos_token_id")
    return [text.tolist() for text in found]
