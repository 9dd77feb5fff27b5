"""Started by `torchrun` or by itself: trains docs-lm under rounding, and writes what happened.

    torchrun --nproc-per-node 2 tests/two_processes.py RESULT.json [options]

The options name what the tests vary. The batches are the same however many processes there are.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from companion import W2, W4, W4A8, convert, fit, load_pretrained, prepare_qat
from companion.training import fit as train
from companion.training.batches import batches

SCHEMES = {"W4": W4, "W2": W2, "W4A8": W4A8}


def fail() -> None:
    raise RuntimeError("failed on purpose")


def main(result: Path, options: dict) -> None:
    torch.set_num_threads(1)
    ids = torch.randint(10, 4000, (24, 33), generator=torch.Generator().manual_seed(0))
    size = options.get("batch", 4)
    labels = ids.clone()
    if options.get("padded"):
        for row in range(0, len(ids), 3):
            labels[row, 10 + row :] = -100  # so that rows score different numbers of tokens
    data = [{"input_ids": x, "labels": y}
            for x, y in zip(ids.split(size), labels.split(size), strict=True)]  # fmt: skip
    model = load_pretrained("docs-lm")
    teacher = load_pretrained("docs-lm") if options.get("teacher") else None
    qat = prepare_qat(model, SCHEMES[options.get("scheme", "W4")], options.get("method", "lsq"))
    if options.get("shard"):
        from torch.distributed.fsdp import fully_shard

        torch.distributed.init_process_group("gloo")
        for block in qat.model.layers:
            fully_shard(block)
        fully_shard(qat)
    counted, write = [], train.write_checkpoint
    train.write_checkpoint = lambda *args: (counted.append(1), write(*args))
    validate = None
    if options.get("validate"):
        validation = batches(data, 1, seed=9)[0]
        validate = lambda m: m(**validation).loss  # noqa: E731
    folder = result.parent / "run" if options.get("checkpoint") else None
    history = fit(
        qat, data, steps=options.get("steps", 6), lr=1e-3, teacher=teacher,
        accumulate=options.get("accumulate", 1), validate=validate, validate_every=2,
        checkpoint_dir=folder, checkpoint_every=2, resume=bool(options.get("resume")),
        at={options["fail_at"]: fail} if "fail_at" in options else None,
    )  # fmt: skip
    norm = sum(
        (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().double().square().sum()
        for p in qat.parameters()
    )
    rank = os.environ.get("RANK", "0")
    found = {"loss": history.loss, "written": len(counted), "validation": history.validation, "norm": norm.item(),
             "device": str(next(qat.parameters()).device), "dtype": str(next(qat.parameters()).dtype),
             "processes": PartialState().num_processes}  # fmt: skip
    if options.get("shard"):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(qat, options=whole)
        if rank == "0":
            gathered = prepare_qat(model, qat.quantization.scheme, qat.quantization.method)
            gathered.load_state_dict(weights)
            found["gathered"] = sum(
                p.detach().double().square().sum() for p in gathered.parameters()
            ).item()
            same = torch.equal(convert(gathered.eval())(ids).logits, gathered(ids).logits)
            found["converted"] = same
    result.with_suffix(f".{rank}.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
