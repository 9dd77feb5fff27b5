"""Mutation fuzzing of every reader: damaged and hostile files are refused in one line, or load equal.

    nice -n 5 python -m benchmarks.fuzz               (all readers; resumable, about a quarter of an hour)
    python -m benchmarks.fuzz --inputs 200 --readers gguf onnx

Each input is one valid file with one mutation, drawn from a seed, its reader's name and its number: so a
fault can be made again (`--again gguf 17`). A worker process reads it, with a limit of memory and of time.
Half of the files that carry a hash get one that fits after the mutation ("resealed"), as from someone who
means harm: past the hash, too, a reader must neither crash nor raise anything but its own errors, though it
may then read what the file now says. Texts, tables and chats carry no hash; what they say is read.

Outcomes: refused (one of companion.errors or ValueError, in one line), equal (what was read is what was
written), other (read as it now says: resealed, or of a kind without a hash). Anything else is a fault:
silent (read as something else than was written, though a hash could tell), another exception, crash, hang,
out of memory. Writes benchmarks/results/fuzz.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.provenance import write_results
from companion import W2, W4, convert, export_onnx, load_quantized, pack, prepare_qat, unpack
from companion import save_quantized as save
from companion.files import seal, sha256
from companion.numerics.scheme import QuantScheme

SEED, INPUTS = 22, 620  # inputs of each reader
SECONDS, BYTES = 60, 3 * 2**30  # of one input; beyond what a worker takes when it is idle
GOOD = ("refused", "equal", "other")
SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2, "max_position_embeddings": 32}  # fmt: skip
X = torch.linspace(-1, 1, 64).reshape(2, 32)
IDS = torch.tensor([[5, 9, 17, 3]])


@dataclass(frozen=True)
class Reader:
    """What is fuzzed.

    Parameters
    ----------
    build : callable
        Fills a folder with valid files.
    load : callable
        Reads it; what comes back is hashed.
    files : tuple of str
        Those that are mutated; empty where the input is no file.
    reseal : callable, optional
        Makes the hashes of the folder fit again.
    hashed : bool
        Whether the format carries a hash, so that any other reading than the written one is a fault.
    """

    build: Callable[[Path], object]
    load: Callable[[Path, random.Random], object]
    files: tuple[str, ...] = ()
    reseal: Callable[[Path], object] | None = None
    hashed: bool = True


# --- what is read -------------------------------------------------------------------------------


def llama(seed: int = 0) -> nn.Module:
    """Return a model of transformers with one layer."""
    import transformers

    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()


def plain() -> nn.Module:
    """Return a model that only its maker can rebuild."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))


def converted(model: nn.Module, scheme: QuantScheme = W4) -> nn.Module:
    """Round to nearest."""
    return convert(prepare_qat(model, scheme, "absmax"))


def refit_config(folder: Path) -> None:
    """Give config.json of a saved folder the hashes of what lies beside it."""
    from companion.formats.hub import _hash

    path = folder / "config.json"
    with suppress(Exception):  # of a config.json that is none any more
        config = json.loads(path.read_text())
        description = config["quantization_config"]
        for name in list(description["sha256"]):
            with suppress(OSError, ValueError, TypeError):
                description["sha256"][name] = sha256(folder / name)
        description.pop("config_sha256", None)
        description["config_sha256"] = _hash(config)
        path.write_text(json.dumps(config))


def sealed(*names: str) -> Callable[[Path], None]:
    """Return what makes the seals of these files fit."""

    def fit_seals(folder: Path) -> None:
        for name in names:
            seal(folder / name)

    return fit_seals


def load_saved(folder: Path, rng: random.Random) -> object:
    model = load_quantized(folder)
    return [model.state_dict(), answer(model), model.generation_config.to_dict()]


def answer(model: nn.Module, x: Tensor = IDS) -> object:
    """Return logits; what was made to fit its hash may be a model that does not compute."""
    try:
        found = model(x)
        return getattr(found, "logits", found)
    except Exception as error:  # of the model: it was read, as what it says
        return type(error).__name__


def load_plain(folder: Path, rng: random.Random) -> object:
    model = load_quantized(folder, plain())
    return [model.state_dict(), answer(model, X)]


def build_shards(folder: Path) -> None:
    save(converted(llama()), folder, max_shard_size="4KB")


def build_compressed(folder: Path) -> None:
    from companion.formats.compressed_tensors import export_compressed_tensors

    export_compressed_tensors(converted(llama()), folder)


