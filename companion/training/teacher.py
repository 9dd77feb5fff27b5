"""A teacher's answers, computed once: training then needs no teacher in memory.

Of every scored prediction the k most probable tokens are kept, and how much probability all others
have together. Rows are found again by their contents, so that their order and the batches that they
come in do not matter. Built in chapter 13.

References
----------
Peng et al., "Pre-training distillation for large language models: a design space exploration", 2024
(top-k logits that are stored). Anshumann et al., "Sparse logit sampling: accelerating knowledge
distillation in LLMs", ACL 2025 (that a student has to know what the other tokens have together).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from companion.data.text import IGNORED
from companion.errors import CheckpointError, EmptyLoader, UnreadableBatch
from companion.evaluation.logits import LazyLogits, pieces
from companion.files import BLANK, is_sealed, seal, write_atomically
from companion.training.batches import to_device
from companion.training.chunked import TopK
from companion.training.fingerprint import describe, differences
from companion.training.losses import Distillation, LossFn, answer, counted_of
from companion.training.state import kept_modes, kept_rng

FORMAT = 1
_KEY = "companion"  # of the header that says whose answers these are
_KEY_BYTES = 16
_FILE_BYTES = 2**26
"""Answers are written whenever they take so much; an interrupted call loses less than that."""
_NOT_THE_ROW = (
    "attention_mask",
    "document",
)  # padding is cut off by the one, no model sees the other


def store_teacher(
    teacher: nn.Module,
    loader: Iterable,
    folder: str | Path,
    k: int | None = 64,
    *,
    temperature: float = 1.0,
    progress: bool = True,
) -> Path:
    """Write what a teacher says to every scored prediction of a data set, for later training.

    Called again it goes on: rows that are there already are not computed anew. One process calls it,
    before those that train are launched. One pass over 5,000
    answers of 30 tokens takes 80 MB at k = 64.

    Parameters
    ----------
    teacher : nn.Module
        A language model, or another one that takes ``input_ids``; computes in eval mode.
    loader : iterable of dict batches
        As for `fit`, read once. The same rows may be batched, padded and shuffled otherwise when
        they train.
    folder : path
        Receives safetensors files, each written atomically.
    k : int or None
        Tokens that are kept of each prediction; None keeps all, and with them the exact loss of the
        teacher itself.
    temperature : float
        Of the teacher's softmax; `stored_distillation_loss` takes it over.
    progress : bool

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    CheckpointError
        If the folder holds another teacher's answers, or those to another k or temperature.
    UnreadableBatch
        If a batch has no ``input_ids``.
    EmptyLoader
        If there is no batch.

    Examples
    --------
    >>> import tempfile
    >>> from companion import load_pretrained
    >>> teacher, ids = load_pretrained("docs-lm"), torch.arange(8).view(1, 8)
    >>> batch = {"input_ids": ids, "labels": ids}
    >>> folder = store_teacher(teacher, [batch], tempfile.mkdtemp(), k=4, progress=False)
    >>> loss = stored_distillation_loss(folder)(teacher, batch)  # its own answers
    >>> abs(float(loss)) < 1e-5
    True
    """
    if temperature <= 0 or (k is not None and k < 1):
        raise ValueError("temperature must be above 0, and k at least 1, or None for all tokens")
    folder, place = Path(folder), next(teacher.parameters()).device
    folder.mkdir(parents=True, exist_ok=True)
    run = {"format": FORMAT, "teacher": describe(teacher), "k": k, "temperature": temperature}
    there = Answers(folder) if any(folder.glob("*.safetensors")) else None
    if there is not None and (
        differ := differences(there.run | {"words": None}, run | {"words": None})
    ):
        raise CheckpointError(
            f"{folder} holds other answers ({', '.join(differ)}): use its values or a new folder"
        )
    writer = _Writer(folder, run, set() if there is None else set(there.rows))
    seen = 0
    hide = {} if progress else {"disable": True}
    with torch.no_grad(), kept_rng(), kept_modes(teacher):
        teacher.eval()
        try:
            for seen, batch in enumerate(tqdm(loader, desc="teacher", leave=False, **hide), 1):  # noqa: B007
                keys = row_keys(batch)
                if not writer.known.issuperset(keys):
                    writer.add(keys, *_answers(teacher, to_device(batch, place), k, temperature))
        finally:  # an interrupted call keeps what it has
            writer.flush()
    if not seen:
        raise EmptyLoader("the loader gave no batch to a teacher: is the data set empty?")
    return folder


def stored_distillation_loss(
    folder: str | Path, share: float = 1.0, *, reverse: bool = False
) -> LossFn:
    """Return `distillation_loss` with answers from `store_teacher` in the teacher's place.

    Where k is all tokens it is the same loss but for rounding. Below, the divergence is that between
    k + 1 outcomes: the teacher's k most probable tokens, and all others together. It is a lower bound
    of the whole one, and says nothing of how the others share what is left; the reverse one, which
    weighs by the student's probabilities, loses more. (Were the rest left out
    and the k scaled up to a sum of one, the student would be taught to be surer than its teacher.)

    Parameters
    ----------
    folder : path
        From `store_teacher`, whose temperature it takes.
    share : float
        Of the divergence in the loss, 0 to 1; the rest is the cross-entropy with the labels.
    reverse : bool
        Take ``KL(student || teacher)``, as in `distillation_loss`.

    Returns
    -------
    callable
        ``loss(model, batch)``, as `fit` and `QATMixin` take it.

    Raises
    ------
    CheckpointError
        If the folder holds no answers; by the loss, if a row of a batch is none of those that were
        stored.
    NothingToTrain
        By the loss, if no prediction of a batch is scored.

    Examples
    --------
    >>> stored_distillation_loss("nowhere")
    Traceback (most recent call last):
    companion.errors.CheckpointError: nowhere holds no teacher's answers: call store_teacher first
    """
    answers = Answers(folder)
    return StoredDistillation(answers, answers.run["temperature"], share, reverse)


@dataclass(frozen=True)
class StoredDistillation(Distillation):
    """What `stored_distillation_loss` returns; its teacher is an `Answers`."""

    def target(self, model: nn.Module, batch: Any, counted: Tensor) -> TopK:
        """Return what was stored of the predictions of a batch."""
        return self.teacher.of(batch, counted)


@dataclass
class Answers:
    """The files that `store_teacher` wrote, opened and not read.

    Parameters
    ----------
    folder : path

    Attributes
    ----------
    run : dict
        Whose answers these are, and how many tokens were kept.
    predictions : int

    Raises
    ------
    CheckpointError
        If there is none, or one cannot be read.

    Examples
    --------
    >>> Answers("nowhere")
    Traceback (most recent call last):
    companion.errors.CheckpointError: nowhere holds no teacher's answers: call store_teacher first
    """

    folder: InitVar[str | Path]
    run: dict = field(init=False)
    predictions: int = field(init=False, default=0)

    def __post_init__(self, folder: str | Path) -> None:
        paths = sorted(Path(folder).glob("*.safetensors"))
        if not paths:
            raise CheckpointError(f"{folder} holds no teacher's answers: call store_teacher first")
        self.place, self.files = folder, []
        self.rows: dict[bytes, tuple[int, int, int]] = {}
        for path in paths:
            try:
                if is_sealed(path) is False:
                    raise ValueError("its hash differs")
                file = safe_open(path, framework="pt")
                run = json.loads(file.metadata()[_KEY])
                keys, counts = file.get_tensor("keys"), file.get_tensor("counts").tolist()
            except Exception as error:
                raise CheckpointError(
                    f"{path} holds no teacher's answers ({error}): delete it and call store_teacher "
                    "again"
                ) from None
            if differ := differences(getattr(self, "run", run) | {"format": FORMAT}, run):
                raise CheckpointError(
                    f"{path} holds other answers than the rest ({', '.join(differ)}): move it away"
                )
            self.run, start = run, 0
            for key, count in zip(keys, counts, strict=True):
                self.rows[key.numpy().tobytes()] = (len(self.files), start, start + count)
                start += count
            self.files.append(file)
            self.predictions += start

    def of(self, batch: Any, counted: Tensor) -> TopK:
        """Read what belongs to the predictions of a batch that count."""
        counts = counted.view(len(counted), -1).sum(1).tolist()
        parts: list[list[Tensor]] = []
        for number, (key, count) in enumerate(zip(row_keys(batch), counts, strict=True)):
            file, start, stop = self.rows.get(key, (0, 0, -1))
            if stop - start != count:
                raise CheckpointError(
                    f"{self.place} knows no answers to row {number} of this batch, whose tokens or "
                    "labels are not among those that were stored: call store_teacher with the "
                    "loader that you train with, cut and masked alike"
                )
            slices = (self.files[file].get_slice(name) for name in ("tokens", "log_probs", "rest"))
            parts.append([part[start:stop] for part in slices])
        tokens, log_probs, rest = (
            torch.cat(part).to(counted.device) for part in zip(*parts, strict=True)
        )
        places = (counted.flatten().cumsum(0) - 1).clamp(min=0)
        shape = (*counted.shape, self.run["words"])
        return TopK(tokens.long(), log_probs, rest, places, shape)


class _Writer:
    """Gathers answers, and writes a file when there are enough."""

    def __init__(self, folder: Path, run: dict, known: set[bytes]) -> None:
        self.folder, self.run, self.known = folder, run, known
        self.waiting: list[tuple[bytes, list[Tensor]]] = []
        self.bytes = 0

    def add(self, keys: list[bytes], counts: list[int], answers: list[Tensor], words: int) -> None:
        """Take what belongs to rows that were not known."""
        self.run["words"] = words
        for key, *row in zip(keys, *(part.split(counts) for part in answers), strict=True):
            if key not in self.known:
                self.known.add(key)
                row = [part.clone() for part in row]  # and not a view of the whole batch
                self.waiting.append((key, row))
                self.bytes += sum(part.nbytes for part in row)
        if self.bytes >= _FILE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if not self.waiting:
            return
        keys = torch.tensor([list(key) for key, _ in self.waiting], dtype=torch.uint8)
        tokens, log_probs, rest = (
            torch.cat(part) for part in zip(*(row for _, row in self.waiting), strict=True)
        )
        counts = torch.tensor([len(row[0]) for _, row in self.waiting])
        tensors = {
            "keys": keys,
            "counts": counts,
            "tokens": tokens,
            "log_probs": log_probs,
            "rest": rest,
        }
        numbers = [int(p.stem) for p in self.folder.glob("*.safetensors") if p.stem.isdigit()]
        path = self.folder / f"{max(numbers, default=-1) + 1:05}.safetensors"
        metadata = {_KEY: json.dumps(self.run), "sha256": BLANK}

        def write(partial: Path) -> None:
            save_file(tensors, partial, metadata=metadata)
            seal(partial)

        write_atomically(path, write)
        self.waiting, self.bytes = [], 0


def row_keys(batch: Any) -> list[bytes]:
    """Hash each row of a batch by all that a model is given, padding left out.

    Examples
    --------
    >>> alone = {"input_ids": torch.tensor([[5, 6]])}
    >>> padded = {"input_ids": torch.tensor([[0, 5, 6]]), "attention_mask": torch.tensor([[0, 1, 1]])}
    >>> row_keys(alone) == row_keys(padded) != row_keys({"input_ids": torch.tensor([[5, 7]])})
    True
    """
    tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(tokens, Tensor) or tokens.dim() != 2:
        raise UnreadableBatch(
            "a teacher's answers are stored by the tokens of a row, and this batch has no "
            "input_ids of shape (rows, tokens): use distillation_loss(teacher) for other models"
        )
    mask = batch.get("attention_mask")
    padded = isinstance(mask, Tensor) and mask.shape == tokens.shape
    columns = {
        name: column.cpu()
        for name, column in sorted(batch.items())
        if name not in _NOT_THE_ROW
        and isinstance(column, Tensor)
        and column.dim()
        and len(column) == len(tokens)
    }
    keys = []
    for number in range(len(tokens)):
        digest = hashlib.sha256()
        for name, column in columns.items():
            row = column[number]
            if column.shape == tokens.shape:
                row = row[mask[number].cpu() != 0] if padded else row
            elif name == "labels" and row.dim():  # a decoder's own, padded by -100
                row = row[row != IGNORED]
            kind = torch.float64 if row.is_floating_point() else torch.int64
            digest.update(f"{name} {tuple(row.shape)}".encode() + row.to(kind).numpy().tobytes())
        keys.append(digest.digest()[:_KEY_BYTES])
    return keys


def _answers(
    teacher: nn.Module, batch: Any, k: int | None, temperature: float
) -> tuple[list[int], list[Tensor], int]:
    """How many predictions of each row count, the answers to all of them, and how many words."""
    logits, _ = answer(teacher, batch)
    counted, words = counted_of(teacher, batch, logits), logits.shape[-1]
    found = []
    for index in pieces(counted.flatten().nonzero()[:, 0], words):
        rows = (
            logits.rows(index) if isinstance(logits, LazyLogits) else logits.flatten(0, -2)[index]
        )
        log_probs = (rows.float() / temperature).log_softmax(-1)
        top, tokens = log_probs.topk(words if k is None else min(k, words))
        rest = log_probs.scatter_(1, tokens, -torch.inf).logsumexp(1)
        found.append([tokens.int().cpu(), top.cpu(), rest.cpu()])
    counts = counted.view(len(counted), -1).sum(1).tolist()
    return counts, [torch.cat(part) for part in zip(*found, strict=True)], words
