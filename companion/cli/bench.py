"""How fast language models are: reading a prompt, and going on with it, side by side.

Built in chapter 15.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median

import torch
from torch import nn

from companion.errors import UnsupportedModel
from companion.evaluation.generation import longest
from companion.formats.llama_cpp import LlamaCppModel
from companion.formats.served import ServedModel

PAUSE = 0.2
"""Seconds after which the idle threads of the model before have stopped to spin."""


def speeds(
    models: Mapping[str, nn.Module], *, prompt: int = 64, tokens: int = 32, rounds: int = 5
) -> dict[str, dict[str, float]]:
    """Time every model on the same prompt, in turns, so that a busy moment hits all of them.

    Parameters
    ----------
    models : mapping of str to nn.Module
        Language models of transformers, or served ones.
    prompt : int
        Tokens that are read at once.
    tokens : int
        Tokens that are then generated, one by one.
    rounds : int
        Of which the medians are taken, after one that is not counted.

    Returns
    -------
    dict of str to dict
        ``prefill`` (milliseconds for the prompt) and ``decode`` (milliseconds for a token).

    Raises
    ------
    UnsupportedModel
        If a model keeps no keys and values.
    ValueError
        If a context is too short for the prompt and two tokens.
    """
    highest = min(1000, *map(_vocabulary, models.values()))
    ids = torch.randint(min(10, highest - 1), highest, (1, prompt),
                        generator=torch.Generator().manual_seed(0))  # fmt: skip
    found: dict[str, dict[str, list]] = {name: {"prefill": [], "decode": []} for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            time.sleep(PAUSE)
            first, rest = times(model, ids, tokens)
            if turn:
                found[name]["prefill"].append(first)
                found[name]["decode"].append(rest)
    return {name: {phase: 1000 * median(seconds) for phase, seconds in phases.items()}
            for name, phases in found.items()}  # fmt: skip


@torch.no_grad()
def times(model: nn.Module, ids: torch.Tensor, tokens: int) -> tuple[float, float]:
    """Seconds until the first new token, and for each one after it.

    Parameters
    ----------
    model : nn.Module
    ids : Tensor, shape (1, length)
    tokens : int
    """
    prompt, stamps = ids.shape[1], [time.perf_counter()]
    tokens = int(min(tokens, longest(model) - prompt - 1))
    if isinstance(model, LlamaCppModel) and tokens >= 1:
        return model.times(ids, tokens)
    if isinstance(model, ServedModel):
        greedy = {"temperature": 0.0, "stop": False, "settings": {}}  # as the loop below
        for _ in model.generate(ids, max_new_tokens=tokens + 1, **greedy):
            stamps.append(time.perf_counter())
    else:
        cache = None
        for _ in range(tokens + 1):
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = getattr(output, "past_key_values", None)
            if cache is None:
                raise UnsupportedModel(
                    f"{type(model).__name__} keeps no keys and values, as recurrent models: bench "
                    "times models with attention"
                )
            ids = output.logits[:, -1:].argmax(-1)
            stamps.append(time.perf_counter())
    if len(stamps) < 3:
        raise ValueError(
            f"after {prompt} tokens the model's context has no room for two more: time it "
            "with a shorter prompt"
        )
    return stamps[1] - stamps[0], (stamps[-1] - stamps[1]) / (len(stamps) - 2)


def _vocabulary(model: nn.Module) -> int:
    """How many tokens a model knows, as far as it says so."""
    if isinstance(model, ServedModel):
        return model.vocabulary or 1000
    return getattr(getattr(model, "config", None), "vocab_size", 1000)
