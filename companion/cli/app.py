"""The command line: ``companion`` or ``python -m companion``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer

from companion.cli.doctor import checks
from companion.errors import DataWarning

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(
    help="docs-lm, smollm2, a Hub id, a folder with a model, or a file from `companion export`.")]  # fmt: skip
TaskName = Annotated[str, typer.Option("--task", help="A task of the course, or a text, JSON, CSV "
                                       "or Parquet file of your own: texts, texts with labels, chats.")]  # fmt: skip
BlockSize = Annotated[int | None, typer.Option(min=2, show_default="256, or what the model takes",
                      help="Tokens in a row, of language tasks.")]  # fmt: skip
MaxLength = Annotated[int | None, typer.Option(min=1, show_default="1,024 of a chat, 128 of a text",
                      help="Tokens of a row, of chats and classifications.")]  # fmt: skip
TextColumn = Annotated[str | None, typer.Option(show_default="text",
                       help="The column of a file that holds the text.")]  # fmt: skip
LabelColumn = Annotated[str | None, typer.Option(show_default="label",
                        help="The column of a file that holds the class of each text.")]  # fmt: skip
Kind = Annotated[str | None, typer.Option(show_default="what its columns say",
                 help="What a file is: language, chat or classification.")]  # fmt: skip
Encoding = Annotated[str | None, typer.Option(show_default="UTF-8, or what the file says",
                     help="Of a text file, such as latin-1.")]  # fmt: skip


@app.callback()
def options(
    traceback: Annotated[bool, typer.Option(
        "--traceback", help="After an error, show where in the code it arose.")] = False,
) -> None:  # fmt: skip
    """Quantization-aware fine-tuning in PyTorch: the companion of the course."""
    global show_traceback
    show_traceback = traceback


show_traceback = False


@contextmanager
def one_line(command: str) -> Iterator[None]:
    """Turn an error into one line on stderr and exit code 1, and a `DataWarning` into a line."""

    def show(message: Warning | str, category: type[Warning], *place: object, **more: object):
        typer.echo(f"{command}: {' '.join(str(message).split())}", err=True)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", DataWarning)  # what a result rests on
            warnings.showwarning = show
            yield
    except (RuntimeError, ValueError, OSError, ImportError) as error:  # ours are among them
        if show_traceback:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        typer.echo(f"{command}: {reason}", err=True)
        raise typer.Exit(code=1) from None
    except typer.Exit:
        raise
    except Exception as error:  # of a library, or a fault of ours: the user still gets one line
        if show_traceback:
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        typer.echo(
            f"{command}: {reason} (companion --traceback {command} ... shows where)", err=True
        )
        raise typer.Exit(code=1) from None


@app.command()
def finetune(
    model: Model = "docs-lm",
    task: TaskName = "language-reference",
    scheme: Annotated[list[str], typer.Option(
        help="W4, W3, W2 (groups of 32), W4-g64, W2-row, W4A8, W8A8, W4-bf16 (for phones); may be repeated.")] = ["W4", "W2"],  # noqa: B006
    method: Annotated[list[str], typer.Option(
        help="default, lsq, mse, absmax, lora, gptq, blockwise, ...; may be repeated.")] = ["default"],  # noqa: B006
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of every arm.")] = 200,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every arm.")] = 1,
    lr: Annotated[list[float], typer.Option(
        help="Learning rate; repeated, each is tried on validation.")] = [1e-3],  # noqa: B006
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Round embeddings, too.")] = False,
    block_size: BlockSize = None,
    max_length: MaxLength = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    kind: Kind = None,
    encoding: Encoding = None,
    out: Annotated[Path, typer.Option(help="Folder for the results and models.")] = Path("finetuned"),
) -> None:  # fmt: skip
    """Fine-tune in floating point and under rounding, with equal steps, and compare.

    Prints the float control, the control rounded to nearest and the quantized model, with 95 %
    intervals. The folder receives results.json and the quantized models. Interrupted, the same
    command goes on after the last finished run; a folder with other content is refused.

    Examples:

      companion finetune

      companion finetune docs-lm --task notes.txt --scheme W2-row --steps 200 --out notes

      companion finetune sentence-transformers/all-MiniLM-L6-v2 --task topics --method lsq

      companion finetune smollm2 --task chat.jsonl --scheme W4 --method default --method lora
    """
    with one_line("finetune"):
        from companion.cli.finetune import RESULTS, report
        from companion.cli.finetune import finetune as run
        from companion.numerics.scheme import parse_scheme

        schemes = [parse_scheme(name) for name in scheme]
        table = run(model, task, schemes, method, folder=out, steps=steps, seeds=seeds, rates=lr,
                    batch_size=batch_size, embeddings=embeddings, block_size=block_size,
                    max_length=max_length, text_column=text_column, label_column=label_column, kind=kind,
                    encoding=encoding)  # fmt: skip
    typer.echo(report(table.attrs["runs"]))
    typer.echo(f"written to {out}: {RESULTS} and the quantized models")


@app.command()
def evaluate(
    model: Model = "docs-lm",
    task: TaskName = "language-reference",
    block_size: BlockSize = None,
    max_length: MaxLength = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    kind: Kind = None,
    encoding: Encoding = None,
) -> None:
    """Measure a model on the test split of a task, with its 95 % interval.

    Examples:

      companion evaluate finetuned/W2-g32-default

      companion evaluate served/model.onnx --task notes.csv --text-column body

      companion evaluate served/model.gguf
    """
    with one_line("evaluate"):
        from companion.cli.stages import open_for, open_task, open_tokenizer
        from companion.evaluation.metrics import METRICS

        data = open_task(task, open_tokenizer(model), block_size=block_size, max_length=max_length,
                         text_column=text_column, label_column=label_column, kind=kind,
                         encoding=encoding)  # fmt: skip
        measured = METRICS[data.metric].measure(open_for(model, data), data)
    typer.echo(f"{data.metric}: {measured.scores.estimate()}")
    for name, estimate in measured.also.items():
        typer.echo(f"{name}: {estimate}")


@app.command()
def export(
    model: Model,
    path: Annotated[Path, typer.Argument(
        help="What to write, such as served/model.onnx, served/model.gguf, served/model.pte or, with "
             "--format, a folder.")],
    format: Annotated[str, typer.Option(
        help="auto goes by the ending; companion, compressed-tensors, onnx, gguf or executorch.")] = "auto",
    accuracy_level: Annotated[int, typer.Option(
        min=0, max=4, help="Of ONNX files: 0 computes in float32, 4 rounds inputs to 8 bits: faster "
                           "tokens, slower prompts.")] = 4,
    zero_points: Annotated[bool, typer.Option("--zero-points", help="Of compressed-tensors: allow "
                           "them where a negative scale can be turned in no other way.")] = False,
    scales: Annotated[str, typer.Option(help="Of ExecuTorch, whose kernels take scales in bfloat16 only: "
                                        "exact refuses others, bfloat16 rounds them.")] = "exact",
    max_length: Annotated[int | None, typer.Option(
        min=4, show_default="512, or what the model takes",
        help="Of ExecuTorch: most tokens of a text, for which memory is kept.")] = None,
) -> None:  # fmt: skip
    """Write a quantized model for another engine, in the format that the name's ending says.

    ONNX Runtime reads .onnx, llama.cpp .gguf, ExecuTorch (on phones) .pte; vLLM and transformers read a folder in the format
    compressed-tensors. The integers are those that were trained. The tokenizer comes along: inside a
    GGUF file, beside the others. `companion parity` then says whether all went well.

    Examples:

      companion export finetuned/W4-g32-default served/model.onnx

      companion export finetuned/W4-g32-default served/model.gguf

      companion export finetuned/W4-g32-default served/model.pte --scales bfloat16

      companion export finetuned/W4-g32-default served --format compressed-tensors
    """
    with one_line("export"):
        from companion.cli.parity import export as run

        options = {"onnx": {"accuracy_level": accuracy_level},
                   "compressed-tensors": {"zero_points": zero_points},
                   "executorch": {"scales": scales, "max_length": max_length}}  # fmt: skip
        size = run(model, path, format, options)
    typer.echo(f"written to {path}: {size / 1e6:.2f} MB")


@app.command()
def parity(
    path: Annotated[Path, typer.Argument(help="What was exported: a file or a folder.")],
    reference: Annotated[str | None, typer.Option(
        show_default="the folder itself, or the one that the file lies in",
        help="The folder of the quantized model that it was made from.")] = None,
    prompt: Annotated[str, typer.Option(
        help="What both go on with.")] = "The for statement is used to",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 24,
    task: Annotated[str | None, typer.Option(
        help="Also measure both on the test split of a task, as evaluate does.")] = None,
    block_size: BlockSize = None,
    max_length: MaxLength = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    kind: Kind = None,
    encoding: Encoding = None,
) -> None:  # fmt: skip
    """Say whether an exported model is the one that was trained, in whatever format it is.

    Compares integers and scales, what both expect of a text, and what they go on with. The exit code
    is 1 where integers or scales differ.

    Examples:

      companion parity served/model.gguf --reference finetuned/W4-g32-default

      companion parity served --reference finetuned/W4-g32-default --task notes.txt
    """
    with one_line("parity"):
        from companion.cli.parity import report

        found, lines = report(
            path, reference, prompt, max_new_tokens=max_new_tokens, task=task,
            block_size=block_size, max_length=max_length, text_column=text_column,
            label_column=label_column, kind=kind, encoding=encoding)  # fmt: skip
    typer.echo("\n".join(lines))
    if not (found.integers and found.scales):
        raise typer.Exit(code=1)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The beginning of the text.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 60,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: int = 0,
) -> None:
    """Let a language model go on with a text, as fast as it comes; an exported one is fastest.

    Example: companion generate served/model.onnx "The for statement"
    """
    with one_line("generate"):
        from companion.cli.generate import generate as run

        run(model, prompt, lambda text: typer.echo(text, nl=False), max_new_tokens=max_new_tokens,
            temperature=temperature, seed=seed)  # fmt: skip
    typer.echo()


@app.command()
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="What the model is told beforehand.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: int = 0,
) -> None:
    """Talk with a chat model: each line is a turn, /reset begins anew, /quit ends.

    Lines from a pipe are answered one after the other. Ctrl-C ends an answer, Ctrl-D the talk.

    Examples:

      companion chat smollm2

      echo "What is the capital of France?" | companion chat finetuned/W4-g32-default
    """
    with one_line("chat"):
        from companion.cli.chat import chat as run

        run(model, _turns(), lambda text: typer.echo(text, nl=False),
            lambda line: typer.echo(f"chat: {line}", err=True), system=system,
            max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)  # fmt: skip


def _turns() -> Iterator[str]:
    """What is typed, or comes from a pipe, line by line."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with suppress(ImportError):  # not on Windows
        import readline  # noqa: F401  arrow keys and a history for input()
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return


