"""How the next token is chosen: the settings that a model brings along, and the draw.

Built in chapter 15.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from companion.errors import UnsupportedModel, extra

Rule = Callable[[Tensor, Tensor], Tensor]
"""From the tokens so far and the logits, each of shape (1, n), to the logits to choose from."""

TOP_K = 50
"""What transformers draw from where a model's settings sample and say nothing of it."""

_RULES = ("sequence_bias", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids",
          "min_length", "min_new_tokens", "forced_bos_token_id", "forced_eos_token_id",
          "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
          "begin_suppress_tokens")  # fmt: skip
"""Settings for every text, and those for texts that are drawn, in the order of transformers."""
_DRAWS = ("top_h", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_OTHERS = ("do_sample", "temperature", "max_new_tokens", "max_length", "eos_token_id")
_OFF = {
    **dict.fromkeys(("repetition_penalty", "top_p", "typical_p", "encoder_repetition_penalty",
                     "guidance_scale", "num_beams", "num_beam_groups", "num_return_sequences"), 1),
    **dict.fromkeys(("no_repeat_ngram_size", "min_length", "min_new_tokens", "top_k",
                     "epsilon_cutoff", "eta_cutoff", "encoder_no_repeat_ngram_size",
                     "diversity_penalty", "penalty_alpha"), 0),
}  # fmt: skip
"""Values at which a setting changes nothing."""
_BESIDES = ("_", "output_", "return_", "use_", "cache_", "max_cache", "pad_token", "bos_token",
            "decoder_start", "transformers_version", "early_stopping", "length_penalty",
            "low_memory", "prefill", "compile", "disable_compile", "continuous", "is_assistant",
            "num_assistant", "assistant_", "target_lookbehind", "prompt_lookup", "max_matching",
            "speculation", "renormalize")  # fmt: skip
"""How the names of settings begin that say how to compute, or what to give beside the text."""


def active_settings(settings: Mapping) -> dict:
    """Leave out what changes no text, and refuse what nobody here knows how to follow.

    Parameters
    ----------
    settings : mapping
        As in generation_config.json.

    Raises
    ------
    UnsupportedModel

    Examples
    --------
    >>> active_settings({"repetition_penalty": 1.2, "top_p": 1.0, "use_cache": True})
    {'repetition_penalty': 1.2}
    >>> active_settings({"num_beams": 4})
    Traceback (most recent call last):
    companion.errors.UnsupportedModel: generate() of a served model does not know num_beams=4, ...
    """
    found = {name: value for name, value in settings.items()
             if value is not None and value is not False and value != _OFF.get(name)
             and not name.startswith(_BESIDES)}  # fmt: skip
    unknown = [f"{name}={found[name]!r}" for name in found if name not in _RULES + _DRAWS + _OTHERS]
    if unknown:
        raise UnsupportedModel(
            f"generate() of a served model does not know {', '.join(unknown)}, which the generation settings "
            "ask for: pass those to go by instead, generate(..., settings={...}), or {} for none"
        )
    return found


def rules(settings: Mapping, prompt: int, limit: int, stop: Sequence[int]) -> list[Rule]:
    """Make what every choice goes through, from the classes of transformers.

    Parameters
    ----------
    settings : mapping
        From `active_settings`.
    prompt, limit : int
        Tokens of the prompt, and most tokens of prompt and answer together.
    stop : sequence of int
        Tokens that end a text.
    """
    wanted = [name for name in _RULES if name in settings]
    if not wanted:
        return []
    with extra("deploy"):
        from transformers.generation import logits_process as of

    ends, begin = list(stop), prompt + ("forced_bos_token_id" in settings and prompt == 1)
    make = {
        "sequence_bias": of.SequenceBiasLogitsProcessor,
        "repetition_penalty": lambda x: of.RepetitionPenaltyLogitsProcessor(float(x)),
        "no_repeat_ngram_size": of.NoRepeatNGramLogitsProcessor,
        "bad_words_ids": lambda x: of.NoBadWordsLogitsProcessor(x, ends or None),
        "min_length": lambda x: of.MinLengthLogitsProcessor(x, ends),
        "min_new_tokens": lambda x: of.MinNewTokensLengthLogitsProcessor(prompt, x, ends),
        "forced_bos_token_id": of.ForcedBOSTokenLogitsProcessor,
        "forced_eos_token_id": lambda x: of.ForcedEOSTokenLogitsProcessor(limit, x),
        "remove_invalid_values": lambda _: of.InfNanRemoveLogitsProcessor(),
        "exponential_decay_length_penalty":
            lambda x: of.ExponentialDecayLengthPenalty(tuple(x), ends, prompt),
        "suppress_tokens": of.SuppressTokensLogitsProcessor,
        "begin_suppress_tokens": lambda x: of.SuppressTokensAtBeginLogitsProcessor(x, begin),
    }  # fmt: skip
    about_ends = ("min_length", "min_new_tokens", "exponential_decay_length_penalty")
    return [make[name](settings[name]) for name in wanted if ends or name not in about_ends]


def draw_rules(settings: Mapping) -> list[Rule]:
    """Make what leaves out tokens before one is drawn.

    Parameters
    ----------
    settings : mapping
        From `active_settings`.
    """
    wanted = [name for name in _DRAWS if name in settings]
    if not wanted:
        return []
    with extra("deploy"):
        from transformers.generation import logits_process as of

    kinds = {"top_h": of.TopHLogitsWarper, "top_k": of.TopKLogitsWarper,
             "top_p": of.TopPLogitsWarper, "min_p": of.MinPLogitsWarper,
             "typical_p": of.TypicalLogitsWarper, "epsilon_cutoff": of.EpsilonLogitsWarper,
             "eta_cutoff": of.EtaLogitsWarper}  # fmt: skip
    return [kinds[name](settings[name]) for name in wanted]


def choose(
    logits: np.ndarray,
    told: Sequence[int],
    always: Sequence[Rule],
    drawn: Sequence[Rule],
    temperature: float,
    rng: np.random.Generator,
) -> int:
    """Take the likeliest token, or draw one by the softened probabilities.

    Parameters
    ----------
    logits : ndarray, shape (vocabulary,)
    told : sequence of int
        The text so far.
    always, drawn : sequence of callable
        From `rules` and `draw_rules`.
    temperature : float
        0 takes the likeliest.
    rng : numpy.random.Generator

    Examples
    --------
    >>> choose(np.array([0.0, 2.0, 1.0]), [1], [], [], 0.0, np.random.default_rng(0))
    1
    """
    scores = _after(always, told, logits)
    if temperature == 0:
        return int(scores.argmax())
    scores = _after(drawn, told, scores.astype(np.float64) / temperature)
    weights = np.exp(scores - scores.max())
    return int(rng.choice(len(weights), p=weights / weights.sum()))


def _after(steps: Sequence[Rule], told: Sequence[int], scores: np.ndarray) -> np.ndarray:
    if not steps:
        return scores
    ids, found = torch.tensor([told]), torch.from_numpy(scores)[None]
    for step in steps:
        found = step(ids, found)
    return found[0].numpy()
