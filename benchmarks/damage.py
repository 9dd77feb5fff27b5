"""What rounding alone costs SmolLM2-135M and docs-lm: the damage map that chapter 9 draws.

    python -m benchmarks.damage                  (about two hours on two cores; minutes on a GPU)
    python -m benchmarks.damage --only map       (or layers, channels, chats)

Nothing is trained. The map: widths 8 to 2, groups of 32 and rows, scales by the largest weight, by
search, by search with an eye on the inputs (4,096 tokens), and GPTQ (65,536 tokens, act-order), on
261 excerpts of nearly equal length.
Then which single layers hurt, the loudest channels, and what the model says. Each finished part is
kept below --work or in the results file; the end of every run writes benchmarks/results/damage.json from them.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.arms import CALIBRATION, SEEN, exact, machine
from benchmarks.excerpts import SIZE, Texts, read
from benchmarks.provenance import restore, write_results
from companion import QuantScheme, load_pretrained, load_task, prepare_qat
from companion.course.sources import load_tokenizer
from companion.evaluation.language import document_losses
from companion.files import cache_folder, write_atomically
from companion.numerics.scheme import W2, W4A8, W8A8
from companion.ptq.gptq import gptq
from companion.qat.ranges import make_quantizer
from companion.study.tables import scheme_name

BITS, SIZES = (8, 4, 3, 2), (32, None)
NAMES = {"nearest": "absmax", "searched": "mse", "calibrated": "mse"}
SAMPLE = 64
"""Documents behind the damage of a single layer, and behind the loudest channels."""
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue? Answer in two sentences.",
    "Write a Python function that reverses a string.",
)
ANSWER = 60
"""Tokens of an answer."""


class Damage:
    """Parts that are done once each and found again.

    Parameters
    ----------
    work : Path
    texts : Texts
    model : nn.Module
        Float, of SmolLM2's vocabulary.
    device : torch.device
    documents : int, optional
        Fewer than all, to try it.
    most : int, optional
        Parts to do.
    """

    def __init__(
        self,
        work: Path,
        texts: Texts,
        model: nn.Module,
        device,
        documents: int | None,
        most: float = math.inf,
    ) -> None:
        self.work, self.texts, self.device = work, texts, device
        self.left = most
        self.model = model.to(device).eval()
        rows = 32
        self.test = texts.test("test", rows, device)[: documents and -(-documents // rows)]
        self.some = texts.test("validation", rows, device)[: 1 if documents else SAMPLE // rows]

    def kept(self, name: str, make: Callable[[], dict]) -> None:
        """Do a part unless it is there, or another process is at it."""
        path = self.work / f"{name}.json"
        with open(path.with_suffix(".lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            if not path.exists() and self.left > 0:
                self.left -= 1
                started = time.time()
                record = {"part": name} | make() | {"machine": machine(self.device)}
                write_atomically(path, lambda part: part.write_text(json.dumps(record)))
                print(f"{time.strftime('%X')} {name} ({time.time() - started:.0f} s)", flush=True)

    def map(self) -> None:
        """The loss on every document for each width, group and method."""
        self.kept("map float", lambda: self._losses(self.model) | {"scheme": "float"})
        for method in ("nearest", "searched"):
            for bits, size in itertools.product(BITS, SIZES):
                self._part(QuantScheme(bits, size), method)
        for scheme in (W8A8, W4A8):
            self._part(scheme, "nearest")
        for method in ("calibrated", "gptq"):
            for size, bits in itertools.product(
                SIZES, BITS[1:]
            ):  # at eight, rounding costs nothing
                self._part(QuantScheme(bits, size), method)

    def _part(self, scheme: QuantScheme, method: str) -> None:
        self.kept(f"map {scheme_name(scheme)} {method}", lambda: self._cell(scheme, method))

    def _cell(self, scheme: QuantScheme, method: str) -> dict:
        if method == "gptq":
            rows = self.texts.calibration(CALIBRATION, 16, self.device)
            rounded = gptq(
                self.model, scheme, rows, batches=len(rows), act_order=True, progress=False
            )
        else:
            seen = self.texts.calibration(SEEN, 4, self.device) if method == "calibrated" else None
            rounded = prepare_qat(self.model, scheme, NAMES[method], calibration=seen)
        bits = scheme.bits_per_weight(self.model.config.hidden_size)
        return self._losses(rounded) | {"scheme": scheme_name(scheme), "method": method, "bits": bits}  # fmt: skip

    def _losses(self, model: nn.Module) -> dict:
        with exact():
            losses = document_losses(model, self.test)
        total = [round(float(x), 3) for x in losses.loss]
        return {"model": "smollm2", "loss": losses.mean, "total": total,
                "weight": losses.tokens.tolist()}  # fmt: skip

    def layers(self) -> None:
        """The loss that each layer adds when it alone is rounded to two bits."""
        self.kept("layers W2 g32", lambda: self._layers(W2))

    @torch.no_grad()
    def _layers(self, scheme: QuantScheme) -> dict:
        whole, quantizer = document_losses(self.model, self.some).mean, make_quantizer(scheme)
        added = {}
        for name, layer in self.model.named_modules():
            if isinstance(layer, nn.Linear) and name != "lm_head":
                kept = layer.weight.clone()
                layer.weight.copy_(quantizer(kept))
                added[name] = document_losses(self.model, self.some).mean - whole
                layer.weight.copy_(kept)
        return {"scheme": scheme_name(scheme), "loss": whole, "added": added}

    def channels(self) -> None:
        """How loud the loudest channels of the residual stream and of each layer's input are."""
        self.kept("channels", self._channels)

    @torch.no_grad()
    def _channels(self) -> dict:
        loudest: dict[str, Tensor] = {}

        def watch(name: str):
            def hook(_, inputs):
                largest = inputs[0].abs().flatten(0, -2).amax(0)
                loudest[name] = torch.maximum(loudest.get(name, largest), largest)

            return hook

        watched = {n: m for n, m in self.model.named_modules()
                   if isinstance(m, nn.Linear) and n != "lm_head"}  # fmt: skip
        hooks = [m.register_forward_pre_hook(watch(n)) for n, m in watched.items()]
        stream, places = [], []
        for batch in self.some:
            states = self.model(batch["input_ids"], output_hidden_states=True).hidden_states
            stream.append(torch.stack([state.abs().amax((0, 1)) for state in states]))
            places.append(torch.stack([state.abs().amax(-1).argmax(1) for state in states]))
        for hook in hooks:
            hook.remove()
        residual = torch.stack(stream).amax(0)
        first = (torch.cat(places, 1) == 0).float().mean(1)
        return {
            "residual": [[round(float(x), 3) for x in row] for row in residual],
            "at_first_token": [round(float(x), 3) for x in first],
            "inputs": {n: _loudness(x) for n, x in loudest.items()},
            "weights": {n: _loudness(m.weight.abs().amax(0)) for n, m in watched.items()},
        }

    def chats(self) -> None:
        """What it answers, greedily, in floating point and at each width."""
        for bits in (None, *BITS):
            name = "float" if bits is None else scheme_name(QuantScheme(bits))
            self.kept(f"chats {name}", lambda b=bits: self._chat(b))

    @torch.no_grad()
    def _chat(self, bits: int | None) -> dict:
        scheme = None if bits is None else QuantScheme(bits)
        model = self.model if scheme is None else prepare_qat(self.model, scheme, "absmax").eval()
        tokenizer, answers = load_tokenizer("smollm2"), {}
        for question in QUESTIONS:
            asked = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True,
                return_tensors="pt", return_dict=True,
            ).to(self.device)  # fmt: skip
            said = model.generate(**asked, max_new_tokens=ANSWER, do_sample=False)
            new = said[0, asked["input_ids"].shape[1] :]
            answers[question] = tokenizer.decode(new, skip_special_tokens=True)
        return {"scheme": "float" if scheme is None else scheme_name(scheme), "answers": answers}

    def docs_lm(self) -> None:
        """The same map, without GPTQ, of the model that the book can train in seconds."""
        model = load_pretrained("docs-lm").to(self.device).eval()
        tokenizer = load_tokenizer("docs-lm")
        test = load_task("excerpts", tokenizer=tokenizer, tokens=SIZE * 2, batch_size=1).test

        def cell(scheme: QuantScheme | None, method: str) -> dict:
            rounded = model if scheme is None else prepare_qat(model, scheme, NAMES[method])
            losses = document_losses(rounded, test)
            return {"model": "docs-lm", "scheme": scheme_name(scheme) if scheme else "float",
                    "method": method, "loss": losses.mean,
                    "total": [round(float(x), 3) for x in losses.loss],
                    "weight": losses.tokens.tolist()}  # fmt: skip

        self.kept("docs-lm float", lambda: cell(None, "nearest"))
        for bits, size, method in itertools.product(BITS, SIZES, ("nearest", "searched")):
            scheme = QuantScheme(bits, size)
            self.kept(f"docs-lm {scheme_name(scheme)} {method}", lambda s=scheme, m=method: cell(s, m))  # fmt: skip


