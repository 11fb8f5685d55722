"""records.py: the shapes of records, what is trained in them, and which records are refused."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import sft
from program.errors import InputError
from tokens.documents import Documents
from tokens.readers import parse
from tokens.records import encode_conversation, encode_pair
from tokens.shapes import conversation, pair, remark
from tokens.tokenizer import Tokenizer


def user(text, **more):
    return {"role": "user", "content": text, **more}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "Be brief."}
HI = [user("Hi"), assistant("Hello!")]


def trained_text(record, tokenizer):
    """The whole text and its trained parts, with EOS written out."""
    ((ids, trained),) = encode_conversation(record, tokenizer)
    kept = [i for i, mark in zip(ids, trained, strict=True) if mark]
    return tokenizer.visible(ids), tokenizer.visible(kept)


# ---- Shapes of conversations


@pytest.mark.parametrize(
    "record",
    [
        {"messages": HI, "prompt": "something else", "prompt_id": 5, "completion": None},
        {"messages": [user([{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]), HI[1]]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
        {"prompt": "Hi", "completion": "Hello!", "messages": None},
        {"prompt": HI[:1], "completion": HI[1:]},
        {"prompt": "Hi", "completion": HI[1:]},
        {"instruction": "Hi", "input": "", "output": "Hello!"},
        {"instruction": "Hi", "output": "Hello!", "input": None, "system": ""},
        {"instruction": " ", "output": "Hello!", "input": "Hi"},
        {"messages": HI, "system": "", "history": [], "tools": "[]"},
        {"messages": HI, "system": None, "history": None, "tools": None, "source": "x"},
        {"instruction": "Hi", "output": "Hello!", "system": " \n", "history": "", "tools": []},
    ],
    ids=str,
)
def test_every_shape_becomes_the_same_messages(base, record):
    """Messages, text parts, ShareGPT's, prompt and completion, Alpaca's: one conversation."""
    tokenizer = Tokenizer(base)
    assert encode_conversation(record, tokenizer) == [tokenizer.encode(HI)]


def test_alpacas_input_follows_a_blank_line():
    """As in Alpaca's own prompt: first the instruction, then what it is to be done on."""
    record = {"instruction": "Add.", "input": "2, 3", "output": "5"}
    assert conversation(record) == [user("Add.\n\n2, 3"), assistant("5")]


