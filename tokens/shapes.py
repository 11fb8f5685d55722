"""What a record of the data may look like, and the messages that it becomes.

SFT takes the shapes of `SHAPES`, all of which become messages. DPO takes `chosen` and `rejected`,
two lists of messages that begin with the prompt; or the prompt stands apart, in `prompt`. Raises
`ValueError` for any other; the caller adds file and line.
"""

import json
from collections.abc import Iterable

from tokens.tokenizer import ROLES

OPENAI = {role: role for role in ROLES}
SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", **OPENAI}
SIDES = ("chosen", "rejected")
NOTHING = (None, False, "", "[]", [], {})  # what a field holds that says nothing


# ---- Shapes of conversations


def conversation(record: dict) -> list[dict]:
    """The messages of a record; `ValueError` names the fields of one that has no known shape."""
    for fields, also, _, read in SHAPES:
        if has(record, fields):
            return after_system(record, read(record), also)
    raise ValueError(f"{fields_of(record)}, expected {KNOWN}")


def sharegpt(record: dict) -> list[dict]:
    return plain_messages(record["conversations"], "conversations", ("from", "value"), SHAREGPT)


def prompt_completion(record: dict) -> list[dict]:
    prompt = one_or_more(record["prompt"], "user", "prompt")
    completion = one_or_more(record["completion"], "assistant", "completion")
    if prompt[-1]["role"] == "assistant" or completion[0]["role"] != "assistant":
        raise ValueError(
            f"prompt ends with {prompt[-1]['role']} and completion begins with "
            f"{completion[0]['role']}, expected an assistant's answer after the prompt"
        )
    return [message | {"weight": 0} for message in prompt] + completion


def alpaca(record: dict) -> list[dict]:
    fields = ("instruction", "input") if has(record, ["input"]) else ("instruction",)
    parts = [text_of(record[name], name) for name in fields]
    question = "\n\n".join(part for part in parts if part.strip())
    answer = text_of(record["output"], "output")
    earlier = [] if record.get("history") in NOTHING else earlier_turns(record["history"])
    return earlier + turn(question, answer)


def earlier_turns(history: object) -> list[dict]:
    """The messages of LLaMA-Factory's `history`; its answers are trained, as they are there."""
    messages = []
    if not isinstance(history, list):
        raise ValueError(f"history is {excerpt(history)}, expected a list of earlier turns")
    for k, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(
                f"history[{k}] is {excerpt(pair)}, expected a list of a question and its answer"
            )
        messages += turn(*(text_of(text, f"history[{k}][{i}]") for i, text in enumerate(pair)))
    return messages


