"""What a language model answers, and how good the answers are.

Answers come in batches, padded on the left, so that every prompt ends where its answer begins.
Built in chapter 13.

References
----------
Lin, "ROUGE: A package for automatic evaluation of summaries", 2004.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from companion.data.chat import Messages, end_of_turn, render
from companion.data.text import start_token, with_padding
from companion.errors import UnsupportedModel, extra
from companion.evaluation.estimates import Scores, summed
from companion.evaluation.forward import device_of, divergences, evaluating
from companion.evaluation.language import by_row
from companion.numerics.rounding import hold_weights

if TYPE_CHECKING:
    import pandas as pd

SHIFTED = ("camembert", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl")
"""Architectures that count positions from the one behind the padding token."""


def answers(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[str | Messages],
    *,
    max_new_tokens: int = 128,
    sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 16,
    seed: int = 0,
) -> list[str]:
    """Let a language model answer prompts, in batches.

    Parameters
    ----------
    model : nn.Module
        A causal language model of transformers in any stage (float, prepared, converted, loaded),
        or a `companion.formats.onnx.model.OnnxModel`, which answers one prompt after the other.
    tokenizer : PreTrainedTokenizerFast
    prompts : sequence of str or list of dict
        What a user says, or the messages of a conversation up to one of the user; where the
        tokenizer has no chat template, texts to go on with.
    max_new_tokens : int
        Tokens of an answer at most; fewer come where the model ends its turn.
    sample : bool
        Draw each token; by default the likeliest is taken. What else the model's own generation
        settings ask for, such as a repetition penalty, holds in both cases.
    temperature, top_p : float
        How tokens are drawn: above 1 more evenly; from the fewest that hold so much probability.
    batch_size : int
        Prompts at a time, those of like length together. It decides which draws a prompt gets.
    seed : int
        Of the draws.

    Returns
    -------
    list of str
        In the order of the prompts, without special tokens and outer white space.

    Raises
    ------
    UnsupportedModel
        If the model does not generate, or the tokenizer has no template for messages.
    ValueError
        If a prompt and its answer do not fit into the model's context.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> words = Tokenizer(models.WordLevel({"the": 0, "road": 1, "[END]": 2, "[UNK]": 3}, "[UNK]"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[END]")
    >>> small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=4, intermediate_size=8, **small))
    >>> len(answers(model, tokenizer, ["the road", "the"], max_new_tokens=3))
    2
    """
    streams = not getattr(model, "can_generate", lambda: False)()
    if streams and not hasattr(model, "generate"):
        raise UnsupportedModel(
            f"{type(model).__name__} does not go on with a text: load a language model, such as "
            'load_pretrained(name, head="lm")'
        )
    if sample and (temperature <= 0 or not 0 < top_p <= 1):
        raise ValueError(
            f"temperature {temperature} must be above 0 and top_p {top_p} in (0, 1]: leave sample out "
            "for the likeliest tokens"
        )
    ids = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    room = min(longest(model), tokenizer.model_max_length) - max_new_tokens
    for number, prompt in enumerate(ids):
        if len(prompt) > room:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens, which with {max_new_tokens} of an answer "
                f"is more than the model takes ({room + max_new_tokens}): shorten it, or lower "
                "max_new_tokens"
            )
    ends = stop_tokens(model, tokenizer)
    draws = {"temperature": temperature, "top_p": top_p} if sample else None
    generated = _one_by_one if streams else _in_batches
    found = [""] * len(ids)
    for place, tokens in generated(
        model, tokenizer, ids, max_new_tokens, draws, ends, batch_size, seed
    ):
        stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        found[place] = tokenizer.decode(tokens[:stop], skip_special_tokens=True).strip()
    return found


def _in_batches(
    model: Any, tokenizer, ids: Sequence[list[int]], most: int, draws: Mapping | None,
    ends: Sequence[int], batch_size: int, seed: int,
) -> Iterator[tuple[int, list[int]]]:  # fmt: skip
    """Place and new tokens of each prompt, by transformers."""
    padding, device = with_padding(tokenizer).pad_token_id, device_of(model)
    choice = {"do_sample": False} if draws is None else {"do_sample": True, "top_k": 0, **draws}
    order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
    with evaluating(model), hold_weights(), torch.random.fork_rng(_cuda(device)):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            width = max(len(ids[place]) for place in places)
            empty = [width - len(ids[place]) for place in places]
            rows = [[padding] * gap + ids[p] for gap, p in zip(empty, places, strict=True)]
            mask = [[0] * gap + [1] * (width - gap) for gap in empty]
            made = model.generate(
                torch.tensor(rows, device=device), attention_mask=torch.tensor(mask, device=device),
                max_new_tokens=most, eos_token_id=list(ends) or None, pad_token_id=padding, **choice,
            )  # fmt: skip
            yield from zip(places, made[:, width:].tolist(), strict=True)


def _one_by_one(
    model: Any, tokenizer, ids: Sequence[list[int]], most: int, draws: Mapping | None,
    ends: Sequence[int], batch_size: int, seed: int,
) -> Iterator[tuple[int, list[int]]]:  # fmt: skip
    """The same from a model whose ``generate`` yields the tokens of one text."""
    options: dict[str, Any] = {"temperature": 0.0}
    if draws is not None:
        own = getattr(getattr(model, "description", None), "generation", {})
        settings = {**own, "do_sample": True, "top_k": 0, "top_p": draws["top_p"]}
        options = {"temperature": draws["temperature"], "settings": settings}
    for place, prompt in enumerate(ids):
        tokens = []
        for token in model.generate(
            torch.tensor([prompt]), max_new_tokens=most, seed=seed + place, **options
        ):
            tokens.append(token)
            if token in ends:
                break
        yield place, tokens


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def encode_prompt(prompt: str | Messages, tokenizer) -> list[int]:
    """Turn what a user says into the tokens that a model goes on with.

    Parameters
    ----------
    prompt : str or list of dict
        Where the tokenizer has no chat template, a text is taken as it is.
    tokenizer : PreTrainedTokenizerBase

    Returns
    -------
    list of int
        At least one.

    Raises
    ------
    UnsupportedModel
        If there is no template for messages, or it refuses them.
    """
    if isinstance(prompt, str) and not getattr(tokenizer, "chat_template", None):
        return tokenizer(prompt, verbose=False)["input_ids"] or [start_token(tokenizer)]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    text = render(messages, tokenizer, answer=True)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def stop_tokens(model: nn.Module, tokenizer) -> tuple[int, ...]:
    """Return the tokens that end an answer: the model's own, and what the chat template ends with.

    A model whose settings know only the end of a text would otherwise go on and ask itself.

    Parameters
    ----------
    model : nn.Module
    tokenizer : PreTrainedTokenizerBase
    """
    settings = getattr(model, "generation_config", None)
    known = getattr(settings, "eos_token_id", None)
    known = getattr(getattr(model, "description", None), "stop", known)
    known = [known] if isinstance(known, int) else list(known or ())
    turn = end_of_turn(tokenizer) if getattr(tokenizer, "chat_template", None) else None
    return tuple(dict.fromkeys(t for t in (*known, tokenizer.eos_token_id, turn) if t is not None))


def longest(model: Any) -> float:
    """Most tokens that a model takes; infinity where it does not say.

    Parameters
    ----------
    model : nn.Module, PretrainedConfig or None

    Examples
    --------
    >>> from transformers import LlamaConfig
    >>> longest(LlamaConfig(max_position_embeddings=40))
    40
    """
    if hasattr(model, "description"):  # an exported file
        return model.description.context or math.inf
    config = getattr(model, "config", model)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    for key in ("max_position_embeddings", "max_seq_len", "seq_length"):
        most = getattr(config, key, None)
        if isinstance(most, int) and most > 0:
            return most - (config.pad_token_id + 1 if config.model_type in SHIFTED else 0)
    return math.inf


def answer_table(
    prompts: Sequence[str | Messages], given: Mapping[str, Sequence[str]]
) -> pd.DataFrame:
    """Lay answers to the same prompts side by side.

    Parameters
    ----------
    prompts : sequence of str or list of dict
        Of a conversation, what was said last is shown.
    given : mapping of str to sequence of str
        By what is to stand above them: ``"float"``, ``"rounded"``, ``"author"``.

    Returns
    -------
    pandas.DataFrame
        One row for each prompt, which is its index.

    Raises
    ------
    ValueError
        If there are not as many answers as prompts.

    Examples
    --------
    >>> answer_table(["Who?"], {"float": ["Dorothy."], "rounded": ["Toto."]}).loc["Who?", "rounded"]
    'Toto.'
    """
    with extra("study"):
        import pandas as pd

    for name, found in given.items():
        if len(found) != len(prompts):
            raise ValueError(f"{len(found)} answers of {name!r} to {len(prompts)} prompts")
    asked = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
    return pd.DataFrame(dict(given), index=pd.Index(asked, name="prompt"))


def rouge_l(given: Sequence[str], true: Sequence[str]) -> Scores:
    """ROUGE-L of answers: F1 of the longest common subsequence of words with the author's text.

    Words are letters and digits in lower case, as in Google's rouge_score without stemming, whose
    numbers these are.

    Parameters
    ----------
    given, true : sequence of str
        Answers, and what the author wrote.

    Returns
    -------
    Scores
        One entry for each answer, between 0 and 1.

    Examples
    --------
    >>> rouge_l(["The road leads to a city"], ["A yellow road leads to the city"]).value
    0.6153846153846154
    """
    with extra("language"):
        from rapidfuzz.distance import Indel

    # 1 - (insertions + deletions) / (words of both), which is 2 LCS / (words of both)
    shares = [Indel.normalized_similarity(_words(a), _words(b)) if _words(a) and _words(b) else 0.0
              for a, b in zip(given, true, strict=True)]  # fmt: skip
    return Scores(np.array(shares), np.ones(len(shares)))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def exact_format(given: Sequence[str], keys: Iterable[str]) -> Scores:
    """Share of answers that are a JSON object with exactly these keys, each once, in any order.

    Nothing may stand around the object: neither words nor a fence of code.

    Parameters
    ----------
    given : sequence of str
    keys : iterable of str

    Returns
    -------
    Scores
        1 for each answer that is, 0 for each that is not.

    Examples
    --------
    >>> exact_format(['{"a": 1, "b": []}', '{"a": 1}', 'Sure: {"a": 1, "b": 2}'], "ab").total
    array([1., 0., 0.])
    """
    wanted = set(keys)
    right = [(found := _object(text)) is not None and set(found) == wanted for text in given]
    return Scores(np.array(right, float), np.ones(len(right)))


def exact_value(given: Sequence[str], true: Sequence[str], key: str | None = None) -> Scores:
    """Share of JSON answers that say the same as the right ones, whole or under one key.

    Parameters
    ----------
    given, true : sequence of str
        Answers, and JSON objects that are right.
    key : str, optional
        Compare only what stands under it.

    Returns
    -------
    Scores
        1 for each answer that is right, 0 for others and for what is no JSON object.

    Examples
    --------
    >>> exact_value(['{"a": 1, "b": 2}', "one"], ['{"b": 2, "a": 1}'] * 2).total
    array([1., 0.])
    """
    pairs = [(_object(a), json.loads(b)) for a, b in zip(given, true, strict=True)]
    right = [a is not None and (a == b if key is None else key in a and a[key] == b[key])
             for a, b in pairs]  # fmt: skip
    return Scores(np.array(right, float), np.ones(len(right)))


def _object(text: str) -> dict[str, Any] | None:
    """The object that a text is in JSON, unless a key stands in it twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key stands twice")
        return found

    try:
        found = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def forgotten(model: nn.Module, original: nn.Module, batches: Iterable) -> Scores:
    """How far a model has moved from the one it was made of: mean KL(original || model) per token.

    On chats outside the task that it was trained for, it says what was forgotten.

    Parameters
    ----------
    model, original : nn.Module
        With the same vocabulary.
    batches : iterable of dict
        Such as the test split of a chat task; only tokens with a label count.

    Returns
    -------
    Scores
        In nats, one entry for each conversation; ``estimate()`` resamples these.

    Raises
    ------
    EmptyLoader
        If there is no token to score.
    UnsupportedModel
        If the two models do not score the same words.

    Examples
    --------
    >>> model = nn.Embedding.from_pretrained(torch.eye(3))
    >>> tokens = torch.tensor([[0, 1, 1]])
    >>> forgotten(model, model, [{"input": tokens, "labels": tokens}]).value
    0.0
    """
    return summed(by_row(divergences(original, model, batches)))