@app.command()
def bench(
    models: Annotated[list[str], typer.Argument(
        help="Language models as in evaluate; the first is the one that the others are compared to.")],
    prompt: Annotated[int, typer.Option(min=1, help="Tokens that are read at once.")] = 64,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens generated after it.")] = 32,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
) -> None:  # fmt: skip
    """Time language models side by side: reading a prompt, and going on with it.

    Example: companion bench docs-lm served/model.onnx
    """
    with one_line("bench"):
        from companion.cli.bench import speeds
        from companion.cli.stages import open_language_model

        found = speeds({name: open_language_model(name) for name in models}, prompt=prompt, tokens=tokens,
                       rounds=rounds)  # fmt: skip
    first = found[models[0]]
    for name, ms in found.items():
        ratio = {phase: first[phase] / ms[phase] for phase in ms}
        typer.echo(f"{name}: prompt {ms['prefill']:.1f} ms ({ratio['prefill']:.1f}x), "
                   f"token {ms['decode']:.2f} ms ({ratio['decode']:.1f}x)")  # fmt: skip


@app.command()
def doctor(
    network: bool = typer.Option(True, help="Also try to reach the sources of weights."),
) -> None:
    """Check this machine: versions, threads, quantized engines, sources of weights.

    One OK or FAIL line each. The exit code is 1 only if something required fails; sources
    that cannot be reached have a stand-in, and are marked optional.

    Example: python -m companion doctor --no-network
    """
    failed = False
    for what, passed, detail, required in checks(network):
        mark = "OK  " if passed else "FAIL"
        typer.echo(f"{mark} {what}: {detail}{'' if required or passed else ' (optional)'}")
        failed |= required and not passed
    raise typer.Exit(code=int(failed))


@app.command()
def pretrain(
    folder: Annotated[Path, typer.Argument(help="Where the model is written.")] = Path("docs-lm"),
    steps: int = typer.Option(6000, min=1, help="Optimizer steps."),
    batch_size: int = typer.Option(8, min=1, help="Rows of 256 tokens in a step."),
    seed: int = typer.Option(0, help="Decides the weights drawn and the order of the data."),
    bfloat16: bool = typer.Option(False, help="Mixed precision, faster on CPUs that have it."),
) -> None:
    """Pre-train docs-lm, the small language model of the course, and write it with its card.

    Reads the docstrings of the installed packages; takes about half an hour on two cores.
    Interrupted, the same command goes on from the last checkpoint.

    Example: python -m companion pretrain my-docs-lm --steps 500
    """
    with one_line("pretrain"):
        from companion.course.pretrain import pretrain as run

        report = run(folder, steps=steps, batch_size=batch_size, seed=seed, bfloat16=bfloat16)
    test, trigram = report["test_perplexity"], report["trigram_perplexity"]
    typer.echo(f"held-out perplexity {test['value']:.2f}, of a trigram {trigram['value']:.2f}")
    typer.echo(f"written to {folder}: model, tokenizer, README.md with the curve")
