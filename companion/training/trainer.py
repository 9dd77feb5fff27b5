"""Training under rounding in transformers' Trainer and TRL's SFTTrainer.

Both train what `prepare_qat` returns as they train any model. What they need help with stands here:
a late start, steps that are frozen near the end, checkpoints that go on exactly, a teacher.
Built in chapter 13.

Examples
--------
The recipe, with either trainer::

    qat = prepare_qat(model, W4)

    class Trainer(QATMixin, trl.SFTTrainer): ...

    trainer = Trainer(qat, args, train_dataset=rows, callbacks=[QATCallback(start=0.75)],
                      loss_fn=distillation_loss(model))
    trainer.train()  # trainer.train(resume_from_checkpoint=True) goes on
    small = convert(trainer.model)
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn

from companion.errors import CheckpointError, UnsupportedModel, WrongStage, extra
from companion.training.fingerprint import differences
from companion.training.losses import LossFn, count_scored

with extra("language"):
    from transformers import Trainer
    from transformers.trainer_callback import ExportableState, TrainerCallback

PREPARED = {"library": "companion", "stage": "prepared, not converted"}
"""What transformers finds as quantization_config in a checkpoint. An entry without a method makes it
stop, where it would else open the float weights that are still to be rounded."""


class QATCallback(TrainerCallback, ExportableState):
    """Rounds from a given share of a Trainer's steps on, and may freeze learned steps near the end.

    The model is prepared before the trainer gets it, so that optimizer, checkpoints and schedule hold
    one set of parameters from the first step to the last. Until the start it computes in floating
    point; then ranges are found for the weights of that moment, whose optimizer state goes on. A
    resumed run equals one that was never interrupted, bit for bit.

    Where the best checkpoint is kept (``load_best_model_at_end``), those from before the start do not
    take part: their loss is that of a float model. A checkpoint holds float weights and ranges; to
    open it otherwise than by resuming is refused by ``from_pretrained``, which would leave the
    rounding out.

    Parameters
    ----------
    start : float
        Share of the steps in floating point, below 1; 0 rounds from the first step on.
    freeze : float, optional
        Share of the steps after which learned steps stay as they are. Default: they train on.
    begin : callable, optional
        ``begin(model)`` is called at the start instead of finding ranges by the weights alone, such as
        ``partial(start_rounding, calibration=batches)``. Not called where `start` is 0.

    Raises
    ------
    ValueError
        If the shares make no sense.
    WrongStage, UnsupportedModel, CheckpointError
        When training begins, if the model is not prepared, would be rounded otherwise than it is
        trained, or the checkpoint is of a run with other shares.

    References
    ----------
    Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference", 2018 (the delay,
    and ranges that are frozen at the end).

    Examples
    --------
    >>> callback = QATCallback(start=0.75, freeze=0.9)
    >>> callback.at(0.75, 200)
    150
    """

    def __init__(
        self,
        start: float = 0.0,
        freeze: float | None = None,
        begin: Callable[[nn.Module], Any] | None = None,
    ) -> None:
        if not 0 <= start < 1 or not (freeze is None or start < freeze <= 1):
            raise ValueError(
                f"start={start} and freeze={freeze} are shares of the steps: let start be at least "
                "0 and below 1, and freeze above it and at most 1"
            )
        self.start, self.freeze, self.begin = start, freeze, begin

    @staticmethod
    def at(share: float, steps: int) -> int:
        """The step before which something happens."""
        return round(share * steps)

    def state(self) -> dict:
        """What Trainer writes into a checkpoint's ``trainer_state.json``."""
        given = {"args": {"start": self.start, "freeze": self.freeze}}
        return given | {"attributes": {"begins_by_function": self.begin is not None}}

    def on_train_begin(self, args, state, control, *, model, optimizer, **kwargs) -> None:
        self._check(model, args, optimizer)
        if state.global_step:
            self._check_checkpoint(state)
        first = self.at(self.start, state.max_steps)
        # at the step itself the ranges are still to be found
        rounds = state.global_step > first or first == 0
        for quantizer in _quantizers(model):
            quantizer.enabled = rounds
        if hasattr(model, "save_pretrained") and _base(model) is model:  # no adapter's
            model.save_pretrained = MethodType(_save_prepared, model)

    def on_step_begin(self, args, state, control, *, model, **kwargs) -> None:
        if not _rounds(model) and state.global_step >= self.at(self.start, state.max_steps):
            self._begin(model)
            # the best so far was a float model, which no rounded one has to beat
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        if self.freeze is not None and state.global_step >= self.at(self.freeze, state.max_steps):
            _freeze(model)

    def on_train_end(self, args, state, control, *, model, **kwargs) -> None:
        if not _rounds(model):  # stopped early: what is converted is what is evaluated
            self._begin(model)

    def _begin(self, model: nn.Module) -> None:
        if self.begin is not None:
            self.begin(model)
        else:
            for layer in _layers(model):
                if layer.weight.requires_grad:  # what is frozen keeps the ranges it was given
                    layer.quantizer.restart(layer.matrix.detach())
        for quantizer in _quantizers(model):
            quantizer.enabled = True

    def _check(self, model: nn.Module, args: Any, optimizer: Any) -> None:
        if not _layers(model):
            raise WrongStage(
                "QATCallback finds no layer that rounds: give the trainer prepare_qat(model, scheme), "
                "or lora_qat's, and convert it after training"
            )
        if _skips_rounded_head(model):
            raise UnsupportedModel(
                "SFTTrainer multiplies by the weight of the output layer itself, past its rounding: "
                "train with class Trainer(QATMixin, SFTTrainer), or prepare the model with "
                "skip=['lm_head']"
            )
        steps = {id(p) for q in _quantizers(model) for p in q.parameters(recurse=False)}
        for group in getattr(optimizer, "param_groups", ()):
            if group.get("weight_decay") and steps & {id(p) for p in group["params"]}:
                raise ValueError(
                    f"weight_decay={group['weight_decay']} would pull learned quantization steps "
                    f"towards 0: train with class MyTrainer(QATMixin, Trainer), which leaves them "
                    "out, or set weight_decay=0"
                )

    def _check_checkpoint(self, state: Any) -> None:
        known = state.stateful_callbacks.get(type(self).__name__, {})
        known = known[0] if isinstance(known, list) else known
        differ = [d for part, here in self.state().items()
                  for d in differences(known.get(part, {}), here)]  # fmt: skip
        if not known or differ:
            what = ", ".join(differ) if known else "it had no QATCallback"
            raise CheckpointError(
                f"the checkpoint is of another run ({what}): use its values, or train from the start"
            )