def read_compressed(folder: Path, rng: random.Random) -> object:
    from companion.formats.compressed_tensors import read_compressed_tensors

    return _matrices(read_compressed_tensors(folder, converted(llama())))


def open_compressed(folder: Path, rng: random.Random) -> object:
    from companion.formats.compressed_tensors import open_compressed_tensors

    return answer(open_compressed_tensors(folder))


def refit_compressed(folder: Path) -> None:
    from companion.formats.compressed_tensors import HASHES, hashes_of

    path = folder / "config.json"
    with suppress(Exception):
        config = json.loads(path.read_text())
        config[HASHES] = hashes_of(folder, config)
        path.write_text(json.dumps(config))


def build_gguf(folder: Path) -> None:
    from companion.formats.gguf import export_gguf
    from tests.tiny import byte_level
    from tests.tiny import llama as with_words

    tokenizer = byte_level()
    export_gguf(converted(with_words(tokenizer)), folder / "model.gguf", tokenizer)


def read_gguf(folder: Path, rng: random.Random) -> object:
    from companion.formats.gguf import read_gguf
    from companion.formats.llama_cpp import _describe
    from tests.tiny import byte_level
    from tests.tiny import llama as with_words

    path = folder / "model.gguf"
    described, size, words = _describe(path)
    global _GGUF
    _GGUF = _GGUF or converted(with_words(byte_level()))
    return [repr(described), size, words, _matrices(read_gguf(path, _GGUF))]


_GGUF: nn.Module | None = None


def build_onnx(folder: Path) -> None:
    export_onnx(converted(llama()), folder / "model.onnx")


def run_onnx(folder: Path, rng: random.Random) -> object:
    from companion.formats.onnx.model import OnnxModel

    model = OnnxModel(folder / "model.onnx", threads=1)
    return [repr(model.description), model(IDS).logits, list(model.generate(IDS, max_new_tokens=2))]


def read_onnx(folder: Path, rng: random.Random) -> object:
    from companion.formats.onnx.stored import read_onnx, rounded_block

    path = folder / "model.onnx"
    return [_matrices(read_onnx(path, nn.Identity())), rounded_block(path)]


def _matrices(found: dict) -> object:
    return {name: [m.integers, m.scales, m.values] for name, m in found.items()}


def trained(folder: Path, steps: int = 4) -> nn.Module:
    """Train a small prepared model, or go on with it."""
    from companion import fit

    torch.manual_seed(0)
    model = prepare_qat(plain(), W2)
    batch = (torch.randn(8, 32), torch.arange(8) % 8)

    def stop() -> None:
        raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        fit(model, [batch], steps=4, at={steps: stop} if steps < 4 else None, checkpoint_dir=folder,
            checkpoint_every=2, resume=True, progress=False)  # fmt: skip
    return model


def resume(folder: Path, rng: random.Random) -> object:
    from companion import fit

    torch.manual_seed(0)
    model = prepare_qat(plain(), W2)
    batch = (torch.randn(8, 32), torch.arange(8) % 8)
    history = fit(model, [batch], steps=4, checkpoint_dir=folder, checkpoint_every=2, resume=True,
                  progress=False)  # fmt: skip
    return [model.state_dict(), history.loss]


def build_checkpoint(folder: Path) -> None:
    trained(folder, 2)


def compared(folder: Path) -> object:
    """Compare two arms on a small task, of which all runs may be in the log."""
    from companion import compare
    from companion.data.task import Task

    torch.manual_seed(0)
    x, y = torch.randn(64, 32), torch.arange(64) % 8
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]
    task = Task("toy", batches[:2], batches[2:3], batches[3:], classes=tuple("abcdefgh"), source="")
    table = compare(plain(), task, [W2], ["absmax"], steps=2, seeds=1, rates=[1e-3], progress=False,
                    log=folder / "log.json")  # fmt: skip
    return table.drop(columns=[c for c in table if "cost" in str(c)]).to_csv()


def write_chats(folder: Path, ending: str) -> None:
    import pandas as pd

    rows = [{"messages": [{"role": "user", "content": f"What is {i} and one?"},
                          {"role": "assistant", "content": f"{i + 1}, größer 🚀"}]}
            for i in range(20)]  # fmt: skip
    path = folder / f"chat{ending}"
    if ending == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif ending == ".json":
        path.write_text(json.dumps(rows))
    elif ending == ".csv":
        pd.DataFrame({"messages": [json.dumps(row["messages"]) for row in rows]}).to_csv(path)
    else:
        pd.DataFrame(rows).to_parquet(path)


