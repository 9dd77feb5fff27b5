"""A conversation with a model in the terminal, at any stage.

Built in chapter 13.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from companion.cli.generate import Streamer, stream
from companion.cli.stages import open_language_model, open_tokenizer
from companion.data.chat import Messages, render
from companion.evaluation.generation import encode_prompt, longest, stop_tokens

RESET, QUIT = "/reset", "/quit"


def chat(
    name: str,
    lines: Iterable[str],
    show: Callable[[str], None],
    note: Callable[[str], None],
    *,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
) -> None:
    """Answer line by line what a user says, each in view of all that was said before.

    Parameters
    ----------
    name : str
        As in `open_model`.
    lines : iterable of str
        One turn each. ``/reset`` begins a new conversation, ``/quit`` ends it all; blank lines
        say nothing.
    show : callable
        Gets each piece of an answer as soon as it is known, and a line end after it.
    note : callable
        Gets one line about what is no answer: where the context is full, that the turn was not
        taken.
    system : str, optional
        What the model is told before the conversation.
    max_new_tokens : int
        Fewer come where the model ends its turn, or its context is full.
    temperature : float
        0 takes the likeliest token each time.
    seed : int
        Of the draws, where the temperature is above 0.

    Raises
    ------
    UnsupportedModel
        If the model is no language model, or its tokenizer has no chat template that takes the
        messages.
    """
    model, tokenizer = open_language_model(name), open_tokenizer(name)
    told: Messages = [{"role": "system", "content": system}] if system else []
    render([*told, {"role": "user", "content": "?"}], tokenizer)  # what is refused, is so at once
    most = min(longest(model), tokenizer.model_max_length)
    ends, messages = stop_tokens(model, tokenizer), list(told)
    for turn, line in enumerate(lines):
        said = line.strip()
        if said == QUIT:
            return
        if said == RESET:
            messages = list(told)
        if not said or said == RESET:
            continue
        asked = [*messages, {"role": "user", "content": said}]
        ids = torch.tensor([encode_prompt(asked, tokenizer)])
        if (room := most - ids.shape[1]) < 1:
            note(
                f"the conversation has {ids.shape[1]} tokens with this turn, and the model takes {most}: "
                f"say less, or {RESET} begins a new one"
            )
            continue
        pieces: list[str] = []

        def hear(text: str, pieces: list[str] = pieces) -> None:
            pieces.append(text)
            show(text)

        tokens = int(min(max_new_tokens, room))
        try:
            stream(model, ids, Streamer(tokenizer, hear), tokens, temperature, seed + turn, ends)
        except KeyboardInterrupt:  # ends the answer, not the conversation
            note("interrupted")
        show("\n")
        messages = [*asked, {"role": "assistant", "content": "".join(pieces).strip()}]