AFTER_SYSTEM = [
    {"messages": HI},
    {"messages": [SYSTEM, *HI]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
    {"prompt": "Hi", "completion": "Hello!"},
    {"prompt": [SYSTEM, *HI[:1]], "completion": "Hello!"},
    {"instruction": "Hi", "output": "Hello!"},
]


@pytest.mark.parametrize("record", AFTER_SYSTEM, ids=str)
@pytest.mark.parametrize("text", [" Be brief.\n", [{"type": "text", "text": "Be brief."}]])
def test_a_system_text_becomes_the_first_message_once(base, record, text):
    """Beside every shape, where its messages do not begin with the same text."""
    tokenizer = Tokenizer(base)
    found = encode_conversation(record | {"system": text}, tokenizer)
    assert found == [tokenizer.encode([SYSTEM, *HI])]
    assert remark(record | {"system": text}, False).endswith(
        "system text becomes the first message"
    )


def test_alpacas_history_stands_before_its_instruction(base):
    """After the system text; its answers are trained, as LLaMA-Factory trains them."""
    record = {"instruction": "Add.", "input": "2, 3", "output": "5", "system": "Be brief."}
    record |= {"history": [["Hi", "Hello!"], ["And you?", "Fine."]]}
    asked = [user("And you?"), assistant("Fine."), user("Add.\n\n2, 3"), assistant("5")]
    tokenizer = Tokenizer(base)
    assert encode_conversation(record, tokenizer) == [tokenizer.encode([SYSTEM, *HI, *asked])]
    assert trained_text(record, tokenizer)[1] == "Hello!</s>Fine.</s>5</s>"


def test_of_a_completion_the_prompts_answers_are_context(base):
    """An answer inside `prompt` is not trained; the completion is."""
    tokenizer = Tokenizer(base)
    record = {"prompt": [SYSTEM, *HI, user("And you?")], "completion": "Fine."}
    text, trained = trained_text(record, tokenizer)
    whole = [SYSTEM, *HI, user("And you?"), assistant("Fine.")]
    assert (text, trained) == (tokenizer.visible(tokenizer.encode(whole)[0]), "Fine.</s>")


@pytest.mark.parametrize(
    "record, problem",
    [
        ({"chosen": HI, "rejected": HI}, "found chosen, rejected, expected messages, or"),
        ({"prompt": "Hi"}, "found prompt, expected messages, or conversations, or prompt and com"),
        ({"conversations": [{"from": "tool", "value": ""}]}, r"\[0\].from is \"tool\", expected"),
        ({"conversations": [{"from": "gpt"}]}, r"conversations\[0\].value is null"),
        ({"conversations": HI}, r"conversations\[0\].from is null, expected one of human, gpt"),
        ({"prompt": HI, "completion": "no"}, "prompt ends with assistant"),
        ({"prompt": "Hi", "completion": [user("x")]}, "completion begins with user"),
        ({"prompt": 5, "completion": "no"}, "prompt is 5"),
        ({"prompt": "Hi", "completion": ["no"]}, r'completion\[0\] is "no"'),
        ({"instruction": 5, "output": "no"}, "instruction is 5, expected a string"),
        ({"instruction": "a", "input": {"a": 1}, "output": "no"}, "input is {"),
        ({"messages": HI, "system": 5}, "system is 5, expected a string"),
        ({"messages": [SYSTEM, *HI], "system": "Be."}, 'is "Be." and the system message is "Be br'),
        ({"messages": HI, "history": [["a", "b"]]}, "history is .* only Alpaca's is read"),
        ({"conversations": [{"from": "gpt", "value": "a"}], "history": "a"}, 'history is "a", exp'),
        ({"messages": HI, "tools": [{"name": "f"}]}, "tools is .*expected none: the chat format"),
        ({"instruction": "a", "output": "no", "tools": "f"}, 'tools is "f", expected none'),
        ({"instruction": "a", "output": "no", "history": {"a": 1}}, "history is {.*, expected a l"),
        ({"instruction": "a", "output": "no", "history": [["a"]]}, r'history\[0\] is \["a"\], exp'),
        (
            {"instruction": "a", "output": "no", "history": [["a", None]]},
            r"history\[0\]\[1\] is nu",
        ),
        ({"messages": [user([{"type": "image"}])]}, r"content\[0\] is {\"type\": \"image\"}, exp"),
        ({"messages": [user([{"type": "text", "text": 5}])]}, r"content\[0\] is {"),
    ],
    ids=str,
)
def test_records_of_no_known_shape_are_refused(base, record, problem):
    """What was found, by the record's own names, and what would be taken."""
    with pytest.raises(ValueError, match=problem):
        encode_conversation(record, Tokenizer(base))


# ---- What is trained


@pytest.mark.parametrize("off", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"train": 0}])
@pytest.mark.parametrize("on", [{}, {"weight": 1}, {"train": True, "weight": None}])
def test_an_answer_may_be_context(base, off, on):
    """`weight: 0` and `train: false` take an answer and its EOS out of the loss, and no token."""
    tokenizer = Tokenizer(base)
    plain = [user("2+2?"), assistant("WRONG"), user("Again?"), assistant("4")]
    marked = [plain[0], plain[1] | off, plain[2], plain[3] | on]
    text, trained = trained_text({"messages": marked}, tokenizer)
    assert (text, trained) == (tokenizer.visible(tokenizer.encode(plain)[0]), "4</s>")
    turns = [{"from": m["role"], "value": m["content"]} for m in plain]
    turns[1] |= off
    assert trained_text({"conversations": turns}, tokenizer) == (text, trained)


def test_answers_that_are_not_trained_are_no_turns(base, tmp_path):
    """The count of trained answers, and a conversation in which none is trained is left out."""
    path = tmp_path / "a.jsonl"
    off = [user("a"), assistant("b", weight=0)]
    rows = [off, [*off, user("c"), assistant("d")]]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    documents = Documents([path], base, 100, encode_conversation)
    assert (documents.skipped, documents.turns.tolist()) == (1, [[1]])


