"""The readers of the mixture: records in bounded memory, and what a broken file says."""

import gzip
import io
import json
import sys

import pytest

from program.errors import InputError
from tulu_mixture.readers import list_items, records


def test_list_items_at_every_chunk_size():
    """The records are equal wherever a read ends: in a string, escape, number or character."""
    items = [
        {"a": 'quote " brace } bracket ] \\ back\\"', "b": [1, 22, {"c": None}]},
        {},
        {"é字😀": "\u2028 \U0001f600 \ud83d", "n": -12.5e-3},
        {"deep": [[[{"x": [True, False]}]]]},
    ]
    for ascii_only in (True, False):
        escaped = items if ascii_only else [*items[:2], {"é字😀": "\u2028"}, items[3]]
        for text in (json.dumps(escaped, ensure_ascii=ascii_only),
                     json.dumps(escaped, ensure_ascii=ascii_only, indent=4) + "\n\n"):  # fmt: skip
            data = text.encode()
            for size in (*range(1, 40), 1 << 20):
                assert list(list_items(io.BytesIO(data), size)) == escaped
    for empty in (b"[]", b" [ \n ] \n"):
        assert list(list_items(io.BytesIO(empty), 1)) == []


@pytest.mark.parametrize(
    ("text", "items", "message"),
    [
        ("", 0, r"expected \[, found the end of the file"),
        ("{}", 0, r"expected \[, found {"),
        ("[1]", 0, "expected {, found 1"),
        ("[{},]", 1, r"expected {, found \]"),
        ("[{} {}]", 1, r"expected , or \], found {"),
        ("[{}", 1, "found the end of the file"),
        ("[{},", 1, "found the end of the file"),
        ('[{}, {"a": "b', 1, "Unterminated string"),
        ('[{}, {"a" 1}, {}]', 1, "Expecting ':' delimiter"),
        ("[{}] {}", 1, "more text after the end"),
        ("[{}, {'a': 1}]", 1, "Expecting property name"),
    ],
)
def test_broken_lists(text, items, message):
    """At any chunk size the records before the fault come, then an error says what is wrong."""
    for size in (1, 3, 1000):
        got, rows = 0, list_items(io.BytesIO(text.encode()), size)
        with pytest.raises(ValueError, match=message):
            for _ in rows:
                got += 1
        assert got == items


def test_a_broken_list_is_not_read_to_its_end(monkeypatch):
    """Reading stops a bounded number of characters after a fault."""
    monkeypatch.setattr("tulu_mixture.readers.LONGEST", 1000)
    broken = io.BytesIO(b'[{"a" 1}' + b" " * 1_000_000 + b"]")
    with pytest.raises(ValueError):
        list(list_items(broken, 10))
    assert broken.tell() < 5000


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"inputs": "q"}\n\n{"inputs": \n', "a.jsonl:3: not JSON (Expecting value"),
        ("a.jsonl", b'{}\n{"a": "\xff"}\n', "a.jsonl:2: not UTF-8"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}\n", "a.jsonl:1: not JSON (Exceeds the limit"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: not JSON (maximum recursion depth"),
        ("a.json", b'[{}, {"a": "\xff"}]', "a.json:1: not UTF-8"),
        ("a.json", b'[{}, {"a": "\xe5\xad', "a.json:2: not UTF-8"),
        ("a.json", b"[{}, {]", "a.json:2: not JSON: Expecting property name"),
        ("a.json", b'[{"a": ' + b"[" * 100_000, "a.json:1: JSON nested too deeply"),
        ("a.jsonl.gz", b"plain", "a.jsonl.gz:1: not a whole gzip file (Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b"{}\n" * 9, mtime=0)[:-9], "a.jsonl.gz:"),
        ("a.parquet", b"PAR1", "a.parquet: not a readable parquet file"),
        ("a.csv", b'Prompt,Output\n"q,a\n', "a.csv:1: unexpected end of data"),
        ("a.csv", b"Prompt,Output\nq,a\nq\n", "a.csv:2: found a row of other length"),
        ("a.csv", b"Prompt,Output\nq,a,b\n", "a.csv:1: found a row of other length"),
        ("a.csv", b"Prompt,Output\nq,\xff\n", "a.csv:1: not UTF-8"),
        ("a.txt", b"", "a.txt: expected a file name that ends in .jsonl"),
    ],
)
def test_unreadable_files(tmp_path, name, data, message):
    """The error names the file, the place in it and the reason."""
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError) as error:
        list(records(tmp_path / name))
    assert message in str(error.value)


def test_parquet_is_read_in_pieces(tmp_path):
    """Of a file with one row group, memory holds a small part."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": [f"{i:0500}" for i in range(40_000)]})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, compression="none", use_dictionary=False)
    del table
    before, rows = pyarrow.total_allocated_bytes(), records(path)
    next(rows)
    # 40,000 * 500 bytes = 20 MB. Held: a batch of 512 rows and read buffers of 1 MiB.
    assert pyarrow.total_allocated_bytes() - before < 6_000_000
    assert sum(1 for _ in rows) == 39_999


def test_parquet_is_optional(tmp_path, monkeypatch):
    """Without pyarrow, the error for a parquet file says what to install."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="a.parquet: .* pip install pyarrow"):
        list(records(tmp_path / "a.parquet"))
