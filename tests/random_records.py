"""Random records of every documented shape, the messages that each becomes, and files read."""

import re

from program.errors import InputError, one_line
from tokens.readers import records

TEXTS = ["Hi", "", " \n", "é😀", "a\0b", "</s>", "<|user|>\nx", "5", "null", "a\u2028b\r\n"]
PLAIN = {"system": "system", "user": "user", "assistant": "assistant"}
NAMES = {"system": ["system"], "user": ["human", "user"], "assistant": ["gpt", "chatgpt"]}
NOTHING = [("name", "Ann"), ("weight", None), ("train", None), ("tool_calls", []), ("id", 5)]


def messages(rng, last=None):
    """Some messages; the last is of that role, where one is given."""
    roles = rng.choices(list(PLAIN), [1, 4, 4], k=rng.randint(1, 5))
    roles = roles if last is None else [*roles[:-1], last]
    return [{"role": role, "content": rng.choice(TEXTS)} for role in roles]


def parts(rng, text):
    """A content of that text: itself, or in parts."""
    if rng.random() < 0.7:
        return text
    cut = rng.randint(0, len(text))
    return [{"type": "text", "text": piece} for piece in (text[:cut], text[cut:])]


def written(rng, plain, keys=("role", "content"), names=None):
    """`plain` as a record may hold it, and what it then becomes: some answers are not trained."""
    out, expected = [], []
    for message in plain:
        role, more = message["role"], dict(rng.sample(NOTHING, rng.randint(0, 2)))
        weight = {}
        if role == "assistant" and rng.random() < 0.4:
            off = rng.random() < 0.5
            more[rng.choice(["weight", "train"])] = rng.choice(
                [0, 0.0, False] if off else [1, True]
            )
            weight = {"weight": 0} if off else {}
        name = rng.choice(names[role]) if names else role
        out.append({keys[0]: name, keys[1]: parts(rng, message["content"]), **more})
        expected.append(message | weight)
    return out, expected


def some_conversation(rng):
    """`(record, messages)` of any shape."""
    shape = rng.choice(["messages", "conversations", "prompt", "instruction"])
    if shape == "messages":
        listed, expected = written(rng, messages(rng))
        return {"messages": listed, "prompt": 5, "output": {}}, expected
    if shape == "conversations":
        listed, expected = written(rng, messages(rng), ("from", "value"), NAMES)
        return {"conversations": listed}, expected
    if shape == "prompt":
        prompt, asked = written(rng, messages(rng, last="user"))
        completion, answered = written(rng, [{"role": "assistant", "content": rng.choice(TEXTS)}])
        if rng.random() < 0.3:
            asked = [{"role": "user", "content": (prompt := rng.choice(TEXTS))}]
        if rng.random() < 0.3:
            completion = rng.choice(TEXTS)
            answered = [{"role": "assistant", "content": completion}]
        return {"prompt": prompt, "completion": completion}, [
            *(message | {"weight": 0} for message in asked),
            *answered,
        ]
    instruction, more, answer = (rng.choice(TEXTS) for _ in range(3))
    record = {"instruction": parts(rng, instruction), "input": more, "output": parts(rng, answer)}
    if more == "":
        record |= rng.choice([{}, {"input": None}])
    question = "\n\n".join(text for text in (instruction, more) if text.strip())
    return record, [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]


def some_pair(rng):
    """`(record, [chosen, rejected])`, the prompt repeated, or apart, or both."""
    prompt = messages(rng, last="user")
    sides, expected = {}, []
    apart = rng.random() < 0.4
    for name in ("chosen", "rejected"):
        answer = [{"role": "assistant", "content": rng.choice(TEXTS)}]
        (asked, plain), (answered, end) = written(rng, prompt), written(rng, answer)
        sides[name] = answered if apart else asked + answered
        expected.append([dict(m) for m in (prompt if apart else plain)] + end)
    if apart:
        return sides | {"prompt": prompt}, expected
    given = [None, [], "", " \n", prompt, prompt[-1:], prompt[:1], prompt[-1]["content"]]
    if prompt[0]["role"] == "system":
        given.append(prompt[1:])
    return sides | {"prompt": rng.choice(given)}, expected


def outcome(path, fields=None):
    """`(records with their numbers, number of the record that an error names, or 0, or None)`."""
    found = []
    try:
        found.extend(item for item in records(path, fields))
    except InputError as error:
        text = one_line(error)
        assert text.startswith(f"{path}:") and len(text) < 700, text
        number = re.match(r":(\d+): ", text.removeprefix(str(path)))
        return found, int(number[1]) if number else 0
    return found, None