@pytest.mark.parametrize(
    "more, problem",
    [
        ({"weight": 0.5}, r"messages\[1\].weight is 0.5, expected 0 or 1"),
        ({"weight": 2}, "weight is 2"),
        ({"weight": -1}, "weight is -1"),
        ({"weight": float("nan")}, "weight is NaN"),
        ({"weight": "0"}, 'weight is "0"'),
        ({"train": "no"}, r"messages\[1\].train is \"no\", expected 0 or 1, false or true"),
        ({"train": []}, r"train is \[\]"),
        ({"content": "", "tool_calls": [{"name": "f"}]}, r"messages\[1\].tool_calls is \[{"),
        ({"content": None, "tool_calls": [{"name": "f"}]}, r"messages\[1\].tool_calls is \[{"),
        ({"content": "Wait.", "tool_calls": [{"name": "f"}]}, "expected an answer in words"),
        ({"content": None, "function_call": {"name": "f"}}, r"messages\[1\].function_call is {"),
        ({"content": None}, "content is null, expected a string"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_as_told_is_refused(base, more, problem):
    """Weights between 0 and 1, and calls, for which the chat format has no words."""
    with pytest.raises(ValueError, match=problem):
        encode_conversation({"messages": [user("a"), assistant("b") | more]}, Tokenizer(base))


def test_fields_that_say_nothing_change_nothing(base):
    """An empty list of calls, null, and a user's weight: parquet files are full of them."""
    tokenizer = Tokenizer(base)
    plain = {"weight": None, "train": None, "tool_calls": [], "function_call": None}
    odd = [user("a", weight=3), assistant("b", **plain)]
    expected = [tokenizer.encode([user("a"), assistant("b")])]
    assert encode_conversation({"messages": odd}, tokenizer) == expected


# ---- Pairs


ASKED = [SYSTEM, user("Name a colour.")]
WHOLE = {"chosen": [*ASKED, assistant("Blue.")], "rejected": [*ASKED, assistant("Seven.")]}
APART = {"chosen": [assistant("Blue.")], "rejected": [assistant("Seven.")]}


@pytest.mark.parametrize(
    "record",
    [
        WHOLE,
        APART | {"prompt": ASKED},
        WHOLE | {"prompt": ASKED},
        WHOLE | {"prompt": ASKED[:1]},
        WHOLE | {"prompt": " Name a colour.\n"},
        WHOLE | {"prompt": ASKED[1:]},
        WHOLE | {"prompt": ""},
        WHOLE | {"prompt": None},
        WHOLE | {"prompt": ASKED, "rejected": APART["rejected"]},
        WHOLE | {"system": "Ignored.", "tools": ["f"], "history": [5]},
        APART | {"prompt": "Name a colour.", "system": "Be brief."},
    ],
    ids=str,
)
def test_a_prompt_stands_before_its_answers_once(base, record):
    """Apart or repeated, with a system message or without: the pair is the same."""
    assert encode_pair(record, Tokenizer(base)) == encode_pair(WHOLE, Tokenizer(base))


def test_a_prompt_of_text_is_a_users_message(base):
    """As in UltraFeedback, where it repeats the first message."""
    tokenizer = Tokenizer(base)
    whole = {name: [user("Hi"), *answer] for name, answer in APART.items()}
    expected = encode_pair(whole, tokenizer)
    assert encode_pair(APART | {"prompt": "Hi"}, tokenizer) == expected
    assert encode_pair(whole | {"prompt": "Hi"}, tokenizer) == expected
    assert remark(APART | {"prompt": "Hi"}, True) and not remark(whole | {"prompt": "Hi"}, True)


def test_a_conversation_may_begin_with_the_assistant(base):
    """Where the prompt holds its greeting, too, it is not put before it again."""
    tokenizer = Tokenizer(base)
    prompt = [assistant("Welcome."), user("Hi")]
    whole = {name: [*prompt, *answer] for name, answer in APART.items()}
    expected = encode_pair(whole, tokenizer)
    assert encode_pair(whole | {"prompt": prompt}, tokenizer) == expected
    assert encode_pair(APART | {"prompt": prompt}, tokenizer) == expected


@pytest.mark.parametrize(
    "record, problem",
    [
        (WHOLE | {"prompt": "Name a number."}, r'chosen begins with \["user", "Name a colour."\]'),
        (WHOLE | {"prompt": [user("Name a number.")]}, "expected the same, or an answer that foll"),
        (WHOLE | {"prompt": [user("Be brief.")]}, "chosen begins with"),
        (WHOLE | {"prompt": WHOLE["chosen"]}, "chosen begins with"),
        (WHOLE | {"prompt": 5}, "prompt is 5"),
        (APART | {"prompt": [*ASKED, assistant("Red?")]}, "chosen begins with"),
        (APART | {"prompt": ["Hi"]}, r'prompt\[0\] is "Hi", expected an object'),
        (APART | {"prompt": "Hi", "tools": "f"}, 'tools is "f", expected none: the chat format'),
        (APART | {"question": "Hi"}, r"nothing before its answer, .* \(found chosen, question, re"),
        ({"messages": HI}, "found messages, expected chosen and rejected"),
        (WHOLE | {"prompt": "Name a colour.", "rejected": HI}, "rejected begins with"),
        (WHOLE | {"chosen": "Blue."}, 'chosen is "Blue.", expected a list of messages'),
    ],
    ids=str,
)
def test_pairs_without_one_prompt_are_refused(base, tmp_path, record, problem):
    """A prompt that says something else than the answers' beginning, or none at all."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(WHOLE) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(InputError, match=rf"a.jsonl:2: .*{problem}"):
        Documents([path], base, 200, encode_pair, per_record=2)


# ---- What a user sees


def test_the_start_says_what_became_of_another_shape(base, tmp_path):
    """One line for a shape, with file and record; none for plain messages."""
    paths = [tmp_path / f"{name}.jsonl" for name in "abc"]
    paths[0].write_text(json.dumps({"messages": HI}) + "\n")
    for path in paths[1:]:
        path.write_text("\n" + json.dumps({"prompt": "Hi", "completion": "Hello!"}) + "\n")
    lines = Documents(paths, base, 200, encode_conversation).summary().splitlines()
    assert lines[0] == f"{paths[1]}:2: prompt and completion: the completion is trained"
    assert len(lines) == 2 and lines[1].startswith("3 conversations, ")


def test_data_py_shows_pairs(base, tmp_path, capsys):
    """Prompt, chosen and rejected, the answers' tokens in brackets; it counts pairs."""
    path = tmp_path / "a.jsonl"
    record = APART | {"prompt": ASKED, "messages": HI}
    path.write_text((json.dumps(record) + "\n") * 2)
    flags = {"model": str(base), "data": [str(path)], "show": 1}
    data.main(flags)
    shown = capsys.readouterr().out
    documents = Documents([path], base, 200, encode_pair, per_record=2)
    total = documents.tokens.sum()
    assert f"2 pairs, {total:,} tokens, {documents.trained_counts.sum()} trained;" in shown
    assert f"tokens of a pair: mean {total // 2}; " in shown and "an update of 2 pairs " in shown
    shown = shown[shown.index("a.jsonl:1 (id None), prompt, ") :]
    prompt = "<s> <|system|>\nBe brief.\n<|user|>\nName a colour.\n<|assistant|>\n"
    assert prompt in shown and "⟦" not in shown[: shown.index(prompt) + len(prompt)]
    assert "chosen, " in shown and "\n⟦Blue.</s>⟧\n" in shown
    assert "rejected, " in shown and "\n⟦Seven.</s>⟧\n" in shown
    data.main(flags | {"pairs": False})
    assert "2 conversations, " in (shown := capsys.readouterr().out) and "⟦Hello!</s>⟧" in shown


def test_only_columns_that_are_needed_are_read(base, tmp_path):
    """A column of another use may hold what Python cannot; in messages, the record is named."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    late = pyarrow.array([9_000_000] * 3, pyarrow.date32())  # the year 26611
    fine = pyarrow.array([1700000000123456789] * 3, pyarrow.timestamp("ns"))
    table = pyarrow.table({"messages": [HI] * 3, "until": late, "created_at": fine})
    parquet.write_table(table, path)
    assert len(Documents([path], base, 100, encode_conversation)) == 3
    parquet.write_table(pyarrow.table({"until": late, "text": ["a"] * 3}), path)
    with pytest.raises(InputError, match="a.parquet:1: found text, until, expected messages, or"):
        Documents([path], base, 100, encode_conversation)
    late = pyarrow.array([1, None, 9_000_000], pyarrow.date32())
    parquet.write_table(pyarrow.table({"id": ["a"] * 3, "messages": late}), path)
    with pytest.raises(InputError, match="a.parquet:3: messages cannot be read .*out of range"):
        Documents([path], base, 100, encode_conversation)


def test_a_pipe_is_no_data(refused, tmp_path):
    """It would be waited for without end, and could be read only once."""
    import os

    path = tmp_path / "a.jsonl"
    os.mkfifo(path)
    assert f"{path}: a pipe or a device, expected a file" in refused(data=[str(path)])
    (tmp_path / "b.json").symlink_to("/dev/zero")
    assert "b.json: a pipe or a device" in refused(data=[str(tmp_path / "b.json")])


# ---- Anything at all


WORDS = st.sampled_from(
    ["messages", "conversations", "prompt", "completion", "instruction", "input", "output", "role",
     "chosen", "rejected", "content", "from", "value", "weight", "train", "tool_calls", "type",
     "text", "user", "assistant", "system", "history", "tools", "human",
     "gpt", "Hi", "", "a\ud800", " \n", "</s>"]
)  # fmt: skip
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-2, 2), st.floats(), WORDS)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", 5]), "content": SCALARS},
        optional={"weight": SCALARS, "train": SCALARS, "tool_calls": SCALARS},
    ),
    max_size=4,
)
VALUES = st.recursive(
    SCALARS | MESSAGES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)
RECORDS = st.dictionaries(WORDS, VALUES, max_size=6)


@settings(derandomize=True, deadline=None, database=None, max_examples=300)
@given(RECORDS)
def test_any_record_is_encoded_or_refused(base_tokenizer, record):
    """Masks as long as the ids, or a `ValueError` with a short text; nothing else."""
    for encode in (encode_conversation, encode_pair):
        try:
            for ids, trained in encode(record, base_tokenizer):
                assert len(ids) == len(trained) and not trained[0]
            remark(record, encode is encode_pair)
        except ValueError as error:
            assert 0 < len(str(error)) < 500


def test_what_is_nested_too_deeply_is_refused():
    """Wherever Python's stack ends: while it is read, or when it is put into the message."""
    limit = sys.getrecursionlimit()
    for depth in range(limit - 200, limit + 5):
        deep = "[" * depth + "]" * depth
        for line in ('{"messages": %s}', '{"messages": [%s]}', '{"chosen": %s}'):
            with pytest.raises(ValueError) as caught:
                record = parse((line % deep).encode(), "a.jsonl", 1)
                (conversation if "messages" in record else pair)(record)
            assert len(str(caught.value)) < 500


@pytest.fixture(scope="session")
def base_tokenizer(base):
    return Tokenizer(Path(base))


def test_sft_trains_another_shape_as_messages(base, tmp_path):
    """The weights after a run on Alpaca's records are those of the same conversations."""
    weights = []
    alpaca = {"instruction": "Add.", "input": "2, 3", "output": "5"}
    messages = {"messages": [user("Add.\n\n2, 3"), assistant("5")]}
    for name, record in (("a", alpaca), ("b", messages)):
        path, out = tmp_path / f"{name}.jsonl", tmp_path / name
        path.write_text((json.dumps(record) + "\n") * 4)
        flags = {"model": str(base), "data": [str(path)], "out": str(out), "batch_size": 2}
        sft.main(flags | {"max_steps": 2, "lr": 1e-2})
        weights.append((out / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != (base / "model.safetensors").read_bytes()
