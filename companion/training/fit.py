"""`fit`: the one training loop. It knows nothing of quantization, so every arm trains alike.

Built in chapter 2, used by every chapter after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from companion.errors import CheckpointError, NonFiniteLoss, NothingToTrain
from companion.training.batches import forever
from companion.training.checkpoint import CHECKPOINT, read_checkpoint, write_checkpoint
from companion.training.losses import LossFn, default_loss, distillation_loss
from companion.training.processes import Processes, is_sharded

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


@dataclass
class History:
    """What a training run did: one entry per optimizer step.

    Parameters
    ----------
    loss : list of float
        Mean training loss of each step, before the update.
    learning_rate : list of float
        Learning rate of the first parameter group at each step.
    validation : list of [int, float]
        Optimizer steps done, and what `validate` returned then.
    """

    loss: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    validation: list[list] = field(default_factory=list)


def fit(
    model: nn.Module,
    loader: Iterable,
    *,
    steps: int = 200,
    loss_fn: LossFn = default_loss,
    teacher: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Callable[[list], torch.optim.Optimizer] | None = None,
    lr: float = 5e-4,
    schedule: str | Callable[[float], float] = "cosine",
    clip_norm: float | None = 1.0,
    accumulate: int = 1,
    at: Mapping[int, Callable[[], Any]] | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    validate_every: int = 50,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 50,
    resume: bool = False,
    progress: bool = True,
) -> History:
    """Train a model for a fixed number of optimizer steps, in one process or in several.

    Started by ``accelerate launch`` or ``torchrun``, the same call shares every batch among the
    processes, each on its own device, in the precision that Accelerate is configured for. Where the
    loss is a mean over rows or over labelled tokens, it is that of one process with the whole batch.
    Only the first shows a bar and writes checkpoints. (A range over a whole batch, as in W8A8 or
    batch norm, is each process's own.)

    Parameters
    ----------
    model : nn.Module
        Trained in place, on the device where its parameters are unless a launcher gives one. It
        may have been sharded by `torch.distributed.fsdp.fully_shard`, without checkpoints then.
    loader : iterable of batches
        Anything that can be iterated again, such as a DataLoader or a list. The global random
        generators (and the loader's own, if it has one) are seeded at the start of each pass.
    steps : int
        Optimizer steps.
    loss_fn : callable
        ``loss_fn(model, batch)`` returns a scalar.
    teacher : nn.Module, optional
        A float model to imitate instead of the labels: the loss is then
        ``distillation_loss(teacher)``.
    optimizer : optimizer or callable, optional
        An optimizer over this model's parameters, or a function from a parameter list to one,
        such as ``partial(torch.optim.SGD, lr=0.001, momentum=0.9)``. Default: AdamW at `lr`.
    lr : float
        Learning rate of the default optimizer. The default is what the comparison of chapter 11
        chose on validation for docs-lm; large models take a tenth of it or less.
    schedule : {"cosine", "linear", "constant"} or callable
        Multiplies the learning rate; a callable receives the progress, 0 to 1.
    clip_norm : float or None
        Largest gradient norm; None leaves gradients alone.
    accumulate : int
        Batches averaged into one step.
    at : mapping of int to callable, optional
        Called once just before the step of that number (from 0), for example
        ``{80: wrapper.freeze}``. Repeated on resume, so that the model has the same form.
    validate : callable, optional
        ``validate(model)`` returns a number, lower is better, such as the validation loss. Called
        before the first step, every `validate_every` steps and after the last; at the end
        the model gets back the weights that did best.
    validate_every : int
    seed : int
        Decides the order of the data and every random draw of the run.
    checkpoint_dir : path, optional
        Where to keep one `checkpoint.safetensors`, replaced atomically.
    checkpoint_every : int
        Steps between checkpoints; the last step always writes one.
    resume : bool
        Continue from the checkpoint, if there is one. The result is bit-identical to a run
        that was never interrupted, on the same machine with the same number of threads.
    progress : bool
        Show a bar on stderr (the environment variable TQDM_DISABLE=1 silences it as well).

    Returns
    -------
    History

    Raises
    ------
    NothingToTrain, EmptyLoader, NonFiniteLoss, CheckpointError
        Each with a remedy in its message.

    Examples
    --------
    >>> model, batch = nn.Linear(2, 2), (torch.eye(2), torch.tensor([0, 1]))
    >>> history = fit(model, [batch], steps=20, lr=0.1, progress=False)
    >>> history.loss[-1] < history.loss[0]
    True
    """
    if min(steps, accumulate, checkpoint_every, validate_every) < 1:
        raise ValueError("steps, accumulate and the ..._every intervals must be at least 1")
    if teacher is not None:
        if loss_fn is not default_loss:
            raise ValueError(
                "pass a teacher or a loss_fn, not both; distillation_loss(teacher, temperature, "
                "share) is a loss_fn"
            )
        loss_fn = distillation_loss(teacher)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise NothingToTrain(
            "no parameter of this model requires a gradient: quantized modules keep their weights "
            "as packed integers, which do not train. Train before convert(), not after"
        )
    processes = Processes(parameters[0].device)
    device = processes.device
    if device != parameters[0].device:
        model.to(device)
    model.train()
    optimizer = _make_optimizer(optimizer, parameters, lr)
    factor = SCHEDULES[schedule] if isinstance(schedule, str) else schedule
    named = schedule if isinstance(schedule, str) else getattr(schedule, "__qualname__", "custom")
    run = {"steps": steps, "accumulate": accumulate, "seed": seed, "schedule": named}
    path = None if checkpoint_dir is None else Path(checkpoint_dir) / CHECKPOINT
    if path is not None and is_sharded(model):
        raise CheckpointError(
            "a sharded model has no process that could write all of it: leave checkpoint_dir out "
            "and save it with torch.distributed.checkpoint"
        )
    history, start, rng, best = History(), 0, None, {}
    if path is not None and path.exists():
        if not resume:
            raise CheckpointError(
                f"{path} already holds a run: pass resume=True to continue it, or another folder"
            )
        saved = read_checkpoint(path, run)
        start = saved["step"]
        for step in sorted(s for s in at or {} if s < start):
            at[step]()
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        history, rng, best = History(**saved["history"]), saved["rng"], saved["best"]

    if processes.mean(torch.tensor(float(start))) != start:
        raise CheckpointError(
            f"not every process finds the checkpoint of step {start} in {path}: use a folder that "
            "all machines share"
        )
    optimizer = processes.optimizer(optimizer)
    loss_of = processes.loss(model, loss_fn)
    stream = forever(loader, seed, start * accumulate, rng)
    if validate is not None and not start:
        best = _validate(model, validate, 0, history, best, processes)
    # unless told here, TQDM_DISABLE decides
    hide = {} if progress and processes.first else {"disable": True}
    with tqdm(total=steps, initial=start, desc="fit", leave=False, **hide) as bar:
        for step in range(start, steps):
            if at and step in at:
                at[step]()
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor(step / steps)
            optimizer.zero_grad()
            total = 0.0
            for part in range(accumulate):
                batch, weight = processes.share(next(stream))
                with processes.unsynchronised(part < accumulate - 1):
                    loss = loss_of(_to(batch, device)) * weight / accumulate
                    value = processes.mean(loss)
                    _check_loss(loss, value, step)
                    processes.backward(loss)
                total += value
            if step == start and all(p.grad is None for p in parameters):
                raise NothingToTrain(_NO_GRADIENT)
            if clip_norm is not None:
                processes.clip(parameters, clip_norm)
            optimizer.step()
            history.loss.append(total)
            history.learning_rate.append(optimizer.param_groups[0]["lr"])
            bar.set_postfix(loss=f"{total:.4f}", refresh=False)
            bar.update()
            done = step + 1
            if validate is not None and (done % validate_every == 0 or done == steps):
                best = _validate(model, validate, done, history, best, processes)
            if path is not None and (done % checkpoint_every == 0 or done == steps):
                if processes.first:
                    write_checkpoint(path, model, optimizer, done, run, vars(history), best)
                processes.wait()
    if best:
        model.load_state_dict(best)
    return history


_NO_GRADIENT = (
    "backward() reached no parameter: something between the weights and the loss, such as a layer "
    "already quantized to integers, cuts the gradient. Train the float model under fake "
    "quantization (QuantWrapper(...).prepare_qat()) and convert afterwards"
)


def _make_optimizer(optimizer, parameters: list, lr: float) -> torch.optim.Optimizer:
    if optimizer is None:
        optimizer = torch.optim.AdamW(parameters, lr=lr)
    elif not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer(parameters)
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not known & {id(p) for p in parameters}:
        raise NothingToTrain(
            "the optimizer holds none of this model's parameters: build it after prepare_qat(), "
            "which makes a new model, or pass a function such as partial(torch.optim.SGD, lr=...)"
        )
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return optimizer


def _validate(
    model: nn.Module,
    validate: Callable,
    done: int,
    history: History,
    best: dict,
    processes: Processes,
) -> dict:
    """Record the validation value; return the weights that did best so far."""
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed when it is iterated
        value = processes.mean(torch.tensor(float(validate(model)), dtype=torch.float64))
    history.validation.append([done, value])
    if value > min(v for _, v in history.validation):
        return best
    return {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}


def _check_loss(loss: Tensor, value: float, step: int) -> None:
    if not math.isfinite(value):  # of all processes, so that all of them stop
        raise NonFiniteLoss(
            f"the loss is {value} at step {step}: lower the learning rate, clip gradients "
            "(clip_norm=1.0) or look at the batch of that step"
        )
    if not loss.requires_grad:
        raise NothingToTrain(_NO_GRADIENT)


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_to(value, device) for value in batch)
    return batch.to(device) if isinstance(batch, Tensor) else batch
