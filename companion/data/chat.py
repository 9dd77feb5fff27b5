"""Chats: the prompt is read, the answer is learned.

A conversation is rendered by the tokenizer's own template, and only what the assistant says is
scored, up to the token that ends its turn. Built in the chapter on chat models.

References
----------
Ouyang et al., "Training language models to follow instructions with human feedback", 2022
(supervised fine-tuning on demonstrations).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from companion.data.examples import Collator, Row, loaders_by_length
from companion.data.task import Task
from companion.data.text import IGNORED
from companion.errors import SourceUnavailable, UnsupportedModel

Messages = list[dict[str, str]]
COLUMNS = ("messages", "conversations", "conversation")
"""Columns that hold a whole conversation."""
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"))
"""Columns that hold a question and its answer; with "instruction" there may be an "input"."""
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
LONGEST = 1024


def is_chat(columns: Sequence[str]) -> bool:
    """Whether a table with these columns holds chats.

    Examples
    --------
    >>> is_chat(["messages"]), is_chat(["prompt", "completion"]), is_chat(["text", "label"])
    (True, True, False)
    """
    return any(name in columns for name in COLUMNS) or any(set(p) <= set(columns) for p in PAIRS)


def conversations(rows: Sequence[Mapping[str, Any]]) -> list[Messages]:
    """Read rows of the usual chat data sets as lists of messages.

    Parameters
    ----------
    rows : sequence of mapping
        With a column ``messages`` (or ``conversations``) of ``role`` and ``content`` (or ``from`` and
        ``value``); or ``prompt`` and ``completion``, each a text or a list of messages; or
        Alpaca's ``instruction``, ``input`` and ``output``.

    Returns
    -------
    list of list of dict
        Each message with ``role`` and ``content``.

    Raises
    ------
    ValueError
        If a row is none of these, or has no answer to learn from.

    Examples
    --------
    >>> conversations([{"prompt": "Who are you?", "completion": "Dorothy."}])
    [[{'role': 'user', 'content': 'Who are you?'}, {'role': 'assistant', 'content': 'Dorothy.'}]]
    """
    found = [_conversation(number, row) for number, row in enumerate(rows, 1)]
    for number, messages in enumerate(found, 1):
        if not any(message["role"] == "assistant" for message in messages):
            raise ValueError(f"row {number} has no message of the assistant: nothing to learn")
    return found


def _conversation(number: int, row: Mapping[str, Any]) -> Messages:
    for name in COLUMNS:
        if row.get(name):
            return _messages(number, row[name], "user")
    for asked, answered in PAIRS:
        if row.get(asked) is not None and row.get(answered) is not None:
            question = row[asked]
            if asked == "instruction" and row.get("input"):
                question = f"{question}\n\n{row['input']}"
            return [*_messages(number, question, "user"),
                    *_messages(number, row[answered], "assistant")]  # fmt: skip
    raise ValueError(
        f"row {number} holds no chat, but {', '.join(map(repr, row))}: write a column 'messages' of "
        "role and content, 'prompt' and 'completion', or 'instruction' and 'output'"
    )


def _messages(number: int, said: Any, role: str) -> Messages:
    if isinstance(said, str):
        return [{"role": role, "content": said}]
    try:
        pairs = [(m.get("role", m.get("from")), m.get("content", m.get("value"))) for m in said]
    except (AttributeError, TypeError):
        pairs = [(None, None)]
    if not all(isinstance(part, str) for pair in pairs for part in pair):
        raise ValueError(
            f"row {number}: a message needs a 'role' and a 'content', both of them text (calls of "
            "tools and images are not read)"
        )
    return [{"role": ROLES.get(who, who), "content": text} for who, text in pairs]


def encode_chat(messages: Messages, tokenizer) -> Row:
    """Turn a conversation into tokens, of which only the assistant's are labels.

    Parameters
    ----------
    messages : list of dict
        With ``role`` and ``content``.
    tokenizer : PreTrainedTokenizerFast
        With a chat template.

    Returns
    -------
    dict of str to list of int
        ``input_ids`` and ``labels``: -100 where nothing is learned. Each turn of the assistant is
        scored up to the token that ends it, so that a model learns to stop.

    Raises
    ------
    UnsupportedModel
        If the tokenizer has no template, or one that tells earlier turns differently as the
        conversation goes on.
    """
    text = render(messages, tokenizer)
    spans = []
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(messages[:place], tokenizer, answer=True)
            after = render(messages[: place + 1], tokenizer)
            if not (text.startswith(before) and text.startswith(after)):
                raise UnsupportedModel(
                    "the chat template changes what came before as a conversation goes on, so that "
                    "its turns cannot be told apart: give conversations with one answer each"
                )
            spans.append((len(before), len(after.rstrip())))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    labels = [
        token if any(start < stop and end > first for first, stop in spans) else IGNORED
        for token, (start, end) in zip(
            encoded["input_ids"], encoded["offset_mapping"], strict=True
        )
    ]
    return {"input_ids": encoded["input_ids"], "labels": labels}


def render(messages: Messages, tokenizer, *, answer: bool = False) -> str:
    """Write a conversation as the model reads it.

    Parameters
    ----------
    messages : list of dict
    tokenizer : PreTrainedTokenizerBase
    answer : bool
        Whether the assistant's turn is opened at the end, for a model to go on.

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
            f"the chat template refuses a conversation of the roles {roles}: {error}"
        ) from error


def chat(
    name: str, splits: Mapping[str, Sequence[Messages]], tokenizer, source: str, *,
    max_length: int | None = None, batch_size: int = 8,
) -> Task:  # fmt: skip
    """Make a task of conversations: the loss of what the assistant says.

    Parameters
    ----------
    name : str
    splits : mapping of str to sequence of list of dict
        "train", "validation" and "test".
    tokenizer : PreTrainedTokenizerFast
    source : str
        Where the text is from, and its licence.
    max_length : int, optional
        Tokens of a conversation at most; longer ones are left out, and a warning says how many: no
        answer is ever cut. Default: 1,024, or what the tokenizer's model takes.
    batch_size : int
        Conversations to train on at a time. Each is a row of its own.

    Raises
    ------
    SourceUnavailable
        If no conversation of a split is short enough.
    """
    most = int(min(max_length or LONGEST, tokenizer.model_max_length))

    def rows(part: Sequence[Messages]) -> list[Row]:
        encoded = [encode_chat(messages, tokenizer) for messages in part]
        kept = [row for row in encoded if len(row["input_ids"]) <= most]
        if part and not kept:
            raise SourceUnavailable(
                f"no conversation of {name} has {most} tokens or fewer: raise max_length"
            )
        if len(kept) < len(encoded):
            warnings.warn(
                f"{len(encoded) - len(kept)} of {len(encoded)} conversations of {name} have more than "
                f"{most} tokens and are left out: raise max_length to keep them",
                stacklevel=2,
            )
        return [row | {"attention_mask": [1] * len(row["input_ids"])} for row in kept]

    parts = loaders_by_length(splits, rows, batch_size, Collator(tokenizer), 2 * batch_size)
    return Task(name, **parts, classes=(), source=source)
