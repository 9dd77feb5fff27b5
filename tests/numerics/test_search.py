"""The search for a scale: no finer one does better, and importance shifts what it spares."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from companion import QuantScheme, choose_scale, fake_quantize
from companion.numerics.affine import to_groups
from companion.numerics.search import best_ratio

seeds = st.integers(0, 2**16)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weighted", [False, True])
@settings(max_examples=30, deadline=None)
@given(seed=seeds, bits=st.integers(2, 3))
def test_searched_range_beats_every_scale_of_a_finer_search(weighted, seed, bits):
    scheme = QuantScheme(bits, 16, torch.float32)
    groups = to_groups(random(seed, 3, 32), 16)
    importance = random(seed + 1, 2, 16).exp() if weighted else torch.ones(2, 16)
    absmax = choose_scale(groups, bits)[0]

    def error(scale):
        off = (fake_quantize(groups, scale, bits=bits) - groups).square()
        return (off * importance).sum(-1)

    found = error(absmax * best_ratio(groups, scheme, importance))
    assert (found <= error(absmax) + 1e-6).all()
    finer = torch.stack(
        [error(absmax * r) for r in torch.linspace(-1.1, 1.1, 400) if r.abs() > 0.2]
    )
    assert (found <= 1.1 * finer.amin(0) + 1e-6).all()  # the coarse search loses next to nothing


def test_equal_importance_changes_nothing():
    groups = to_groups(random(3, 8, 64), 32)
    for scheme in (QuantScheme(4), QuantScheme(2)):
        plain = best_ratio(groups, scheme)
        assert torch.equal(plain, best_ratio(groups, scheme, torch.full((2, 32), 4.0)))


def test_eight_bits_keep_positive_scales_for_their_kernels():
    groups = to_groups(random(9, 16, 64), 32)
    assert (best_ratio(groups, QuantScheme(8)) > 0).all()
    assert (best_ratio(groups, QuantScheme(4)) < 0).any()
    assert (best_ratio(groups, QuantScheme(4), signed=False) > 0).all()