def read_chats(folder: Path, rng: random.Random) -> object:
    from companion.data.chat import conversations
    from companion.data.sets import read_rows

    (path,) = folder.glob("chat.*")
    return {part: conversations(rows) for part, rows in read_rows(str(path)).items()}


def chats(ending: str) -> Reader:
    return Reader(
        lambda folder: write_chats(folder, ending), read_chats, (f"chat{ending}",), None, False
    )


def build_texts(folder: Path) -> None:
    (folder / "a.txt").write_text(
        "\n\n".join(f"Document {i} über das Land.\nMore." for i in range(20))
    )
    rows = "\n".join(f'"a text, {i}",{i % 2}' for i in range(40))
    (folder / "b.csv").write_text(f"text,label\n{rows}\n")


def read_texts(folder: Path, rng: random.Random) -> object:
    from companion.data.sets import labelled, read_tables, read_text

    return [read_text(str(folder / "a.txt")), labelled("b", read_tables(str(folder / "b.csv")))]


def packed_tensors(folder: Path, rng: random.Random) -> object:
    """Integers and their packing, of shapes, types and widths that may not fit each other."""
    if not hasattr(rng, "drawn"):  # the original
        q = torch.arange(-8, 8, dtype=torch.int8).reshape(2, 8)
        return unpack(pack(q, 4), 4, 8)
    odd: list[Any] = [
        0,
        1,
        -1,
        3,
        8,
        9,
        64,
        2**31,
        2**63,
        2**70,
        True,
        None,
        2.5,
        float("nan"),
        "4",
        [],
    ]
    shape = [rng.choice([0, 1, 2, 3, 8, 9, 16]) for _ in range(rng.randrange(0, 4))]
    kind = rng.choice(
        [torch.uint8, torch.int8, torch.int32, torch.int64, torch.float32, torch.bool]
    )
    given: Any = torch.zeros(shape, dtype=torch.int64).random_(0, 2**7).to(kind)
    given = rng.choice([given, given, given, given, None, [1, 2], "text", np.zeros(8, np.int8)])
    bits = rng.choice([2, 3, 4, 5, 6, 7, 8, *odd])
    if rng.random() < 0.4:
        return pack(given, bits)
    if rng.random() < 0.7:
        return unpack(given, bits, rng.choice([8, 16, *odd]))
    saved = W4.to_dict() | {rng.choice(list(W4.to_dict())): rng.choice(odd)}
    return repr(QuantScheme.from_dict(rng.choice([saved, saved, saved, *odd])))


WORDS = ["", " ", "-", "--", "-1", "0", "nan", "inf", "1e400", str(2**70), "..", "../../etc/passwd",
         "/dev/null", "/dev/zero", "\x00", "\ud800", "größe", "[a]*?", "W4", "W9", "W4-g0", "W4-g-1",
         "W99999999999", "{", "'; rm", "--task", "--out", "--scheme", "--steps", "--help", "--format",
         "model", "texts.txt", "texts.csv", "no/such", "a" * 5000]  # fmt: skip
LINES = [["evaluate", "model", "--task", "texts.txt", "--block-size", "16"],
         ["export", "model", "out.gguf"], ["export", "model", "out", "--format", "companion"],
         ["generate", "model", "the road", "--max-new-tokens", "2"],
         ["finetune", "model", "--task", "texts.txt", "--steps", "1", "--scheme", "W4", "--out", "o"],
         ["parity", "model", "model", "--task", "texts.txt"], ["bench", "--help"], ["chat", "model"],
         ["--help"]]  # fmt: skip


def build_line(folder: Path) -> None:
    from tests.tiny import byte_level
    from tests.tiny import llama as with_words

    tokenizer = byte_level()
    save(converted(with_words(tokenizer)), folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "texts.txt").write_text("\n\n".join(f"the road of bricks {i}" for i in range(20)))
    (folder / "texts.csv").write_text(
        "text,label\n" + "\n".join(f"a{i},{i % 2}" for i in range(20))
    )


