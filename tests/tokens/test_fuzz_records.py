"""Thousands of random records: each becomes the messages that it was made of, or is refused."""

import json
import random

import pytest

from random_records import some_conversation, some_pair
from tokens.shapes import conversation, pair

WRONG = [None, 0, 5, 1.5, True, False, {}, [], [5], [None], [{"type": "image"}], [{"type": "text"}]]
NO_LIST = [0, 5, True, False, {}, [], [5], [None], ["Hi"], [[]], [{}]]  # nor text


def spoiled(rng, record):
    """The record with one wrong value where its messages are."""
    record = json.loads(json.dumps(record))
    fields = ["messages", "conversations", "instruction", "chosen", "rejected"]
    shape = next((name for name in fields if name in record), "prompt")
    if shape == "instruction":
        value = rng.choice([value for value in WRONG if value is not None])
        return record | {rng.choice(["instruction", "input", "output"]): value}
    name = rng.choice(["prompt", "completion"]) if shape == "prompt" else shape
    listed = record[name]
    if isinstance(listed, str) or rng.random() < 0.2:
        wrong = [value for value in NO_LIST if shape != "chosen" or value != []]
        return record | {name: rng.choice(wrong)}
    message = rng.choice(listed)
    role, content = ("from", "value") if shape == "conversations" else ("role", "content")
    kind = rng.randrange(4)
    if kind == 0:
        message[content] = rng.choice([*WRONG, "a\ud800"])
    elif kind == 1:
        message[role] = rng.choice([*WRONG, "User", "tool", "", " user"])
    elif kind == 2:
        listed[rng.randrange(len(listed))] = rng.choice(
            [None, 0, 5, True, "Hi", [], ["user", "Hi"]]
        )
    else:
        answer = {role: "assistant", content: "Hi"}
        wrong = [("weight", 0.5), ("weight", 2), ("weight", "0"), ("weight", []), ("train", "no"),
                 ("weight", float("nan")), ("train", {}), ("tool_calls", [{"name": "f"}]),
                 ("function_call", {"name": "f"})]  # fmt: skip
        listed[rng.randrange(len(listed))] = answer | dict([rng.choice(wrong)])
    return record


def check_record(rng):
    for make, read in ((some_conversation, conversation), (some_pair, pair)):
        record, expected = make(rng)
        assert read(record) == expected, record
        bad = spoiled(rng, record)
        with pytest.raises(ValueError) as caught:
            raise AssertionError(f"taken: {bad} as {read(bad)}")
        assert 0 < len(str(caught.value)) < 500


def test_records_become_the_messages_they_were_made_of():
    """In every documented way to write them; and one wrong value anywhere is refused."""
    for seed in range(1000):
        check_record(random.Random(seed))
