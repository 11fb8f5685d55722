"""Data files, record by record: `.jsonl`, `.jsonl.gz`, `.json` (a list), `.parquet`, and folders.

Lines are handed on as bytes and parsed by whoever encodes them (`parse`), so that reading a large
file keeps every core busy. Every error names the file and the record.
"""

import gzip
import json
import zlib
from pathlib import Path

from errors import InputError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
BATCH_BYTES, BATCH_RECORDS = 1 << 20, 512


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
    try:
        records = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: not JSON ({error}), expected a list of records (one a line would be .jsonl)"
        ) from None
    if not isinstance(records, list):
        raise InputError(f"{path}: found a JSON {type(records).__name__}, expected a list")
    for start in range(0, len(records), BATCH_RECORDS):
        batch = records[start : start + BATCH_RECORDS]
        yield start + 1, batch, (start + len(batch)) / len(records)


def read_parquet(path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        first, rows = 1, max(file.metadata.num_rows, 1)
        for batch in file.iter_batches(BATCH_RECORDS):
            yield first, batch.to_pylist(), (first - 1 + batch.num_rows) / rows
            first += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file ({error})") from None


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