class QATMixin:
    """Put before a trainer, makes it train prepared models as `fit` does: ``class T(QATMixin, Trainer)``.

    Learned quantization steps do not decay. The loss may be a teacher's, over scored tokens, averaged
    over all that one step accumulates. An output layer that is rounded computes rounded in SFTTrainer,
    too, which by itself multiplies by its weight.

    Parameters
    ----------
    loss_fn : callable, optional
        ``loss_fn(model, batch)`` as `fit` takes it, such as ``distillation_loss(teacher)`` or
        ``stored_distillation_loss(folder)``, for training. Evaluation stays with the labels.
    *args, **kwargs
        The trainer's own.

    Examples
    --------
    >>> class MyTrainer(QATMixin, Trainer):
    ...     pass
    >>> "QATMixin" in [c.__name__ for c in MyTrainer.__mro__]
    True
    """

    def __init__(self, *args, loss_fn: LossFn | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.loss_fn = loss_fn
        self.head_is_rounded = _skips_rounded_head(self.model)
        if self.head_is_rounded:
            del _base(self.model).forward  # TRL's; the model's own asks the output layer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As in Trainer, without what belongs to a quantizer."""
        names = super().get_decay_parameter_names(model)
        return [name for name in names if "quantizer" not in name.split(".")]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As in Trainer; in training by `loss_fn`, if there is one."""
        given = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        if self.loss_fn is None or not model.training:
            if self.head_is_rounded:
                return Trainer.compute_loss(self, model, inputs, **given)
            return super().compute_loss(model, inputs, **given)
        loss: Tensor = self.loss_fn(model, inputs)
        if num_items_in_batch is None:
            return loss  # Trainer divides by the batches of a step
        loss = loss * count_scored(self.loss_fn, model, inputs) / num_items_in_batch
        # the items are those of all processes, over which gradients are averaged
        shared = self.args.average_tokens_across_devices
        return loss * self.accelerator.num_processes if shared else loss


def _layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(type(m), "matrix") and hasattr(m, "quantizer")]


def _quantizers(model: nn.Module) -> list[nn.Module]:
    return [layer.quantizer for layer in _layers(model)]


def _rounds(model: nn.Module) -> bool:
    return all(quantizer.enabled for quantizer in _quantizers(model))


def _freeze(model: nn.Module) -> None:
    for quantizer in _quantizers(model):
        quantizer.requires_grad_(False)


def _base(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _skips_rounded_head(model: nn.Module) -> bool:
    """Whether TRL put a forward on the model that reads the weight of an output layer that rounds."""
    base = _base(model)
    forward, fused = vars(base).get("forward"), False
    while forward is not None and not fused:
        code = getattr(getattr(forward, "__func__", forward), "__code__", None)
        fused = code is not None and "fused_lm_head" in code.co_varnames
        forward = getattr(forward, "__wrapped__", None)
    return fused and hasattr(base.get_output_embeddings(), "quantizer")


def _save_prepared(self: nn.Module, *args, **kwargs) -> None:
    if not _layers(self):  # a copy that was converted since
        return type(self).save_pretrained(self, *args, **kwargs)
    self.config.quantization_config = PREPARED
    try:
        type(self).save_pretrained(self, *args, **kwargs)
    finally:
        del self.config.quantization_config
