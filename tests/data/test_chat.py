"""Chats: what is scored is decoded again, for templates of four kinds; nothing is cut in silence."""

import json
import warnings

import pandas
import pytest
import torch
from tokenizers import processors

from companion import load_task
from companion.course.sources import load_tokenizer
from companion.data.chat import chat, conversations, encode_chat, end_of_turn, render
from companion.data.sets import PARTS, read_rows
from companion.data.text import IGNORED
from companion.errors import DataWarning, SourceUnavailable, UnsupportedModel
from tests import tiny

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "<|start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>model\n{% endif %}"
)
REWRITES = (  # as Qwen3's: only the last answer keeps its thoughts
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|eot|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TEMPLATES = {"llama": LLAMA3, "no system": NO_SYSTEM, "rewrites": REWRITES}
TALK = [
    {"role": "user", "content": "Where does the road lead to?"},
    {"role": "assistant", "content": "To a city, größer than 🚀."},
    {"role": "user", "content": "Which?"},
    {"role": "assistant", "content": "The Emerald City."},
    {"role": "user", "content": "Thanks"},
]


def with_template(template: str, **special):
    tokenizer = tiny.byte_level(model_max_length=4000, bos_token="[CLS]", **special)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>", "<|eot|>"]})
    tokenizer.chat_template = template
    begun = [("[CLS]", tokenizer.bos_token_id)]  # as Llama 3's, which begins a text by itself
    tokenizer._tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=True),
        processors.TemplateProcessing(single="[CLS] $A", special_tokens=begun),
    ])  # fmt: skip
    return tokenizer


def scored(rows, tokenizer) -> list[list[str]]:
    """The texts that are learned, one after the other, of each row."""
    found = []
    for row in rows:
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["attention_mask"])
        pieces, before = [], IGNORED
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            assert label in (IGNORED, token)
            if label != IGNORED:
                if before == IGNORED:
                    pieces.append([])
                pieces[-1].append(token)
            before = label
        found.append([tokenizer.decode(piece) for piece in pieces])
    return found


def test_every_answer_of_smollm2_is_scored_up_to_its_end():
    tokenizer = load_tokenizer("smollm2")
    rows = encode_chat([{"role": "system", "content": "Be brief."}, *TALK], tokenizer)
    assert scored(rows, tokenizer) == [
        ["To a city, größer than 🚀.<|im_end|>", "The Emerald City.<|im_end|>"]
    ]
    text = tokenizer.decode(rows[0]["input_ids"])
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhere")
    assert text.endswith("The Emerald City.<|im_end|>\n")
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == "<|im_end|>"


@pytest.mark.parametrize("said", ["\n", " a", "a ", "\n\n two  lines\n\n here \n", "<|end|>", ""])
def test_white_space_of_an_answer_is_scored_and_what_stands_around_it_is_not(said):
    talk = [TALK[0], {"role": "assistant", "content": said}] * 2
    for tokenizer, end in (
        (with_template(NO_SYSTEM), "<|eot|>"),
        (load_tokenizer("smollm2"), "<|im_end|>"),
    ):
        (row,) = encode_chat(talk, tokenizer)
        assert scored([row], tokenizer) == [[f"{said}{end}"] * 2]
        prompt = tokenizer(render(talk[:1], tokenizer, answer=True), add_special_tokens=False)[
            "input_ids"
        ]
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["labels"][len(prompt)] != IGNORED
        assert tokenizer.decode(row["input_ids"]) == render(talk, tokenizer)


def test_a_tokenizer_that_begins_words_with_spaces_reads_the_text_unchanged():
    tokenizer = tiny.word_pieces()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[' if m.role == 'user' else '' }}{{ m.content }}"
        "{{ '] ' if m.role == 'user' else '</s>' }}{% endfor %}"
    )
    talk = [{"role": "user", "content": "the road"}, {"role": "assistant", "content": "to a city"}]
    (row,) = encode_chat(talk, tokenizer)
    assert tokenizer.decode(row["input_ids"]) == "[the road] to a city</s>"
    assert scored([row], tokenizer) == [["to a city</s>"]]


def test_a_template_that_begins_the_text_begins_it_once():
    tokenizer = with_template(LLAMA3)
    rows = encode_chat([{"role": "system", "content": "Be brief."}, *TALK], tokenizer)
    assert rows[0]["input_ids"].count(tokenizer.bos_token_id) == 1
    assert scored(rows, tokenizer) == [
        ["To a city, größer than 🚀.<|eot|>", "The Emerald City.<|eot|>"]
    ]


