"""`QuantWrapper`: the classic eager road of ``torch.ao.quantization``, for convolutional nets.

``torch.ao.quantization`` is imported when it is needed, since upstream has announced its removal.
Built in chapters 5 and 6.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from functools import wraps
from itertools import islice
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from companion.classic.eager import (
    fuse,
    make_qconfig,
    own_module_for_each_place,
    quantized_engine,
    refuse_unquantizable,
    remeasured_batch_norm,
    remove_stubs,
    search_range,
    snap_to_grid,
    torch_ao,
)
from companion.errors import EmptyLoader, UnsupportedBackend, UnsupportedModel, WrongStage

Given = ParamSpec("Given")
Result = TypeVar("Result")
ENGINES = ("x86", "fbgemm", "onednn", "qnnpack")  # in order of preference


def _quiet(method: Callable[Given, Result]) -> Callable[Given, Result]:
    """Keep upstream's deprecation notices out of the reader's way; chapter 5 states them once."""

    @wraps(method)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.filterwarnings("ignore", message=".*must run observer.*")
            warnings.filterwarnings("ignore", message=".*quantized tensor creation.*")
            return method(*args, **kwargs)

    return call


class QuantWrapper(nn.Module):
    """Wrap a model in quantize and dequantize stubs, and carry it through the classic recipe.

    On its own the wrapper is the identity around the model: stubs are only marks. The calls
    below give them meaning, in this order: `prepare_qat`, training, `freeze`, `convert`
    (or `prepare_qat`, `calibrate`, `convert` for post-training static quantization).

    Parameters
    ----------
    model : nn.Module
        A float model whose additions and concatenations of activations go through
        ``torch.ao.nn.quantized.FloatFunctional``, such as
        ``torchvision.models.quantization.resnet18(quantize=False)``. It is never modified.
    backend : {"x86", "fbgemm", "onednn", "qnnpack"}, optional
        Engine that will run the integers; default the best that this build supports.

    Attributes
    ----------
    quant, dequant : nn.Module
        Where floats become integers and integers floats.
    model : nn.Module
        What runs in between.
    stage : {"float", "prepared", "converted"}

    Raises
    ------
    UnsupportedBackend
        If this build of PyTorch lacks the engine.

    Examples
    --------
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    >>> x = torch.ones(2, 1, 4, 4)
    >>> torch.equal(QuantWrapper(net)(x), net(x))
    True
    >>> qat = QuantWrapper(net).prepare_qat(weight_bits=4)
    >>> _ = qat(x)                                   # a training step would go here
    >>> int8 = qat.freeze().convert()
    >>> int8.model[0].weight().dtype, int8(x).shape
    (torch.qint8, torch.Size([2, 2]))
    """

    def __init__(self, model: nn.Module, backend: str | None = None) -> None:
        super().__init__()
        ao = torch_ao()
        supported = torch.backends.quantized.supported_engines
        backend = backend or next(e for e in ENGINES if e in supported)
        if backend not in supported or backend not in ENGINES:
            raise UnsupportedBackend(
                f"backend {backend!r} is not in this build of PyTorch: choose one of "
                f"{', '.join(e for e in ENGINES if e in supported)}"
            )
        self.backend = backend
        self.stage = "float"
        self._frozen = False
        self.quant: nn.Module = ao.QuantStub()
        self.model = model
        self.dequant: nn.Module = ao.DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(self.model(self.quant(x)))

    def __call__(self, *args, **kwargs):  # forward itself stays what torch.jit.script understands
        if self.stage != "converted":
            return super().__call__(*args, **kwargs)
        with quantized_engine(self.backend):
            try:
                return super().__call__(*args, **kwargs)
            except NotImplementedError as error:
                operator = str(error).partition("'")[2].partition("'")[0]
                raise UnsupportedModel(
                    f"the model computes {operator or error}, which has no kernel for integers: "
                    "replace it by a module that torch.ao.nn.quantized knows, or keep that part "
                    "outside the wrapper"
                ) from error

    def load_state_dict(self, *args, **kwargs):
        with quantized_engine(self.backend):  # weights are packed as they arrive
            return super().load_state_dict(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> QuantWrapper:
        memo[id(self)] = new = type(self).__new__(type(self))
        with quantized_engine(self.backend):  # the copy is packed anew
            new.__setstate__(copy.deepcopy(self.__dict__, memo))
        return new

    @_quiet
    def prepare_qat(self, weight_bits: int = 8) -> QuantWrapper:
        """Insert fake quantization: weights per channel, activations per tensor at 8 bits.

        Works on a copy of the model, so build the optimizer afterwards. Fuses convolution,
        batch norm and ReLU where the model offers ``fuse_model`` or is sequential; takes out
        stubs that the model already carries; leaves the wrapper in train mode.

        Parameters
        ----------
        weight_bits : int
            Width of the weights, 2 to 8. Below 8 the integers still sit in int8 containers
            on this road, so only the accuracy changes, not the size.

        Returns
        -------
        QuantWrapper
            Itself, prepared.

        Raises
        ------
        WrongStage, NothingToQuantize, UnsupportedModel
        """
        self._expect("float", "prepare_qat()", "it is already {stage}; wrap the float model anew")
        ao = torch_ao()
        model = copy.deepcopy(self.model)
        refuse_unquantizable(model, ao)
        remove_stubs(model, ao)
        self.model = model.train()
        self.train()
        own_module_for_each_place(model)
        fuse(model, ao)
        self.qconfig = make_qconfig(weight_bits, self.backend, ao)
        self.weight_bits = weight_bits
        ao.prepare_qat(self, inplace=True)
        self.stage = "prepared"
        return self

    @torch.no_grad()
    def calibrate(
        self,
        loader: Iterable,
        batches: int = 8,
        *,
        search: bool = False,
        batch_norm: bool = False,
    ) -> QuantWrapper:
        """Choose activation ranges by watching data, without training (static PTQ).

        Parameters
        ----------
        loader : iterable of (inputs, labels) or inputs
        batches : int
            How many batches to watch.
        search : bool
            First search for each output channel the share of its weights' range that rounds them
            with the smallest squared error. If trained on, the range stays that share.
        batch_norm : bool
            Then measure the batch-norm statistics anew: those of the float model describe
            channels that rounding has shifted.

        Returns
        -------
        QuantWrapper
            Itself, in eval mode.

        Raises
        ------
        WrongStage, EmptyLoader
        """
        self._expect("prepared", "calibrate()", "call prepare_qat() first")
        if self._frozen and (search or batch_norm):
            raise WrongStage(
                "calibrate(search=True) and calibrate(batch_norm=True) change what freeze() has fixed: "
                "call them before freeze()"
            )
        watched = [b[0] if isinstance(b, (tuple, list)) else b for b in islice(loader, batches)]
        if not watched:
            raise EmptyLoader("the loader gave no batch to calibrate on: is the data set empty?")
        if search:
            for module in self.modules():
                if hasattr(module, "weight_fake_quant"):
                    search_range(module, self.weight_bits)
        self.eval()
        if batch_norm:
            # with weights rounded, and activations not: their ranges are still to be found
            self._observe_activations(False)
            self._set_activations("fake_quant_enabled", False)
            try:
                with remeasured_batch_norm(self):
                    for inputs in watched:
                        self(inputs)
            finally:
                self._set_activations("fake_quant_enabled", True)
        self._observe_activations(True)
        for inputs in watched:
            self(inputs)
        self._observe_activations(False)
        return self

    def freeze(self) -> QuantWrapper:
        """Stop observers and batch-norm statistics, so that the last steps train a fixed grid.

        Call it late in training (say, for the last fifth): a grid that moves under the weights
        until the end is not the grid they have adapted to.

        Returns
        -------
        QuantWrapper
            Itself.
        """
        self._expect("prepared", "freeze()", "call prepare_qat() first")
        ao = torch_ao()
        self.apply(ao.disable_observer)
        self.apply(torch.ao.nn.intrinsic.qat.freeze_bn_stats)
        self._frozen = True
        return self.train(self.training)

    def train(self, mode: bool = True) -> QuantWrapper:
        """Switch between training and evaluation; refuse to train integers."""
        if mode and self.stage == "converted":
            raise WrongStage(
                "a converted model does not train: its weights are packed integers. Train the "
                "prepared wrapper that convert() was called on, then convert again"
            )
        super().train(mode)
        if self._frozen:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        elif self.stage == "prepared":  # evaluation must not move activation ranges
            self._observe_activations(mode)
        return self

    @_quiet
    def convert(self) -> QuantWrapper:
        """Turn fake quantization into real int8 layers.

        Weights are set to their grid points first. Upstream would otherwise measure and round
        them anew after folding batch norm in, and the largest weight of a channel, which sits
        on a tie, can fall either way.

        Returns
        -------
        QuantWrapper
            A new wrapper in eval mode that runs on the chosen engine; the prepared one is
            left as it was, ready for comparison or more training.

        Raises
        ------
        WrongStage
            If it was not prepared, or never saw data.
        """
        self._expect("prepared", "convert()", "call prepare_qat() and train or calibrate first")
        ao = torch_ao()
        converted = copy.deepcopy(self).eval()
        if torch.isinf(converted.quant.activation_post_process.activation_post_process.min_val):
            raise WrongStage(
                "convert() before any data: activation ranges were never observed. Train the "
                "prepared wrapper, or call calibrate(loader), first"
            )
        for module in converted.modules():
            if hasattr(module, "weight_fake_quant"):
                # Tied layers may have norms of their own, and so different grids.
                module.weight = nn.Parameter(module.weight.clone())
                snap_to_grid(module)
        converted.apply(ao.disable_observer)
        with quantized_engine(self.backend):
            ao.convert(converted, inplace=True)
        converted.stage = "converted"
        return converted

    def _observe_activations(self, on: bool) -> None:
        self._set_activations("observer_enabled", on)

    def _set_activations(self, switch: str, on: bool) -> None:
        for name, module in self.named_modules():
            if name.endswith("activation_post_process") and hasattr(module, switch):
                getattr(module, switch).fill_(on)

    def _expect(self, stage: str, call: str, remedy: str) -> None:
        if self.stage != stage:
            raise WrongStage(f"{call}: {remedy.format(stage=self.stage)}")
