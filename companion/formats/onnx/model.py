"""`OnnxModel`: an exported file, run by ONNX Runtime and asked like the model it came from.

Built in chapter 14.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from companion.errors import DamagedFile, UnsupportedModel, extra
from companion.formats.onnx.export import KEY, Description


class Output(NamedTuple):
    """What a served model answers: for an encoder without a head, its last hidden state."""

    logits: Tensor


class OnnxModel(nn.Module):
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
    >>> q = convert(prepare_qat(nn.Sequential(nn.Linear(64, 8)), W4))
    >>> x = torch.ones(3, 64)
    >>> path = export_onnx(q, tempfile.mkdtemp() + "/layer.onnx", example=x)
    >>> torch.allclose(OnnxModel(path)(x), q(x), atol=1e-5)
    True
    """

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        with extra("deploy"):
            import onnxruntime

        super().__init__()
        if not Path(path).is_file():
            raise DamagedFile(f"{path} is missing: give the file that export_onnx() wrote")
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
        self.description = Description(**saved | {"stop": tuple(saved["stop"])})
        self.loss_type = self.description.loss_type
        self.eval()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Tensor
    ) -> Output | Tensor:
        """Answer a batch: logits, or for a plain module its output.

        Parameters
        ----------
        input_ids : Tensor, int64, shape (batch, length)
            Or the input of a plain module.
        attention_mask : Tensor, int64, shape (batch, length), optional
        """
        if self.description.kind == "module":
            return self._run({"input": input_ids})[0]
        feed = self._texts(input_ids, attention_mask)
        if self.description.kind == "decoder":
            feed |= self._no_past(len(input_ids))
        return Output(self._run(feed)[0])

    def embed(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """One vector of length one for each text: shape (batch, width)."""
        self._needs("retrieval")
        return self._run(self._texts(input_ids, attention_mask))[0]

    def generate(
        self,
        input_ids: Tensor,
        *,
        max_new_tokens: int = 50,
        temperature: float = 0.0,
        seed: int = 0,
        stop: bool = True,
    ) -> Iterator[int]:
        """Go on with a text, token by token, each as soon as it is known.

        Parameters
        ----------
        input_ids : Tensor, int64, shape (1, length)
        max_new_tokens : int
            Fewer come where the model ends the text, or its context is full.
        temperature : float
            0 takes the likeliest token each time.
        seed : int
            Of the draws, where the temperature is above 0.
        stop : bool
            End where the model ends the text.

        Yields
        ------
        int
        """
        with extra("deploy"):
            import onnxruntime

        self._needs("decoder")
        names = [node.name for node in self._session.get_outputs()]
        rng = np.random.default_rng(seed)
        ids, length = input_ids.cpu().numpy(), input_ids.shape[1]
        context = self.description.context or length + max_new_tokens
        past = self._no_past(1)
        past = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy()) for name, x in past.items()
        }
        for _ in range(min(max_new_tokens, context - length)):
            text = {"input_ids": ids, "attention_mask": np.ones((1, length), dtype=np.int64)}
            feed = {n: onnxruntime.OrtValue.ortvalue_from_numpy(x) for n, x in text.items()}
            logits, *present = self._session.run_with_ort_values(names, feed | past)
            token = _choose(logits.numpy()[0, -1], temperature, rng)
            yield token
            if stop and token in self.description.stop:
                return
            past = dict(zip(past, present, strict=True))
            ids, length = np.array([[token]]), length + 1

    def extra_repr(self) -> str:
        return f"{self.description.kind}: {self.description.quantization}"

    def _texts(self, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}

    def _no_past(self, batch: int) -> dict[str, Tensor]:
        form = self.description
        empty = torch.zeros(batch, form.heads, 0, form.head_dim)
        return {f"past_key_values.{layer}.{part}": empty
                for layer in range(form.layers) for part in ("key", "value")}  # fmt: skip

    def _run(self, feed: dict[str, Tensor]) -> list[Tensor]:
        arrays = {name: tensor.cpu().numpy() for name, tensor in feed.items()}
        outputs = [self._session.get_outputs()[0].name]
        return [torch.from_numpy(array) for array in self._session.run(outputs, arrays)]

    def _needs(self, kind: str) -> None:
        if self.description.kind != kind:
            raise UnsupportedModel(
                f"this file holds a model of kind {self.description.kind!r}, and {kind!r} is needed"
            )


def _choose(logits: np.ndarray, temperature: float, rng: np.random.Generator) -> int:
    """The likeliest token, or one drawn by the softened probabilities."""
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return int(rng.choice(len(weights), p=weights / weights.sum()))
