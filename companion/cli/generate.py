"""A language model goes on with a text, and the text is shown as it comes.

Built in chapters 13 and 15.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from companion.cli.stages import open_language_model, open_tokenizer
from companion.course.sources import quiet_transformers
from companion.data.text import start_token
from companion.evaluation.generation import longest
from companion.formats.served import ServedModel

UNFINISHED = (
    "\N{REPLACEMENT CHARACTER}"  # what a character decodes to while bytes of it are missing
)


class Streamer:
    """Shows a text as its tokens come: after each the whole is decoded, and what is new is shown.

    Only the whole has the right spaces between words; a character whose last bytes are still to
    come is held back. Takes the place of `transformers.TextStreamer`, which decodes the answer
    apart from the prompt and so glues the two together.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    show : callable
        Gets each new piece of text.

    Examples
    --------
    >>> from companion.course.sources import load_tokenizer
    >>> tokenizer, pieces = load_tokenizer(), []
    >>> streamer = Streamer(tokenizer, pieces.append)
    >>> streamer.put(torch.tensor(tokenizer("Hello")["input_ids"]))  # the prompt, not shown
    >>> for token in tokenizer(" größe \N{ROCKET}")["input_ids"]:
    ...     streamer.put(torch.tensor([token]))
    >>> streamer.end()
    >>> "".join(pieces)
    ' größe \N{ROCKET}'
    """

    def __init__(self, tokenizer, show: Callable[[str], None]) -> None:
        self.tokenizer, self.show = tokenizer, show
        self.tokens: list[int] = []
        self.shown: str | None = None  # until the prompt is known

    def put(self, tokens: Tensor) -> None:
        """Take the prompt, which is not shown, and afterwards each new token."""
        self.tokens += tokens.flatten().tolist()
        text = self._text()
        if self.shown is None:
            self.shown = text
        else:
            self._advance(text.rstrip(UNFINISHED))

    def end(self) -> None:
        """Show what was held back."""
        self._advance(self._text())

    def _text(self) -> str:
        return self.tokenizer.decode(
            self.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _advance(self, text: str) -> None:
        if len(text) > len(self.shown):
            self.show(text[len(self.shown) :])
            self.shown = text


def generate(
    name: str,
    prompt: str,
    show: Callable[[str], None],
    *,
    max_new_tokens: int = 60,
    temperature: float = 0.0,
    seed: int = 0,
) -> None:
    """Let a language model go on with a text.

    Parameters
    ----------
    name : str
        As in `open_model`.
    prompt : str
        The beginning; an empty one lets the model begin.
    show : callable
        Gets the prompt and then each piece of text as soon as it is known.
    max_new_tokens : int
        Fewer come where the model ends the text, or its context is full.
    temperature : float
        0 takes the likeliest token each time.
    seed : int
        Of the draws, where the temperature is above 0.

    Raises
    ------
    UnsupportedModel
        If the model is no language model.
    ValueError
        If the prompt fills the model's context.
    """
    model = open_language_model(name)
    tokenizer = open_tokenizer(name)
    ids = tokenizer(prompt, return_tensors="pt", verbose=False).input_ids.long()
    if not ids.numel():
        ids = torch.tensor([[start_token(tokenizer)]])
    room = min(tokenizer.model_max_length, longest(model)) - ids.shape[1]
    if room < 1:
        raise ValueError(
            f"the prompt has {ids.shape[1]} tokens and the model takes {ids.shape[1] + room}, which "
            "leaves no room to go on: shorten it"
        )
    streamer, most = Streamer(tokenizer, show), int(min(max_new_tokens, room))
    show(prompt)
    stream(model, ids, streamer, most, temperature, seed)


def stream(
    model: nn.Module, ids: Tensor, streamer: Streamer, tokens: int, temperature: float = 0.0,
    seed: int = 0, ends: Sequence[int] = (),
) -> None:  # fmt: skip
    """Hand a prompt and each new token to a streamer, by the model's own generation settings.

    Parameters
    ----------
    model : nn.Module
        A language model of transformers, or a `ServedModel`.
    ids : Tensor, int64, shape (1, length)
    streamer : Streamer
    tokens : int
        New ones at most.
    temperature : float
        0 takes the likeliest token each time.
    seed : int
    ends : sequence of int
        Tokens to end at; by default the model's own.
    """
    if isinstance(model, ServedModel):
        streamer.put(ids)
        for token in model.generate(ids, max_new_tokens=tokens, temperature=temperature, seed=seed):
            streamer.put(torch.tensor([token]))
            if token in ends:
                break
        streamer.end()
        return
    choice = {"do_sample": False} if temperature == 0 else {
        "do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}  # fmt: skip
    if ends:
        choice["eos_token_id"] = list(ends)
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            streamer=streamer,
            max_new_tokens=tokens,
            **choice,
        )
