"""benchmarks/packing.py: the tokens of one update, counted."""

import json

from benchmarks import packing
from pairs import message, write


def test_tokens_by_layout():
    """Packed: the conversations' own; padded: each batch as wide as its longest conversation."""
    lengths = [3, 5, 2, 2, 9]
    assert packing.computed(lengths, [[4, 1], [0, 2, 3]], 16) == {
        "packed": 21,
        "padded, 4 a batch": 4 * 5 + 9,
        "padded, 16 a batch": 5 * 9,
        "padded to 16": 5 * 16,
    }


def test_runs_of_positions():
    """Neighbours are one run; a gap of one ends it."""
    assert packing.spans([3, 4, 5, 7, 9]) == [[3, 6], [7, 8], [9, 10]]


def test_counts_of_a_file(tmp_path, tokenizer_folder):
    """An update's conversations, each of them in one row that is not too long, whose trained runs
    end where the conversation ends; and no path of the machine in the file."""
    chats = [[message("user", "w " * n), message("assistant", "yes")] for n in (1, 9, 4, 30, 2, 7)]
    records = [{"dataset": "x", "id": str(i), "messages": m} for i, m in enumerate(chats)]
    write(tmp_path / "chats.jsonl", records)
    flags = {"data": tmp_path / "chats.jsonl", "out": tmp_path / "out.json", "batch-size": 5}
    flags |= {"tokenizer": tokenizer_folder, "micro-tokens": 90}
    packing.main([word for flag, value in flags.items() for word in (f"--{flag}", str(value))])
    text = (tmp_path / "out.json").read_text()
    results = json.loads(text)
    lengths, rows = results["lengths"], results["rows"]
    assert len(lengths) == 5 and sorted(i for row in rows for i in row) == list(range(5))
    assert all(sum(lengths[i] for i in row) <= 90 for row in rows) and len(rows) > 1
    assert [spans[-1][1] for spans in results["trained"]] == lengths
    assert results["computed_tokens"]["packed"] == sum(lengths)
    assert results["data"] == "chats.jsonl" and str(tmp_path) not in text