def command_line(folder: Path, rng: random.Random) -> object:
    """Run a mutated command line; whatever is said, it is a line and an exit code."""
    from typer.testing import CliRunner

    from companion.cli.app import app

    words = list(rng.choice(LINES))
    for _ in range(rng.randrange(1, 3) if hasattr(rng, "drawn") else 0):
        place = rng.randrange(len(words))
        way = rng.randrange(4)
        if way == 0:
            words[place] = rng.choice(WORDS)
        elif way == 1:
            words.insert(place, rng.choice(WORDS))
        elif way == 2:
            del words[place]
        else:
            words.insert(place, words[place])
        words = words or [""]
    if words[0] in ("bench",) and "--help" not in words:
        words.append("--help")  # what runs measures for minutes
    os.chdir(folder)
    result = CliRunner().invoke(app, words, input="")
    if result.exit_code not in (0, 1, 2) or (
        result.exception and not isinstance(result.exception, SystemExit)
    ):
        raise AssertionError(f"{words} ended with {result.exception!r}")
    if result.exit_code == 1 and not result.stderr.strip():
        raise AssertionError(f"{words} ended with 1 and said nothing")
    if "--traceback" in result.stderr and "shows where" in result.stderr:
        raise AssertionError(f"{words} met an error nobody thought of: {result.stderr[-300:]}")
    if result.exit_code:
        raise ValueError(result.stderr.strip().split("\n")[-1] or "help")
    return "ran"


READERS: dict[str, Reader] = {
    "saved folder": Reader(lambda f: save(converted(llama()), f), load_saved,
                           ("config.json", "model.safetensors", "generation_config.json"), refit_config),
    "saved folder, several files": Reader(build_shards, load_saved,
                           ("config.json", "model.safetensors.index.json"), refit_config),
    "saved folder, model given": Reader(lambda f: save(converted(plain()), f), load_plain,
                           ("config.json", "model.safetensors"), refit_config),
    "packed tensors": Reader(lambda f: None, packed_tensors, hashed=False),
    "compressed-tensors, read": Reader(build_compressed, read_compressed,
                           ("config.json", "model.safetensors"), refit_compressed),
    "compressed-tensors, opened": Reader(build_compressed, open_compressed,
                           ("config.json", "model.safetensors"), refit_compressed),
    "gguf": Reader(build_gguf, read_gguf, ("model.gguf",), sealed("model.gguf")),
    "onnx, run": Reader(build_onnx, run_onnx, ("model.onnx",), sealed("model.onnx")),
    "onnx, read": Reader(build_onnx, read_onnx, ("model.onnx",), sealed("model.onnx")),
    "checkpoint": Reader(build_checkpoint, resume, ("checkpoint.safetensors",),
                         sealed("checkpoint.safetensors")),
    "results log": Reader(compared, lambda f, rng: compared(f), ("log.json",), sealed("log.json")),
    "chat.jsonl": chats(".jsonl"), "chat.json": chats(".json"), "chat.csv": chats(".csv"),
    "chat.parquet": chats(".parquet"),
    "texts and labels": Reader(build_texts, read_texts, ("a.txt", "b.csv"), None, False),
    "command line": Reader(build_line, command_line, hashed=False),
}  # fmt: skip


# --- mutations ------------------------------------------------------------------------------------

NUMBERS = (0, 1, 2**7, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, 2**40)
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2**31, 2**63, 10**30, 1.5, float("nan"), float("inf"), "", "x", "../x", [], {},
    [[]], {"a": 1}, "float64", "int8", "load", -(2**40))  # fmt: skip


def mutate(data: bytes, rng: random.Random, name: str) -> tuple[bytes, str]:
    """Change a file in one place; say how."""
    ways: list[Callable] = [_flip, _flip, _truncate, _splice, _number, _zeros, _grow]
    if name.endswith((".json", ".jsonl")):
        ways += [_json, _json, _json, _duplicate_key, _nest]
    if name.endswith(".safetensors"):
        ways += [_header, _header, _header, _header_length]
    if name.endswith((".gguf", ".onnx", ".parquet")):
        ways += [_early_number, _early_number, _early_flip]
    way = rng.choice(ways)
    return way(data, rng), way.__name__.strip("_")


def _flip(data: bytes, rng: random.Random, most: int | None = None) -> bytes:
    found = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 8])):
        found[rng.randrange(most or len(found))] ^= 1 << rng.randrange(8)
    return bytes(found)


def _early_flip(data: bytes, rng: random.Random) -> bytes:
    return _flip(data, rng, min(len(data), 2048))


def _truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice([0, 1, 8, rng.randrange(len(data)), len(data) - 1])]


