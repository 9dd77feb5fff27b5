"""Low-rank adapters inside fake quantization: what trains is rounded as base and adapter together.

Built in chapter 11.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from companion.errors import extra
from companion.numerics.scheme import QuantScheme
from companion.qat.prepare import prepare_qat
from companion.qat.ranges import Absmax


def lora(
    model: nn.Module,
    scheme: QuantScheme,
    task: Any = None,
    skip: Sequence[str] = (),
    *,
    rank: int = 8,
) -> nn.Module:
    """Prepare a model, freeze it, and add low-rank adapters inside its fake quantization.

    PEFT adds its update to the *parameter*, before it is rounded; so what trains is
    ``fake_quantize(W + B A)``, and merging changes not one bit. An adapter around a rounded
    layer, ``fake_quantize(W) x + B A x``, cannot be merged so: the sum lies on no grid, and
    `convert` refuses it.

    Parameters
    ----------
    model : nn.Module
    scheme : QuantScheme
    task : Task, optional
        Not used; it makes the signature that of `Arm.prepare`.
    skip : sequence of str
        As in `prepare_qat`.
    rank : int
        Columns of B.

    Returns
    -------
    peft.PeftModel
        ``merge_and_unload()`` gives the prepared model back, ready for `convert`.

    Examples
    --------
    >>> import torch
    >>> from companion import W4, convert
    >>> adapted = lora(nn.Sequential(nn.Linear(64, 8)), W4, rank=2)
    >>> x = torch.ones(1, 64)
    >>> before = adapted(x)
    >>> torch.equal(convert(adapted.merge_and_unload())(x), before)
    True

    References
    ----------
    Hu et al., "LoRA: low-rank adaptation of large language models", ICLR 2022.
    """
    with extra("peft"):
        from peft import LoraConfig, get_peft_model

    prepared = prepare_qat(model, scheme, "mse", skip=skip)
    for module in prepared.modules():
        if isinstance(module, Absmax):
            module.fingerprint = None  # these weights may change while frozen: merging is exact
    targets = [f"{name}.weight" for name in prepared.quantization.layers]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[], target_parameters=targets)
    with warnings.catch_warnings():  # peft reads a property that transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        return get_peft_model(prepared, config)
