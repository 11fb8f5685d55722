"""documents.py: records as token ids and masks, cut, left out and counted."""

import json

import pytest

from data import Documents, check_micro_tokens, encode_conversation
from pairs import chat, write
from program.errors import InputError
from tokens.tokenizer import Tokenizer


def test_documents_are_what_the_tokenizer_makes(base, conversations):
    """In the order of the file, ids and mask; lengths and trained counts are theirs."""
    documents = Documents([conversations], base, 10_000, encode_conversation)
    tokenizer = Tokenizer(base)
    records = [json.loads(line) for line in conversations.read_text().splitlines()]
    assert len(documents) == 24
    assert documents.truncated == documents.skipped == 0
    for i, record in enumerate(records):
        ids, trained = tokenizer.encode(record["messages"])
        assert [[a.tolist() for a in sequence] for sequence in documents[i]] == [[ids, trained]]
        assert documents.lengths[i] == len(ids) and documents.trained_counts[i] == sum(trained)
        answers = sum(m["role"] == "assistant" for m in record["messages"])
        assert (documents.turns[i], documents.numbers[i]) == (answers, i + 1)


@pytest.mark.parametrize("most", [2, 20, 57, 100])
def test_truncation_and_skipping_are_counted(base, conversations, most):
    """Cut on the right; what trains nothing then is skipped; trained tokens are counted after."""
    tokenizer = Tokenizer(base)
    records = [json.loads(line) for line in conversations.read_text().splitlines()]
    full = [tokenizer.encode(record["messages"]) for record in records]
    kept = [(ids[:most], mask[:most]) for ids, mask in full if any(mask[:most])]
    if not kept:
        with pytest.raises(InputError, match=f"none of the 24 .* first {most} tokens"):
            Documents([conversations], base, most, encode_conversation)
        return
    documents = Documents([conversations], base, most, encode_conversation)
    assert [tuple(a.tolist() for a in sequence) for sequence in sequences_of(documents)] == kept
    assert documents.lengths.tolist() == [[len(ids)] for ids, _ in kept]
    assert documents.trained_counts.tolist() == [[sum(mask)] for _, mask in kept]
    assert documents.truncated == sum(len(ids) > most for ids, _ in full) > 0
    assert documents.skipped == 24 - len(kept)
    numbers = [k for k, (_, mask) in enumerate(full, 1) if any(mask[:most])]
    assert documents.numbers[:, 0].tolist() == numbers
    assert f"{documents.truncated} truncated, {documents.skipped} without" in documents.summary()


def test_longer_ones_may_be_left_out_or_refused(base, conversations):
    """Instead of cut; those that fit are as they were, and it is another set of data."""
    most, tokenizer = 57, Tokenizer(base)
    lines = conversations.read_text().splitlines()
    lengths = [len(tokenizer.encode(json.loads(line)["messages"])[0]) for line in lines]
    fit = [k for k, length in enumerate(lengths, 1) if length <= most]
    cut, drop = (
        Documents([conversations], base, most, encode_conversation, too_long=how)
        for how in ("cut", "drop")
    )
    assert 0 < len(fit) < len(cut)
    assert drop.numbers[:, 0].tolist() == fit
    assert (drop.dropped, drop.truncated, drop.skipped) == (24 - len(fit), 0, 0)
    assert f" 0 truncated, {24 - len(fit)} longer ones left out, 0 without" in drop.summary()
    assert drop.key != cut.key
    first = next(k for k, length in enumerate(lengths, 1) if length > most)
    message = f"conversations.jsonl:{first}: {lengths[first - 1]} tokens, expected at most {most}"
    with pytest.raises(InputError, match=message):
        Documents([conversations], base, most, encode_conversation, too_long="error")
    whole = [
        Documents([conversations], base, max(lengths), encode_conversation, too_long=how)
        for how in ("cut", "drop", "error")
    ]
    assert len({documents.key for documents in whole}) == 1
    with pytest.raises(InputError, match="--too-long drop leaves out 24"):
        Documents([conversations], base, 5, encode_conversation, too_long="drop")


