"""The processes that train one model together, by Hugging Face Accelerate; usually just one.

`accelerate launch` and `torchrun` start a script several times. Each process then reads every
batch and computes its share of the rows; the gradients are averaged. Built
in chapter 16.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from companion.data.biencoder import BiEncoder
from companion.errors import extra
from companion.training.batches import count_rows, take_rows

Count = Callable[[Any], int]


class Processes:
    """What `fit` needs to know about its fellow processes; this is a process alone.

    Parameters
    ----------
    device : torch.device
        Where the model is.

    Examples
    --------
    >>> alone = Processes(torch.device("cpu"))
    >>> alone.mean(torch.tensor(3.0))
    3.0
    >>> [weight for _, weight in alone.share([torch.ones(1), torch.ones(3)], len)]
    [0.25, 0.75]
    """

    count = 1
    first = True  # the process that shows bars and writes files
    precision = "no"
    scales_gradients = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def loss(self, model: nn.Module, loss_fn: Callable) -> Callable[[Any], Tensor]:
        """Return the loss as a function of a batch."""
        return lambda batch: loss_fn(model, batch)

    def optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Return the optimizer, which under mixed precision also scales the gradients back."""
        return optimizer

    def share(self, batches: Sequence[Any], scored: Count) -> list[tuple[Any, float]]:
        """Return this process's rows of the batches of a step, and their weights in its loss.

        Each mean weighs by what it is a mean over, so that the weighted means add up to the mean
        over all batches of the step. Batches in which nothing is scored are left out.

        Parameters
        ----------
        batches : list of batches
        scored : callable
            Counts the predictions that the loss of a batch is a mean over.
        """
        counts = [scored(batch) for batch in batches]
        return [
            (batch, count / sum(counts))
            for batch, count in zip(batches, counts, strict=True)
            if count
        ]

    def unsynchronised(self, really: bool) -> AbstractContextManager:
        """Keep gradients to this process, where more batches of the same step follow."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip(self, parameters: list, norm: float) -> Tensor:
        """Clip the gradient and return its norm before."""
        return nn.utils.clip_grad_norm_(parameters, norm)

    def mean(self, value: Tensor) -> float:
        """Average a number over all processes, which then have the same."""
        return value.item()

    def wait(self) -> None:
        """Go on when all processes have come here."""


class Launched(Processes):
    """A process that `accelerate launch` or `torchrun` started, among others or alone.

    Its device and its precision are those that the launcher gives.

    Parameters
    ----------
    device : torch.device
        Where the model is.

    Raises
    ------
    ValueError
        If the processes would not train together, or Accelerate was configured to shard the model.
    """

    def __init__(self, device: torch.device) -> None:
        with extra("distributed"):
            from accelerate import Accelerator, DistributedDataParallelKwargs

        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        started = _started()
        # without being told, Accelerate lets several processes on CPUs train for themselves
        self._accelerator = Accelerator(
            cpu=started > 1 and not _has_devices(), device_placement=False, kwargs_handlers=[unused]
        )
        if self._accelerator.num_processes != started:
            raise ValueError(
                f"{started} processes were started, and Accelerate would train "
                f"{self._accelerator.num_processes} together: set ACCELERATE_USE_CPU=1, or see "
                "`accelerate env`"
            )
        if self._accelerator.distributed_type.value in ("FSDP", "DEEPSPEED"):
            raise ValueError(
                "fit() does not let Accelerate shard the model: launch plain processes, and shard "
                "it yourself before, with torch.distributed.fsdp.fully_shard (chapter 16)"
            )
        super().__init__(self._accelerator.device)
        self.count, self._index = self._accelerator.num_processes, self._accelerator.process_index
        self.first = self._accelerator.is_main_process
        self.precision = self._accelerator.mixed_precision
        self.scales_gradients = self._accelerator.scaler is not None
        self._module: nn.Module | None = None

    def loss(self, model: nn.Module, loss_fn: Callable) -> Callable[[Any], Tensor]:
        """Return the loss as a function of a batch, its gradients averaged over processes.

        The loss function is wrapped with the model, so that it may use any of its methods.

        Raises
        ------
        ValueError
            If the loss compares all rows of a batch with each other.
        """
        if self.count > 1 and isinstance(model, BiEncoder):
            raise ValueError(
                "retrieval compares every query with every text of its batch, which processes "
                "cannot share: train it in one"
            )
        if is_sharded(model):  # which averages its gradients already
            self._module = _Loss(model, loss_fn, self._accelerator.autocast)
        else:
            self._module = self._accelerator.prepare_model(_Loss(model, loss_fn))
        return self._module

    def optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        return self._accelerator.prepare_optimizer(optimizer)

    def share(self, batches: Sequence[Any], scored: Count) -> list[tuple[Any, float]]:
        """Return this process's rows of the batches of a step, and their weights in its loss.

        Raises
        ------
        ValueError
            If a batch has fewer rows than there are processes.
        """
        whole = super().share(batches, scored)
        total = sum(scored(batch) for batch, _ in whole)
        return [(part, self.count * count / total) for part, count in
                (self._rows(batch, scored) for batch, _ in whole)]  # fmt: skip

    def _rows(self, batch: Any, scored: Count) -> tuple[Any, int]:
        if self.count == 1:
            return batch, scored(batch)
        rows = count_rows(batch)
        if rows < self.count:
            raise ValueError(
                f"a batch of {rows} cannot be shared by {self.count} processes: make batches "
                "larger, or pass drop_last=True to the DataLoader if it is the last one"
            )
        start, stop = (rows * i // self.count for i in (self._index, self._index + 1))
        part = take_rows(batch, rows, slice(start, stop))
        count = scored(part)
        # a mean over nothing is NaN: a process without any takes the whole batch, with weight 0
        return (part, count) if count else (batch, 0)

    def unsynchronised(self, really: bool) -> AbstractContextManager:
        return self._accelerator.no_sync(self._module) if really else nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def clip(self, parameters: list, norm: float) -> Tensor:
        return self._accelerator.clip_grad_norm_(parameters, norm)

    def mean(self, value: Tensor) -> float:
        if self.count == 1:
            return value.item()
        return self._accelerator.reduce(value.detach().to(self.device), "mean").item()

    def wait(self) -> None:
        self._accelerator.wait_for_everyone()


def join(device: torch.device) -> Processes:
    """Return the processes that this one was launched with, or this one alone.

    Accelerate keeps its precision and its devices for the whole life of a process. So it is asked only
    where a launcher decided them, and a plain `fit` neither imports it nor sees what others set.

    Examples
    --------
    >>> type(join(torch.device("cpu"))).__name__
    'Processes'
    """
    launcher = ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")
    launched = _started() > 1 or any(name in os.environ for name in launcher)
    return (Launched if launched else Processes)(device)


class _Loss(nn.Module):
    def __init__(self, model: nn.Module, loss_fn: Callable, context: Callable = nullcontext):
        super().__init__()
        self.model, self.loss_fn, self.context = model, loss_fn, context

    def forward(self, batch: Any) -> Tensor:
        with self.context():
            return self.loss_fn(self.model, batch)


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` has spread the parameters over processes.

    Examples
    --------
    >>> is_sharded(nn.Linear(1, 1))
    False
    """
    tensors = sys.modules.get("torch.distributed.tensor")  # half a second; who shards has it
    return tensors is not None and any(isinstance(p, tensors.DTensor) for p in model.parameters())


def _started() -> int:
    """How many processes there are, by the launcher or by a process group of the user's own."""
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    known = torch.distributed.get_world_size() if group else 1
    return max(known, int(os.environ.get("WORLD_SIZE") or 1))


def _has_devices() -> bool:
    """Whether processes can have a device each; Apple's is one, and does not take part."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found is not None and found.type != "mps"
