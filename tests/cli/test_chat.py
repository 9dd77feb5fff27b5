"""A conversation, driven through a pipe, with a model at every stage."""

import json
import os
import sys
import warnings

import pytest
import torch
from typer.testing import CliRunner

from companion import W4, convert, prepare_qat
from companion.cli import app as cli
from companion.cli.chat import chat
from companion.cli.stages import save_tokenizer
from companion.course.sources import load_tokenizer
from companion.errors import DataWarning, UnsupportedModel
from companion.evaluation.generation import answers
from companion.formats.hub import save_quantized
from companion.formats.onnx.export import export_onnx
from tests import tiny

runner = CliRunner()
CHATML = (
    "{% for m in messages %}<|start|>{{ m.role[0] }}\n{{ m.content }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>a\n{% endif %}"
)


def talking():
    """A model that says other things to other words, and its tokenizer."""
    tokenizer = tiny.byte_level(pad_token="[PAD]", model_max_length=64)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|stop|>"]})
    tokenizer.chat_template = CHATML
    model = tiny.llama(tokenizer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.mul_(20)
    return model, tokenizer


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> dict[str, str]:
    folder, (model, tokenizer) = tmp_path_factory.mktemp("stages"), talking()
    small = convert(prepare_qat(model, W4, "absmax"))
    save_quantized(small, folder / "converted")
    save_tokenizer(tokenizer, folder / "converted")
    save_tokenizer(tokenizer, folder / "served")
    return {
        "float": tiny.saved(folder / "float", model, tokenizer),
        "converted": str(folder / "converted"),
        "served": str(export_onnx(small, folder / "served" / "model.onnx", accuracy_level=0)),
    }


def said(*arguments, lines: str = ""):
    result = runner.invoke(cli.app, ["chat", *map(str, arguments)], input=lines)
    assert result.exit_code == 0, result.output
    return result


def heard(name: str, lines: list[str], **options) -> tuple[str, list[str]]:
    pieces, notes = [], []
    chat(name, lines, pieces.append, notes.append, **options)
    return "".join(pieces), notes


@pytest.mark.parametrize("stage", ["float", "converted", "served"])
def test_each_line_is_answered_in_view_of_those_before(stages, stage):
    from companion.cli.stages import open_model

    model, (_, tokenizer) = open_model(stages[stage]), talking()
    told, wanted = [{"role": "system", "content": "a"}], ""
    for line in ("the road", "to"):
        told.append({"role": "user", "content": line})
        (answer,) = answers(model, tokenizer, [told], max_new_tokens=6)
        told.append({"role": "assistant", "content": answer})
        wanted += answer.strip()
    result = said(stages[stage], "--system", "a", "--max-new-tokens", 6, lines="the road\n\n to \n")
    assert result.stdout.replace("\n", "").replace(" ", "") == wanted.replace("\n", "").replace(
        " ", ""
    )
    assert result.stderr == ""


def test_a_conversation_can_be_reset_and_left(stages):
    once, _ = heard(stages["float"], ["the road"], max_new_tokens=5)
    twice, _ = heard(stages["float"], ["the road", "the road"], max_new_tokens=5)
    anew, _ = heard(stages["float"], ["the road", "/reset", "the road"], max_new_tokens=5)
    left, notes = heard(stages["float"], ["the road", "/quit", "the road"], max_new_tokens=5)
    assert twice != anew == once * 2
    assert left == once
    assert notes == []
    told = [
        heard(stages["float"], ["a", "/reset", "a"], max_new_tokens=5, system=s)[0] for s in "ab"
    ]
    assert told[0] != told[1]
    assert told[0][: len(told[0]) // 2] * 2 == told[0]  # the reset keeps what it was told first


def test_pieces_come_as_they_are_known_and_draws_follow_the_seed(stages):
    pieces: list[str] = []
    chat(stages["float"], ["the road"], pieces.append, print, max_new_tokens=6)
    assert len(pieces) > 3
    drawn = [heard(stages["float"], ["the road"], max_new_tokens=9, temperature=2.0, seed=s)
             for s in (0, 0, 1)]  # fmt: skip
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_turn_that_does_not_fit_is_not_taken_and_said_in_one_line(stages):
    long = "the road " * 60
    result = said(stages["float"], "--max-new-tokens", 5, lines=f"the road\n{long}\n")
    assert result.stdout == heard(stages["float"], ["the road"], max_new_tokens=5)[0]
    (line,) = result.stderr.splitlines()
    assert "tokens with this turn, and the model takes 64: say less, or /reset" in line
    after, notes = heard(stages["float"], ["a", long, "/reset", "a"], max_new_tokens=5)
    assert len(notes) == 1
    assert after[: len(after) // 2] * 2 == after


def test_ctrl_c_ends_the_answer_and_not_the_conversation(stages):
    heard_of, notes = [], []

    def show(text):
        heard_of.append(text)
        if len(heard_of) == 2:
            raise KeyboardInterrupt

    chat(stages["float"], ["the road", "/reset", "the road"], show, notes.append, max_new_tokens=5)
    assert notes == ["interrupted"]
    assert "".join(heard_of).endswith(heard(stages["float"], ["the road"], max_new_tokens=5)[0])


def test_at_a_terminal_each_line_is_asked_for(monkeypatch, capsys):
    ours, theirs = os.openpty()
    with os.fdopen(theirs) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        os.write(ours, b"the road\nto\n\x04")
        assert list(cli._turns()) == ["the road", "to"]
    os.close(ours)
    assert capsys.readouterr().out == "> > > \n"


def test_a_model_without_a_chat_template_is_named():
    with pytest.raises(UnsupportedModel, match="no chat template"):
        chat("docs-lm", [], print, print)
    result = runner.invoke(cli.app, ["chat", "docs-lm"], input="Hi\n")
    assert result.exit_code == 1
    assert result.stderr.startswith("chat: the tokenizer has no chat template")


def test_smollm2_talks():
    result = said(
        "smollm2", "--max-new-tokens", 12, lines="What is the capital of France?\n/quit\nNo.\n"
    )
    assert "Paris" in result.stdout
    assert load_tokenizer("smollm2").eos_token not in result.stdout


def test_fine_tuned_on_chats_of_ones_own_and_talked_to(tmp_path):
    """The whole way on fifty conversations; how many were left out is said, other warnings not."""
    model, tokenizer = talking()
    tiny.saved(tmp_path / "model", model, tokenizer)
    talks = [{"prompt": text, "completion": text[::-1]} for text in tiny.TEXTS[:8] * 6]
    talks += [{"prompt": "the road " * 60, "completion": "to"}] * 2
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, talks)))
    result = runner.invoke(
        cli.app,
        ["finetune", str(tmp_path / "model"), "--task", str(tmp_path / "chat.jsonl"), "--scheme", "W4",
         "--method", "default", "--method", "lora", "--steps", "2", "--out", str(tmp_path / "out")],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "loss (lower is better), 2 steps" in result.stdout
    told = [line for line in result.stderr.splitlines() if line.startswith("finetune: ")]
    assert len(told) == 1
    assert "of 50 conversations" in told[0]
    assert "have more than 64 tokens and are left out" in told[0]
    for method in ("default", "lora"):
        out = tmp_path / "out" / f"W4-g32-{method}"
        assert said(out, "--max-new-tokens", 5, lines="the road\n").stdout.strip()
    evaluated = runner.invoke(
        cli.app,
        ["evaluate", str(out), "--task", str(tmp_path / "chat.jsonl"), "--max-length", "64"],
    )
    assert evaluated.stdout.startswith("loss: ")
    long = ["evaluate", str(out), "--task", str(tmp_path / "chat.jsonl"), "--block-size", "8"]
    assert "no option 'block_size'" in runner.invoke(cli.app, long).stderr


def test_only_what_a_result_rests_on_is_shown_of_warnings(capsys):
    with cli.one_line("evaluate"):
        warnings.warn("of a library", UserWarning, stacklevel=1)
        warnings.warn("3 rows\nwere left out", DataWarning, stacklevel=1)
        warnings.warn("3 rows\nwere left out", DataWarning, stacklevel=1)
    assert capsys.readouterr().err == "evaluate: 3 rows were left out\n" * 2


def test_conversations_of_ones_own_end_in_a_table_and_in_models_that_talk(tmp_path):
    """Fifty of them and a real model: the slowest test of this file, about a minute."""
    path, out = tmp_path / "chat.jsonl", tmp_path / "mine"
    rows = [{"messages": [{"role": "user", "content": f"What is {n} plus one?"},
                          {"role": "assistant", "content": f"{n + 1}."}]} for n in range(50)]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    arguments = ["finetune", "smollm2", "--task", str(path), "--scheme", "W4", "--method", "default",
                 "--method", "lora", "--steps", "2", "--lr", "1e-4", "--out", str(out)]  # fmt: skip
    result = runner.invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "loss (lower is better), 2 steps, 1 seed" in result.stdout
    head, *lines = result.stdout.partition("1 seed")[2].splitlines()[1:]
    assert head.split() == ["scheme", "method", "value", "recovered", "MB"]
    trained = ("default", "lora")
    assert {name for name in ("float", "nearest", *trained) if any(f" {name} " in x for x in lines)} == {
        "float", "nearest", *trained}  # fmt: skip
    for method in trained:
        talk = said(out / f"W4-g32-{method}", "--max-new-tokens", 3, lines="What is 1 plus one?\n")
        assert talk.stdout.strip()
