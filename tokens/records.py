"""What a record must look like, and the token ids and loss masks that it becomes.

Called by token_cache.py on each record of the data; what is wrong with one is a `ValueError`, to
which the caller adds file and line.
"""

import json

from tokens.tokenizer import ROLES


def encode_conversation(record, tokenizer):
    """`[(ids, trained)]` of a record of the Tulu schema; `ValueError` says what is wrong."""
    messages = record.get("messages")
    check_messages(messages, "messages")
    return [tokenizer.encode(messages)]


def encode_pair(record, tokenizer):
    """`[chosen, rejected]`, each `(ids, trained)`, of a record of UltraFeedback's schema.

    Only the last message of each is trained; what stands before it must be the same in both.
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
    encoded = []
    for messages in sides:
        ids, trained = tokenizer.encode(messages)
        answer = len(tokenizer.prompt(messages[:-1]))
        encoded.append((ids, [False] * answer + trained[answer:]))
    return encoded


def shown(value):
    """The beginning of a value for an error; parquet also holds what JSON cannot say."""
    return json.dumps(value, default=repr)[:40]


def check_messages(messages, name):
    """Raise `ValueError` unless `messages` is a list of roles and contents; `name` is its field."""
    if not isinstance(messages, list) or not messages:
        found = "nothing" if messages is None else shown(messages)
        raise ValueError(f"{name} is {found}, expected a list of messages")
    for k, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"{name}[{k}] is {shown(message)}, expected an object")
        if message.get("role") not in ROLES:
            raise ValueError(
                f"{name}[{k}].role is {shown(message.get('role'))}, expected one of "
                + ", ".join(ROLES)
            )
        content = message.get("content")
        if not isinstance(content, str):
            raise ValueError(f"{name}[{k}].content is {shown(content)}, expected a string")
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name}[{k}].content holds the lone surrogate {content[error.start]!a} at "
                f"character {error.start}, which is not Unicode text"
            ) from None
