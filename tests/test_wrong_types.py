"""Every public name, called with what it does not take: one sentence, of a kind that says whose fault."""

import inspect

import pytest
import torch

import companion
from companion import QuantScheme

WRONG = {"None": None, "a number": 3, "a text": "no such thing", "a list": [1, 2], "a set": {1},
         "an object": object(), "NaN": float("nan"), "a mapping": {"a": 1}, "a tensor": torch.ones(2, 2)}  # fmt: skip
CALLED = [name for name in companion.__all__ if callable(getattr(companion, name))]


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("name", CALLED)
def test_a_wrong_type_is_said_in_one_sentence(name, what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, value = getattr(companion, name), WRONG[what]
    needed = [p for p in inspect.signature(call).parameters.values()
              if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty]  # fmt: skip
    given = [value] * max(1, len(needed))
    raised = None
    try:
        call(*given)
    except Exception as found:
        raised = found
    if raised is not None:
        error = raised
        ours = type(error).__module__ == "companion.errors"
        said = str(error).strip()
        assert ours or type(error) in (TypeError, ValueError), f"{type(error).__name__}: {said}"
        assert said
        assert "\n" not in said
    else:
        assert isinstance(call(*given), (QuantScheme, companion.Activations, torch.Tensor,
                                         companion.Estimate, torch.nn.Module, tuple))  # fmt: skip
    assert not list(tmp_path.iterdir())
