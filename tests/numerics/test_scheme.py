import dataclasses
import json

import pytest
import torch

from companion import W2, W3, W4, W4A8, W8, W8A8, Activations, QuantScheme
from companion.errors import SchemeError
from companion.numerics.scheme import integer_range, parse_scheme
from companion.study.tables import scheme_name


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integer_range_has_two_to_the_bits_values(bits):
    low, high = integer_range(bits)
    assert high - low + 1 == 2**bits
    assert low == -high - 1
    assert integer_range(bits, signed=False) == (0, 2**bits - 1)


@pytest.mark.parametrize("bits", [0, 1, 9, -4, 4.0, True, "4", None])
def test_impossible_widths_are_refused(bits):
    with pytest.raises(SchemeError, match="from 2 to 8"):
        QuantScheme(weight_bits=bits)
    with pytest.raises(SchemeError, match="from 2 to 8"):
        Activations(bits=bits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 0}, "group_size"),
        ({"group_size": -32}, "group_size"),
        ({"group_size": 32.0}, "group_size"),
        ({"scale_dtype": torch.int8}, "scale_dtype"),
        ({"activations": 8}, "Activations"),
    ],
)
def test_bad_settings_name_themselves(settings, message):
    with pytest.raises(SchemeError, match=message):
        QuantScheme(**settings)


@pytest.mark.parametrize("bad", [(1, 127), (0, 256), (-129, 127), (0, 0)])
def test_activation_range_must_hold_zero_and_fit(bad):
    with pytest.raises(SchemeError, match="must contain 0"):
        Activations(bits=8, range=bad)


def test_unknown_granularity_is_refused():
    with pytest.raises(SchemeError, match="'token', 'tensor' or 'block'"):
        Activations(granularity="channel")


def test_bits_per_weight_counts_the_scale():
    assert W4.bits_per_weight(256) == 4 + 16 / 32
    assert W2.bits_per_weight(256) == 2 + 16 / 32
    assert W8A8.bits_per_weight(256) == 8 + 16 / 256
    assert QuantScheme(4, 64, torch.float32).bits_per_weight(256) == 4.5


def test_schemes_are_values():
    assert QuantScheme(4, 32) == W4
    assert hash(W4) == hash(QuantScheme(4, 32))
    assert W4A8.activations == Activations(8, "token")
    with pytest.raises(dataclasses.FrozenInstanceError):
        W4.weight_bits = 2


@pytest.mark.parametrize(
    "scheme",
    [W8A8, W8, W4A8, W4, W3, W2, QuantScheme(4, 64), QuantScheme(2, None)],
    ids=scheme_name,
)
def test_short_names_are_read_back(scheme):
    assert parse_scheme(scheme_name(scheme)) == scheme
    assert parse_scheme(scheme_name(scheme).replace(" ", "-")) == scheme


def test_scales_in_bfloat16_are_asked_for_at_the_end():
    assert parse_scheme("W4-g64-bf16") == QuantScheme(4, 64, torch.bfloat16)
    assert parse_scheme("W8A8-bf16") == dataclasses.replace(W8A8, scale_dtype=torch.bfloat16)


@pytest.mark.parametrize("text", ["W9", "4", "W4-g", "W4-x", "w4", "W4 g0"])
def test_other_names_are_refused_with_those_that_exist(text):
    with pytest.raises(SchemeError):
        parse_scheme(text)


SCHEMES = [
    W8A8, W8, W4A8, W4, W3, W2, QuantScheme(5, None, torch.float32),
    QuantScheme(4, 64, torch.bfloat16, Activations(7, "block", True, (-3, 9))),
]  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_scheme_survives_json(scheme):
    saved = json.loads(json.dumps(scheme.to_dict()))
    assert saved == scheme.to_dict()
    again = QuantScheme.from_dict(saved)
    assert again == scheme
    assert hash(again) == hash(scheme)


@pytest.mark.parametrize(
    "change",
    [
        {"weight_bits": 9},
        {"scale_dtype": "float17"},
        {"scale_dtype": "int8"},
        {"scale_dtype": None},
        {"activations": {"bits": 8}},
        {"activations": "token"},
        {"unknown": 1},
    ],
)
def test_what_describes_no_scheme_is_refused(change):
    with pytest.raises(SchemeError, match="describes no scheme"):
        QuantScheme.from_dict(W4.to_dict() | change)
    with pytest.raises(SchemeError, match="describes no scheme"):
        QuantScheme.from_dict({})
