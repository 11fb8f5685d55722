"""What a record must hold, and the token ids and loss masks that it becomes.

token_cache.py calls `encode_conversation` (SFT) or `encode_pair` (DPO) on each record of the data.
Both raise `ValueError` for a bad record; the caller adds file and line.
"""

import json

from tokens.tokenizer import ROLES


def encode_conversation(record, tokenizer):
    """`[(ids, trained)]` of a record `{"messages": [{"role", "content"}, …]}`."""
    messages = record.get("messages")
    check_messages(messages, "messages")
    return [tokenizer.encode(messages)]


def encode_pair(record, tokenizer):
    """`[chosen, rejected]`, each `(ids, trained)`, of a record `{"chosen": […], "rejected": […]}`.

    Both are lists of messages, as in UltraFeedback; only the last message, the answer, is trained.
    The messages before it must be the same in both.
    """
    sides = [record.get(name) for name in ("chosen", "rejected")]
    for name, messages in zip(("chosen", "rejected"), sides, strict=True):
        check_messages(messages, name)
        if messages[-1]["role"] != "assistant":
            raise ValueError(
                f"{name} ends with {messages[-1]['role']}, expected an assistant's answer"
            )
    prompts = [[(m["role"], m["content"].strip()) for m in messages[:-1]] for messages in sides]
    if prompts[0] != prompts[1]:
        raise ValueError(
            "chosen and rejected answer different prompts, expected the same messages "
            "before the last"
        )
    # The prompt ends in a line feed, which never merges with what follows: its ids are a prefix of
    # the conversation's.
    answer = len(tokenizer.prompt(sides[0][:-1]))
    encoded = [tokenizer.encode(messages) for messages in sides]
    return [(ids, [False] * answer + trained[answer:]) for ids, trained in encoded]


def check_messages(messages, name):
    """Raise `ValueError` unless `messages` is a list of roles and contents; `name` is its field."""
    if not isinstance(messages, list) or not messages:
        value = "nothing" if messages is None else excerpt(messages)
        raise ValueError(f"{name} is {value}, expected a list of messages")
    for k, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"{name}[{k}] is {excerpt(message)}, expected an object")
        if message.get("role") not in ROLES:
            raise ValueError(
                f"{name}[{k}].role is {excerpt(message.get('role'))}, expected one of "
                + ", ".join(ROLES)
            )
        content = message.get("content")
        if not isinstance(content, str):
            raise ValueError(f"{name}[{k}].content is {excerpt(content)}, expected a string")
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name}[{k}].content holds the lone surrogate {content[error.start]!a} at "
                f"character {error.start}, which is not Unicode text"
            ) from None


def excerpt(value):
    """The first 40 characters of a value as JSON, for a message; parquet holds other types, too."""
    return json.dumps(value, default=repr)[:40]
