"""Arms of a study: how each trains, how its rate is found, and what is measured once.

Three studies are made of it: `benchmarks.smollm2`, `benchmarks.recovery` and, on chats,
`benchmarks.chat`. What they compare, and by which rule, stands in benchmarks/hypotheses.md,
written before a test split was opened. Every arm takes equally many optimizer steps on the same rows, keeps the weights that did
best on validation, and has its learning rate chosen there from three or more, the best of them
inside the range. Each finished run is a file below --work, and a run that is there is not done
again; `--merge` (and the end of every command) writes the results file from them.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fcntl
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from benchmarks.excerpts import SIZE, Texts, read
from benchmarks.provenance import RESULTS, restore, write_results
from companion import (
    QuantScheme,
    choose_scale,
    convert,
    fit,
    fit_blocks,
    load_pretrained,
    model_bytes,
    prepare_qat,
)
from companion.evaluation.language import document_losses
from companion.files import cache_folder, write_atomically
from companion.ptq.gptq import gptq
from companion.qat.ranges import LearnedStepSize
from companion.study.tables import scheme_name
from companion.training.losses import default_loss
from companion.training.optimizer import parameter_groups

TUNING, SEEDS = 100, (0, 1, 2)
"""Draws of the training text: one to choose rates on, three to measure."""
LATE = 0.75
"""Share of the steps in floating point before the rounding of an arm that starts late."""
CALIBRATION = 256
"""Rows for GPTQ: 65,536 tokens."""
SEEN = 16
"""Rows that calibrated arms see before the first step: 4,096 tokens."""
BLOCK_STEPS = 200
"""Optimizer steps of each block, where blocks are trained one by one, on what GPTQ reads."""
BLOCK_RATES = (3e-4, 1e-3, 3e-3)
FACTOR, MOST = 3.0, 6
"""Where the best rate is at an end, the next one beyond it; trials at most."""
PTQ, PLAIN = ("nearest", "mse", "gptq"), {"nearest": "absmax"}
W4, W3, W2 = (QuantScheme(bits) for bits in (4, 3, 2))


@dataclass(frozen=True)
class Budget:
    """What every run of a study has.

    Parameters
    ----------
    float_rates, rates : tuple of float
        Learning rates to begin with, in floating point and rounded.
    steps, rows : int
        Optimizer steps, rows of 256 tokens in each.
    looks : int
        Measurements on validation while it trains.
    bfloat16 : bool
        Whether a CPU that multiplies in bfloat16 does so while it trains, under autocast.
    """

    float_rates: tuple[float, ...]
    rates: tuple[float, ...]
    steps: int = 100
    rows: int = 8
    looks: int = 5
    bfloat16: bool = False


@dataclass(frozen=True)
class Arm:
    """One way to train: which rounding, what is imitated, and when the rounding begins.

    Parameters
    ----------
    method : str
        "float", "torchao", or a method of `prepare_qat`.
    target : {"labels", "teacher"}
        The teacher of an arm that starts late is the float model it starts from; otherwise the float
        control of the same draw.
    start : {"first", "late", "blocks", "blocks first"}
        When the rounding begins: from the first step on, or late. Or on the float control of the
        draw, whose rounded blocks are trained one by one; that is all, or the steps come after it.
    step_rate : float
        Learning rate of learned steps over that of the weights.
    calibrated : bool
        Whether the search for the first range knows the inputs that the weights meet.
    """

    method: str
    target: str = "labels"
    start: str = "first"
    step_rate: float = 1.0
    calibrated: bool = False

    @property
    def name(self) -> str:
        if self.method == "float" and self.target == "labels":
            return "float"
        more = "" if self.step_rate == 1 else f" x{self.step_rate:g}"
        more += " calibrated" if self.calibrated else ""
        return f"{self.method}{more}, {self.target}, {self.start}"


@dataclass(frozen=True)
class Job:
    """What one worker does in one go: tune an arm at a scheme, then run it on every draw.

    Parameters
    ----------
    arm : Arm
    scheme : QuantScheme, optional
        None for floating point.
    steps : int, optional
        Default: those of the budget.
    draws : tuple of int
    rates : tuple of float, optional
        Learning rates to begin with. Default: those of the budget.
    """

    arm: Arm
    scheme: QuantScheme | None = None
    steps: int | None = None
    draws: tuple[int, ...] = SEEDS
    rates: tuple[float, ...] | None = None

    @property
    def name(self) -> str:
        scheme = "float" if self.scheme is None else scheme_name(self.scheme)
        return f"{scheme}, {self.arm.name}"


More = Callable[[list[dict], list[str]], dict]
Work = Sequence[Job | tuple[str, QuantScheme, int]]
"""Jobs in the order of their weight; ("ptq", scheme, draw) rounds a float control afterwards, by all of
PTQ, and ("autoround", scheme, draw) by AutoRound."""

FLOAT, IMITATING_FLOAT = Arm("float"), Arm("float", "teacher")


class Study:
    """Runs that are done once each and found again, by any number of processes.

    Parameters
    ----------
    work : Path
        Folder of the finished runs.
    texts : Texts
    device : torch.device
    deadline : float
        Time after which no run begins.
    start : nn.Module
        Float.
    budget : Budget
    small : bool
        Four steps of two rows each, on eight documents, without trials of rates.
    """

    after: tuple[str, ...] = PTQ
    """How float controls are rounded afterwards."""
    one_shape = True
    """Whether all batches are alike, so that a card can repeat one captured step."""

    def __init__(
        self, work: Path, texts: Texts, start: nn.Module, device, deadline: float, budget: Budget,
        small: bool = False,
    ) -> None:  # fmt: skip
        self.work, self.texts, self.device, self.deadline = work, texts, device, deadline
        self.budget, self.small, self.rows = budget, small, 2 if small else budget.rows
        self.start = start.to(device)
        self.bfloat16 = (
            budget.bfloat16 and device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
        )
        self.held_out = {p: texts.test(p, 2 * self.rows, device) for p in ("validation", "test")}
        if small:
            self.held_out = {part: batches[:1] for part, batches in self.held_out.items()}

    def steps(self, job: Job) -> int:
        return (
            4 if self.small else job.steps or self.budget.steps
        )  # three and one where an arm starts late

    def float_steps(self, job: Job) -> int:
        if job.arm.method == "float":
            return self.steps(job)
        return round(LATE * self.steps(job)) if job.arm.start == "late" else 0

    def read_by(self, job: Job, draw: int) -> int:
        """Tokens that an arm trains on, those of its float control not counted."""
        blocks = BLOCK_STEPS * self.rows * SIZE if job.arm.start.startswith("blocks") else 0
        return blocks + (0 if job.arm.start == "blocks" else self.tokens(draw, self.steps(job)))

    def measure(self, model: nn.Module, part: str):
        """Losses by document, in full float32 whatever the training used."""
        with exact():
            return document_losses(model, self.held_out[part])

    def kept(self, name: str, make: Callable[[], dict]) -> dict:
        """Return a finished run by its name, or do it."""
        path = self.work / f"{name}.json"
        with _lock(path):
            if not path.exists():
                if time.time() > self.deadline:
                    raise TimeoutError
                record = {"name": name} | make() | {"machine": machine(self.device, self.bfloat16)}
                write_atomically(path, lambda part: part.write_text(json.dumps(record)))
                losses = {k: record[k] for k in ("validation_loss", "loss") if k in record}
                print(f"{time.strftime('%X')} {name}: {losses}", flush=True)
            return json.loads(path.read_text())

    def do(self, job) -> None:
        """Tune and run one job, or round the float controls."""
        if isinstance(job, tuple):
            for method in self.after if job[0] == "ptq" else job[:1]:
                self.round_after(job[1], method, job[2])
            return
        rate = self.tune(job)
        for draw in job.draws[: 1 if self.small else None]:
            self.run(job, draw, rate, test=True)

    def tune(self, job: Job) -> float:
        """Try rates at the budget's steps until the best is inside the range, and return it.

        The rate is that of the blocks for an arm that trains nothing else.
        """
        job = replace(job, steps=None)
        budget = self.budget
        usual = budget.float_rates if job.arm.method == "float" else budget.rates
        usual = BLOCK_RATES if job.arm.start == "blocks" else usual
        rates = sorted(job.rates or usual)
        if self.small:
            return rates[1]
        found: dict[float, float] = {}
        while True:
            for rate in (r for r in rates if r not in found):
                found[rate] = self.run(job, TUNING, rate, test=False)["validation_loss"]
            best = min(found, key=lambda rate: found[rate])
            if best not in (rates[0], rates[-1]) or len(rates) == MOST:
                return best
            rates = sorted([*rates, best / FACTOR if best == rates[0] else best * FACTOR])

    def run(self, job: Job, draw: int, rate: float, test: bool) -> dict:
        """One run: trained, measured on validation, and if asked on test."""
        name = f"{job.name}, {self.steps(job)} steps, draw {draw}, rate {rate:.3g}"

        def make() -> dict:
            started = time.time()
            model, history = self.train(job, draw, rate)
            if job.arm == FLOAT and job.steps is None and test:
                path = self.control(draw)
                write_atomically(path, lambda part: save_model(model, str(part)))
            steps = self.steps(job)
            return self.record(model, test) | {
                "scheme": "float" if job.scheme is None else scheme_name(job.scheme),
                "method": job.arm.name, "seed": draw, "lr": rate, "steps": steps,
                "float_steps": self.float_steps(job), "training_tokens": self.read_by(job, draw),
                "validation": history, "seconds": round(time.time() - started, 1),
            }  # fmt: skip

        return self.kept(name, make)

    def train(self, job: Job, draw: int, rate: float) -> tuple[nn.Module, list]:
        """The arm's model, converted, and its losses on validation on the way."""
        arm, steps = job.arm, self.steps(job)
        first = 0 if arm.method == "float" else self.float_steps(job)
        batches = self.texts.train(draw, steps, self.rows, self.device)
        begin = self.float_phase(batches[:first], draw, first) if first else self.start
        if blocks := arm.start.startswith("blocks"):
            begin = self.load_control(draw)
        loss = default_loss
        if arm.target == "teacher":
            teacher = copy.deepcopy(begin) if first else self.load_control(draw)
            loss = self.imitation(teacher.eval())
        seen = self.texts.calibration(SEEN, SEEN // 4, self.device) if arm.calibrated else None
        model, finish = self.prepare(copy.deepcopy(begin), arm.method, job.scheme, seen)
        if blocks:
            alone = arm.start == "blocks"
            only = replace(job, arm=replace(arm, start="blocks"), rates=None)
            history = self.fit_blocks(model, begin, rate if alone else self.tune(only))
            if alone:
                return finish(model), history
        history = self.fit(model, batches[first:], rate, loss, arm.step_rate)
        return finish(model), history

    def prepare(self, model: nn.Module, method: str, scheme, seen: list | None):
        """What trains, and how it is converted; `model` is the arm's own."""
        if method == "float":
            return model, lambda trained: trained
        if method == "torchao":
            return prepare_torchao(model, scheme)
        method = {"lsq": CapturableStep}.get(method, method)
        return prepare_qat(model, scheme, method, calibration=seen), convert

    def imitation(self, teacher: nn.Module):
        return Imitation(teacher)

    def tokens(self, draw: int, steps: int) -> int:
        """How many a run of so many steps reads."""
        return steps * self.rows * SIZE

    def fit(self, model, batches: list, rate: float, loss, step_rate: float = 1.0) -> list:
        graphed = None
        if self.device.type == "cuda" and self.one_shape:
            torch.cuda.empty_cache()
            try:
                loss = graphed = GraphedLoss(model.train(), loss, batches[0])
            except torch.AcceleratorError as error:  # what cannot be captured is launched
                print(f"no graph: {error}", flush=True)
        groups = _with_step_rate(model, rate, step_rate)

        def validate(model: nn.Module) -> float:
            with self.autocast():
                return document_losses(model, self.held_out["validation"]).mean

        history = fit(
            model, batches, steps=len(batches), loss_fn=self.half(loss),
            optimizer=torch.optim.AdamW(groups, lr=rate), validate=validate,
            validate_every=math.ceil(len(batches) / self.budget.looks), progress=False,
        )  # fmt: skip
        if graphed is not None:
            graphed.check(batches[-1])
        return history.validation

    def fit_blocks(self, model: nn.Module, teacher: nn.Module, rate: float) -> list:
        rows, steps = (4, 4) if self.small else (CALIBRATION, BLOCK_STEPS)
        before = self.measure(model, "validation").mean
        read = self.texts.calibration(rows, self.rows, self.device)
        with self.autocast():
            fit_blocks(model, read, teacher=teacher, batches=len(read), lr=rate, progress=False,
                       steps=steps)  # fmt: skip
        return [[0, before], [steps, self.measure(model, "validation").mean]]

    def autocast(self):
        return torch.autocast("cpu", torch.bfloat16, self.bfloat16)

    def half(self, loss):
        """A loss whose products, forward and back, are in bfloat16 where the CPU has them."""
        if not self.bfloat16:
            return loss

        def halved(model: nn.Module, batch: dict) -> Tensor:
            with self.autocast():
                return loss(model, batch)

        return halved

    def float_phase(self, batches: list, draw: int, steps: int) -> nn.Module:
        """The steps in floating point that late arms of a draw share."""
        rate = self.tune(Job(FLOAT))
        path = self.work / f"float {steps} steps, draw {draw}.safetensors"
        with _lock(path):
            model = copy.deepcopy(self.start)
            if path.exists():
                load_model(model, path, device=str(self.device))
            else:
                self.fit(model, batches, rate, default_loss)
                write_atomically(path, lambda part: save_model(model, str(part)))
        return model

    def control(self, draw: int) -> Path:
        return self.work / f"float control, draw {draw}.safetensors"

    def load_control(self, draw: int) -> nn.Module:
        """The float control of a draw: trained if it is not there yet."""
        job, path = Job(FLOAT), self.control(draw)
        rate = self.tune(job)
        self.run(job, draw, rate, test=True)
        if not path.exists():  # only its numbers were kept
            again, _ = self.train(job, draw, rate)
            write_atomically(path, lambda part: save_model(again, str(part)))
            self.again(again, draw)
        model = copy.deepcopy(self.start)
        load_model(model, path, device=str(self.device))
        return model

    def again(self, model: nn.Module, draw: int) -> None:
        """A control that was trained a second time, perhaps by another machine: is it the same?"""
        self.kept(
            f"float again, draw {draw}",
            lambda: self.record(model, test=True)
            | {"scheme": "float", "method": "float again", "seed": draw,
               "steps": self.steps(Job(FLOAT)), "lr": 0.0},
        )  # fmt: skip

    def round_after(self, scheme: QuantScheme, method: str, draw: int) -> None:
        """Round a float control without training."""

        def make() -> dict:
            model, steps = self.load_control(draw), self.steps(Job(FLOAT))
            rows = 4 if self.small else CALIBRATION
            calibration = self.texts.calibration(rows, 2 * self.rows, self.device)
            model = round_with(method, model, scheme, calibration)
            return self.record(model, test=True) | {
                "scheme": scheme_name(scheme), "method": method, "seed": draw, "steps": steps,
                "float_steps": steps, "lr": 0.0, "training_tokens": self.tokens(draw, steps),
            }  # fmt: skip

        self.kept(f"{scheme_name(scheme)}, {method}, draw {draw}", make)

    def record(self, model: nn.Module, test: bool) -> dict:
        record = {"validation_loss": self.measure(model, "validation").mean,
                  "metric": "loss", "higher_is_better": False, "bytes": model_bytes(model)}  # fmt: skip
        if test:
            losses = self.measure(model, "test")
            record |= {"loss": losses.mean, "total": [round(float(x), 4) for x in losses.loss],
                       "weight": losses.tokens.tolist()}  # fmt: skip
        return record


class Imitation:
    """`companion.distillation_loss` for rows whose every token is a label, without a look at them.

    What decides by the values of a tensor cannot be captured in a CUDA graph.
    """

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher

    def __call__(self, model: nn.Module, batch: dict) -> Tensor:
        asked = {key: value for key, value in batch.items() if key != "labels"}
        with torch.no_grad():
            target = self.teacher(**asked).logits[:, :-1].flatten(0, 1)
        student = model(**asked).logits[:, :-1].flatten(0, 1)
        return nn.functional.kl_div(student.log_softmax(-1), target.log_softmax(-1),
                                    reduction="batchmean", log_target=True)  # fmt: skip


class CapturableStep(LearnedStepSize):
    """Learned steps whose groups that follow their weights are chosen without a look at a tensor."""

    def scale(self, groups: Tensor, rows: Tensor | None = None) -> Tensor:
        if not self._some_follow:
            return super().scale(groups, rows)
        absmax, _ = choose_scale(groups, self.scheme.weight_bits)
        return self.step * torch.where(self.follows[..., None], absmax * self.first, self.first)


class GraphedLoss:
    """A loss whose forward and backward pass are one CUDA graph, for `fit` to call.

    A step of SmolLM2 is some ten thousand small kernels: launched one by one they take ten times as
    long as they run.

    Parameters
    ----------
    model : nn.Module
    loss_fn : callable
        Of rows that all have the shape of `batch`.
    batch : dict
    """

    def __init__(self, model: nn.Module, loss_fn, batch: dict) -> None:
        self.model, self.loss_fn = model, loss_fn
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.batch = {key: value.clone() for key, value in batch.items()}
        rows, size = batch["input_ids"].shape
        causal = torch.ones(size, size, dtype=torch.bool, device=batch["input_ids"].device).tril()
        self.batch["attention_mask"] = causal.expand(rows, 1, size, size)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                eager = self._gradients()[0].item()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss, self.gradients = self._gradients()
        self.graph.replay()
        if abs(self.loss.item() - eager) > 1e-3 * max(1.0, eager):
            raise RuntimeError(f"the graph gives {self.loss.item()}, the model {eager}")

    def _gradients(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = self.loss_fn(self.model, self.batch)
        return loss.detach(), torch.autograd.grad(loss, self.parameters)

    def __call__(self, model: nn.Module, batch: dict) -> Tensor:
        for key, value in batch.items():
            self.batch[key].copy_(value)
        return _Replay.apply(self, *self.parameters)

    def check(self, batch: dict) -> None:
        """See that after training the graph still computes what the model does."""
        for key, value in batch.items():
            self.batch[key].copy_(value)
        self.graph.replay()
        with torch.no_grad():
            eager = self.loss_fn(self.model.train(), self.batch).item()
        if abs(self.loss.item() - eager) > 1e-3 * max(1.0, eager):
            raise RuntimeError(f"the graph gives {self.loss.item()}, the model {eager}")


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graphed, *parameters):
        graphed.graph.replay()
        ctx.gradients = graphed.gradients
        return graphed.loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return (None, *torch._foreach_mul(ctx.gradients, grad))


def prepare_torchao(model: nn.Module, scheme: QuantScheme):
    """Return torchao's fake-quantized model of the same layers, and how it is converted."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup
    from torchao.quantization.qat import QATConfig

    size = scheme.group_size
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{scheme.weight_bits}"),
        granularity=PerAxis(0) if size is None else PerGroup(size),
    )

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name != "lm_head"

    quantize_(model, QATConfig(config, step="prepare"), chosen)

    def finish(trained: nn.Module) -> nn.Module:
        quantize_(trained, QATConfig(config, step="convert"))
        return trained

    return model, finish


def round_with(method: str, model: nn.Module, scheme: QuantScheme, calibration: list) -> nn.Module:
    """Round a float model by a method of PTQ, or by AutoRound's own package.

    AutoRound takes its usual 200 iterations a block. What it returns holds its weights on their grid in
    float32, so that `bytes` of its record are those of a float model.
    """
    if method == "gptq":
        return convert(gptq(model, scheme, calibration, batches=len(calibration), act_order=True,
                            progress=False))  # fmt: skip
    if method != "autoround":
        return convert(prepare_qat(model, scheme, PLAIN.get(method, method)))
    from auto_round import AutoRound

    rows = [row for batch in calibration for row in batch["input_ids"].split(1)]
    tuned = AutoRound(
        model, object(),  # stands for a tokenizer, which rows that are encoded do not need
        bits=scheme.weight_bits, group_size=scheme.group_size or -1, sym=True,
        dataset=rows, nsamples=len(rows), seqlen=SIZE, batch_size=8, iters=200, amp=False,
        enable_torch_compile=False, device_map=str(model.device),
    )  # fmt: skip
    return tuned.quantize()[0]


def machine(device: torch.device, bfloat16: bool = False) -> str:
    """What a run was made with; the results file may hold runs of several machines."""
    versions = [f"{name} {version(name)}" for name in ("torch", "transformers", "torchao")]
    place = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    place += " in bfloat16" * bfloat16
    return ", ".join([place, *versions])


def _with_step_rate(model: nn.Module, rate: float, factor: float) -> list[dict]:
    """The usual groups, learned steps apart with a rate of their own."""
    steps = {id(p) for name, p in model.named_parameters() if name.endswith("quantizer.step")}
    groups = []
    for group in parameter_groups(model):
        for chosen, lr in ((False, rate), (True, rate * factor)):
            params = [p for p in group["params"] if (id(p) in steps) == chosen]
            if params:
                groups.append(group | {"params": params, "lr": lr})
    return groups


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """No TF32 inside: it would add to what rounding costs."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time; the lock of one that dies is free again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def work_through(study: Study, jobs: Work) -> None:
    """Take the next job that no other process has."""
    for job in jobs:
        name = job.name if isinstance(job, Job) else f"{job[0]} {scheme_name(job[1])} {job[2]}"
        mine = open(study.work / f"{name}.job", "w")  # noqa: SIM115  held until this process ends
        try:
            fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        try:
            study.do(job)
        except TimeoutError:
            return
        finally:
            mine.close()


def command(
    name: str, model: str, jobs: Work, budget: Budget, text: str, more: More | None = None,
    study: type[Study] = Study, read: Callable[[Path | None, str], Texts] = read,
) -> None:  # fmt: skip
    """The command line of a study.

    Parameters
    ----------
    name : str
        Of the results file.
    model : str
        As `load_pretrained` takes it; texts are encoded for it.
    jobs : sequence
    budget : Budget
    text : str
        What `--help` says.
    more : callable, optional
        ``more(records, packages)`` returns further keys of the results file.
    study : type
        `Study`, or one that measures more.
    read : callable
        ``read(path, model)`` gives it its texts.
    """
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=cache_folder() / f"{name}-study")
    parser.add_argument("--texts", type=Path, help="file of the texts, for a machine without them")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after these")
    parser.add_argument("--small", action="store_true", help="four steps each, to try it")
    parser.add_argument("--merge", action="store_true", help="only write the results file")
    args = parser.parse_args()
    if args.small:
        args.work = args.work / "small"
    args.work.mkdir(parents=True, exist_ok=True)
    if not args.small:
        restore(name, args.work, "name")
    texts = read(args.texts, model)
    deadline = float(os.environ.get("STUDY_DEADLINE", time.time() + 60 * args.minutes))
    if args.workers > 1 and not args.merge:
        again = [
            sys.executable,
            "-m",
            f"benchmarks.{name}",
            "--work",
            args.work.parent if args.small else args.work,
        ]
        again += ["--texts", args.texts] * (args.texts is not None) + ["--small"] * args.small
        threads = max(1, (os.cpu_count() or 1) // args.workers)
        environment = os.environ | {
            "STUDY_DEADLINE": str(deadline),
            "OMP_NUM_THREADS": str(threads),
        }
        children = [subprocess.Popen(again, env=environment) for _ in range(args.workers)]
        if failed := sum(child.wait() != 0 for child in children):
            sys.exit(f"{failed} of {len(children)} processes failed; what is finished is kept")
    elif not args.merge:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.backends.cuda.matmul.allow_tf32 = True
        start = load_pretrained(model)
        work_through(study(args.work, texts, start, device, deadline, budget, args.small), jobs)
        if "STUDY_DEADLINE" in os.environ:
            return
    if not args.small:
        print(merge(name, args.work, texts, budget, more))


def merge(name: str, work: Path, texts: Texts, budget: Budget, more: More | None) -> Path:
    """Write the results file from the finished runs."""
    records = [json.loads(path.read_text()) for path in sorted(work.glob("*.json"))]
    packages = texts.packages["test"]
    about = {
        "text": {"sha256": texts.sha256, "versions": texts.versions},
        "packages": packages,
    }
    path = RESULTS / f"{name}.json"
    known = json.loads(path.read_text())["text"]["sha256"] if path.exists() else texts.sha256
    if known != texts.sha256:
        raise ValueError(f"{path} was measured on other text: move it away to begin anew")
    about |= more(records, packages) if more else {}
    return write_results(
        name, records, about, steps=budget.steps, rows=budget.rows, size=texts.size,
        seeds=len(SEEDS),
    )  # fmt: skip
