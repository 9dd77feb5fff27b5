"""The processes that train one model together, by Hugging Face Accelerate; usually just one.

`accelerate launch` and `torchrun` start a script several times. Each process then reads every
batch and computes its share of the rows; the gradients are averaged. Floor 2 of the house. Built
in chapter 15.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Processes:
    """What `fit` needs to know about its fellow processes; alone, all of it is the identity.

    Parameters
    ----------
    device : torch.device
        Where the model is. Launched by `accelerate launch` or `torchrun`, a process has a device
        of its own, which takes precedence.

    Raises
    ------
    ValueError
        If Accelerate was configured to shard the model itself.

    Examples
    --------
    >>> alone = Processes(torch.device("cpu"))
    >>> alone.share(torch.ones(4, 2))[1], alone.mean(torch.tensor(3.0))
    (1.0, 3.0)
    """

    def __init__(self, device: torch.device) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        self._accelerator = Accelerator(device_placement=False, kwargs_handlers=[unused])
        if self._accelerator.distributed_type.value in ("FSDP", "DEEPSPEED"):
            raise ValueError(
                "fit() does not let Accelerate shard the model: launch plain processes, and shard "
                "it yourself before, with torch.distributed.fsdp.fully_shard (chapter 15)"
            )
        self.device = self._accelerator.device if _launched() else device
        self.count, self._index = self._accelerator.num_processes, self._accelerator.process_index
        self._module: nn.Module | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that shows bars and writes files."""
        return self._accelerator.is_main_process

    def loss(self, model: nn.Module, loss_fn: Callable) -> Callable[[Any], Tensor]:
        """Return the loss as a function of a batch, its gradients averaged over processes.

        The loss function is wrapped with the model, so that it may use any of its methods.
        """
        self._module = _Loss(model, loss_fn)
        if not is_sharded(model):  # which averages its gradients already
            self._module = self._accelerator.prepare_model(self._module)
        return self._module

    def optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Return the optimizer, which under mixed precision also scales the gradients back."""
        return self._accelerator.prepare_optimizer(optimizer)

    def share(self, batch: Any) -> tuple[Any, float]:
        """Return this process's rows of a batch, and what they weigh in the mean of all losses.

        Raises
        ------
        ValueError
            If there are fewer rows than processes.
        """
        if self.count == 1:
            return batch, 1.0
        from accelerate.utils import find_batch_size, slice_tensors

        rows = find_batch_size(batch)
        start, stop = (rows * i // self.count for i in (self._index, self._index + 1))
        if rows < self.count:
            raise ValueError(
                f"a batch of {rows} cannot be shared by {self.count} processes: make batches "
                "larger, or pass drop_last=True to the DataLoader if it is the last one"
            )
        return slice_tensors(batch, slice(start, stop)), (stop - start) * self.count / rows

    def unsynchronised(self, really: bool) -> AbstractContextManager:
        """Keep gradients to this process, where more batches of the same step follow."""
        return self._accelerator.no_sync(self._module) if really else nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def clip(self, parameters: list, norm: float) -> None:
        self._accelerator.clip_grad_norm_(parameters, norm)

    def mean(self, value: Tensor) -> float:
        """Average a number over all processes, which then have the same."""
        if self.count == 1:
            return value.item()
        return self._accelerator.reduce(value.detach().to(self.device), "mean").item()

    def wait(self) -> None:
        """Go on when all processes have come here."""
        self._accelerator.wait_for_everyone()


class _Loss(nn.Module):
    def __init__(self, model: nn.Module, loss_fn: Callable) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, batch: Any) -> Tensor:
        return self.loss_fn(self.model, batch)


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` has spread the parameters over processes.

    Examples
    --------
    >>> is_sharded(nn.Linear(1, 1))
    False
    """
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _launched() -> bool:
    return "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
