"""What a model costs: the bytes of its file and the time of a call.

Built in chapters 3 (bytes) and 7 (latency).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from companion.errors import expect
from companion.numerics.packing import narrowest


def model_bytes(model: nn.Module) -> int:
    """Size of the whole file that a model is saved to, in bytes.

    The state is written as safetensors in memory and counted. Layers of
    ``torch.ao.nn.quantized`` and torchao's tensors are opened: their integers, scales and zero
    points count. Tensors that layers share count once.

    Parameters
    ----------
    model : nn.Module
        Float, prepared or converted.

    Returns
    -------
    int

    Examples
    --------
    >>> model_bytes(nn.Linear(100, 100)) - 4 * (100 * 100 + 100)  # the header
    144
    """
    expect("model_bytes", "model", model, nn.Module)
    state = model.state_dict()
    if any(name.rpartition(".")[2] == "integers" for name in state):  # as save_quantized() writes
        state |= {n: narrowest(p.detach()) for n, p in model.named_parameters() if n in state}
    once = {}  # tied tensors stand in a file once
    for name, tensor in state.items():
        plain = isinstance(tensor, Tensor) and not hasattr(tensor, "__tensor_flatten__")
        shared = plain and not tensor.is_quantized and tensor.numel()
        once.setdefault((tensor.data_ptr(), tensor.shape) if shared else name, (name, tensor))
    return len(to_safetensors(dict(_plain_tensors("", dict(once.values())))))


def _plain_tensors(name: str, value: Any) -> Iterable[tuple[str, Tensor]]:
    """Flatten nested state to ordinary tensors, opening packed and quantized ones."""
    if isinstance(value, torch.ScriptObject):
        value = value.__getstate__()
    if hasattr(value, "__tensor_flatten__"):  # a tensor made of others, as torchao's are
        for part in value.__tensor_flatten__()[0]:
            yield from _plain_tensors(f"{name}.{part}", getattr(value, part))
    elif isinstance(value, Tensor) and value.is_quantized:
        if value.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
            scale, zero_point = value.q_per_channel_scales(), value.q_per_channel_zero_points()
        else:
            scale, zero_point = torch.tensor(value.q_scale()), torch.tensor(value.q_zero_point())
        yield from (
            (f"{name}.integers", value.int_repr().contiguous()),
            (f"{name}.scale", scale.float()),
            (f"{name}.zero_point", zero_point.int()),
        )
    elif isinstance(value, Tensor):
        yield name, value.detach().contiguous().clone()
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from _plain_tensors(f"{name}.{key}" if name else key, entry)
    elif isinstance(value, (tuple, list)):
        for index, entry in enumerate(value):
            yield from _plain_tensors(f"{name}.{index}", entry)


@dataclass(frozen=True)
class Latency:
    """Wall-clock time of one call: median and interquartile range, in milliseconds."""

    median_ms: float
    iqr_ms: float
    threads: int
    runs: int


def latency(
    call: Callable[[], Any], *, threads: int | None = None, min_seconds: float = 1.0
) -> Latency:
    """Time a call with ``torch.utils.benchmark``: warm-up, then repeated runs.

    Parameters
    ----------
    call : callable
        Takes no argument, such as ``lambda: model(x)``. Run under ``torch.no_grad()``.
    threads : int, optional
        Intra-op threads during the measurement; default the current number.
    min_seconds : float
        Least total time spent measuring.

    Returns
    -------
    Latency

    Examples
    --------
    >>> latency(lambda: torch.zeros(10), min_seconds=0.01).median_ms > 0
    True
    """
    from torch.utils.benchmark import Timer  # prints about CUDA when imported, so only here

    threads = threads or torch.get_num_threads()
    with torch.no_grad():
        timer = Timer("call()", globals={"call": call}, num_threads=threads)
        timer.timeit(3)  # warm-up
        result = timer.blocked_autorange(min_run_time=min_seconds)
    return Latency(result.median * 1e3, result.iqr * 1e3, threads, len(result.times))