def test_a_template_may_refuse_a_system_message_and_says_so():
    tokenizer = with_template(NO_SYSTEM)
    assert scored(encode_chat(TALK, tokenizer), tokenizer) == [
        ["To a city, größer than 🚀.<|eot|>", "The Emerald City.<|eot|>"]
    ]
    with pytest.raises(UnsupportedModel, match="roles system, user: System role not supported"):
        encode_chat([{"role": "system", "content": "Be brief."}, *TALK], tokenizer)


def test_where_earlier_turns_are_rewritten_each_answer_has_a_row_of_its_own():
    tokenizer = with_template(REWRITES)
    rows = encode_chat(TALK, tokenizer)
    thought = "<think>\n\n</think>\n\n"
    assert scored(rows, tokenizer) == [
        [f"{thought}To a city, größer than 🚀.<|eot|>"], [f"{thought}The Emerald City.<|eot|>"]
    ]  # fmt: skip
    for row, place in zip(rows, (1, 3), strict=True):  # behind exactly what a model reads
        prompt = render(TALK[:place], tokenizer, answer=True)
        before = [t for t, label in zip(row["input_ids"], row["labels"], strict=True)
                  if label == IGNORED]  # fmt: skip
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert before[: len(ids)] == ids
    assert thought not in tokenizer.decode(rows[1]["input_ids"]).split("The Emerald")[0][:-30]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_prompt_is_that_of_generation(kind):
    tokenizer = with_template(TEMPLATES[kind])
    (row,) = encode_chat(TALK[:2], tokenizer)
    first = next(i for i, label in enumerate(row["labels"]) if label != IGNORED)
    prompt = render(TALK[:1], tokenizer, answer=True)
    assert row["input_ids"][:first] == tokenizer(prompt, add_special_tokens=False)["input_ids"]


def test_a_greeting_answers_nothing_and_is_only_read():
    tokenizer = load_tokenizer("smollm2")
    talk = [{"role": "assistant", "content": "Hello!"}, *TALK[:2]]
    assert scored(encode_chat(talk, tokenizer), tokenizer) == [
        ["To a city, größer than 🚀.<|im_end|>"]
    ]
    with pytest.raises(ValueError, match="nothing to learn"):
        encode_chat(talk[:2], tokenizer)


def test_a_template_whose_answers_begin_otherwise_is_refused():
    opened = NO_SYSTEM.replace("<|start|>model\n{% endif", "<|start|>model\n<think>\n{% endif")
    with pytest.raises(UnsupportedModel, match="opens an answer with"):
        encode_chat(TALK, with_template(opened))
    assert end_of_turn(with_template(opened)) is None  # one may be talked with all the same
    with pytest.raises(UnsupportedModel, match="no chat template"):
        encode_chat(TALK, tiny.byte_level())


HOSTILE = {
    "classes": "{{ messages.__class__.__base__.__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['__builtins__']['open']('/etc/passwd').read() }}",
    "code": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "filter": "{{ (messages | attr('__class__')).__mro__[1].__subclasses__() }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "change": "{{ messages.append({'role': 'user', 'content': 'more'}) }}",
    "endless": "{% for i in range(10 ** 12) %}a{% endfor %}",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_template_does_not_get_out_of_its_sandbox(kind):
    tokenizer = with_template(HOSTILE[kind])
    messages = [dict(message) for message in TALK]
    with pytest.raises(UnsupportedModel, match=r"unsafe|undefined|Range too big"):
        render(messages, tokenizer)
    assert messages == TALK


ROWS = {
    "messages": {"messages": TALK[:2]},
    "sharegpt": {"conversations": [{"from": "human", "value": TALK[0]["content"]},
                                   {"from": "gpt", "value": TALK[1]["content"]}]},
    "texts": {"prompt": TALK[0]["content"], "completion": TALK[1]["content"]},
    "response": {"prompt": TALK[0]["content"], "response": TALK[1]["content"]},
    "lists": {"prompt": TALK[:1], "completion": TALK[1:2]},
    "alpaca": {"instruction": TALK[0]["content"], "input": "", "output": TALK[1]["content"]},
}  # fmt: skip
WRITERS = {
    "json": lambda path, rows: path.write_text(json.dumps(rows)),
    "jsonl": lambda path, rows: path.write_text("\n".join(map(json.dumps, rows))),
    "csv": lambda path, rows: pandas.DataFrame(
        [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows]
    ).to_csv(path, index=False),
    "parquet": lambda path, rows: pandas.DataFrame(rows).to_parquet(path),
}


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize("kind", ROWS)
def test_the_usual_columns_in_the_usual_files_are_the_same_chat(tmp_path, kind, ending):
    path = tmp_path / f"a.{ending}"
    WRITERS[ending](path, [ROWS[kind]] * 10)
    if (kind, ending) == ("lists", "csv"):
        return  # a cell of text is what a user says
    for rows in read_rows(str(path)).values():
        assert conversations(rows) == [TALK[:2]] * len(rows)


def test_an_input_of_alpaca_stands_below_its_instruction():
    (talk,) = conversations([{"instruction": "Add.", "input": "1 and 2", "output": "3"}])
    assert [message["content"] for message in talk] == ["Add.\n\n1 and 2", "3"]


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        ({"text": "a"}, "write a column 'messages'"),
        ({"prompt": "a", "completion": None}, "write a column 'messages'"),
        ({"messages": TALK[:1]}, "nothing to learn"),
        ({"messages": []}, "nothing to learn"),
        ({"messages": "Hi"}, "no list of messages in JSON"),
        ({"messages": ["Hi"]}, "both of them text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "both of them text"),
        ({"messages": [{"role": "assistant", "content": None}]}, "both of them text"),
    ],
)
def test_a_row_that_holds_no_chat_is_shown(row, remedy):
    with pytest.raises(ValueError, match=r"the row \{") as caught:
        conversations([ROWS["texts"], row])
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)


