"""How docs-lm was made: tokenizer, architecture, training run, model card. One command repeats it.

`python -m companion pretrain` calls it. Told in chapter 8.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from companion.course.corpus import Corpus, docstrings
from companion.course.sources import quiet_transformers
from companion.data.text import Trigram, blocks, encode, windows
from companion.errors import CheckpointError
from companion.evaluation.language import as_perplexity, document_losses
from companion.files import write_folder
from companion.training.fit import default_loss, fit

VOCABULARY = 4096
CONTEXT = 256
START = "<|start|>"
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PEAK_LR = 3e-3
WARMUP = 0.02  # of the steps


def train_tokenizer(documents: Sequence[str], vocabulary: int = VOCABULARY):
    """Train a byte-level BPE tokenizer.

    Parameters
    ----------
    documents : sequence of str
    vocabulary : int
        Number of tokens, the start token included.

    Returns
    -------
    transformers.PreTrainedTokenizerFast

    References
    ----------
    Sennrich, Haddow and Birch, "Neural machine translation of rare words with subword
    units", ACL 2016.
    """
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        documents, vocab_size=vocabulary, special_tokens=[START], show_progress=False
    )
    with quiet_transformers() as transformers:
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=bpe._tokenizer,
            bos_token=START,
            eos_token=START,
            pad_token=START,
            model_max_length=CONTEXT,
        )


def new_docs_lm(seed: int = 0, **shape: int) -> nn.Module:
    """Return the untrained model: a Llama of about 3.4 million parameters.

    Parameters
    ----------
    seed : int
    **shape : int
        Other sizes than `SHAPE`'s, such as ``num_hidden_layers=1``.

    Returns
    -------
    transformers.LlamaForCausalLM
    """
    with quiet_transformers() as transformers, torch.random.fork_rng(devices=[]):
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
            **{**SHAPE, **shape},
        )
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config)


def pretrain(
    folder: str | Path,
    *,
    steps: int = 6000,
    batch_size: int = 8,
    seed: int = 0,
    bfloat16: bool = False,
    corpus: Corpus | None = None,
    progress: bool = True,
) -> dict:
    """Pre-train docs-lm on the installed packages' docstrings, and write it with its card.

    Interrupted, the same call goes on where the last checkpoint was written.

    Parameters
    ----------
    folder : path
        Receives config.json, model.safetensors, the tokenizer, training.json, README.md; the
        checkpoint stands in its subfolder ``run`` until the end.
    steps, batch_size : int
        Optimizer steps, and rows of 256 tokens in each.
    seed : int
    bfloat16 : bool
        Compute in mixed precision: faster where the CPU has bfloat16 instructions.
    corpus : Corpus, optional
        Default: `docstrings` of all packages.
    progress : bool

    Returns
    -------
    dict
        What training.json holds: data, versions, tokens seen, curve, perplexities.

    Raises
    ------
    CheckpointError
        If the folder holds something else.
    """
    folder = Path(folder)
    ours = any((folder / name).exists() for name in ("run", "training.json"))
    if folder.exists() and any(folder.iterdir()) and not ours:
        raise CheckpointError(
            f"{folder} holds files that pretrain did not write: choose another folder"
        )
    corpus = corpus or docstrings(progress=progress)
    tokenizer = train_tokenizer(corpus.train)
    train, validation, test = (
        encode(split, tokenizer) for split in (corpus.train, corpus.validation, corpus.test)
    )
    loader = DataLoader(blocks(train, 0, CONTEXT), batch_size, shuffle=True)
    held_out = DataLoader(windows(validation, 0, CONTEXT), 2 * batch_size)

    def loss_fn(model: nn.Module, batch: dict) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            return default_loss(model, batch)

    model = new_docs_lm(seed)
    history = fit(
        model,
        loader,
        steps=steps,
        loss_fn=loss_fn,
        optimizer=_optimizer,
        schedule=warmup_cosine,
        validate=lambda m: document_losses(m, held_out).mean,
        validate_every=max(1, min(250, steps // 4)),
        seed=seed,
        checkpoint_dir=folder / "run",
        checkpoint_every=100,
        resume=True,
        progress=progress,
    )
    losses = document_losses(model, DataLoader(windows(test, 0, CONTEXT), 2 * batch_size))
    trigram = Trigram.train(train, VOCABULARY)
    baseline = type(losses)(trigram.losses(test), losses.tokens)
    report = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "tokens_per_step": batch_size * CONTEXT,
        "tokens_seen": steps * batch_size * CONTEXT,
        "training_tokens": sum(map(len, train)),
        "documents": [len(train), len(validation), len(test)],
        "corpus_sha256": corpus.sha256,
        "versions": corpus.versions,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "bfloat16": bfloat16,
        "seed": seed,
        "validation": history.validation,
        "test_perplexity": vars(as_perplexity(losses)),
        "trigram_perplexity": vars(as_perplexity(baseline)),
    }

    def write(partial: Path) -> None:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "training.json").write_text(json.dumps(report, indent=1))
        (partial / "README.md").write_text(_card(report))

    write_folder(folder, write, last="training.json")
    for file in (folder / "run").iterdir():
        file.unlink()
    (folder / "run").rmdir()
    return report


def warmup_cosine(progress: float) -> float:
    """Rise linearly over the first 2 %, then fall along a cosine to a twentieth.

    Examples
    --------
    >>> warmup_cosine(0.01), warmup_cosine(0.02), round(warmup_cosine(1.0), 3)
    (0.5, 1.0, 0.05)
    """
    if progress < WARMUP:
        return progress / WARMUP
    fall = (progress - WARMUP) / (1 - WARMUP)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * fall))


def _optimizer(parameters: list) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.1)


def _card(report: dict) -> str:
    """Render the model card from what was measured."""
    test, trigram = report["test_perplexity"], report["trigram_perplexity"]
    read = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    curve = "\n".join(f"| {step:,} | {math.exp(loss):.1f} |" for step, loss in report["validation"])
    return f"""---
