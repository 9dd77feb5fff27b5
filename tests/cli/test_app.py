"""The command line, from a text of one's own to a served model; bad input gives one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from gguf import GGUFReader
from typer.testing import CliRunner

from companion.cli import app as cli
from companion.cli import main
from companion.cli.stages import open_model
from companion.course import tasks
from companion.course.sources import MINILM, load_tokenizer
from tests import tiny

runner = CliRunner()


def run(*arguments) -> str:
    result = runner.invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A language model, and what came of it in two steps on a text file."""
    folder = tmp_path_factory.mktemp("cli")
    tokenizer = tiny.byte_level()
    tiny.saved(folder / "model", tiny.llama(tokenizer), tokenizer)
    (folder / "notes.txt").write_text("\n".join(f"{text} to a city" for text in tiny.TEXTS * 4))
    text = run("finetune", folder / "model", "--task", folder / "notes.txt", "--scheme", "W4-row",
               "--steps", 2, "--method", "lsq", "--out", folder / "out")  # fmt: skip
    (folder / "said.txt").write_text(text)
    run("export", folder / "out" / "W4-row-lsq", folder / "served" / "model.onnx")
    return folder


def test_finetune_prints_the_table_and_keeps_the_models(folder):
    head, columns, *rows, last = (folder / "said.txt").read_text().strip().splitlines()
    assert "loss (lower is better), 2 steps, 1 seed" in head
    assert columns.split() == ["scheme", "method", "value", "recovered", "MB"]
    assert [row.split()[:2] for row in rows] == [["float", "float"], ["W4", "row"], ["W4", "row"]]
    assert last == f"written to {folder / 'out'}: results.json and the quantized models"
    kept = {path.name for path in (folder / "out").iterdir()}
    assert kept == {"W4-row-lsq", "W4-row-nearest", "results.json", "log.json"}


def test_a_gguf_file_holds_model_and_tokenizer(folder):
    file = folder / "served" / "model.gguf"
    run("export", folder / "out" / "W4-row-lsq", file)
    fields = GGUFReader(file).fields
    assert fields["general.architecture"].contents() == "llama"
    assert fields["tokenizer.ggml.model"].contents() == "gpt2"


def test_from_fine_tuned_to_served(folder):
    model, file = folder / "out" / "W4-row-lsq", folder / "served" / "model.onnx"
    before, after = (
        run("evaluate", m, "--task", folder / "notes.txt").split() for m in (model, file)
    )
    assert before[0] == after[0] == "loss:"
    assert abs(float(before[1]) - float(after[1])) < 0.05
    first, second = run(
        "bench", model, file, "--prompt", 8, "--tokens", 3, "--rounds", 1
    ).splitlines()
    assert first.startswith(f"{model}: prompt ")
    assert "(1.0x)" in first
    assert second.startswith(f"{file}: prompt ")


FEW = {"topics": 45, "summaries": 20, "code_words": 20}
HEADS = {"topics": "accuracy", "summaries": "recall@1", "code-words": "span F1"}


