"""A quantized model leaves in a format by its name, and is compared with what arrived.

Built in chapter 15.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from companion.cli.stages import open_for, open_model, open_task, open_tokenizer, save_tokenizer
from companion.errors import WrongStage
from companion.formats.hub import is_saved
from companion.formats.parity import Parity
from companion.formats.parity import parity as compare
from companion.formats.registry import FORMATS, format_for


def export(
    name: str, path: Path, asked: str = "auto", options: Mapping[str, Mapping[str, Any]] | None = None
) -> int:  # fmt: skip
    """Write a quantized model, and its tokenizer, in a format of `FORMATS`.

    Parameters
    ----------
    name : str
        A folder of `save_quantized`.
    path : Path
    asked : str
        As in `format_for`.
    options : mapping of str to mapping, optional
        Of the exporters, by format.

    Returns
    -------
    int
        Bytes that were written, of weights and settings.

    Raises
    ------
    WrongStage
        If the model is not quantized.
    ValueError
        If path and format do not fit.
    """
    kind = format_for(path, asked)
    form = FORMATS[kind]
    if not is_saved(name):
        raise WrongStage(f"{name} is no folder with a quantized model: finetune makes one")
    folder = path.parent if form.ending else path
    if not form.ending and folder.resolve() == Path(name).resolve():
        raise ValueError(f"{path} is the model itself: choose another folder")
    model, tokenizer = open_model(name), open_tokenizer(name)
    if not form.holds_tokenizer:
        save_tokenizer(tokenizer, folder, write=False)  # it says where it may not lie
    form.export(model, path, tokenizer, **(options or {}).get(kind, {}))
    if not form.holds_tokenizer:
        save_tokenizer(tokenizer, folder)
    written = [path] if form.ending else [*path.glob("*.safetensors"), path / "config.json"]
    return sum(file.stat().st_size for file in written)


def report(
    path: Path, reference: str | None, prompt: str, *, max_new_tokens: int = 24,
    task: str | None = None, **options: Any,
) -> tuple[Parity, list[str]]:  # fmt: skip
    """Compare what was exported with what it was made from, and lay it out in lines.

    Parameters
    ----------
    path : Path
    reference : str, optional
        The folder of the quantized model; by default the path itself, or the folder it lies in.
    prompt : str
        What both go on with, or read where they do not go on with a text.
    max_new_tokens : int
    task : str, optional
        On whose test split both are measured.
    **options
        Of the task.

    Returns
    -------
    Parity
    list of str
        A table, both answers and a sentence.

    Raises
    ------
    ValueError
        If no reference is given and none is near.
    """
    if reference is None:
        near = [str(folder) for folder in (path, path.parent) if is_saved(folder)]
        if not near:
            raise ValueError(
                f"{path} does not say what it was made from: pass --reference, the folder of the "
                "quantized model"
            )
        reference = near[0]
    tokenizer = open_tokenizer(reference)
    data = None if task is None else open_task(task, tokenizer, **options)
    model = open_model(reference) if data is None else open_for(reference, data)
    ids: Tensor = tokenizer(prompt, return_tensors="pt", verbose=False).input_ids.long()
    if not ids.numel():
        raise ValueError("the prompt is empty: give a few words")
    with torch.no_grad():
        found = compare(model, path, data, prompt=ids, max_new_tokens=max_new_tokens)
    lines = [
        f"{path} ({found.format}, {found.engine}) beside {reference}",
        *str(found).splitlines(),
    ]
    if found.ours or found.theirs:
        said = [tokenizer.decode(tokens) for tokens in (found.ours, found.theirs)]
        lines += [f"{prompt!r} goes on", f"  trained: {said[0]!r}",
                  f"  served:  {'the same' if said[0] == said[1] else repr(said[1])}"]  # fmt: skip
    return found, [*lines, found.verdict]