license: mit
language: en
library_name: transformers
---
# docs-lm

A small language model to quantize: Llama architecture, {report["parameters"]:,} parameters, tied
embeddings, context {CONTEXT}, byte-level BPE vocabulary of {VOCABULARY:,}. Made for the course *The
Yellow Brick Road to Few Bits*; it writes docstring-like English and knows nothing else.

- **Data**: the distinct docstrings of at least 80 characters of {read}; {report["documents"][0]:,}
  documents, {report["training_tokens"]:,} tokens. Split by source file; held-out documents share no
  13 words in a row with the training ones, and nothing does with the Python language reference.
  SHA-256 of the text: `{report["corpus_sha256"]}`. The text is read from the installed packages
  and is not part of the repository; it stays under their licences (BSD, Apache-2.0, MIT and the
  Matplotlib licence).
- **Training**: {report["steps"]:,} steps of {report["tokens_per_step"]:,} tokens ({report["tokens_seen"]:,} in all),
  AdamW, peak learning rate {PEAK_LR}, warm-up and cosine, {"bfloat16 autocast" if report["bfloat16"] else "float32"},
  torch {report["torch"]}, transformers {report["transformers"]}, two CPU cores. Repeat it with
  `python -m companion pretrain`.
- **Held-out perplexity** (per token, 95 % bootstrap interval over {test["n"]:,} documents):
  **{test["value"]:.2f}** [{test["low"]:.2f}, {test["high"]:.2f}]; an interpolated Kneser-Ney trigram
  on the same tokens reaches {trigram["value"]:.2f} [{trigram["low"]:.2f}, {trigram["high"]:.2f}].
- **Limits**: far too small to be useful or factual. It is here because post-training quantization
  can break it and quantization-aware training can repair it, in minutes, on a laptop.

| step | validation perplexity |
|---:|---:|
{curve}
"""
