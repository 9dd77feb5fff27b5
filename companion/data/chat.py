"""Chats: the prompt is read, the answer is learned.

A conversation is written out by the tokenizer's own template, and only what the assistant answers
is scored, up to and including the token that ends its turn. Built in chapter 13.

References
----------
Ouyang et al., "Training language models to follow instructions with human feedback", 2022
(supervised fine-tuning on demonstrations).
"""

from __future__ import annotations

import json
import reprlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from companion.data.examples import Collator, Row, loaders_by_length
from companion.data.sets import CHATS, PARTS
from companion.data.task import Task
from companion.data.text import IGNORED
from companion.errors import DataWarning, SourceUnavailable, UnsupportedModel

Messages = list[dict[str, str]]
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"))
"""Columns that hold a question and its answer; with "instruction" there may be an "input"."""
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
"""What ShareGPT and others call the two sides."""
LONGEST = 1024
"""Tokens of a conversation, where nothing else is asked for."""


def is_chat(columns: Iterable[str]) -> bool:
    """Whether a table with these columns holds chats.

    Parameters
    ----------
    columns : iterable of str

    Examples
    --------
    >>> is_chat(["messages"]), is_chat(["prompt", "completion"]), is_chat(["text", "label"])
    (True, True, False)
    """
    names = set(columns)
    return not names.isdisjoint(CHATS) or any(names.issuperset(pair) for pair in PAIRS)


def conversations(rows: Iterable[Mapping[str, Any]]) -> list[Messages]:
    """Read rows of the usual chat data sets as lists of messages.

    Parameters
    ----------
    rows : iterable of mapping
        With a column ``messages`` (or ``conversations``, ``conversation``) of ``role`` and
        ``content`` (or ``from`` and ``value``), in a CSV file as JSON; or ``prompt`` and
        ``completion`` (or ``response``), each a text or a list of messages; or Alpaca's
        ``instruction``, ``input`` and ``output``.

    Returns
    -------
    list of list of dict
        Each message with ``role`` and ``content``.

    Raises
    ------
    ValueError
        If a row is none of these, or holds no answer to learn.

    Examples
    --------
    >>> conversations([{"prompt": "Who are you?", "completion": "Dorothy."}])
    [[{'role': 'user', 'content': 'Who are you?'}, {'role': 'assistant', 'content': 'Dorothy.'}]]
    """
    found = []
    for row in rows:
        messages = _conversation(row)
        if not _answers(messages):
            raise ValueError(
                f"no message of the assistant answers one of the user in {_shown(row)}: there is "
                "nothing to learn, leave the row out"
            )
        found.append(messages)
    return found


def _conversation(row: Mapping[str, Any]) -> Messages:
    for name in CHATS:
        if (said := row.get(name)) is not None:
            if isinstance(said, str):  # from a CSV file, whose cells are text
                try:
                    said = json.loads(said)
                except (ValueError, RecursionError):
                    raise ValueError(
                        f"column {name!r} of {_shown(row)} is text, but no list of messages in JSON"
                    ) from None
            return _messages(row, said)
    for asked, answered in PAIRS:
        question, answer = row.get(asked), row.get(answered)
        if question is not None and answer is not None:
            if asked == "instruction" and row.get("input"):
                question = f"{question}\n\n{row['input']}"
            return [*_messages(row, question, "user"), *_messages(row, answer, "assistant")]
    raise ValueError(
        f"there is no chat in {_shown(row)}: write a column 'messages' of role and content, "
        "'prompt' and 'completion', or 'instruction' and 'output'"
    )


def _messages(row: Mapping[str, Any], said: Any, role: str | None = None) -> Messages:
    """Messages of one kind; a mere text is one by `role`."""
    if role and isinstance(said, str):
        return [{"role": role, "content": said}]
    try:
        pairs = [(m.get("role", m.get("from")), m.get("content", m.get("value"))) for m in said]
    except (AttributeError, TypeError):
        pairs = [(None, None)]
    if not all(isinstance(part, str) for pair in pairs for part in pair):
        raise ValueError(
            f"a message of {_shown(row)} is no 'role' with a 'content', both of them text: leave the "
            "row out (calls of tools and images are not read)"
        )
    return [{"role": ROLES.get(who, who), "content": text} for who, text in pairs]


