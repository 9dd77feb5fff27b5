"""The next token: settings that count, rules in the order of transformers, draws by probability."""

import numpy as np
import pytest

from companion.errors import UnsupportedModel
from companion.formats.onnx.choice import active_settings, choose, draw_rules, rules

LOGITS = np.array([0.0, 3.0, 2.0, 1.0], dtype=np.float32)


def pick(settings, told=(1,), temperature=0.0, seed=0):
    kept = active_settings(settings)
    always, drawn = rules(kept, len(told), 10, stop=[3]), draw_rules(kept)
    return choose(LOGITS, list(told), always, drawn, temperature, np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("settings", "token"),
    [
        ({}, 1),
        ({"repetition_penalty": 2.0}, 2),  # token 1 was told: 3 / 2 falls below 2
        ({"suppress_tokens": [1, 2]}, 3),
        ({"bad_words_ids": [[1]]}, 2),
        ({"sequence_bias": [[[3], 5.0]]}, 3),
        ({"suppress_tokens": [1, 2], "min_new_tokens": 4}, 0),  # too early for the end, token 3
    ],
)
def test_greedy_choices_follow_the_settings(settings, token):
    assert pick(settings) == token


@pytest.mark.parametrize(
    ("settings", "left"),
    [({}, {0, 1, 2, 3}), ({"top_k": 2}, {1, 2}), ({"top_p": 0.5}, {1}), ({"min_p": 0.3}, {1, 2})],
)
def test_draws_leave_out_what_the_settings_do(settings, left):
    found = {pick(settings, temperature=1.0, seed=seed) for seed in range(120)}
    assert found == left


def test_draws_go_by_probability():
    drawn = [pick({}, temperature=1.0, seed=seed) for seed in range(2000)]
    share = np.bincount(drawn, minlength=4) / len(drawn)
    expected = np.exp(LOGITS) / np.exp(LOGITS).sum()
    # four standard errors of a share of 2,000 draws are below .045
    assert np.abs(share - expected).max() < 0.045


def test_what_changes_nothing_is_left_out_and_the_rest_is_named():
    assert active_settings({"num_beams": 1, "top_k": 0, "use_cache": True, "top_p": None}) == {}
    with pytest.raises(UnsupportedModel, match=r"num_beams=3.*settings=\{\.\.\.\}"):
        active_settings({"num_beams": 3})
