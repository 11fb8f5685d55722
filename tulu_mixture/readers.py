"""Finds data files and yields their records, one at a time, each with its place for messages.

What readers.py reads, one record at a time, and CSV with a header. Memory holds a record and a
buffer, never the file. A leaf of `mixture.py`.
"""

import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import zlib
from pathlib import Path

from program.errors import InputError
from tokens.readers import list_items, parquet

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv")
BLANK = object()  # stands for an empty line, which has a number but no record
UNREADABLE = (ValueError, RecursionError, EOFError, zlib.error, gzip.BadGzipFile, csv.Error)
BOM = codecs.BOM_UTF8  # some editors put it at the beginning of a file


def records(path):
    """Yield (place, record) for every record; `InputError`, with its place, where one is broken."""
    unit = "line" if path.name.endswith((".jsonl", ".jsonl.gz")) else "record"
    number = 0
    try:
        for number, record in enumerate(items(path), 1):
            if record is not BLANK:
                yield f"{path}: {unit} {number}", record
    except InputError:
        raise
    except UNREADABLE as error:
        raise InputError(f"{path}: {unit} {number + 1}: {reason(error)}") from None


def reason(error) -> str:
    if isinstance(error, json.JSONDecodeError):
        near = error.doc[max(0, error.pos - 20) : error.pos + 20]
        return f"broken JSON: {error.msg}, near {near!r}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: {error.reason} (byte {error.object[error.start]:#04x})"
    if isinstance(error, RecursionError):
        return "JSON nested too deeply"
    return str(error)


def count(path) -> int:
    """How many records the file has."""
    if path.name.endswith(".parquet"):
        with parquet(path) as table:
            return table.metadata.num_rows
    return sum(1 for _ in records(path))


def items(path):
    """The records of a file, by its ending."""
    if path.name.endswith(".parquet"):
        with parquet(path) as table:
            for batch in table.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
        return
    with (gzip.open if path.name.endswith(".gz") else open)(path, "rb") as file:
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            for line in file:
                yield json.loads(line.removeprefix(BOM).decode()) if line.strip() else BLANK
        elif path.name.endswith(".json"):
            yield from list_items(file)
        elif path.name.endswith(".csv"):
            rows = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True)
            for row in rows:
                if None in row or None in row.values():
                    raise ValueError(f"a row of other length than the header {rows.fieldnames}")
                yield row
        else:
            raise InputError(f"{path}: expected a file name that ends in {', '.join(ENDINGS)}")


def find_files(raw: Path, chosen) -> dict[str, list[Path]]:
    """The raw files of every source, by its name: in the folder `raw`, or in one for it in there.

    A file may have another of `ENDINGS` than the published one: unpacked or converted.
    """
    if not raw.is_dir():
        raise InputError(f"--raw {raw}: no such folder")
    paths, missing = {}, {}
    for source in chosen:
        paths[source.name] = []
        for name in source.files:
            stem = name[: -len(next(ending for ending in ENDINGS if name.endswith(ending)))]
            names = dict.fromkeys([name, *(stem + ending for ending in ENDINGS)])
            places = [raw / source.name / name for name in names] + [raw / name for name in names]
            found = [path for path in places if path.is_file()]
            if len(found) > 1:
                raise InputError(f"{found[0]} and {found[1]}: expected one of them")
            if found:
                paths[source.name] += found
            else:
                text = f"{name} of {source.name} (published at {source.where})"
                missing.setdefault(source.name, []).append(text)
    if missing:
        rest = [source.name for source in chosen if source.name not in missing]
        texts = ", no ".join(itertools.chain(*missing.values()))
        raise InputError(f"--raw {raw}: no {texts}{without(rest)}")
    return paths


def without(rest) -> str:
    """How to go on with the rest of the sources."""
    return f"; to go on without: --sources {' '.join(rest)}" if rest else ""


def files_in(paths) -> list[Path]:
    """The files themselves, and of a folder all those that can be read."""
    files = []
    for path in paths:
        inside = sorted(file for file in path.glob("*") if file.name.endswith(ENDINGS))
        if path.is_dir() and not inside:
            raise InputError(f"{path}: holds no file that ends in {', '.join(ENDINGS)}")
        files += inside if path.is_dir() else [path]
    return files


@contextlib.contextmanager
def located(place: str):
    """Put the place in front of an `InputError` about a record."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
