"""`fit`: the one training loop. It knows nothing of quantization, so every arm trains alike.

Built in chapter 2, used by every chapter after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from companion.errors import CheckpointError, NothingToTrain, expect, readable
from companion.numerics.rounding import hold_weights
from companion.training.batches import Stream, count_rows, to_device
from companion.training.checkpoint import Keeper
from companion.training.fingerprint import (
    describe,
    describe_loader,
    describe_model,
    describe_optimizer,
)
from companion.training.finite import check_finite
from companion.training.losses import (
    NOTHING_SCORED,
    LossFn,
    count_scored,
    default_loss,
    distillation_loss,
)
from companion.training.optimizer import make_optimizer, schedule_of, set_rates
from companion.training.processes import Processes, is_sharded, join
from companion.training.state import held_interrupt, set_rng
from companion.training.validation import Validation


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
    lr: float | None = None,
    weight_decay: float | None = None,
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
    Otherwise nothing of Accelerate is imported or asked.
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
        such as ``partial(torch.optim.SGD, lr=0.001, momentum=0.9)``. Default: AdamW at `lr` on the
        two groups of `companion.training.optimizer.parameter_groups`.
    lr : float, optional
        Learning rate of the default optimizer, 5e-4 unless told otherwise: what the comparison of
        chapter 11 chose on validation for docs-lm; large models take a tenth of it or less.
    weight_decay : float, optional
        Of the default optimizer, 0.01 unless told otherwise, for matrices only: neither biases nor
        norms nor learned quantization steps decay.
    schedule : {"cosine", "linear", "constant"} or callable
        Multiplies the learning rate; a callable receives the progress, 0 to 1.
    clip_norm : float or None
        Largest gradient norm; None leaves gradients alone.
    accumulate : int
        Batches of one step, which is that of one batch with all their rows: each counts by its
        scored tokens. Weights are rounded once for all of them (`hold_weights`).
    at : mapping of int to callable, optional
        Called once just before the step of that number (from 0), for example
        ``{80: wrapper.freeze}``. Repeated on resume, so that the model has the same form.
    validate : callable, optional
        ``validate(model)`` returns a number, lower is better, such as the validation loss. Called
        before the first step, every `validate_every` steps and after the last; at the end
        the model gets back the weights that did best. Whatever it draws at random, and whether it
        calls ``model.eval()``, training goes on as before.
    validate_every : int
    seed : int
        Any integer. Decides the order of the data and every random draw of the run.
    checkpoint_dir : path, optional
        Where to keep one `checkpoint.safetensors`, replaced atomically.
    checkpoint_every : int
        Steps between checkpoints; the last step always writes one, and so do Ctrl-C (once the step
        is done; in one process, pressed again it stops at once) and an error in `validate`.
    resume : bool
        Continue from the checkpoint, if there is one. The result is bit-identical to a run
        that was never interrupted, on the same machine with the same number of threads. A run with
        other settings is refused: functions are compared by name, a teacher by its weights, data
        by the first batch.
    progress : bool
        Show a bar on stderr (the environment variable TQDM_DISABLE=1 silences it as well).

    Returns
    -------
    History

    Raises
    ------
    NothingToTrain, EmptyLoader, NonFiniteLoss, CheckpointError, ValueError
        Each with a remedy in its message.

    Examples
    --------
    >>> model, batch = nn.Linear(2, 2), (torch.eye(2), torch.tensor([0, 1]))
    >>> history = fit(model, [batch], steps=20, lr=0.1, progress=False)
    >>> history.loss[-1] < history.loss[0]
    True
    """
    expect("fit", "model", model, nn.Module)
    expect("fit", "loader", loader, Iterable)
    if min(steps, accumulate, checkpoint_every, validate_every) < 1:
        raise ValueError("steps, accumulate and the ..._every intervals must be at least 1")
    loss_fn = _choose_loss(loss_fn, teacher)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise NothingToTrain(
            "no parameter of this model requires a gradient: quantized modules keep their weights "
            "as packed integers, which do not train. Train before convert(), not after"
        )
    processes = join(parameters[0].device)
    if processes.device != parameters[0].device:
        model.to(processes.device)
    model.train()
    optimizer = make_optimizer(model, optimizer, lr, weight_decay)
    factor = schedule_of(schedule)
    stream = Stream(loader, seed)
    keeper, saved = None, None
    if checkpoint_dir is not None:
        if is_sharded(model):
            raise CheckpointError(
                "a sharded model has no process that could write all of it: leave checkpoint_dir "
                "out and save it with torch.distributed.checkpoint"
            )
        run = {
            "steps": steps, "accumulate": accumulate, "seed": seed, "clip_norm": clip_norm,
            "schedule": describe(schedule), "precision": processes.precision,
            "loss_fn": describe(loss_fn), "loader": describe_loader(loader),
            "validate": validate and [describe(validate), validate_every],
            "model": describe_model(model), "optimizer": describe_optimizer(optimizer),
        }  # fmt: skip
        keeper = Keeper(checkpoint_dir, run, stream)
        saved = keeper.open(resume, accumulate)
    start = saved["step"] if saved else 0
    if processes.mean(torch.tensor(float(start))) != start:
        raise CheckpointError(
            f"not every process finds the checkpoint of step {start} in {checkpoint_dir}: use a "
            "folder that all machines share"
        )
    history, best = History(), {}
    if saved:
        for step in sorted(s for s in at or {} if s < start):
            at[step]()
        with readable(keeper.path, "delete it", CheckpointError):
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            history, best = History(**saved["history"]), saved["best"]
            set_rng(saved["rng"])
            set_rates(optimizer, factor(start / steps))  # also reads what the groups say
    optimizer = processes.optimizer(optimizer)
    loss_of = processes.loss(model, loss_fn)
    validation = Validation(validate, validate_every, steps, history.validation, best)
    validation(model, start, processes)

    def save(done: int) -> None:
        if keeper is not None and processes.first:
            keeper.write(model, optimizer, done, vars(history), validation.best)

    # unless told here, TQDM_DISABLE decides
    hide = {} if progress and processes.first else {"disable": True}
    with (
        tqdm(total=steps, initial=start, desc="fit", leave=False, **hide) as bar,
        held_interrupt(keeper is not None and processes.count == 1) as interrupted,
    ):
        for step in range(start, steps):
            if at and step in at:
                at[step]()
            set_rates(optimizer, factor(step / steps))
            optimizer.zero_grad()
            parts = _share(stream.take(accumulate), step, processes, loss_fn, model)
            total = 0.0
            with hold_weights() if len(parts) > 1 else nullcontext():
                for place, (part, weight) in enumerate(parts, 1):
                    batch = to_device(part, processes.device)
                    with processes.unsynchronised(place < len(parts)):
                        loss = loss_of(batch) * weight
                        value = processes.mean(loss)  # of all processes, so that all of them stop
                        check_finite("loss", value, step, processes, partial(loss_fn, model, batch))
                        if not loss.requires_grad:
                            raise NothingToTrain(_NO_GRADIENT)
                        processes.backward(loss)
                    total += value
            if step == start and all(p.grad is None for p in parameters):
                raise NothingToTrain(_NO_GRADIENT)
            if clip_norm is not None:
                norm = processes.clip(parameters, clip_norm)
                check_finite("gradient", norm, step, processes, partial(loss_fn, model, batch))
            optimizer.step()
            history.loss.append(total)
            history.learning_rate.append(optimizer.param_groups[0]["lr"])
            bar.set_postfix(loss=f"{total:.4f}", refresh=False)
            bar.update()
            done = step + 1
            try:
                validation(model, done, processes)
            except BaseException:
                save(done)
                raise
            stop = interrupted()
            if keeper is not None and (done % checkpoint_every == 0 or done == steps or stop):
                save(done)
                processes.wait()
            if stop:
                raise KeyboardInterrupt(f"resume=True continues after step {done}")
    if validation.best:
        model.load_state_dict(validation.best)
    return history


_NO_GRADIENT = (
    "backward() reached no parameter: something between the weights and the loss, such as a layer "
    "already quantized to integers, cuts the gradient. Train the float model under fake "
    "quantization (QuantWrapper(...).prepare_qat()) and convert afterwards"
)


def _choose_loss(loss_fn: LossFn, teacher: nn.Module | None) -> LossFn:
    if teacher is None:
        return loss_fn
    if loss_fn is not default_loss:
        raise ValueError(
            "pass a teacher or a loss_fn, not both; distillation_loss(teacher, temperature, "
            "share) is a loss_fn"
        )
    return distillation_loss(teacher)


def _share(
    drawn: list, step: int, processes: Processes, loss_fn: LossFn, model: nn.Module
) -> list[tuple[Any, float]]:
    """Return what this process computes of a step's batches, with weights."""
    parts = processes.share(drawn, partial(count_scored, loss_fn, model))
    if not parts and (loss_fn is default_loss or hasattr(loss_fn, "scored")):
        raise NothingToTrain(f"step {step}: {NOTHING_SCORED}")
    # a loss of your own may score what the labels do not say
    return parts or processes.share(drawn, partial(count_rows, default=1))
