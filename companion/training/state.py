"""What a run shares with the world around it: random generators, training modes, Ctrl-C.

Built in chapter 2.
"""

from __future__ import annotations

import hashlib
import operator
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

RngState = tuple[dict[str, Tensor], dict]
_SEEDS_APART = 1_000_003  # a prime: seed 1 is not seed 0 one pass later


def pass_seed(seed: int, number: int) -> int:
    """Return the seed of one pass over the data, different for every seed and pass.

    Generators take 32 bits. Numbers that have more, negative ones too, are hashed to as many.

    Examples
    --------
    >>> [pass_seed(0, number) for number in (0, 1, 2)], pass_seed(1, 0)
    ([0, 1, 2], 1000003)
    >>> pass_seed(2**64, 0) == pass_seed(0, 0), pass_seed(-1, 0) == pass_seed(1, 0)
    (False, False)
    """
    value = operator.index(seed) * _SEEDS_APART + number
    if 0 <= value < 2**32:
        return value
    return int.from_bytes(hashlib.sha256(str(value).encode()).digest()[:4])


def seed_everything(seed: int) -> None:
    """Seed the generators of torch, numpy and Python with a number of 32 bits."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def get_rng() -> RngState:
    """Return the states of the random generators of torch, numpy and Python, for `set_rng`."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(keys.astype(np.int64))}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors, {"numpy": [kind, position, has_gauss, gauss], "python": random.getstate()}


def set_rng(saved: RngState) -> None:
    """Put the random generators of torch, numpy and Python back as they were saved."""
    tensors, rest = saved
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    kind, *tail = rest["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), *tail))
    version, state, gauss = rest["python"]
    random.setstate((version, tuple(state), gauss))


@contextmanager
def kept_rng() -> Iterator[None]:
    """Whatever is drawn inside, the random generators go on afterwards as if nothing had been.

    Examples
    --------
    >>> with kept_rng():
    ...     seed_everything(0)
    ...     inside = torch.rand(1)
    >>> seed_everything(0)
    >>> torch.equal(torch.rand(1), inside)
    True
    """
    saved = get_rng()
    try:
        yield
    finally:
        set_rng(saved)


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Whatever calls `eval` or `train` inside, each module has its own mode back afterwards.

    Examples
    --------
    >>> model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
    >>> with kept_modes(model):
    ...     _ = model.eval()
    >>> model.training, model[0].training, model[1].training
    (True, True, False)
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:  # parents come before their children
            if module.training != mode and type(module).train is not nn.Module.train:
                module.train(mode)  # QuantWrapper's also switches its observers
            module.training = mode


@contextmanager
def held_interrupt(hold: bool) -> Iterator[Callable[[], bool]]:
    """Hold the first Ctrl-C back and say when asked that it came; the second interrupts at once.

    Only in the main thread, and only where Python's own handler is at work.

    Parameters
    ----------
    hold : bool
        False changes nothing.

    Examples
    --------
    >>> with held_interrupt(True) as interrupted:
    ...     signal.raise_signal(signal.SIGINT)
    ...     interrupted()
    True
    """
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        came.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("finishing this step; Ctrl-C again stops at once", file=sys.stderr)

    ours = (
        hold
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(came)
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
