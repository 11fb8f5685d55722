"""Data files, record by record: `.jsonl`, `.jsonl.gz`, `.json` (a list), `.parquet`, and folders.

Memory holds a batch and a buffer, never the file. Lines are handed on as bytes and parsed by
whoever encodes them (`parse`), so that reading a large file keeps every core busy. Every error
names the file and the record.
"""

import codecs
import contextlib
import gzip
import json
import re
import zlib
from pathlib import Path

from program.errors import InputError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
BATCH_BYTES, BATCH_RECORDS = 1 << 20, 512
CHUNK = 1 << 20  # bytes of a list or of parquet read at once
LONGEST = 64 << 20  # characters; a record of a list that does not end by then counts as broken
SPACE = re.compile(r"[ \t\r\n]*")


def data_files(paths):
    """The files that `--data` means, folders opened (sorted by name); raises `InputError`."""
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [p for p in sorted(path.iterdir()) if p.is_file() and is_data(p)]
            if not inside:
                raise InputError(f"{path}: no {', '.join(SUFFIXES)} file in this folder")
            files += inside
        elif not path.exists():
            raise InputError(f"{path}: no such file or folder")
        elif not is_data(path):
            raise InputError(f"{path}: unknown kind of file, expected {', '.join(SUFFIXES)}")
        else:
            files.append(path)
    return files


def is_data(path):
    return path.name.endswith(SUFFIXES) and not path.name.startswith(".")


def read_batches(path):
    """Yield `(first, records, done)`: the number of the first record (line), the records of a batch
    (bytes of lines, or parsed objects), and the share of the file read so far."""
    if path.name.endswith(".parquet"):
        yield from read_parquet(path)
    elif path.name.endswith(".json"):
        yield from read_json_list(path)
    else:
        yield from read_lines(path)


def read_lines(path):
    size = max(path.stat().st_size, 1)
    with open(path, "rb") as raw:
        lines = gzip.GzipFile(fileobj=raw) if path.name.endswith(".gz") else raw
        first, batch, held = 1, [], 0
        try:
            for line in lines:
                batch.append(line)
                held += len(line)
                if held >= BATCH_BYTES or len(batch) == BATCH_RECORDS:
                    yield first, batch, raw.tell() / size
                    first, batch, held = first + len(batch), [], 0
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            number = first + len(batch)
            raise InputError(f"{path}:{number}: not a whole gzip file ({error})") from None
        if batch:
            yield first, batch, 1.0


def read_json_list(path):
    size = max(path.stat().st_size, 1)
    with open(path, "rb") as file:
        first, batch = 1, []
        try:
            for record in list_items(file):
                batch.append(record)
                if len(batch) == BATCH_RECORDS:
                    yield first, batch, file.tell() / size
                    first, batch = first + len(batch), []
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path}:{first + len(batch)}: {error}; expected one JSON list of records (one a "
                "line would be .jsonl)"
            ) from None
        if batch:
            yield first, batch, 1.0


def read_parquet(path):
    with parquet(path) as table:
        first, rows = 1, max(table.metadata.num_rows, 1)
        for batch in table.iter_batches(BATCH_RECORDS):
            yield first, batch.to_pylist(), (first - 1 + batch.num_rows) / rows
            first += batch.num_rows


def parse(raw, path, number):
    """The object of one record, bytes of a line or parsed already; None for a blank line."""
    record = raw
    if isinstance(raw, bytes):
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}:{number}: not UTF-8 (byte {raw[error.start]:#04x} at {error.start})"
            ) from None
        if not text.strip():
            return None
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not JSON ({error})") from None
    if not isinstance(record, dict):
        raise InputError(
            f"{path}:{number}: found a JSON {type(record).__name__}, expected an object"
        )
    return record


@contextlib.contextmanager
def parquet(path):
    """The parquet file, opened to be read in small pieces."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        # `pre_buffer`, pyarrow's default, would hold a whole row group, and that may be the file:
        # for one like Open-Orca's it took 1 GB instead of 142 MiB.
        with pyarrow.parquet.ParquetFile(path, buffer_size=CHUNK, pre_buffer=False) as table:
            yield table
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file ({error})") from None


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
