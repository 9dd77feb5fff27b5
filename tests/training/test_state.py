"""Seeds, random generators, training modes, Ctrl-C."""

import random
import signal
from itertools import product

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler

from companion.training.batches import batches
from companion.training.state import held_interrupt, pass_seed, seed_everything


def draws() -> tuple:
    return torch.rand(1).item(), np.random.rand(), random.random()


def test_no_two_seeds_share_a_pass():
    seeds = (0, 1, 2, -1, 2**31, 2**32, 2**63, 2**63 + 1, -(2**40))
    used = {pass_seed(seed, number) for seed, number in product(seeds, range(50))}
    assert len(used) == len(seeds) * 50
    for generator in range(3):
        drawn = set()
        for seed, number in product(seeds, range(5)):
            seed_everything(pass_seed(seed, number))
            drawn.add(draws()[generator])
        assert len(drawn) == len(seeds) * 5


def test_seed_0_keeps_its_order():
    for number in range(3):
        torch.manual_seed(number), np.random.seed(number), random.seed(number)
        expected = draws()
        seed_everything(pass_seed(0, number))
        assert draws() == expected


def test_a_seed_is_an_integer():
    assert pass_seed(np.int64(2**62), 0) == pass_seed(2**62, 0)
    with pytest.raises(TypeError):
        pass_seed(0.5, 0)


@pytest.mark.parametrize("where", ["loader", "sampler", "global"])
def test_the_second_pass_of_a_seed_is_not_the_first_of_the_next(where):
    generator = torch.Generator()
    options = {"loader": {"shuffle": True, "generator": generator}, "global": {"shuffle": True},
               "sampler": {"sampler": RandomSampler(range(50), generator=generator)}}  # fmt: skip
    loader = DataLoader(torch.arange(50), 10, **options[where])
    first, next_seed = torch.stack(batches(loader, 10, 0)), torch.stack(batches(loader, 5, 1))
    assert not torch.equal(first[5:], next_seed)
    assert not torch.equal(first[5:], first[:5])
    assert torch.equal(torch.stack(batches(loader, 10, 0)), first)


def test_drawing_batches_leaves_every_generator_alone():
    seed_everything(5)
    expected = draws()
    seed_everything(5)
    batches([1, 2], 4)
    assert draws() == expected


def test_the_second_ctrl_c_stops_at_once(capsys):
    with held_interrupt(True) as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert "Ctrl-C again stops at once" in capsys.readouterr().err


def test_a_handler_of_your_own_stays():
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        with held_interrupt(True) as interrupted:
            signal.raise_signal(signal.SIGINT)
            assert not interrupted()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [1]
