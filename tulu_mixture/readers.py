"""The mixture's raw files: finds them, and yields their records, each with its place for messages.

Reads what tokens/readers.py reads, and CSV with a header. `.json` lists are streamed here, since
ShareGPT's are large: memory holds a batch of records or a buffer, never the file. Called by
mixture.py.
"""

import codecs
import contextlib
import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from program.errors import InputError
from tokens import readers

ENDINGS = (*readers.SUFFIXES, readers.ZSTD, ".csv")
SPACE = re.compile(r"[ \t\r\n]*")
CHUNK = 1 << 20  # bytes of a list read at once
LONGEST = 64 << 20  # characters; a record of a list that does not end by then counts as broken


def records(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield `(place, record)` for every record; its place is `path:number`, numbered from 1.

    In a .jsonl the number is that of the line. Raises `InputError`, with the place, for a broken
    record.
    """
    if path.name.endswith(".json"):
        numbered = streamed(path, list_items)
    elif path.name.endswith(".csv"):
        numbered = streamed(path, csv_rows)
    elif path.name.endswith(ENDINGS):
        numbered = readers.records(path)
    else:
        raise InputError(f"{path}: expected a file name that ends in {', '.join(ENDINGS)}")
    for number, record in numbered:
        yield f"{path}:{number}", record


def count(path: Path) -> int:
    """The number of records in a file."""
    if path.name.endswith(".parquet"):
        with readers.parquet(path) as table:
            return table.metadata.num_rows
    return sum(1 for _ in records(path))


def streamed(path: Path, read: Callable) -> Iterator[tuple[int, dict]]:
    """Yield `(number, record)` for every record that `read` makes of the open file."""
    number = 0
    with open(path, "rb") as file:
        try:
            for number, record in enumerate(read(file), 1):
                yield number, record
        except (ValueError, RecursionError, csv.Error) as error:
            raise InputError(f"{path}:{number + 1}: {reason(error)}") from None


def reason(error: Exception) -> str:
    """An error's text without positions, which would be those in a buffer."""
    if isinstance(error, json.JSONDecodeError):
        near = error.doc[max(0, error.pos - 20) : error.pos + 20]
        return f"not JSON: {error.msg}, near {near!r}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: {error.reason} (byte {error.object[error.start]:#04x})"
    if isinstance(error, RecursionError):
        return "JSON nested too deeply"
    return str(error)


def csv_rows(file: BinaryIO) -> Iterator[dict]:
    """The rows of a CSV with a header, as dicts; `ValueError` for one of another length."""
    rows = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True)
    for row in rows:
        if None in row or None in row.values():
            raise ValueError(f"found a row of other length than the header {rows.fieldnames}")
        yield row


def list_items(file: BinaryIO, chunk: int = CHUNK) -> Iterator[dict]:
    """The objects of one top-level JSON list, parsed one by one out of a growing buffer.

    An object that does not parse may only not have been read to its end. So the buffer grows until
    it parses or the file ends, by twice as much each time, so that the work stays linear.
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
        """The next character, which must be one of these."""
        character = next_character()
        if not character or character not in characters:
            expected = " or ".join(characters)
            raise ValueError(f"expected {expected}, found {character or 'the end of the file'}")
        return character

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


def find_files(raw: Path, chosen: Iterable) -> dict[str, list[Path]]:
    """The raw files of every source, by the source's name.

    They are in the folder `raw`, or in a subfolder with the source's name. A file may end in
    another of `ENDINGS` than the published one: unpacked or converted.
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
            present = [path for path in places if path.is_file()]
            if len(present) > 1:
                raise InputError(f"{present[0]} and {present[1]}: expected one of them")
            if present:
                paths[source.name] += present
            else:
                text = f"{name} of {source.name} (published at {source.where})"
                missing.setdefault(source.name, []).append(text)
    if missing:
        rest = [source.name for source in chosen if source.name not in missing]
        texts = ", no ".join(itertools.chain(*missing.values()))
        raise InputError(f"--raw {raw}: no {texts}{without(rest)}")
    return paths


def without(rest: list[str]) -> str:
    """A hint for the message: how to build the other sources."""
    return f"; to go on without: --sources {' '.join(rest)}" if rest else ""


def files_in(paths: list[Path]) -> list[Path]:
    """The files among the paths, and all readable files of each folder among them."""
    files = []
    for path in paths:
        inside = sorted(file for file in path.glob("*") if file.name.endswith(ENDINGS))
        if path.is_dir() and not inside:
            raise InputError(f"{path}: holds no file that ends in {', '.join(ENDINGS)}")
        files += inside if path.is_dir() else [path]
    return files


@contextlib.contextmanager
def located(place: str) -> Iterator[None]:
    """Put the record's place in front of an `InputError`."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
