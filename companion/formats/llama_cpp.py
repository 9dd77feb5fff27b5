"""`LlamaCppModel`: a GGUF file, run by llama.cpp and asked like the model it came from.

Built in chapter 15.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from companion.errors import (
    DamagedFile,
    MissingExtra,
    UnreadableBatch,
    UnsupportedModel,
    readable,
)
from companion.formats.gguf import open_gguf
from companion.formats.onnx.choice import active_settings
from companion.formats.onnx.graphs import Description
from companion.formats.onnx.model import Output, limit, one_text
from companion.formats.served import ServedModel, first_line

TOLD = 20
"""Likeliest tokens that llama.cpp is asked for at each place, beside the one that stands there."""
FORCED = 1000.0
"""Added to a logit, so that its token is the one taken. What is told of it stays as it was."""
SAMPLING = {
    "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "typical_p": "typical_p",
    "repetition_penalty": "repeat_penalty",
}  # fmt: skip
"""transformers' names of generation settings, and llama.cpp's."""


class LlamaCppModel(ServedModel):
    """A file of `export_gguf` in llama.cpp, through the package xllamacpp, on the CPU.

    `perplexity` and the metrics of language tasks take it as they take any model; llama.cpp is
    asked once for each place of a text, which takes its time: some ten milliseconds each.

    Parameters
    ----------
    path : path
    threads : int, optional
        Default: one for each core.
    told : int
        How many of the likeliest tokens are asked for at each place.

    Raises
    ------
    DamagedFile
        If the file is missing, truncated or no GGUF file.
    UnsupportedModel
        If it holds no tokenizer.
    MissingExtra
        If xllamacpp is not installed.

    Examples
    --------
    >>> LlamaCppModel("no.gguf")
    Traceback (most recent call last):
    companion.errors.DamagedFile: no.gguf is missing: give the file that export_gguf() wrote
    """

    def __init__(self, path: str | Path, *, threads: int | None = None, told: int = TOLD) -> None:
        super().__init__()
        if not Path(path).is_file():
            raise DamagedFile(f"{path} is missing: give the file that export_gguf() wrote")
        self.told = told
        self.description, self._vocabulary, tokenizer = _describe(path)
        if not tokenizer:
            raise UnsupportedModel(
                f"{path} holds no tokenizer, without which llama.cpp's server does not answer: export "
                "it again with one"
            )
        try:
            import xllamacpp
        except ImportError as error:
            raise MissingExtra(
                "xllamacpp, which runs GGUF files, is missing: pip install xllamacpp"
            ) from error
        options = xllamacpp.CommonParams()
        options.model.path = str(path)
        options.n_ctx, options.n_parallel, options.verbosity = self.description.context, 1, 0
        if threads:
            options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
        try:
            self._server = xllamacpp.Server(options)
        except Exception as error:
            raise DamagedFile(
                f"llama.cpp cannot open {path} ({first_line(error)}): export it again"
            ) from None
        self.eval()

    @property
    def vocabulary(self) -> int:
        """How many tokens it knows."""
        return self._vocabulary

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Output:
        """Answer a batch of texts with logarithms of probabilities.

        They are llama.cpp's own for the token that comes next in the text and for the likeliest
        ones. It tells them one place at a time; so as not to ask for all, the other tokens share
        what is left evenly. A loss and a choice are what they are; a divergence is not. Where a
        text fills the context, nothing is said of what would follow it.

        Parameters
        ----------
        input_ids : Tensor, int64, shape (batch, length)
        attention_mask : Tensor, int64, shape (batch, length), optional
            0 at padding, on either side; what is answered there says nothing.

        Raises
        ------
        UnreadableBatch
            If inputs do not fit each other, or a text is longer than the context.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if input_ids.dim() != 2 or attention_mask.shape != input_ids.shape:
            raise UnreadableBatch(
                f"attention_mask has shape {tuple(attention_mask.shape)} and input_ids "
                f"{tuple(input_ids.shape)}: both are (batch, length)"
            )
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask.bool(), strict=True)):
            text = ids[mask].tolist()
            places = mask.nonzero().flatten().tolist()
            if len(text) > self.description.context:
                raise UnreadableBatch(
                    f"a text has {len(text)} tokens, and the model takes {self.description.context}: "
                    "shorten it"
                )
            for number, place in enumerate(places):
                follows = text[number + 1] if number + 1 < len(text) else None
                if number + 1 < self.description.context:
                    told = self.log_probabilities(text[: number + 1], follows)
                    logits[row, place] = _spread(told, self.vocabulary)
        return Output(logits)

    def log_probabilities(self, ids: Sequence[int], follows: int | None = None) -> dict[int, float]:
        """What llama.cpp expects after a text: of the likeliest tokens, and of one that is asked for.

        Parameters
        ----------
        ids : sequence of int
        follows : int, optional

        Returns
        -------
        dict of int to float
            Natural logarithms of probabilities, among all tokens, by token.
        """
        found = self._told_of(ids, self.told, follows)
        if found is None:  # of a token that ends a text or has none nothing is told
            found = self._told_of(ids, self.vocabulary, self._ordinary)
        (content,) = found["content"]
        told = {entry["id"]: entry["logprob"] for entry in content["top_logprobs"]}
        return told | {content["id"]: content["logprob"]}

    def _told_of(self, ids: Sequence[int], count: int, follows: int | None) -> dict | None:
        """What is told of one place, when a token is made to follow; its probability stays its own."""
        forced = {} if follows is None else {"logit_bias": [[follows, FORCED]]}
        found = self._complete(ids, 1, logprobs=count, temperature=0.0, **forced)
        return found["choices"][0]["logprobs"]

    @cached_property
    def _ordinary(self) -> int:
        """A token of which something is told, whatever comes before it."""
        numbers = range(self.vocabulary)
        return next(n for n in numbers if self._told_of([0], 1, n) is not None)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
        stop: bool = True,
        settings: Mapping | None = None,
    ) -> Iterator[int]:
        """Go on with a text, token by token, each as soon as it is known.

        Parameters
        ----------
        input_ids : Tensor, int64, shape (1, length)
        attention_mask : Tensor, int64, shape (1, length), optional
            Places that are 0 are left out.
        max_new_tokens : int, optional
            Fewer come where the model ends the text, or its context is full. Default: 50.
        temperature : float, optional
            0, the default, takes the likeliest token each time.
        seed : int
            Of the draws, which are llama.cpp's.
        stop : bool
            End where the model ends the text; the token that ends it is not given.
        settings : mapping, optional
            Such as ``{"top_k": 40, "top_p": 0.9, "repetition_penalty": 1.2}``.

        Yields
        ------
        int

        Raises
        ------
        ValueError
            If the prompt is empty, more than one text, or leaves no room in the context.
        UnsupportedModel
            If the settings ask for something that llama.cpp has by no such name.
        """
        wanted = active_settings(settings or {})
        unknown = set(wanted) - {*SAMPLING, "do_sample", "temperature", "max_new_tokens"}
        if unknown:
            raise UnsupportedModel(
                f"llama.cpp is not told of {', '.join(sorted(unknown))} here: leave it out of "
                "settings, or serve the model from an ONNX file"
            )
        if temperature is None:
            temperature = wanted.get("temperature", 1.0) if wanted.get("do_sample") else 0.0
        if temperature < 0:
            raise ValueError(f"temperature={temperature} is below 0, which takes the likeliest")
        told = one_text(input_ids, attention_mask)
        most = limit(self.description.context, len(told), max_new_tokens, wanted) - len(told)
        draws = {
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "repeat_last_n": self.description.context,
        } | {SAMPLING[name]: wanted[name] for name in wanted if name in SAMPLING}
        return self._tokens(told, most, seed, temperature=temperature, ignore_eos=not stop, **draws)

    def times(self, ids: Tensor, tokens: int) -> tuple[float, float]:
        """Seconds for a prompt, and for each token after it, by llama.cpp's own clock.

        Parameters
        ----------
        ids : Tensor, int64, shape (1, length)
        tokens : int
        """
        found = self._complete(ids[0].tolist(), tokens + 1, temperature=0.0, ignore_eos=True,
                               cache_prompt=False)  # fmt: skip
        clock = found["timings"]
        return clock["prompt_ms"] / 1e3, clock["predicted_ms"] / 1e3 / tokens

    def _complete(self, ids: Sequence[int], most: int, **more: Any) -> dict:
        asked = {"prompt": list(ids), "max_tokens": most, "cache_prompt": True} | more
        return _checked(self._server.handle_completions(asked))

    def _tokens(self, told: list[int], most: int, seed: int, **more: Any) -> Iterator[int]:
        """Ask for one token after the other: in a stream, llama.cpp leaves out parts of characters."""
        for step in range(most):
            found = self._complete(told, 1, logprobs=1, seed=seed + step, **more)["choices"][0]
            content = (found["logprobs"] or {}).get("content")
            if not content or found["finish_reason"] == "stop":  # it ends the text
                return
            told.append(content[-1]["id"])
            yield told[-1]

    def extra_repr(self) -> str:
        return f"{self.description.kind}: {self.description.quantization}"


