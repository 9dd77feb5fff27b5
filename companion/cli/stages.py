"""A model at any stage by its name: from the Hub, fine-tuned and saved, or exported.

Built in chapter 15.
"""

from __future__ import annotations

import filecmp
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from companion.course.images import IMAGES
from companion.course.models import load_pretrained
from companion.course.sources import find, load_tokenizer, quiet_transformers
from companion.course.tasks import load_task
from companion.data.biencoder import BiEncoder
from companion.data.task import Task
from companion.errors import DamagedFile, MissingExtra, SourceUnavailable, UnsupportedModel
from companion.evaluation.generation import longest
from companion.formats.hub import load_quantized, read_config
from companion.formats.registry import FORMATS, format_at
from companion.formats.served import ServedModel

HEADS = {"loss": "lm", "right choices": "lm", "accuracy": "classification",
         "span F1": "tokens", "recall@1": "retrieval"}  # fmt: skip
"""What a model ends in, by the metric of the task."""
KINDS = {
    "lm": "a language model",
    "classification": "a classifier of texts",
    "tokens": "a tagger of words",
    "retrieval": "an encoder of texts",
    "embedding": "an encoder without a head",
    "module": "a model of no text",
}


def open_model(name: str, *, head: str | None = None, classes: int | None = None) -> nn.Module:
    """Open an exported file or folder, one of `save_quantized`, or what `load_pretrained` takes.

    Parameters
    ----------
    name : str
    head, classes
        As in `load_pretrained`; saved and exported models have theirs.

    Returns
    -------
    nn.Module
        In eval mode.

    Raises
    ------
    UnsupportedModel
        If it reads images, or is an encoder-decoder.

    Examples
    --------
    >>> open_model("docs-lm").num_parameters()
    3410176
    """
    if (form := format_at(name)) not in (None, "companion"):
        return FORMATS[form].open(Path(name))
    _refuse_images(name)
    if getattr(config := _config(name), "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{name} is an encoder-decoder ({config.model_type}), and the command line takes encoders "
            "and decoders: prepare_qat and fit train it in Python"
        )
    if form == "companion":
        return load_quantized(name, _retriever(name))
    return load_pretrained(name, head=head, classes=classes).eval()


def _config(name: str) -> Any:
    """The settings of a model, or None where a folder holds none that transformers knows."""
    with quiet_transformers() as transformers:
        try:
            return transformers.AutoConfig.from_pretrained(find(name)[0], trust_remote_code=False)
        except (OSError, ValueError, KeyError):
            return None


def _retriever(folder: str) -> nn.Module | None:
    """An empty encoder to fill, where the folder holds a `BiEncoder`; transformers knows none."""
    config, saved = read_config(folder)
    if saved.get("class") != BiEncoder.__name__:
        return None
    if "model_type" not in config:
        raise DamagedFile(f"{folder} does not say which encoder it holds: fine-tune it anew")
    with quiet_transformers() as transformers:
        kind = transformers.CONFIG_MAPPING[config["model_type"]]
        encoder = transformers.AutoModel.from_config(
            kind.from_dict(config), attn_implementation=saved.get("attention"), dtype=torch.float32
        )
    return BiEncoder(encoder)


def open_for(name: str, task: Task) -> nn.Module:
    """Open a model that can be measured on a task.

    Parameters
    ----------
    name : str
        As in `open_model`.
    task : Task

    Raises
    ------
    UnsupportedModel
        If the model ends in something else than the task needs, or its head was never trained.
    """
    wanted = HEADS[task.metric]
    model = open_model(name, head=wanted)
    trained = "finetune makes one"
    if wanted in ("classification", "tokens") and getattr(model, "fresh", ()):
        raise UnsupportedModel(
            f"{name} has no head that was trained for {task.name} ({task.metric}): {trained}"
        )
    if kind_of(model) != wanted:
        raise UnsupportedModel(
            f"{name} is {KINDS[kind_of(model)]}, and {task.name} needs {KINDS[wanted]}: {trained}"
        )
    known = getattr(getattr(model, "config", None), "num_labels", None)
    if task.classes and known not in (None, len(task.classes)):
        raise UnsupportedModel(
            f"{name} knows {known} classes, and {task.name} has {len(task.classes)}: {trained}"
        )
    return model


def kind_of(model: nn.Module) -> str:
    """Say what a model ends in, by a key of `KINDS`.

    Examples
    --------
    >>> kind_of(open_model("docs-lm"))
    'lm'
    """
    if isinstance(model, BiEncoder):
        return "retrieval"
    if isinstance(model, ServedModel):
        kind, ending = model.description.kind, model.loss_type
        if kind != "encoder":
            return {"decoder": "lm"}.get(kind, kind)
    else:
        ending = type(model).__name__
        if getattr(model, "can_generate", bool)():
            return "lm"
    for kind, end in (
        ("classification", "ForSequenceClassification"),
        ("tokens", "ForTokenClassification"),
    ):
        if ending.endswith(end):
            return kind
    return "embedding"


