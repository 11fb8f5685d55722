"""readers.py: every record with its number, whatever the kind of file."""

import gzip
import json

import pytest

from program.errors import InputError
from tokens import readers
from tokens.readers import data_files, records

RECORDS = [{"a": k, "text": "é😀\n" * k} for k in range(7)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", LINES.encode()),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.json", json.dumps(RECORDS, ensure_ascii=False).encode()),
        ("a.json", b"\xef\xbb\xbf \n" + json.dumps(RECORDS, indent=1).encode() + b"\n\n"),
        ("a.json", LINES.encode()),
        ("a.json", b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode()),
    ],
    ids=["lines", "gzip", "list", "indented list", "lines in .json", "BOM and CR LF in .json"],
)
@pytest.mark.parametrize("size", [1, 3, 512])
def test_records_are_numbered_from_one(tmp_path, monkeypatch, name, content, size):
    """Every kind of file gives the same records, over batches of any size."""
    monkeypatch.setattr(readers, "BATCH_RECORDS", size)
    path = tmp_path / name
    path.write_bytes(content)
    assert list(records(path)) == list(enumerate(RECORDS, 1))


def test_blank_lines_are_counted_and_skipped(tmp_path):
    """A record's number is that of its line."""
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"a": 1}\n \n\n{"a": 2}')
    assert list(records(path)) == [(2, {"a": 1}), (5, {"a": 2})]


def test_records_before_a_bad_line_come_first(tmp_path):
    """An error is raised where the bad line is met, with its number."""
    path = tmp_path / "a.jsonl"
    path.write_text(LINES + "{")
    rows = records(path)
    assert [next(rows)[1] for _ in RECORDS] == RECORDS
    with pytest.raises(InputError, match="a.jsonl:8: not JSON .*expected one JSON object a line"):
        next(rows)


def test_a_folder_is_read_whole_or_refused(tmp_path):
    """Hidden files and folders are no data; a link to what is not there is, and cannot be read."""
    for name in ("b.parquet", "a.jsonl", ".c.json", "README.md"):
        (tmp_path / name).touch()
    (tmp_path / "d.json").mkdir()
    assert data_files([tmp_path]) == [tmp_path / "a.jsonl", tmp_path / "b.parquet"]
    (tmp_path / "e.json").symlink_to(tmp_path / "blob")
    with pytest.raises(InputError, match=r"e.json: no such file or folder \(a link to .*blob\)"):
        data_files([tmp_path])