def _shown(row: Mapping[str, Any]) -> str:
    return f"the row {reprlib.repr(dict(row))}"


def _answers(messages: Messages) -> list[int]:
    """Places of what the assistant says after the user has spoken; a greeting answers nothing."""
    asked = next((i for i, m in enumerate(messages) if m["role"] == "user"), len(messages))
    return [i for i, m in enumerate(messages) if m["role"] == "assistant" and i > asked]


def encode_chat(messages: Messages, tokenizer) -> list[Row]:
    """Turn a conversation into tokens, of which only those of the answers are labels.

    Parameters
    ----------
    messages : list of dict
        With ``role`` and ``content``. What follows the last answer is left out.
    tokenizer : PreTrainedTokenizerFast
        With a chat template.

    Returns
    -------
    list of dict of str to list of int
        ``input_ids``, ``attention_mask`` where the tokenizer writes one, and ``labels``: -100
        where nothing is learned. An answer is scored up to and including the token that ends its
        turn, so that a model learns to stop. One row; or one for each answer, where the template
        writes earlier turns otherwise than the last (Qwen3 drops their thoughts): then every
        answer is learned behind exactly what a model reads before it gives it.

    Raises
    ------
    UnsupportedModel
        If the tokenizer has no template, or one that cannot write the conversation.
    ValueError
        If there is no answer in it.
    """
    return [_encode(text, spans, tokenizer) for text, spans in _written(messages, tokenizer)]


def _written(messages: Messages, tokenizer) -> list[tuple[str, list[tuple[int, int]]]]:
    """Texts of a conversation, each with the beginning and end of the answers in it."""
    turns = []
    for place in _answers(messages):
        before = render(messages[:place], tokenizer, answer=True)
        after = render(messages[: place + 1], tokenizer)
        if not after.startswith(before):
            raise UnsupportedModel(
                f"the chat template opens an answer with {before[-30:]!r}, and an answer that is given "
                "does not begin so: what a model would read and what it would learn from differ. "
                "Set tokenizer.chat_template to one that writes both alike"
            )
        turns.append((after, (len(before), len(after.rstrip()))))
    if not turns:
        raise ValueError("no message of the assistant answers one of the user: nothing to learn")
    whole = turns[-1][0]
    if all(whole.startswith(after) for after, _ in turns):
        return [(whole, [span for _, span in turns])]
    return [(after, [span]) for after, span in turns]


def _encode(text: str, spans: Sequence[tuple[int, int]], tokenizer) -> Row:
    if not tokenizer.is_fast:
        raise UnsupportedModel(
            f"{type(tokenizer).__name__} does not say where its tokens stand in a text, so answers "
            "cannot be told from questions: load it as a fast tokenizer (tokenizer.json)"
        )
    whole = _tokens(text, tokenizer)
    # a token that spans prompt and answer is none that a model could read and then go on
    cuts = [0, *(first for first, _ in spans), len(text)]
    apart = [token for a, b in pairwise(cuts) for token in _tokens(text[a:b], tokenizer, a)]
    ids, split = ([token for token, _, _ in found] for found in (whole, apart))
    if ids != split and tokenizer.decode(ids) == tokenizer.decode(split):  # no space was added
        ids, whole = split, apart
    labels = [token if any(start < last and end > first for first, last in spans) else IGNORED
              for token, start, end in whole]  # fmt: skip
    mask = "attention_mask" in tokenizer.model_input_names
    return {"input_ids": ids, "labels": labels} | (
        {"attention_mask": [1] * len(ids)} if mask else {}
    )