def open_task(name: str, tokenizer, **options: Any) -> Task:
    """Load a task for a model of text.

    Parameters
    ----------
    name : str
        As in `load_task`.
    tokenizer : PreTrainedTokenizerBase
        From `open_tokenizer`.
    **options
        As in `load_task`; what is None is left to its default.

    Raises
    ------
    UnsupportedModel
        If the task holds images.
    """
    _refuse_images(name)
    given = {option: value for option, value in options.items() if value is not None}
    return load_task(name, tokenizer=tokenizer, **given)


def open_tokenizer(name: str):
    """Load the tokenizer of a model: of an exported file, the one in it or beside it.

    Its ``model_max_length`` is at most what the model takes, so that tasks follow the model.

    Parameters
    ----------
    name : str
        As in `open_model`.

    Raises
    ------
    SourceUnavailable
        If there is none.
    """
    _refuse_images(name)
    form = FORMATS.get(format_at(name) or "")
    exported = form is not None and form.ending != ""
    folder = str(Path(name).parent) if exported else name
    belongs = "tokenizer.json belongs beside the model's file"
    if exported and form.holds_tokenizer:
        belongs = "it belongs into the file: export it again with one"
    try:
        if exported and not Path(folder).is_dir():
            raise FileNotFoundError(folder)
        if exported and form.holds_tokenizer:
            return _tokenizer_inside(Path(name))
        tokenizer = load_tokenizer(folder)
    except (SourceUnavailable, DamagedFile, MissingExtra):
        raise
    except Exception:  # where tokenizer.json is damaged, it is no kind of its own
        raise SourceUnavailable(
            f"no tokenizer was found for {name}: {belongs}"
            f"{', which is missing, too' if exported and not Path(name).is_file() else ''}"
        ) from None
    tokenizer.model_max_length = min(tokenizer.model_max_length, longest(_config(folder)))
    return tokenizer


SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "pad_token": "padding_token_id",
}
"""Names of special tokens, and of what a GGUF file calls them."""


def _tokenizer_inside(file: Path):
    """The tokenizer that a GGUF file holds; it takes no more tokens than the model."""
    from gguf import GGUFReader

    with quiet_transformers() as transformers:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, trust_remote_code=False
        )
    fields = GGUFReader(file).fields
    template = "tokenizer.chat_template"  # transformers leaves some of them in the file
    if not tokenizer.chat_template and template in fields:
        tokenizer.chat_template = fields[template].contents()
    for token, field in SPECIAL.items():  # a tokenizer's files beside it are asked before it is
        if getattr(tokenizer, token) is None and (key := f"tokenizer.ggml.{field}") in fields:
            number = int(fields[key].contents())
            setattr(tokenizer, token, tokenizer.convert_ids_to_tokens(number))
    arch = fields["general.architecture"].contents()
    context = int(fields[f"{arch}.context_length"].contents())
    tokenizer.model_max_length = min(tokenizer.model_max_length, context)
    return tokenizer


def _refuse_images(name: str) -> None:
    if name in ("resnet18", *IMAGES):
        raise UnsupportedModel(
            f"{name} is about images, and the command line takes models of text: prepare_qat, fit and "
            "accuracy take it in Python"
        )


def open_language_model(name: str) -> nn.Module:
    """Open a model that goes on with a text.

    Raises
    ------
    UnsupportedModel
        If it ends in something else.
    """
    model = open_model(name)
    if kind_of(model) != "lm":
        raise UnsupportedModel(
            f"{name} is {KINDS[kind_of(model)]}, and only a language model goes on with a text"
        )
    return model


def save_tokenizer(tokenizer, folder: str | Path, *, write: bool = True) -> None:
    """Write a tokenizer beside a model, unless files of another one lie there.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    folder : path
    write : bool
        Whether to write it, or only to see that it may.

    Raises
    ------
    FileExistsError
        If a file would be overwritten by other content.
    """
    folder = Path(folder)
    if folder.resolve() == Path(tokenizer.name_or_path).resolve():
        return  # where it was read from
    with tempfile.TemporaryDirectory() as new:
        tokenizer.save_pretrained(new)
        files = sorted(file.name for file in Path(new).iterdir())
        others = [file for file in files if (folder / file).exists()
                  and not filecmp.cmp(Path(new, file), folder / file, shallow=False)]  # fmt: skip
        if others:
            raise FileExistsError(
                f"{folder} already holds {others[0]} of another model: choose another folder"
            )
        if write:
            tokenizer.save_pretrained(folder)
