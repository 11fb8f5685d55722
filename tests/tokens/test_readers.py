"""readers.py: every record with its number, whatever the kind of file."""

import gzip
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest

from data import Documents, encode_conversation
from pairs import chat, write
from program.errors import InputError
from tokens import readers
from tokens.readers import data_files, parse, read_batches, records

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


# ---- Of many kinds, and damaged


MANY = [chat("q", f"é {i} \u2028", id=f"r{i}") for i in range(1200)]


def write_as(suffix, folder):
    path = folder / f"data{suffix}"
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in MANY).encode()
    if suffix == ".jsonl":
        path.write_bytes(lines)
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif suffix == ".jsonl.zst":  # two frames, as of files put together
        zstandard = pytest.importorskip("zstandard")
        path.write_bytes(zstandard.compress(lines[:999]) + zstandard.compress(lines[999:]))
    elif suffix == ".json":
        path.write_text(json.dumps(MANY, indent=1))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(MANY), path)
    return path


def read(path):
    return [
        (number, parse(raw, path, number))
        for first, records, _ in read_batches(path)
        for number, raw in enumerate(records, first)
    ]


@pytest.mark.parametrize("suffix", [*readers.SUFFIXES, readers.ZSTD])
def test_every_kind_of_file_gives_the_same_records(suffix, tmp_path):
    """In order, numbered from 1, over several batches, the share read rising to 1."""
    path = write_as(suffix, tmp_path)
    assert read(path) == list(enumerate(MANY, 1))
    shares = [done for _, _, done in read_batches(path)]
    assert len(shares) == 3 and shares == sorted(shares) and 0 < shares[0] and shares[-1] == 1


def test_batches_are_bounded_in_records_and_in_bytes(tmp_path, monkeypatch):
    """Memory holds one batch: it ends with the record that fills it."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"123456\n" * 10 + b"1\n" * 10)
    monkeypatch.setattr(readers, "BATCH_RECORDS", 4)
    monkeypatch.setattr(readers, "BATCH_BYTES", 20)
    batches = [(first, len(records)) for first, records, _ in read_batches(path)]
    assert batches == [(1, 3), (4, 3), (7, 3), (10, 4), (14, 4), (18, 3)]


def test_a_zstd_file_that_is_not_whole(tmp_path, monkeypatch):
    """Cut short, or of another kind; or without the package that reads it."""
    path = write_as(".jsonl.zst", tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    with pytest.raises(InputError, match="data.jsonl.zst:.*: not a whole zstd file"):
        read(path)
    path.write_bytes(gzip.compress(b"{}"))
    with pytest.raises(InputError, match="not a whole zstd file"):
        read(path)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(InputError, match="reading it needs zstandard: pip install zstandard"):
        read(path)


def test_a_cloned_data_set(base, tmp_path):
    """Its files stand one folder down; what the Hub's programs keep beside them is no data."""
    for name in ("data", ".git", "README"):
        (tmp_path / name).mkdir()
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "data" / "dataset_info.json").write_text('{"features": {}}')
    (tmp_path / ".git" / "x.jsonl").write_text("no data")
    paths = [write(tmp_path / "data" / f"{k}.jsonl", [chat("q", "a")]) for k in "ab"]
    assert data_files([tmp_path]) == data_files([tmp_path / "data"]) == paths
    assert data_files([tmp_path / "dataset_infos.json"]) == [tmp_path / "dataset_infos.json"]
    documents = Documents([tmp_path], base, 99, encode_conversation)
    first, second = documents.summary().splitlines()
    skipped = "skipped, as no data: dataset_infos.json, dataset_info.json"
    assert first == f"{tmp_path}: data/a.jsonl, data/b.jsonl; {skipped}"
    assert second.startswith("2 conversations, ")
    write(tmp_path / "own.jsonl", [chat("q", "a")])
    assert data_files([tmp_path]) == [tmp_path / "own.jsonl"]
    (tmp_path / "own.jsonl").unlink()
    for path in paths:
        path.unlink()
    with pytest.raises(InputError, match="no .jsonl, .* file in this folder, nor in a folder in"):
        data_files([tmp_path])


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".json"])
def test_where_a_broken_file_ends_is_told_by_the_record(suffix, tmp_path, monkeypatch):
    """In the second batch: the number is that of the first record that cannot be read."""
    monkeypatch.setattr(readers, "BATCH_RECORDS", 500)
    path = write_as(suffix, tmp_path)
    if suffix == ".json":
        text = path.read_text().encode()
        path.write_bytes(text[: text.index(b"r700")])
    else:
        lines = "".join(json.dumps(r) + "\n" for r in MANY[:700]).encode()
        path.write_bytes(gzip.compress(lines)[:-8])  # all of the text, without its checksum
    # A list is parsed as a whole: its error names the line and the column, not the record.
    place = "not JSON" if suffix == ".json" else "not a whole gzip file"
    number = "" if suffix == ".json" else ":701"
    with pytest.raises(InputError, match=rf"data{suffix}{number}: {place} "):
        read(path)


def test_line_numbers_count_blank_lines(tmp_path, monkeypatch):
    """Wherever the borders of batches fall; a byte order mark and CR LF are no content."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}\n\n{"a": 3}')
    for size in (1, 2, 3, 512):
        monkeypatch.setattr(readers, "BATCH_RECORDS", size)
        found = [(number, r["a"]) for number, r in read(path) if r is not None]
        assert found == [(1, 1), (4, 2), (6, 3)]


@pytest.mark.parametrize(
    "line, problem",
    [(b'{"a"', "not JSON"), (b'"a"', "JSON str"), (b"[1]", "JSON list"), (b"\xff{}", "not UTF-8"),
     (b'\xef\xbb\xbf{"a": 1}', "not JSON"), (b"[" * 100_000, "not JSON")],
    ids=lambda x: str(x)[:12],
)  # fmt: skip
def test_bad_lines_are_named(line, problem, tmp_path):
    """File, number of the line, and what was found."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b"\n")
    with pytest.raises(InputError, match=f"a.jsonl:3: .*{problem}"):
        read(path)


def test_broken_files_are_named(tmp_path):
    """The error for gzip cut short, broken JSON or broken parquet names the file."""
    for suffix in (".jsonl.gz", ".parquet", ".json"):
        path = write_as(suffix, tmp_path)
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(InputError, match=f"data{suffix}"):
            read(path)
    path.write_text("{\n}")
    with pytest.raises(InputError, match="data.json:1: .*expected one JSON object a line"):
        read(path)


def test_what_data_means(tmp_path):
    """A folder is its data files, hidden ones and others left out; anything else is refused."""
    for name in ("b.jsonl", "a.parquet", ".c.jsonl", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.jsonl").mkdir()
    assert [p.name for p in data_files([tmp_path])] == ["a.parquet", "b.jsonl"]
    assert data_files([tmp_path / "b.jsonl", tmp_path])[0].name == "b.jsonl"
    for name, problem in (
        ("empty", "no .jsonl"), ("notes.txt", "unknown kind"), ("absent.jsonl", "no such file"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"{name}: {problem}"):
            data_files([tmp_path / name])
