"""Finds data files and yields their records, one at a time, each with its place for messages.

Memory holds a record and a buffer, never the file: JSON lines (plain or gzip), a JSON list, parquet
(`pyarrow` is imported there and only there), CSV with a header. A leaf of `mixture.py`.
"""

import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import re
import zlib
from pathlib import Path

from errors import InputError

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv")
CHUNK = 1 << 20  # bytes read at once
LONGEST = 64 << 20  # characters; a record of a list that does not end by then counts as broken
BLANK = object()  # stands for an empty line, which has a number but no record
UNREADABLE = (ValueError, RecursionError, EOFError, zlib.error, gzip.BadGzipFile, csv.Error)
BOM = codecs.BOM_UTF8  # some editors put it at the beginning of a file
SPACE = re.compile(r"[ \t\r\n]*")


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


@contextlib.contextmanager
def parquet(path):
    """The parquet file, opened to be read in small pieces."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: to read parquet, install the package pyarrow") from None
    try:
        # `pre_buffer`, pyarrow's default, would hold a whole row group, and that may be the file:
        # for one like Open-Orca's it took 1 GB instead of 142 MiB.
        with pyarrow.parquet.ParquetFile(path, buffer_size=CHUNK, pre_buffer=False) as table:
            yield table
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not readable as parquet: {error}") from None


def list_items(file, chunk: int = CHUNK):
    """The objects of one top-level JSON list, parsed one by one out of a growing buffer.

    Where an object does not parse, its end may only not have been read yet: the buffer grows, twice
    as much every time so that the work stays linear, until it parses, or the file ends.
    """
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    parse = json.JSONDecoder().raw_decode
    text, at = "", 0

    def more(size):
        """Read on; False at the end of the file."""
        nonlocal text, at
        data = file.read(size)
        text, at = text[at:] + decode(data, final=not data), 0
        return bool(data)

    def next_character():
        """Skip white space; the character there, or "" at the end of the file."""
        nonlocal at
        while (at := SPACE.match(text, at).end()) == len(text):
            if not more(chunk):
                return ""
        return text[at]

    def expect(characters):
        found = next_character()
        if not found or found not in characters:
            wanted = " or ".join(characters)
            raise ValueError(f"expected {wanted}, found {found or 'the end of the file'}")
        return found

    expect("[")
    at += 1
    if next_character() == "]":
        at += 1
    else:
        separator = ","
        while separator == ",":
            expect("{")
            size = chunk
            while True:
                try:
                    item, at = parse(text, at)
                    break
                except (ValueError, RecursionError):
                    if len(text) - at > LONGEST or not more(size):
                        raise
                    size *= 2
            yield item
            separator = expect(",]")
            at += 1
    if next_character():
        raise ValueError("more text after the end of the list")


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