@pytest.fixture
def _few(monkeypatch):
    """The tasks on text, with fewer examples."""
    for name, number in FEW.items():
        parts = getattr(tasks, name)()
        few = {part: rows[:: max(1, len(rows) // number)] for part, rows in parts.items()}
        monkeypatch.setattr(tasks, name, lambda *sizes, few=few, **more: few)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    tokenizer = load_tokenizer(MINILM)
    config = tf.BertConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32,
                           num_hidden_layers=1, num_attention_heads=2)  # fmt: skip
    folder = tmp_path_factory.mktemp("encoder")
    return Path(tiny.saved(folder, tf.BertModel(config), tokenizer))


@pytest.mark.usefixtures("_few")
@pytest.mark.parametrize("task", HEADS)
def test_every_head_goes_the_whole_way(encoder, tmp_path, task):
    model, file = tmp_path / "out" / "W4-g32-absmax", tmp_path / "served" / "model.onnx"
    run("finetune", encoder, "--task", task, "--scheme", "W4", "--method", "absmax", "--steps", 1,
        "--out", tmp_path / "out")  # fmt: skip
    run("export", model, file, "--accuracy-level", 0)
    stages = [run("evaluate", stage, "--task", task) for stage in (model, file)]
    assert stages[0].startswith(f"{HEADS[task]}: ")
    runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    (trained,) = (run for run in runs if run["method"] == "absmax")
    # what was measured while training is what the reopened folder and the exported file give
    value = sum(trained["total"]) / sum(trained["weight"])
    assert [float(said.split(": ")[1].split()[0]) for said in stages] == pytest.approx(
        [value] * 2, abs=1e-3
    )
    saved, served = open_model(str(model)), open_model(str(file))
    if task == "summaries":
        ids = torch.tensor([[101, 2000, 2001, 102]])
        vectors = [m.embed(ids, torch.ones_like(ids)) for m in (saved, served)]
        # float32, sums of 32 products of values below 1
        assert torch.allclose(*vectors, atol=1e-5)
    else:
        fail("evaluate", model, "--task", "summaries", says="needs an encoder of texts")
    fail("generate", model, "a", says="only a language model goes on with a text")
    fail("generate", file, "a", says="only a language model goes on with a text")
    fail("bench", file, says="only a language model")


def fail(*arguments, says: str) -> None:
    """The command ends with exit code 1 and one line."""
    result = runner.invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"{arguments[0]}: ")
    assert says in line
    assert "--traceback" not in line  # no error that nobody thought of


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["finetune", "--scheme", "W9"], "scheme 'W9' is unknown: write W4"),
        (["finetune", "--method", "magic"], "method 'magic' is unknown: choose from"),
        (["finetune", "--task", "no.txt"], "task 'no.txt' is unknown: choose one of"),
        (["finetune", "./no-model"], "./no-model"),
        (["evaluate", "no.onnx"], "no.onnx"),
        (["export", "docs-lm", "a.onnx"], "finetune makes one"),
        (["generate", "no.onnx", "a"], "no.onnx is missing"),
        (["bench", "./no-model"], "./no-model"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_bad_input_gives_one_line(arguments, remedy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fail(*arguments, says=remedy)
    assert not list(tmp_path.rglob("*.onnx"))


KINDS = {
    "t5": (tf.T5Config(d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2),
           "T5ForConditionalGeneration", "is an encoder-decoder (t5)"),
    "bart": (tf.BartConfig(d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32,
                           decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2),
             "BartForConditionalGeneration", "is an encoder-decoder (bart)"),
    "masked": (tf.BertConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                             num_attention_heads=2), "BertForMaskedLM", "is no language model"),
    "headless": (tf.LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                num_attention_heads=2), "LlamaModel", "is no language model"),
    "images": (tf.ViTConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                            num_attention_heads=2, image_size=32), "ViTModel", "is no language model"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_the_wrong_kind_is_named_by_every_command(folder, tmp_path, kind):
    config, name, reason = KINDS[kind]
    tokenizer = tiny.byte_level()
    config = type(config).from_dict(config.to_dict() | {"vocab_size": len(tokenizer)})
    model = tiny.saved(tmp_path / kind, getattr(tf, name)(config), tokenizer)
    notes = folder / "notes.txt"
    fail("finetune", model, "--task", notes, "--out", tmp_path / "out", says=reason)
    fail("evaluate", model, "--task", notes, says=reason)
    fail("generate", model, "a", says=reason)
    fail("bench", model, says=reason)
    fail("export", model, tmp_path / "a.onnx", says="finetune makes one")
    assert not (tmp_path / "out").exists()


def test_a_model_without_state_for_attention_is_not_timed(tmp_path):
    tokenizer = tiny.byte_level()
    config = tf.MambaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, state_size=4
    )
    model = tiny.saved(tmp_path, tf.MambaForCausalLM(config), tokenizer)
    fail("bench", model, "--prompt", 4, says="keeps no keys and values")


@pytest.mark.usefixtures("_few")
def test_a_task_of_the_wrong_kind_is_named(folder, encoder):
    model, file = folder / "out" / "W4-row-lsq", folder / "served" / "model.onnx"
    for stage in (model, file):
        fail("evaluate", stage, "--task", "topics", says="needs a classifier of texts: finetune")
    fail("evaluate", encoder, "--task", "topics", says="no head that was trained for topics")
    fail(
        "evaluate", folder / "model", "--task", "topics", says="no head that was trained for topics"
    )
    fail("evaluate", encoder, "--task", folder / "notes.txt", says="tokenizer of a language model")
    for command in ("finetune", "evaluate"):
        fail(command, folder / "model", "--task", "digits-5-9", says="is about images")
        fail(command, "resnet18", says="is about images")
        fail(
            command,
            folder / "model",
            "--task",
            "topics",
            "--block-size",
            8,
            says="no option 'block_size'",
        )
    fail("finetune", model, says="is quantized already")
    fail("export", model, folder / "served", says="let its name end in .onnx or .gguf")


