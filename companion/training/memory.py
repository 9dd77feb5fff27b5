"""How much memory training takes, by arithmetic and by measurement.

Built in chapter 16.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from types import TracebackType

import torch

from companion.errors import extra

_PAUSE = 0.002


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a training run, without activations, which depend on the batch.

    Parameters
    ----------
    weights, gradients, optimizer : float
    rounding : float
        Copies of weights kept from the forward to the backward pass because they are rounded.
    segments : int
        Parts that gradient checkpointing computes again, one at a time; 1 without it.
    """

    weights: float
    gradients: float
    optimizer: float
    rounding: float
    segments: int = 1

    @property
    def at_peak(self) -> dict[str, float]:
        """What is there at the larger of two moments: before the last segment's backward, and after.

        Before, its rounded copies are there and its gradients are not; after, the reverse.
        Without checkpointing there is one segment, the whole model.
        """
        segment = {"gradients": self.gradients / self.segments,
                   "rounded copies": self.rounding / self.segments}  # fmt: skip
        gone = min(segment, key=segment.__getitem__)
        parts = {"gradients": self.gradients, "rounded copies": segment["rounded copies"]}
        parts[gone] -= segment[gone]
        return {"weights": self.weights, "moments": self.optimizer} | parts

    @property
    def peak(self) -> float:
        """Bytes at that moment."""
        return sum(self.at_peak.values())


def training_memory(
    parameters: float,
    rounded: float = 0.0,
    *,
    trained: float | None = None,
    weight_bytes: int = 4,
    segments: int = 1,
    processes: int = 1,
) -> TrainingMemory:
    """Add up what fine-tuning with AdamW takes, under rounding or not.

    Rounding keeps nothing: the backward pass rounds each weight again, in memory that one layer
    lends the next. Adapters inside the rounding are the exception, since the sum of weight and
    adapter is a tensor of its own that has to wait.

    Not in it: activations, a teacher (its weights once more), the weights that `validate` keeps,
    the memory in which one layer is rounded, up to a gigabyte of rounded weights while batches are
    accumulated, and with several processes the block that is lent.

    Parameters
    ----------
    parameters : float
        Of the model.
    rounded : float
        Of them, those that fake quantization rounds; 0 trains in floating point.
    trained : float, optional
        Parameters that receive a gradient; default all. With LoRA, those of the adapters, which
        come in addition.
    weight_bytes : int
        4 for float32, 2 for a frozen bfloat16 model under LoRA. What is trained takes 4.
    segments : int
        Parts, such as the blocks of a transformer, that gradient checkpointing computes again;
        one of them at a time then holds such sums.
    processes : int
        That share weights, gradients and optimizer states (FSDP).

    Returns
    -------
    TrainingMemory

    Examples
    --------
    >>> in_float, qat = training_memory(1e9), training_memory(1e9, 1e9)
    >>> in_float.peak / 1e9, qat.peak / 1e9  # bytes for each parameter
    (16.0, 16.0)
    >>> training_memory(1e9, 1e9, trained=1e7, weight_bytes=2).peak / 1e9  # adapters
    4.12
    >>> training_memory(1e9, 1e9, trained=1e7, weight_bytes=2, segments=20).peak / 1e9
    2.258
    """
    adapters = trained is not None
    trained = parameters if trained is None else trained
    weights = parameters * weight_bytes + (4 * trained if adapters else 0)
    rounding = rounded * weight_bytes if adapters else 0.0
    shared = (part / processes for part in (weights, 4 * trained, 8 * trained))
    return TrainingMemory(*shared, rounding, segments)


class PeakMemory:
    """Measure how much memory a block of code takes at most, beyond what there was before it.

    On a CPU the memory of the process is sampled, every two milliseconds; on a GPU PyTorch counts
    its own allocations exactly. Linux's glibc keeps holes between tensors for later: started with
    ``MALLOC_MMAP_THRESHOLD_=65536`` in its environment, a process holds what it needs.

    Parameters
    ----------
    device : torch.device or str

    Attributes
    ----------
    bytes : int
        After the block.

    Examples
    --------
    >>> with PeakMemory() as peak:
    ...     x = torch.ones(50_000_000)
    >>> peak.bytes >= 0  # about 200 million in a process that nothing else was freed in
    True
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"memory of {device!r} cannot be measured: use 'cpu' or 'cuda'")
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return self
        self._before = _resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
            return
        self._done.set()
        self._thread.join()
        self._see()

    def _sample(self) -> None:
        while not self._done.wait(_PAUSE):
            self._see()

    def _see(self) -> None:
        self.bytes = max(self.bytes, _resident() - self._before)


def _resident() -> int:
    with extra("memory"):
        import psutil

    return psutil.Process().memory_info().rss
