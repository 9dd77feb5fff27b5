"""Equal things hash alike in every process, and different ones do not."""

import functools
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from companion import W4, W8A8, QuantScheme
from companion.data.task import Task
from companion.study.fingerprint import fingerprint, of_task
from companion.study.recipes import ARMS

VALUES = """(list(ARMS.values()), W4, {"b", "a", "c"}, dict.fromkeys("qwertyuiop"), lambda x: x in {"p", "q", "r"},
             nn.Linear(2, 2).register_parameter)"""


def test_it_is_the_same_in_every_process():
    """Whatever the order of sets and the addresses of objects."""
    script = (
        "from torch import nn; from companion import W4; from companion.study.recipes import ARMS; "
        "from companion.study.fingerprint import fingerprint; import torch; torch.manual_seed(0); "
        f"print(fingerprint(*{VALUES}))"
    )
    there = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True,
                           text=True, env=os.environ | {"PYTHONHASHSEED": "1"}).stdout.strip()  # fmt: skip
    torch.manual_seed(0)
    assert fingerprint(*eval(VALUES)) == there


def constant(n):
    return lambda: n


def default(n):
    return lambda n=n: n


class Call:
    def __init__(self, n):
        self.n = n

    def __call__(self):
        return self.n

    def method(self):
        return self.n


MAKERS = {
    "closure": constant,
    "default": default,
    "partial": lambda n: functools.partial(max, n),
    "object": Call,
    "method": lambda n: Call(n).method,
    "nested": lambda n: constant(constant(n)),
    "tensor": lambda n: torch.tensor([n]),
    "bfloat16": lambda n: torch.tensor([n], dtype=torch.bfloat16),
    "scheme": lambda n: QuantScheme(4, n),
    "module": lambda n: nn.Sequential(nn.Dropout(n / 10)),
    "list of dict": lambda n: [{"a": n}],
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_values_that_differ_in_one_number(make):
    assert fingerprint(make(2)) == fingerprint(make(2))
    assert fingerprint(make(2)) != fingerprint(make(3))


def test_functions_count_with_their_code_and_what_it_names():
    assert fingerprint(lambda x: x + 1) != fingerprint(lambda x: x - 1)
    assert fingerprint(lambda x: max(x)) != fingerprint(lambda x: min(x))
    assert fingerprint(lambda x: [y + 1 for y in x]) != fingerprint(lambda x: [y + 2 for y in x])
    before = fingerprint(reader)
    globals()["SETTING"] = 5
    assert fingerprint(reader) != before
    globals()["SETTING"] = 4
    assert fingerprint(reader) == before
    assert len({fingerprint(arm) for arm in ARMS.values()}) == len(ARMS)


SETTING = 4


def reader():
    return helper()


def helper():
    return SETTING


def test_circles_come_to_an_end():
    around: dict = {}
    around["itself"] = around
    around["function"] = lambda: around
    assert fingerprint(around) == fingerprint(around)
    assert fingerprint(odd) == fingerprint(odd)


def odd(n):
    return n and even(n - 1)


def even(n):
    return not n or odd(n - 1)


class Scaled(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale
        self.register_buffer("shift", torch.tensor(scale), persistent=False)
        self.linear = nn.Linear(2, 2)


def test_modules_count_with_weights_settings_and_what_is_frozen():
    def made(scale=1.0, cls=Scaled):
        torch.manual_seed(0)
        return cls(scale)

    same = fingerprint(made())
    assert fingerprint(made().eval()) == same
    assert fingerprint(made(2.0)) != same
    frozen = made()
    frozen.linear.bias.requires_grad_(False)
    assert fingerprint(frozen) != same
    moved = made()
    moved.shift += 1.0
    assert fingerprint(moved) != same

    class Other(Scaled):
        def forward(self, x):
            return self.linear(x) + self.shift

    first = fingerprint(made(cls=Other))
    Other.forward = lambda self, x: self.linear(x) - self.shift
    assert len({same, first, fingerprint(made(cls=Other))}) == 3
    assert fingerprint(W4) != fingerprint(W8A8)


def test_reading_a_task_draws_nothing():
    x = torch.arange(24.0).view(12, 2)
    loader = DataLoader(TensorDataset(x, x[:, 0].long()), 4, shuffle=True)
    task = Task("t", loader, loader, loader, (), "")
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    first = of_task(task)
    assert torch.equal(torch.rand(2), expected)
    assert of_task(task) == first
    assert of_task(replace(task, metric="accuracy")) != first
    assert of_task(replace(task, source="another mirror")) == first


def test_a_stream_without_an_end_is_read_to_some_length():
    class Endless:
        def __iter__(self):
            while True:
                yield torch.ones(2), torch.zeros(2, dtype=torch.int64)

    batch = [(torch.ones(2), torch.zeros(2, dtype=torch.int64))]
    assert of_task(Task("t", Endless(), batch, batch, (), ""))