def _splice(data: bytes, rng: random.Random) -> bytes:
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    place = rng.randrange(len(data))
    piece = data[a : min(b, a + 4096)]
    return data[:place] + piece + data[place + rng.choice([0, len(piece)]) :]


def _number(data: bytes, rng: random.Random, most: int | None = None) -> bytes:
    wide = rng.choice([4, 8])
    place = rng.randrange(max(1, min(most or len(data), len(data)) - wide))
    value = struct.pack("<Q", rng.choice(NUMBERS))[:wide]
    return data[:place] + value + data[place + wide :]


def _early_number(data: bytes, rng: random.Random) -> bytes:
    return _number(data, rng, 2048)


def _zeros(data: bytes, rng: random.Random) -> bytes:
    place, length = rng.randrange(len(data)), rng.choice([1, 16, 256])
    return data[:place] + bytes(min(length, len(data) - place)) + data[place + length :]


def _grow(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.choice([1, 8, 4096]))


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    for key, inner in (value.items() if isinstance(value, dict) else
                       enumerate(value) if isinstance(value, list) else ()):  # fmt: skip
        yield (*path, key)
        yield from _places(inner, (*path, key))


def _change(value: Any, rng: random.Random) -> Any:
    """Replace, remove, rename or double a random part of what JSON said."""
    path = rng.choice(list(_places(value)) or [()])
    if not path:
        return rng.choice(VALUES)
    owner = value
    for key in path[:-1]:
        owner = owner[key]
    way = rng.randrange(5)
    if way == 0:
        del owner[path[-1]]
    elif way == 1 and isinstance(owner, dict):
        owner[rng.choice(["", "..", "x" * 99, "../../x", "0"])] = owner.pop(path[-1])
    else:
        owner[path[-1]] = rng.choice(VALUES)
    return value


def _json(data: bytes, rng: random.Random) -> bytes:
    lines = data.decode().split("\n") if b"\n{" in data and data[:2] != b"{\n" else [data.decode()]
    place = rng.randrange(len(lines))
    lines[place] = json.dumps(_change(json.loads(lines[place]), rng))
    return "\n".join(lines).encode()


def _duplicate_key(data: bytes, rng: random.Random) -> bytes:
    pairs = [*re.finditer(rb'"[^"\\]{1,60}": ?("[^"\\]{0,80}"|[\d.]+|null|true|false)', data)]
    if not pairs:
        return data + data
    found, value = rng.choice(pairs), json.dumps(rng.choice(VALUES)).encode()
    key = found[0].split(b":")[0]
    doubled = rng.choice(
        [key + b": " + value + b", " + found[0], found[0] + b", " + key + b": " + value]
    )
    return data[: found.start()] + doubled + data[found.end() :]


def _nest(data: bytes, rng: random.Random) -> bytes:
    depth = rng.choice([50, 5_000, 200_000])
    place = data.find(b":", rng.randrange(len(data))) + 1
    open_, close = rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
    return data[:place] + open_ * depth + b"1" + close * depth + b"," + data[place:]


def _header(data: bytes, rng: random.Random) -> bytes:
    length = struct.unpack("<Q", data[:8])[0]
    text = data[8 : 8 + length]
    if rng.random() < 0.7:
        told = json.loads(text)
        inner = told.get("__metadata__", {}).get("companion")
        if inner and rng.random() < 0.6:
            told["__metadata__"]["companion"] = json.dumps(_change(json.loads(inner), rng))
            changed = json.dumps(told).encode()
        else:
            changed = json.dumps(_change(told, rng)).encode()
    else:
        changed = rng.choice([_duplicate_key, _nest, _flip])(text, rng)
    changed += b" " * (-len(changed) % 8)
    return struct.pack("<Q", len(changed)) + changed + data[8 + length :]


def _header_length(data: bytes, rng: random.Random) -> bytes:
    return struct.pack("<Q", rng.choice(NUMBERS)) + data[8:]


# --- one input ------------------------------------------------------------------------------------


class Drawn(random.Random):
    """Tells a reader whose input is no file that it is to be mutated."""

    drawn = True


