"""Started by `torchrun` or by itself: trains small models under rounding, and writes what happened.

    torchrun --nproc-per-node 2 tests/training/two_processes.py RESULT.json SCENARIOS

The scenarios name what the tests vary. Batches are the same however many processes there are.
"""

import contextlib
import io
import json
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from companion import W4, convert, fit, prepare_qat
from companion.training.batches import batches
from companion.training.checkpoint import Keeper

VOCABULARY, WIDTH, LENGTH = 97, 32, 17


class Language(nn.Module):
    """Predicts the next token from the mean of those before it, in two blocks."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids, labels=None):
        x = self.embedding(input_ids)
        for block in self.blocks:
            means = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
            x = x + block(means)
        logits = self.head(x)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            )
        return SimpleNamespace(logits=logits, loss=loss)


def fail() -> None:
    raise RuntimeError("failed on purpose")


def data(batch: int = 4, padded: bool = False, bare: bool = False) -> list[dict]:
    """Batches; `padded` scores as many tokens as nobody expects, `bare` none in first rows."""
    ids = torch.randint(VOCABULARY, (24, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    if padded:
        for row in range(0, len(ids), 3):
            labels[row, 3 + row // 3 :] = -100
    if bare:
        labels[::batch] = -100
    return [{"input_ids": x, "labels": y}
            for x, y in zip(ids.split(batch), labels.split(batch), strict=True)]  # fmt: skip


def train(
    folder: Path, *, batch=4, padded=False, bare=False, steps=4, accumulate=1, teacher=False,
    validate=False, checkpoint=False, resume=False, fail_at=None, shard=False,
) -> dict:  # fmt: skip
    """Train one scenario; return what can be compared with other numbers of processes.

    SGD, because AdamW turns rounding noise of gradients near 0 into steps of the learning rate.
    """
    model = Language()
    qat = prepare_qat(model, W4)
    start = [p.detach().clone() for p in qat.parameters()]
    if shard:
        from torch.distributed.fsdp import fully_shard

        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        for block in qat.blocks:
            fully_shard(block)
        fully_shard(qat)
    written, write = [], Keeper.write
    Keeper.write = lambda *arguments: (written.append(1), write(*arguments))
    rows = data(batch, padded, bare)
    held_out = batches(rows, 1, seed=9)[0]
    bars = io.StringIO()
    try:
        with contextlib.redirect_stderr(bars):
            history = fit(
                qat, rows, steps=steps, accumulate=accumulate,
                optimizer=partial(torch.optim.SGD, lr=0.5, momentum=0.9),
                teacher=Language(seed=1) if teacher else None,
                validate=(lambda m: m(**held_out).loss) if validate else None, validate_every=2,
                checkpoint_dir=folder if checkpoint else None, checkpoint_every=2, resume=resume,
                at=None if fail_at is None else {fail_at: fail},
            )  # fmt: skip
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        Keeper.write = write
    whole = [p.full_tensor() if shard else p for p in qat.parameters()]
    found = {
        "loss": history.loss, "validation": [value for _, value in history.validation],
        "moved": sum((p - q).detach().double().square().sum()
                     for p, q in zip(whole, start, strict=True)).item(),
        "written": len(written), "bars": bars.getvalue().count("fit:   0%"),
        "dtype": str(next(qat.parameters()).dtype),
    }  # fmt: skip
    return found | (gather(qat, model) if shard else {})


def gather(sharded: nn.Module, model: nn.Module) -> dict:
    """Put a sharded model together as chapter 16 tells it, and convert it in the first process."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    weights = get_model_state_dict(
        sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if torch.distributed.get_rank():
        return {}
    gathered = prepare_qat(model, sharded.quantization.scheme, sharded.quantization.method)
    gathered.load_state_dict(weights)
    ids = data()[0]["input_ids"]
    start = prepare_qat(model, W4).parameters()
    return {
        "gathered": sum((p - q).detach().double().square().sum()
                        for p, q in zip(gathered.parameters(), start, strict=True)).item(),
        "converted": torch.equal(convert(gathered.eval())(ids).logits, gathered(ids).logits),
    }  # fmt: skip


def main(result: Path, scenarios: dict[str, dict]) -> None:
    torch.set_num_threads(1)
    found = {name: train(result.parent / options.pop("folder", name), **options)
             for name, options in scenarios.items()}  # fmt: skip
    rank = os.environ.get("RANK", "0")
    result.with_suffix(f".{rank}.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