def turn(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# The fields that tell a shape, those that it may have besides, what is said of it at the start, how
# it becomes messages. A record that has several shapes is of the first (UltraChat has messages and,
# beside them, a prompt).
SHAPES = (
    (("messages",), (), "", lambda record: plain_messages(record["messages"], "messages")),
    (("conversations",), (), "ShareGPT's conversations: each gpt is trained as an assistant",
     sharegpt),
    (("prompt", "completion"), (), "prompt and completion: the completion is trained",
     prompt_completion),
    (("instruction", "output"), ("input", "history"), "Alpaca's instruction and input, a blank "
     "line between them, become the user's message, after its history: every answer is trained",
     alpaca),
)  # fmt: skip
APART = "the prompt stands apart from chosen and rejected, and is put before them"
KNOWN = ", or ".join(" and ".join(fields) for fields, *_ in SHAPES)
# Of any shape, `system` becomes a message. These would be lost without a word, so they are refused.
UNREAD = {
    "history": "it inside messages: outside of them, only Alpaca's is read",
    "tools": "none: the chat format has no words for them",
}
# The columns that are read from a file of columns.
FIELDS = {name for fields, also, *_ in SHAPES for name in fields + also}
FIELDS |= {"system", *SIDES, *UNREAD}


def is_pair(record: dict) -> bool:
    return has(record, SIDES)


def remark(record: dict, pairs: bool) -> str:
    """What a user should know of a record's shape; empty where it is plain messages."""
    system = "the system text becomes the first message" * (record.get("system") not in NOTHING)
    if pairs:
        joined = is_pair(record) and len(pair(record)[0]) > len(record["chosen"])
        return "; ".join(filter(None, (APART, system))) if joined else ""
    of_shape = next((text for fields, _, text, _ in SHAPES if has(record, fields)), "")
    return "; ".join(filter(None, (of_shape, system)))


def has(record: dict, fields: Iterable[str]) -> bool:
    return all(record.get(name) is not None for name in fields)


def fields_of(record: dict) -> str:
    names = [name if record[name] is not None else f"{name} (null)" for name in sorted(record)]
    return f"found {', '.join(names)[:200] or 'no field'}"


def after_system(record: dict, messages: list[dict], also: Iterable[str] = ()) -> list[dict]:
    """The messages after the record's `system` text, if it has one and they do not hold it.

    also: the fields of `UNREAD` that the record's shape has read.
    """
    for name, expected in UNREAD.items():
        if name not in also and record.get(name) not in NOTHING:
            raise ValueError(f"{name} is {excerpt(record[name])}, expected {expected}")
    if record.get("system") in NOTHING:
        return messages
    first = {"role": "system", "content": text_of(record["system"], "system")}
    own = [message for message in messages if message["role"] == "system"]
    if not first["content"].strip() or texts([first])[0] in texts(own):
        return messages
    if own:
        raise ValueError(
            f"system is {excerpt(first['content'])} and the system message is "
            f"{excerpt(own[0]['content'])}, expected the same, or one of them"
        )
    return [first, *messages]


# ---- Pairs


def pair(record: dict) -> list[list[dict]]:
    """The messages of chosen and of rejected, each from the prompt to the answer."""
    if not any(has(record, [name]) for name in SIDES):
        raise ValueError(f"{fields_of(record)}, expected {' and '.join(SIDES)}")
    return [whole_side(record, name) for name in SIDES]


def whole_side(record: dict, name: str) -> list[dict]:
    """The messages of one side; those of `prompt` are put before an answer that stands alone."""
    side, prompt = plain_messages(record.get(name), name), record.get("prompt")
    if side[-1]["role"] != "assistant":
        raise ValueError(f"{name} ends with {side[-1]['role']}, expected an assistant's answer")
    if prompt in (None, []) or (isinstance(prompt, str) and not prompt.strip()):
        if len(side) == 1:
            raise ValueError(
                f"{name} has nothing before its answer, and there is no prompt "
                f"({fields_of(record)}), expected the messages that it answers"
            )
        return side
    prompt = one_or_more(prompt, "user", "prompt")
    # UltraFeedback repeats the user's first message in `prompt`; a system message may precede it.
    first = int(side[0]["role"] == "system" != prompt[0]["role"])
    # It may also be the end of what is answered, as the last question of a longer conversation.
    asked, prompts = side[first:-1], len(prompt)
    if texts(prompt) in (texts(asked[:prompts]), texts(asked[-prompts:])):
        return side
    if side[0]["role"] == "assistant" != prompt[-1]["role"]:
        return after_system(record, prompt + side)
    raise ValueError(
        f"{name} begins with {excerpt(texts(side[first:])[0])} and prompt is "
        f"{excerpt(texts(prompt)[0])}, expected the same, or an answer that follows the prompt"
    )


def texts(messages: list[dict]) -> list[tuple[str, str]]:
    """Roles and contents, stripped as the chat format strips them, to be compared."""
    return [(message["role"], message["content"].strip()) for message in messages]


# ---- Messages


def plain_messages(
    messages: object, name: str, keys: tuple[str, str] = ("role", "content"),
    roles: dict[str, str] = OPENAI,
) -> list[dict]:  # fmt: skip
    """The messages as `tokenizer.encode` takes them; `ValueError` names what is wrong in them.

    name: of their field. keys: of a message's role and content. roles: known names → roles.
    """
    if not isinstance(messages, list) or not messages:
        value = "nothing" if messages is None else excerpt(messages)
        raise ValueError(f"{name} is {value}, expected a list of messages")
    plain = []
    for k, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"{name}[{k}] is {excerpt(message)}, expected an object")
        role = message.get(keys[0])
        if not isinstance(role, str) or role not in roles:
            raise ValueError(
                f"{name}[{k}].{keys[0]} is {excerpt(role)}, expected one of {', '.join(roles)}"
            )
        role, weight = roles[role], {}
        if role == "assistant":
            weight = {} if is_trained(message, f"{name}[{k}]") else {"weight": 0}
        content = text_of(message.get(keys[1]), f"{name}[{k}].{keys[1]}")
        plain.append({"role": role, "content": content, **weight})
    return plain


def one_or_more(value: object, role: str, name: str) -> list[dict]:
    """The messages of a field that holds a list of them, or the text of one."""
    value = [{"role": role, "content": value}] if isinstance(value, str) else value
    return plain_messages(value, name)


def is_trained(message: dict, where: str) -> bool:
    """Whether an assistant's message is trained: not with `weight: 0` or `train: false`."""
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            raise ValueError(
                f"{where}.{name} is {excerpt(message[name])}, expected an answer in words: the "
                "chat format has no calls"
            )
    values = {name: message.get(name) for name in ("weight", "train")}
    for name, value in values.items():
        if not (value is None or value in (0, 1)):
            raise ValueError(
                f"{where}.{name} is {excerpt(value)}, expected 0 or 1, false or true: an answer is "
                "trained or it is not"
            )
    return all(value is None or value for value in values.values())


def text_of(content: object, where: str) -> str:
    """A content's text: the string itself, or its text parts joined."""
    if isinstance(content, list) and content:
        for k, part in enumerate(content):
            text = part.get("text") if isinstance(part, dict) else None
            if not isinstance(text, str) or part.get("type") != "text":
                raise ValueError(f"{where}[{k}] is {excerpt(part)}, expected a part of type text")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(
            f"{where} is {excerpt(content)}, expected a string or a list of text parts"
        )
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} holds the lone surrogate {content[error.start]!a} at character "
            f"{error.start}, which is not Unicode text"
        ) from None
    return content


def excerpt(value: object) -> str:
    """The first 40 characters of a value as JSON, for a message; parquet holds other types, too."""
    try:
        return json.dumps(value, default=repr)[:40]
    except RecursionError:  # it could be read just so
        return f"a deeply nested {type(value).__name__}"