def digest(value: object) -> str:
    """Hash what a reader gave back, values and types."""
    found = hashlib.sha256()

    def add(part: object) -> None:
        if isinstance(part, Tensor):
            part = part.detach().cpu()
            found.update(f"{part.dtype}{tuple(part.shape)}".encode())
            found.update(part.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(part, np.ndarray):
            found.update(f"{part.dtype}{part.shape}".encode() + part.tobytes())
        elif isinstance(part, dict):
            for key, inner in sorted(part.items(), key=lambda pair: str(pair[0])):
                found.update(str(key).encode())
                add(inner)
        elif isinstance(part, (list, tuple)):
            found.update(f"{len(part)}[".encode())
            for inner in part:
                add(inner)
        else:
            found.update(repr(part).encode(errors="surrogatepass"))

    add(value)
    return found.hexdigest()


def one(name: str, number: int, base: Path, wanted: str) -> dict[str, Any]:
    """Mutate, read, and say what came of it."""
    reader = READERS[name]
    rng = Drawn(f"{SEED} {name} {number}")
    resealed, how, file = False, "arguments", ""
    with tempfile.TemporaryDirectory(dir=base.parent) as place:
        folder = Path(place)
        shutil.copytree(base, folder, dirs_exist_ok=True)
        if reader.files:
            file = rng.choice(reader.files)
            data, how = mutate((folder / file).read_bytes(), rng, file)
            (folder / file).write_bytes(data)
            if reader.reseal is not None and rng.random() < 0.5:
                resealed = True
                reader.reseal(folder)
        found: dict[str, Any] = {
            "number": number,
            "how": f"{file} {how}{' resealed' * resealed}".strip(),
        }
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                same = digest(reader.load(folder, rng)) == wanted
            if same:
                return found | {"outcome": "equal"}
            return found | {"outcome": "other" if resealed or not reader.hashed else "silent"}
        except MemoryError:
            return found | {"outcome": "out of memory"}
        except Exception as error:
            said = str(error)
            ours = type(error).__module__ == "companion.errors" or type(error) in (
                ValueError,
                TypeError,
            )
            if type(error) is TypeError and reader.files:
                ours = False  # a wrong argument is one, a damaged file is not
            if ours and said.strip() and "\n" not in said.strip():
                return found | {"outcome": "refused", "said": type(error).__name__}
            last = traceback.extract_tb(error.__traceback__)[-1]
            return found | {"outcome": "several lines" if ours else "another exception",
                            "said": f"{type(error).__name__}: {said[:300]}",
                            "where": f"{Path(last.filename).name}:{last.lineno}"}  # fmt: skip


def work(name: str, numbers: list[int], base: Path, out: int) -> None:
    """Read input after input in this process, and write a line of each to a pipe."""
    torch.set_num_threads(1)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, now + BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1), os.dup2(silence, 2)
    rng = random.Random(0)
    with tempfile.TemporaryDirectory(dir=base.parent) as place:
        folder = Path(place)
        shutil.copytree(base, folder, dirs_exist_ok=True)
        wanted = "-" if name == "command line" else digest(READERS[name].load(folder, rng))
    os.write(out, b'{"ready": true}\n')
    for number in numbers:
        os.write(out, (json.dumps(one(name, number, base, wanted)) + "\n").encode())