def _loudness(largest: Tensor) -> dict:
    """The loudest of some channels, where it is, and how much louder than the median one."""
    place = int(largest.argmax())
    return {"channel": place, "largest": float(largest[place]),
            "over_median": float(largest[place] / largest.median())}  # fmt: skip


PARTS = {"map": Damage.map, "layers": Damage.layers, "channels": Damage.channels,
         "chats": Damage.chats, "docs-lm": Damage.docs_lm}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--work", type=Path, default=cache_folder() / "damage")
    parser.add_argument("--texts", type=Path, help="file of benchmarks.excerpts")
    parser.add_argument("--documents", type=int, help="fewer than all, to try it")
    parser.add_argument("--most", type=int, default=math.inf, help="parts to do, then stop")
    parser.add_argument("--no-results", action="store_true", help="leave the results file alone")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    restore("damage", args.work, "part")
    texts = read(args.texts)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_pretrained("smollm2")
    damage = Damage(args.work, texts, model, device, args.documents, args.most)
    for part in args.only:
        PARTS[part](damage)
    if not args.no_results:
        print(merge(args.work, texts))


def merge(work: Path, texts: Texts) -> Path:
    """Write the results file from the finished parts."""
    records = [json.loads(path.read_text()) for path in sorted(work.glob("*.json"))]
    more = {
        "text": {"sha256": texts.sha256, "versions": texts.versions},
        "packages": texts.packages["test"],
    }
    return write_results("damage", records, more)


if __name__ == "__main__":
    main()
