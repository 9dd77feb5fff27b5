"""The text that the studies train and measure on, as tokens in one file.

    python -m benchmarks.excerpts FILE                    (a minute)
    python -m benchmarks.excerpts FILE --model docs-lm

Docstrings of installed packages, split by source file (companion.course.corpus). The file lets
a machine without these packages, such as one with a GPU, read exactly the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from companion.course.corpus import docstrings
from companion.course.passages import excerpts, reading
from companion.course.sources import load_tokenizer
from companion.data.text import start_token, windows
from companion.files import cache_folder

SIZE = 256
"""Tokens in a row."""
TOKENS = {0: 2_600_000, 1: 900_000, 2: 900_000, 100: 900_000}
"""How much of each draw the file of SmolLM2 holds; draw 0 also serves the longest runs."""
FEW = dict.fromkeys(TOKENS, 300_000)
"""The same for another model."""


@dataclass(frozen=True)
class Texts:
    """Rows to train on by draw, and held-out documents with the packages they come from."""

    draws: dict[int, Tensor]
    held_out: dict[str, Tensor]
    packages: dict[str, list[str]]
    sha256: str
    versions: dict[str, str]
    size = SIZE

    def train(self, draw: int, steps: int, rows: int, device: torch.device) -> list[dict]:
        """Return one batch for each step, no row twice."""
        if steps * rows > len(self.draws[draw]):
            raise ValueError(f"draw {draw} holds {len(self.draws[draw])} rows, not {steps * rows}")
        kept = self.draws[draw][: steps * rows].to(device, torch.int64)
        return [{"input_ids": part, "labels": part} for part in kept.split(rows)]

    def test(self, part: str, rows: int, device: torch.device) -> list[dict]:
        """Return batches of "validation" or "test"; each document is one row."""
        columns = windows(self._documents(part), self._start, SIZE).columns
        parts = [column.to(device).split(rows) for column in columns.values()]
        return [dict(zip(columns, some, strict=True)) for some in zip(*parts, strict=True)]

    def calibration(self, rows: int, batch: int, device: torch.device) -> list[dict]:
        """Return rows for GPTQ, from the end of the tuning draw."""
        kept = self.draws[100][-rows:].to(device, torch.int64)
        return [{"input_ids": part} for part in kept.split(batch)]

    @property
    def _start(self) -> int:
        return int(self.draws[0][0, 0])

    def _documents(self, part: str) -> list[list[int]]:
        return [[t for t in row if t >= 0] for row in self.held_out[part].tolist()]


def write(path: Path, model: str = "smollm2") -> None:
    """Encode the corpus of this machine."""
    tokenizer, tensors, packages = load_tokenizer(model), {}, {}
    start = start_token(tokenizer)
    for draw, tokens in (TOKENS if model == "smollm2" else FEW).items():
        stream = [t for doc in reading(tokenizer, tokens, draw) for t in (start, *doc)]
        rows = torch.tensor(stream[: len(stream) // SIZE * SIZE]).view(-1, SIZE)
        tensors[f"train.{draw}"] = rows.to(torch.uint16)
    for part, found in excerpts(tokenizer, SIZE - 1).items():
        rows = [e.tokens + [-1] * (SIZE - 1 - len(e.tokens)) for e in found]
        tensors[part] = torch.tensor(rows, dtype=torch.int32)
        packages[part] = json.dumps([e.package for e in found])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, packages | {"versions": json.dumps(docstrings().versions)})


def read(path: Path | None = None, model: str = "smollm2") -> Texts:
    """Read the file, or without one encode the text now and keep it among cached files."""
    if path is None:
        path = cache_folder() / f"excerpts-{model}-{docstrings().sha256[:12]}.safetensors"
        if not path.exists():
            write(path, model)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        more = {key: json.loads(value) for key, value in file.metadata().items()}
    draws = {int(k.split(".")[1]): v for k, v in tensors.items() if k.startswith("train")}
    held_out = {part: tensors[part] for part in ("validation", "test")}
    # of the tokens: the file's own bytes differ from one writing to the next
    sha = hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors)))
    return Texts(draws, held_out, more, sha.hexdigest(), more.pop("versions"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", default="smollm2", help="whose tokens")
    args = parser.parse_args()
    write(args.file, args.model)