def _spread(told: Mapping[int, float], vocabulary: int) -> Tensor:
    """A whole row: what was told, and for each other token an even share of what is left."""
    ids = torch.tensor(list(told))
    logs = torch.tensor(list(told.values()), dtype=torch.float64)
    left = (1 - logs.exp().sum()).clamp(min=1e-12) / max(1, vocabulary - len(told))
    row = torch.full((vocabulary,), float(left.log()))
    row[ids] = logs.float()
    return row


def _checked(found: dict) -> dict:
    if "error" in found:
        raise UnreadableBatch(f"llama.cpp says: {found['error']['message']}")
    return found


def _describe(path: str | Path) -> tuple[Description, int, bool]:
    """What a GGUF file says about itself, the size of its vocabulary, and whether it has its words."""
    with readable(path, "export it again"):
        fields = open_gguf(path).fields
        arch = fields["general.architecture"].contents()
        context = fields[f"{arch}.context_length"].contents()
        ends = [fields[key].contents() for key in ("tokenizer.ggml.eos_token_id",) if key in fields]
        words = "tokenizer.ggml.tokens"
        size = fields.get(f"{arch}.vocab_size")
        vocabulary = len(fields[words].contents()) if size is None else int(size.contents())
        described = Description("decoder", context=int(context), stop=tuple(map(int, ends)),
                                quantization=f"GGUF, {arch}")  # fmt: skip
    return described, vocabulary, words in fields
