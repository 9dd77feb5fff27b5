"""The processes that train one model together, by Hugging Face Accelerate; usually just one.

`accelerate launch` and `torchrun` start a script several times. Each process then reads every
batch and computes its share of the rows; the gradients are averaged. Built
in chapter 15.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from companion.data.biencoder import BiEncoder
from companion.errors import extra


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
        If the processes would not train together, or Accelerate was configured to shard the model.

    Examples
    --------
    >>> alone = Processes(torch.device("cpu"))
    >>> alone.share(torch.ones(4, 2))[1], alone.mean(torch.tensor(3.0))
    (1.0, 3.0)
    """

    def __init__(self, device: torch.device) -> None:
        with warnings.catch_warnings():  # tqdm, in Jupyter without widgets
            warnings.filterwarnings("ignore", "IProgress not found")
            with extra("distributed"):
                from accelerate import Accelerator, DistributedDataParallelKwargs

        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        started = int(os.environ.get("WORLD_SIZE", "1"))
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
        """Return the optimizer, which under mixed precision also scales the gradients back."""
        return self._accelerator.prepare_optimizer(optimizer)

    def share(self, batch: Any) -> tuple[Any, float]:
        """Return this process's rows of a batch, and what they weigh in the mean of all losses.

        They weigh by their scored tokens where each token has a label, otherwise by their number.

        Raises
        ------
        ValueError
            If there are fewer rows than processes.
        """
        if self.count == 1:
            return batch, 1.0
        rows = count_rows(batch)
        if rows < self.count:
            raise ValueError(
                f"a batch of {rows} cannot be shared by {self.count} processes: make batches "
                "larger, or pass drop_last=True to the DataLoader if it is the last one"
            )
        start, stop = (rows * i // self.count for i in (self._index, self._index + 1))
        part = take_rows(batch, rows, slice(start, stop))
        return part, self.count * _scored(part) / max(_scored(batch), 1)

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
    def __init__(self, model: nn.Module, loss_fn: Callable, context: Callable = nullcontext):
        super().__init__()
        self.model, self.loss_fn, self.context = model, loss_fn, context

    def forward(self, batch: Any) -> Tensor:
        with self.context():
            return self.loss_fn(self.model, batch)


def count_rows(batch: Any) -> int:
    """Rows of a batch: those of its labels or ids, otherwise of its first tensor that has any.

    Examples
    --------
    >>> count_rows({"scale": torch.tensor(2.0), "x": torch.ones(3, 5)})
    3
    """
    if isinstance(batch, Mapping):
        known = [batch[key] for key in ("labels", "input_ids") if key in batch]
        return count_rows([*known, *batch.values()])
    parts = batch if isinstance(batch, (tuple, list)) else [batch]
    sizes = [len(part) for part in parts if isinstance(part, Tensor) and part.dim()]
    if not sizes:
        raise ValueError("a batch without tensors cannot be shared by several processes")
    return sizes[0]


def take_rows(batch: Any, rows: int, which: slice) -> Any:
    """Cut out rows of all tensors and lists that have as many; leave what else there is.

    Examples
    --------
    >>> take_rows((torch.arange(3), ["a", "b", "c"], torch.ones(1)), 3, slice(1, 3))
    (tensor([1, 2]), ['b', 'c'], tensor([1.]))
    """
    if isinstance(batch, Mapping):
        return {key: take_rows(value, rows, which) for key, value in batch.items()}
    if isinstance(batch, Tensor):
        return batch[which] if batch.dim() and len(batch) == rows else batch
    if isinstance(batch, (tuple, list)):
        if any(isinstance(part, Tensor) for part in batch):
            return type(batch)(take_rows(part, rows, which) for part in batch)
        return batch[which] if len(batch) == rows else batch
    return batch


def _scored(batch: Any) -> int:
    """Labels of tokens that count, the first of each row aside; or rows."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point():
        return int((labels[:, 1:] != -100).sum())
    return count_rows(batch)


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` has spread the parameters over processes.

    Examples
    --------
    >>> is_sharded(nn.Linear(1, 1))
    False
    """
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _has_devices() -> bool:
    """Whether processes can have a device each; Apple's is one, and does not take part."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found is not None and found.type != "mps"


def _launched() -> bool:
    return "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
