"""`ExecuTorchModel`: a ``.pte`` file, run by ExecuTorch and asked like the model it came from.

Built in chapter 15.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from companion.errors import DamagedFile, UnreadableBatch, extra, readable
from companion.evaluation.forward import refuse
from companion.formats.executorch.stored import TOLD, silent
from companion.formats.onnx.model import Output, TextModel, described
from companion.formats.served import first_line


class ExecuTorchModel(TextModel):
    """A file of `export_executorch` in ExecuTorch, on the CPU, through XNNPACK.

    `perplexity`, `accuracy` and the metrics of the tasks take it as they take any model. The file
    reads one text at a time, so the texts of a batch are read one after the other.

    Parameters
    ----------
    path : path

    Raises
    ------
    DamagedFile
        If the file is missing, truncated or not from `export_executorch`.
    MissingExtra
        If ExecuTorch is not installed.

    Examples
    --------
    >>> ExecuTorchModel("no.pte")
    Traceback (most recent call last):
    companion.errors.DamagedFile: no.pte is missing: give the file that export_executorch() wrote
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        if not Path(path).is_file():
            raise DamagedFile(f"{path} is missing: give the file that export_executorch() wrote")
        with extra("executorch"), silent():
            import executorch.kernels.quantized  # noqa: F401  registers what looks rows up
            from executorch.runtime import Runtime
        try:
            with silent():
                self._program = Runtime.get().load_program(Path(path))  # has to outlive its method
                names = self._program.method_names
                told = self._program.load_method(TOLD).execute([])[0] if TOLD in names else None
                self._method = self._program.load_method("forward")
        except Exception as error:
            raise DamagedFile(
                f"{path} cannot be read ({first_line(error)}): export it again"
            ) from None
        if told is None:
            raise DamagedFile(f"{path} was not written by export_executorch()")
        with readable(path, "export it again"):  # of another version, or damaged
            told = json.loads(told)
            self.description, self._inputs = described(told["description"]), told["inputs"]
        self.loss_type = self.description.loss_type
        self._read: object = None  # whose keys and values the file keeps
        self.eval()

    @property
    def vocabulary(self) -> int:
        """How many tokens it knows."""
        return self._method.metadata.output_tensor_meta(0).sizes()[-1]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Tensor
    ) -> Output | Tensor:
        """Answer a batch: logits, or for a plain module its output.

        Parameters
        ----------
        input_ids : Tensor, int64, shape (batch, length)
            Or the input of a plain module.
        attention_mask : Tensor, int64, shape (batch, length), optional
            0 at padding, on either side. Default: no padding. A decoder does not read padding, and
            answers there with zeros.
        **others : Tensor
            ``token_type_ids``, where the model was trained with two kinds of segments; all 0
            where they are left out.

        Raises
        ------
        UnreadableBatch
            If the file takes no such input, inputs do not fit each other, or a text is too long.
        """
        if self.description.kind == "module":
            given = others | ({} if attention_mask is None else {"attention_mask": attention_mask})
            refuse(self, given, given)
            return self._run(input_ids)
        feed = self._texts(input_ids, attention_mask, others)
        if self.description.kind != "decoder":
            return Output(self._rows(feed))
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        mask = feed["attention_mask"].bool()
        for row, ids in enumerate(feed["input_ids"]):
            if mask[row].any():
                logits[row, mask[row]] = self._logits(ids[mask[row]].tolist(), 0)
        return Output(logits)

    def embed(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """One vector of length one for each text: shape (batch, width)."""
        self._needs("retrieval")
        return self._rows(self._texts(input_ids, attention_mask, {}))

    def _tokens(
        self, told: list[list[int]], limits: list[int], ends: Sequence[int], choice: Callable
    ) -> Iterator[list[int | None]]:
        """Append to the one text until it ends; `choice` reads it."""
        (text,), (limit,) = told, limits
        mine, before = object(), 0
        while len(text) < limit:
            if self._read is not mine:  # the file has read something else since
                before = 0
            logits = self._logits(text[before:], before)[-1].numpy()
            self._read, before = mine, len(text)
            text.append(choice(0, logits))
            yield [text[-1]]
            if text[-1] in ends:
                return

    def _logits(self, tokens: list[int], before: int) -> Tensor:
        """Read tokens after so many others: logits of shape (tokens, vocabulary)."""
        self._read = None
        positions = torch.arange(before, before + len(tokens))
        return self._run(torch.tensor([tokens]), positions)[0]

    def _texts(self, ids: Tensor, mask: Tensor | None, others: Mapping) -> dict[str, Tensor]:
        feed = {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}
        feed |= others
        refuse(self, others, set(others) - set(self._inputs))
        if "token_type_ids" in self._inputs:
            feed.setdefault("token_type_ids", torch.zeros_like(ids))
        for name, tensor in feed.items():
            if tensor.dim() != 2 or tensor.shape != ids.shape or tensor.is_floating_point():
                raise UnreadableBatch(
                    f"{name} has shape {tuple(tensor.shape)} and input_ids {tuple(ids.shape)}: both "
                    "are integers, (batch, length)"
                )
        decodes = self.description.kind == "decoder"
        longest = int(feed["attention_mask"].bool().sum(-1).max()) if decodes else ids.shape[1]
        if longest > self.description.context:
            raise UnreadableBatch(
                f"a text has {longest} tokens, and the file takes {self.description.context}: shorten "
                "it, or export the model with a greater max_length"
            )
        return {name: tensor.cpu().long() for name, tensor in feed.items()}

    def _rows(self, feed: Mapping[str, Tensor]) -> Tensor:
        """Texts of an encoder, one after the other."""
        rows = range(len(feed["input_ids"]))
        inputs = [[feed[name][row : row + 1].contiguous() for name in self._inputs] for row in rows]
        return torch.cat([self._run(*given) for given in inputs])

    def _run(self, *inputs: Tensor) -> Tensor:
        try:
            return self._method.execute(list(inputs))[0].clone()  # its memory is written again
        except RuntimeError as error:
            shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
            raise UnreadableBatch(
                f"the file cannot compute inputs of shape {shapes} ({first_line(error)}): give what "
                "it was exported for"
            ) from error