def talks(number: int) -> list:
    return [[{"role": "user", "content": f"Say {'a ' * n}"}, {"role": "assistant", "content": f"{n}."}]
            for n in range(number)]  # fmt: skip


def test_a_long_conversation_is_left_out_and_counted_never_cut():
    tokenizer = with_template(LLAMA3)
    splits = {"train": talks(30), "validation": talks(2), "test": talks(3)}
    sizes = sorted(len(encode_chat(talk, tokenizer)[0]["input_ids"]) for talk in talks(30))
    with pytest.warns(DataWarning, match=r"^9 of 35 conversations of chats have more than"):
        task = chat("chats", splits, tokenizer, "here", max_length=sizes[20])
    learned = [scored([row], tokenizer)[0] for row in task.train.dataset]
    assert sorted(learned) == sorted([f"{n}.<|eot|>"] for n in range(21))
    assert "document" not in task.train.dataset[0]
    with pytest.raises(SourceUnavailable, match="for train and validation and test has 5 tokens"):
        chat("chats", splits, tokenizer, "here", max_length=5)
    tokenizer.model_max_length = sizes[20]
    with pytest.warns(DataWarning, match="9 of 35"):
        chat("chats", splits, tokenizer, "here")


def test_rows_of_one_conversation_are_one_document():
    tokenizer = with_template(REWRITES)
    task = chat("chats", {part: [TALK, TALK[:2]] for part in PARTS}, tokenizer, "")
    assert sorted(row["document"] for row in task.test.dataset) == [0, 0, 1]
    assert len(task.train.dataset) == 3


def test_padding_is_neither_read_nor_learned():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splits = dict.fromkeys(("train", "validation", "test"), talks(5))
        task = chat("chats", splits, with_template(LLAMA3), "here")
    (batch,) = task.test
    assert batch["input_ids"].shape == batch["labels"].shape
    assert not batch["attention_mask"].all()
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
    assert torch.equal(batch["document"], torch.arange(5))


def test_a_tokenizer_that_writes_no_mask_needs_none():
    tokenizer = with_template(LLAMA3, model_input_names=["input_ids"])
    task = chat("chats", {part: talks(5) for part in PARTS}, tokenizer, "here")
    assert set(next(iter(task.test))) == {"input_ids", "labels", "document"}


def test_a_template_that_never_ends_a_turn_is_told():
    endless = LLAMA3.replace("<|eot|>", "\n")
    splits = dict.fromkeys(("train", "validation", "test"), talks(2))
    with pytest.warns(DataWarning, match="may not know when to stop"):
        chat("chats", splits, with_template(endless), "here")
    assert end_of_turn(with_template(endless)) is None


def test_a_file_of_chats_becomes_a_task_for_smollm2(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(
        "\n".join(json.dumps({"messages": talk, "text": "plain " * 60}) for talk in talks(50))
    )
    task, named = load_task(str(path), batch_size=4), load_task(str(path), model="smollm2")
    tokenizer = load_tokenizer("smollm2")
    assert (task.metric, task.classes) == ("loss", ())
    batch = next(iter(task.train))
    assert batch["labels"].shape[0] == 4
    assert tokenizer.decode(batch["labels"][0][batch["labels"][0] != IGNORED]).endswith(
        "<|im_end|>"
    )
    assert task.test.dataset == named.test.dataset
    plain = load_task(str(path), text_column="text", block_size=16)
    assert set(next(iter(plain.train))) == {"input_ids", "labels"}
    assert "chat" not in tokenizer.decode(batch["input_ids"][0])