def fork(task: Callable[[int], None]) -> tuple[int, int]:
    """Run in a child process; return its id and the end of a pipe to read from."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    code = 1
    try:
        os.close(read)
        task(write)
        code = 0
    except BaseException:
        os.write(write, (json.dumps({"broken": traceback.format_exc()[-2000:]}) + "\n").encode())
    finally:
        os._exit(code)


def fuzz(name: str, numbers: list[int], base: Path) -> Iterator[dict[str, Any]]:
    """Give the outcome of each input, whatever happens to the process that reads it."""
    left = list(numbers)
    while left:
        child, pipe = fork(lambda out, left=tuple(left): work(name, list(left), base, out))
        buffer, ended = b"", ""
        while not ended:
            ready, _, _ = select.select([pipe], [], [], SECONDS)
            chunk = os.read(pipe, 65536) if ready else b""
            if not ready:
                os.kill(child, signal.SIGKILL)
                ended = "hang"
            elif not chunk:
                ended = "crash"
            buffer += chunk
            *lines, buffer = buffer.split(b"\n")
            for line in map(json.loads, lines):
                if "broken" in line:
                    raise RuntimeError(
                        f"{name}: the unchanged file cannot be read: {line['broken']}"
                    )
                if "number" in line:
                    left.remove(line["number"])
                    yield line
        _, status = os.waitpid(child, 0)
        os.close(pipe)
        if left:
            ended = f"killed by signal {os.WTERMSIG(status)}" if ended == "crash" else ended
            yield {"number": left.pop(0), "outcome": ended.split(" by ")[0].replace("killed", "crash"),
                   "said": ended}  # fmt: skip


def build(name: str, base: Path) -> None:
    """Write the valid files, in a process that leaves no threads behind in this one."""
    if base.exists():
        return
    partial = base.with_name(base.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    child, pipe = fork(lambda out: READERS[name].build(partial))
    said = b""
    while chunk := os.read(pipe, 65536):
        said += chunk
    os.waitpid(child, 0)
    os.close(pipe)
    if said:
        raise RuntimeError(f"{name}: {json.loads(said)['broken']}")
    partial.rename(base)


def refuse_network(event: str, _: tuple) -> None:
    """Hear of what the interpreter is about to do, and refuse to leave this machine.

    Examples
    --------
    >>> refuse_network("open", ("a file",))
    >>> refuse_network("socket.getaddrinfo", ("example.org", 443))
    Traceback (most recent call last):
    OSError: without a network
    """
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise OSError("without a network")


def prepare_process() -> None:
    """Import all before the first fork, and let no reader reach a network."""
    import datasets  # noqa: F401
    import gguf  # noqa: F401
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import pandas  # noqa: F401
    import transformers

    import companion.cli.app
    import companion.formats.registry
    import companion.study.compare  # noqa: F401

    sys.addaudithook(refuse_network)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ["TQDM_DISABLE"] = "1"


def summary(name: str, found: list[dict]) -> dict[str, Any]:
    """Count outcomes, and list what is a fault."""
    counts = Counter(line["outcome"] for line in found)
    return {"reader": name, "inputs": len(found), "outcomes": dict(sorted(counts.items())),
            "refused by": dict(Counter(x["said"] for x in found if x["outcome"] == "refused")),
            "faults": [line for line in found if line["outcome"] not in GOOD]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--readers", nargs="+", default=list(READERS), choices=list(READERS))
    parser.add_argument("--inputs", type=int, default=INPUTS, help="of each reader")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "fuzz"),
                        help="where outcomes are kept until all are there")  # fmt: skip
    parser.add_argument("--again", nargs=2, metavar=("READER", "NUMBER"),
                        help="read one input in this process, and show what is raised")  # fmt: skip
    args = parser.parse_args()
    prepare_process()
    torch.set_num_threads(1)
    if args.again:
        name, number = args.again[0], int(args.again[1])
        build(name, args.work / name)
        rng = random.Random(0)
        wanted = digest(READERS[name].load(args.work / name, rng)) if READERS[name].files else "-"
        print(json.dumps(one(name, number, args.work / name, wanted), indent=1))
        return
    records = []
    started = time.time()
    for name in args.readers:
        build(name, args.work / name)
        path = args.work / f"{name}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("}")]
        done = {line["number"] for line in found}
        numbers = [number for number in range(args.inputs) if number not in done]
        before = sum(line.get("seconds", 0) for line in found)
        with path.open("a") as file, tqdm(total=args.inputs, initial=len(done), desc=name,
                                          disable=False) as bar:  # fmt: skip
            last = time.time()
            for line in fuzz(name, numbers, args.work / name):
                line["seconds"], last = round(time.time() - last, 3), time.time()
                file.write(json.dumps(line) + "\n")
                file.flush()
                found.append(line)
                before += line["seconds"]
                bar.set_postfix(faults=sum(x["outcome"] not in GOOD for x in found), refresh=False)
                bar.update()
        shown = [{k: v for k, v in line.items() if k != "seconds"} for line in found
                 if line["number"] < args.inputs]  # fmt: skip
        records.append(summary(name, shown) | {"seconds": round(before)})
        print(json.dumps({k: v for k, v in records[-1].items() if k != "faults"}), flush=True)
    if set(args.readers) == set(READERS):
        total = sum(record["inputs"] for record in records)
        faults = sum(len(record["faults"]) for record in records)
        path = write_results("fuzz", records, {"inputs": total, "faults": faults}, seed=SEED,
                             seconds_a_input=SECONDS, bytes_beyond_idle=BYTES,
                             minutes=round(sum(r["seconds"] for r in records) / 60, 1))  # fmt: skip
        print(
            f"{total} inputs, {faults} faults: {path} ({(time.time() - started) / 60:.1f} minutes)"
        )


if __name__ == "__main__":
    main()