def test_several_files_and_folders_are_one_data_set(base, tmp_path):
    """In the order given, folders by name; a document's name says where it stood."""
    (tmp_path / "folder").mkdir()
    b = write(tmp_path / "folder" / "b.jsonl", [chat("q", "b", id="of-b")])
    records = [chat("q", "a"), chat("no answer"), chat("q", "aa")]
    a = write(tmp_path / "folder" / "a.jsonl", records)
    a.write_text("\n" + a.read_text().replace("\n", "\n  \n"))  # blank lines: records 2, 4 and 6
    records = [chat("q", "c", prompt_id="of-c"), *[chat("no answer")] * 5]
    c = write(tmp_path / "c.jsonl", records)
    documents = Documents([c, tmp_path / "folder"], base, 100, encode_conversation)
    tokenizer = Tokenizer(base)
    answers = [
        tokenizer.decode([13, *ids[trained].tolist()]) for ids, trained in sequences_of(documents)
    ]
    assert [text[-len(w) :] for text, w in zip(answers, ("c", "a", "aa", "b"), strict=True)] == [
        "c", "a", "aa", "b"
    ]  # fmt: skip
    assert (len(documents), documents.skipped) == (4, 6)
    assert list(documents.names([0, 1, 2, 3])) == [
        f"{c}:1 (id of-c)", f"{a}:2 (id None)", f"{a}:6 (id None)", f"{b}:1 (id of-b)"
    ]  # fmt: skip
    # Both files have a sixth record.
    assert list(documents.names([2, 0])) == [f"{c}:1 (id of-c)", f"{a}:6 (id None)"]


def trains_as_told(record, tokenizer):
    """Two sequences of two tokens, the second one trained where the record says so."""
    return [([1, 5], [False, trained]) for trained in record["trained"]]


def test_a_record_is_left_out_where_one_of_its_sequences_trains_nothing(base, tmp_path):
    """Whichever of the two it is: what is kept has trained tokens on both sides."""
    sides = ((True, True), (True, False), (False, True), (False, False), (True, True))
    path = write(tmp_path / "sides.jsonl", [{"trained": both} for both in sides])
    documents = Documents([path], base, 9, trains_as_told, per_record=2)
    assert documents.numbers.tolist() == [[1, 1], [5, 5]] and documents.skipped == 3
    assert documents.trained_counts.tolist() == [[1, 1], [1, 1]]


def sequences_of(documents):
    return documents.sequences(range(len(documents)))


def test_the_key_is_of_the_contents(base, tmp_path):
    """A copy elsewhere is the same data; another order, or one more byte, is not."""
    (tmp_path / "copy").mkdir()
    one, two = chat("q", "1"), chat("q", "2")
    a, b = write(tmp_path / "a.jsonl", [one]), write(tmp_path / "b.jsonl", [two])
    copies = [
        write(tmp_path / "copy" / f"{n}.jsonl", [each]) for n, each in (("x", one), ("y", two))
    ]

    def key(paths):
        return Documents(paths, base, 100, encode_conversation).key

    assert key([a, b]) == key(copies) != key([b, a])
    b.write_text(b.read_text() + "\n")
    assert key([a, b]) != key(copies)


def test_a_row_too_short_for_the_longest_document_is_refused(base, tmp_path):
    """With the number that would do, and where the document stands."""
    path = write(tmp_path / "a.jsonl", [chat("q", "a"), chat("q", "long " * 20, id="it")])
    documents = Documents([path], base, 100, encode_conversation)
    longest = documents.lengths[1, 0]
    check_micro_tokens(documents, longest)
    with pytest.raises(InputError, match=rf"at least {longest}, .*a.jsonl:2 \(id it\)"):
        check_micro_tokens(documents, longest - 1)


@pytest.mark.parametrize(
    "record, problem",
    [
        ({}, "found no field, expected messages, or"),
        ({"text": "hi", "label": 1}, "found label, text, expected messages, or conversations, or"),
        ({"messages": []}, r"messages is \[\]"),
        ({"messages": "hi"}, 'messages is "hi"'),
        ({"messages": ["hi"]}, r'messages\[0\] is "hi"'),
        (chat("a", None), r"messages\[1\].content is null"),
        (chat("a", ["b"]), r'messages\[1\].content\[0\] is "b", expected a part of type text'),
        (chat("a", []), r"messages\[1\].content is \[\], expected a string or a list of text"),
        ({"messages": [{"role": "tool", "content": ""}]}, r'role is "tool", expected one of'),
        ({"messages": [{"content": ""}]}, "role is null"),
        ({"messages": [{"role": ["user"], "content": ""}]}, r'role is \["user"\]'),
        (chat("a\ud800b"), "lone surrogate '.ud800' at character 1"),
    ],
    ids=str,
)
def test_records_of_another_schema_are_refused(base, tmp_path, record, problem):
    """The message, the field and what was found, behind the file and the line."""
    path = write(tmp_path / "a.jsonl", [chat("q", "a"), record])
    with pytest.raises(InputError, match=rf"a.jsonl:2: .*{problem}"):
        Documents([path], base, 100, encode_conversation)
