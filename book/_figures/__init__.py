"""The pictures of the book's ideas, as SVG: one function each, all in one style.

python -m book._figures          draws them into book/_static/figures
"""

from __future__ import annotations

from pathlib import Path

from . import decision, language, methods, networks, numbers

FOLDER = Path(__file__).parents[1] / "_static" / "figures"
DRAWINGS = {
    "bit-layouts": numbers.bit_layouts,
    "number-line": numbers.number_line,
    "zero-point": numbers.zero_point,
    "granularity": numbers.granularity,
    "calibration": numbers.calibration,
    "packing": numbers.packing,
    "prepare-train-convert": networks.prepare_train_convert,
    "batch-norm-folding": networks.batch_norm_folding,
    "fake-quant": networks.fake_quant,
    "straight-through": networks.straight_through,
    "training-memory": networks.training_memory,
    "weights-read": networks.weights_read,
    "paired-difference": language.paired_difference,
    "perplexity": language.perplexity,
    "recovered-share": language.recovered_share,
    "learned-step": methods.learned_step,
    "teacher-student": methods.teacher_student,
    "lora": methods.lora,
    "gptq": methods.gptq,
    "smoothquant": methods.smoothquant,
    "decision": decision.decision,
}


def draw(name: str) -> str:
    """Return a picture as the text of its file."""
    return DRAWINGS[name]()


def draw_all(folder: Path = FOLDER) -> None:
    """Write every picture, and remove what no function draws any more."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.svg"):
        if old.stem not in DRAWINGS:
            old.unlink()
    for name in DRAWINGS:
        (folder / f"{name}.svg").write_text(draw(name))