def _tokens(text: str, tokenizer, start: int = 0) -> list[tuple[int, int, int]]:
    """Tokens of a text that begins at `start` of a longer one, with beginning and end of each."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [(token, start + a, start + b) for token, (a, b) in
            zip(found["input_ids"], found["offset_mapping"], strict=True)]  # fmt: skip


def render(messages: Messages, tokenizer, *, answer: bool = False) -> str:
    """Write a conversation out as the model reads it, by the tokenizer's own template.

    transformers runs templates in a sandbox of jinja2, out of which they reach nothing.

    Parameters
    ----------
    messages : list of dict
    tokenizer : PreTrainedTokenizerBase
    answer : bool
        Whether the assistant's turn is opened at the end, for a model to go on.

    Returns
    -------
    str

    Raises
    ------
    UnsupportedModel
        If the tokenizer has no chat template, or the template refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UnsupportedModel(
            "the tokenizer has no chat template: take an instruction-tuned model (smollm2), or set "
            "tokenizer.chat_template"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
    except Exception as error:  # templates raise errors of jinja2 and their own
        roles = ", ".join(message["role"] for message in messages)
        raise UnsupportedModel(
            f"the chat template refuses a conversation of the roles {roles}: "
            f"{' '.join(str(error).split())}"
        ) from error


def end_of_turn(tokenizer) -> int | None:
    """Return the token that ends an answer, or None where the template tells of none.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerFast
        With a chat template.
    """
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        return _last(encode_chat(said, tokenizer)[0], tokenizer)
    except UnsupportedModel:  # one may be talked with all the same
        return None


def _last(row: Row, tokenizer) -> int | None:
    """The last token that is scored, if it stands for no text."""
    last = [token for token in row["labels"] if token != IGNORED][-1]
    return last if last in tokenizer.added_tokens_decoder else None


def chat(
    name: str, splits: Mapping[str, Sequence[Messages]], tokenizer, source: str, *,
    max_length: int | None = None, batch_size: int = 8,
) -> Task:  # fmt: skip
    """Make a task of conversations: the loss of what the assistant answers.

    Parameters
    ----------
    name : str
    splits : mapping of str to sequence of list of dict
        "train", "validation" and "test".
    tokenizer : PreTrainedTokenizerFast
        With a chat template.
    source : str
        Where the text is from, and its licence.
    max_length : int, optional
        Tokens of a conversation at most; longer ones are left out, and a `DataWarning` says how
        many: no answer is ever cut. Default: 1,024, or what the tokenizer's model takes.
    batch_size : int
        Rows to train on at a time. Each holds one conversation; several are not packed into one.

    Returns
    -------
    Task
        Its ``document`` is the conversation, so that intervals come from resampling these.

    Raises
    ------
    SourceUnavailable
        If no conversation of a split is short enough.
    UnsupportedModel
        As in `encode_chat`.
    """
    most = int(min(max_length or LONGEST, tokenizer.model_max_length))
    encoded = {part: [encode_chat(messages, tokenizer) for messages in splits[part]]
               for part in PARTS}  # fmt: skip
    kept = {part: [rows for rows in found if max(len(row["input_ids"]) for row in rows) <= most]
            for part, found in encoded.items()}  # fmt: skip
    if empty := [part for part in PARTS if not kept[part]]:
        raise SourceUnavailable(
            f"no conversation of {name} for {' and '.join(empty)} has {most} tokens or fewer: raise "
            "max_length, or take a model that reads longer texts"
        )
    total, left = (sum(map(len, found.values())) for found in (encoded, kept))
    if left < total:
        many = f"{total - left} of {total} conversations of {name} have more than {most} tokens"
        warnings.warn(
            f"{many} and are left out: raise max_length to keep them", DataWarning, stacklevel=2
        )
    if _last(kept["train"][0][-1], tokenizer) is None:
        warnings.warn(
            f"the chat template behind {name} ends an answer with no token of its own: a model that "
            "learns from it may not know when to stop",
            DataWarning,
            stacklevel=2,
        )

    def rows(part: Sequence[list[Row]], numbered: bool) -> list[Row]:
        return [row | ({"document": number} if numbered else {})
                for number, own in enumerate(part) for row in own]  # fmt: skip

    flat = {part: rows(found, part != "train") for part, found in kept.items()}
    parts = loaders_by_length(flat, list, batch_size, Collator(tokenizer), 2 * batch_size)
    return Task(name, **parts, classes=(), source=source)