@pytest.mark.parametrize(
    ("name", "content", "options", "says"),
    [
        ("empty.txt", b"", [], "is empty"),
        (
            "a.txt",
            "größe\n".encode("latin-1") * 30,
            [],
            "pass --encoding or encoding, such as latin-1",
        ),
        ("a.csv", b"text,n\n1,2\n", [], "is no text"),
        ("a.csv", b"body\na\n", [], "pass --text-column or text_column, one of body"),
        ("a [1].txt", b"one\n\ntwo", [], "fewer than 10"),
        ("a.jsonl", b'{"messages": []}', [], "fewer than 10 rows"),
        ("a.jsonl", b'{"messages": []}', ["--kind", "language"], "holds chats"),
        ("a.csv", b"text,label\n" + b"a,0\nb,0\n" * 9, [], "one class only, '0'"),
        ("a.csv", b"text,n\n" + b"a,0\n" * 9, ["--label-column", "m"], "no column 'm'"),
        ("a.bin", b"abc", [], "must end in .txt"),
        ("a.txt", b"a word\n" * 30, ["--block-size", "65"], "can be at most 64"),
        ("a.txt", b"a word\n" * 30, ["--encoding", "klingon"], "encoding 'klingon' is unknown"),
    ],
)
def test_a_file_that_cannot_be_used_gives_one_line(folder, tmp_path, name, content, options, says):
    (tmp_path / name).write_bytes(content)
    for command in ("finetune", "evaluate"):
        fail(command, folder / "model", "--task", tmp_path / name, *options, says=says)


def test_texts_with_labels_of_ones_own_go_the_whole_way(folder, encoder, tmp_path):
    rows = "\n".join(f"{text},{('go', 'stop')[i % 2]}" for i, text in enumerate(tiny.TEXTS * 2))
    (tmp_path / "a.csv").write_text(f"body,mood\n{rows}")
    options = ["--task", tmp_path / "a.csv", "--text-column", "body", "--label-column", "mood"]
    for model in (encoder, folder / "model"):
        out = tmp_path / model.name
        table = run("finetune", model, *options, "--scheme", "W4", "--method", "absmax", "--steps", 1,
                    "--out", out)  # fmt: skip
        assert "accuracy (higher is better), 1 step" in table
        assert run("evaluate", out / "W4-g32-absmax", *options).startswith("accuracy: ")


def test_encoding_and_column_are_options(folder, tmp_path):
    rows = "\n".join(f"{i},größe {text}" for i, text in enumerate(tiny.TEXTS))
    (tmp_path / "a [1].csv").write_bytes(("n,body\n" + rows).encode("latin-1"))
    said = run("evaluate", folder / "model", "--task", tmp_path / "a [1].csv", "--text-column", "body",
               "--encoding", "latin-1", "--block-size", 16)  # fmt: skip
    assert "(n = 4)" in said


def test_an_error_that_nobody_thought_of_gives_one_line_and_shows_itself_on_request(monkeypatch):
    def surprise(*args, **kwargs):
        raise KeyError("what?\n")

    monkeypatch.setattr("companion.cli.stages.open_task", surprise)
    result = runner.invoke(cli.app, ["evaluate"])
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("evaluate: KeyError: ")
    assert "companion --traceback evaluate" in line
    with pytest.raises(KeyError):
        runner.invoke(cli.app, ["--traceback", "evaluate"], catch_exceptions=False)


def test_a_tokenizer_of_another_model_is_not_overwritten(folder, tmp_path):
    tiny.word_pieces().save_pretrained(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()
    model = folder / "out" / "W4-row-lsq"
    fail("export", model, tmp_path / "model.onnx", says="of another model: choose another folder")
    assert (tmp_path / "tokenizer.json").read_bytes() == before
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("command", ["finetune", "evaluate", "export", "generate", "bench"])
def test_every_command_shows_an_example(command):
    assert "Example" in run(command, "--help")


@pytest.mark.parametrize("command", [[sys.executable, "-m", "companion"], ["companion"]])
def test_both_commands_exist_and_help(command):
    if command == ["companion"]:
        command = [str(Path(sys.executable).with_name("companion"))]
    run = subprocess.run([*command, "doctor", "--help"], capture_output=True, text=True, check=True)
    assert "One OK or FAIL line each" in run.stdout
    assert "Example" in run.stdout


def test_without_typer_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "companion.cli.app")
    with pytest.raises(
        SystemExit, match=r"^companion: typer is missing: pip install 'companion\[cli\]'$"
    ):
        main()
