"""Data files, record by record: JSON lines, plain or compressed, `.json`, `.parquet`, and folders.

`records` is for whoever wants parsed records. The token cache takes `read_batches`, which leaves
lines as bytes, so that its workers parse them (`parse`) and keep every core busy. Every error names
the file and the record. Except for a `.json` list, memory holds a batch and never the whole file.
"""

import contextlib
import gzip
import itertools
import json
import zlib
from codecs import BOM_UTF8
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from program.errors import InputError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
ZSTD = ".jsonl.zst"  # one more, where the package zstandard is installed
# What the package `datasets` and LLaMA-Factory keep beside the data.
NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
BATCH_BYTES, BATCH_RECORDS = 1 << 20, 512
BUFFER = 1 << 20  # bytes


def data_files(paths: Iterable[str | Path]) -> list[Path]:
    """The files that `--data` means; a folder stands for the data files in it, sorted by name.

    Where it has none itself, as a cloned data set, it stands for those of its folders. Raises
    `InputError` for a path that is neither a data file nor a folder of some.
    """
    files = []
    for path in map(Path, paths):
        found = [path]
        if path.is_dir():
            found, _ = inside_of(path)
            if not found:
                raise InputError(
                    f"{path}: no {', '.join(SUFFIXES)} file in this folder, nor in a folder in it"
                )
        for file in found:
            if not file.exists():
                link = f" (a link to {file.readlink()})" if file.is_symlink() else ""
                raise InputError(f"{file}: no such file or folder{link}")
            if not is_data(file):
                kinds = f"{', '.join(SUFFIXES)} or {ZSTD}"
                raise InputError(f"{file}: unknown kind of file, expected {kinds}")
            if not file.is_file():
                raise InputError(f"{file}: a pipe or a device, expected a file: it is read twice")
        files += found
    return files


def inside_of(folder: Path) -> tuple[list[Path], list[Path]]:
    """(data files, files that are none but have such names) of a folder, or of those in it."""
    own = sorted(folder.iterdir())
    below = [p for p in own if p.is_dir() and not p.name.startswith(".")]
    skipped = []
    for paths in (own, [path for inner in below for path in sorted(inner.iterdir())]):
        named = [path for path in paths if is_data(path) and not path.is_dir()]
        skipped += [path for path in named if path.name in NO_DATA]
        if found := [path for path in named if path.name not in NO_DATA]:
            return found, skipped
    return [], skipped


def found_in(path: str | Path) -> str:
    """A line for the user on what `data_files` takes of a folder; empty for a file."""
    if not Path(path).is_dir():
        return ""
    found, skipped = inside_of(Path(path))
    names = [str(p.relative_to(path)) for p in found]
    listed = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    skipped = ", ".join(p.name for p in skipped)
    return f"{path}: {listed}" + (f"; skipped, as no data: {skipped}" if skipped else "")


def is_data(path: Path) -> bool:
    return path.name.endswith((*SUFFIXES, ZSTD)) and not path.name.startswith(".")


def records(path: Path, fields: Collection[str] | None = None) -> Iterator[tuple[int, dict]]:
    """Yield `(number, record)`: each object of a file, with its line or its place, from 1.

    Blank lines are counted and skipped. Raises `InputError`, with file and number, for bad data.
    fields: see `read_batches`.
    """
    for first, batch, _ in read_batches(path, fields):
        for number, raw in enumerate(batch, first):
            if (record := parse(raw, path, number)) is not None:
                yield number, record


def read_batches(
    path: Path, fields: Collection[str] | None = None
) -> Iterator[tuple[int, list, float]]:
    """Yield `(first, batch, done)`: the number of the batch's first record, the records (lines as
    bytes, or parsed values), and the share of the file that has been read.

    fields: the columns to read of a parquet file, all by default; the others are `"not read"`.
    """
    if path.name.endswith(".parquet"):
        yield from read_parquet(path, fields)
    elif path.name.endswith(".json"):
        yield from read_json(path)
    else:
        yield from read_lines(path)


def read_lines(path: Path) -> Iterator[tuple[int, list[bytes], float]]:
    size = max(path.stat().st_size, 1)
    with open(path, "rb") as raw:
        lines = decompressed(raw, path)
        first, batch, held = 1, [], 0
        try:
            for line in lines:
                batch.append(line)
                held += len(line)
                if held >= BATCH_BYTES or len(batch) == BATCH_RECORDS:
                    yield first, batch, raw.tell() / size
                    first, batch, held = first + len(batch), [], 0
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            number, kind = first + len(batch), "zstd" if path.suffix == ".zst" else "gzip"
            raise InputError(f"{path}:{number}: not a whole {kind} file ({error})") from None
        if batch:
            yield first, batch, 1.0


def decompressed(raw: BinaryIO, path: Path) -> Iterable[bytes]:
    """The lines of an open file, as its name says it is compressed."""
    if path.suffix == ".zst":
        return zstd_lines(raw, path)
    return gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw


def zstd_lines(raw: BinaryIO, path: Path) -> Iterator[bytes]:
    """The lines of a file of zstd frames. (The package's own reader ends in silence where the file
    was cut short.) Raises `EOFError` for such a file."""
    try:
        import zstandard
    except ImportError:
        raise InputError(f"{path}: reading it needs zstandard: pip install zstandard") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # `zstd --long=31`
    frame, rest = None, b""
    while block := raw.read(BUFFER):
        while block:
            frame = frame or decompressor.decompressobj()
            try:
                rest += frame.decompress(block)
            except zstandard.ZstdError as error:
                raise EOFError(error) from None
            block = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
        *lines, rest = rest.split(b"\n")
        yield from (line + b"\n" for line in lines)
    if frame is not None:
        raise EOFError("it ends within a frame")
    if rest:
        yield rest


def read_json(path: Path) -> Iterator[tuple[int, list, float]]:
    """A list, held in memory as a whole, or lines, as in `.jsonl`."""
    with open(path, "rb") as file:
        beginning = file.read(BUFFER).removeprefix(BOM_UTF8).lstrip()
    if not beginning.startswith(b"["):
        yield from read_lines(path)
        return
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}), expected a list of records") from None
    for i in range(0, len(values), BATCH_RECORDS):
        batch = values[i : i + BATCH_RECORDS]
        yield i + 1, batch, (i + len(batch)) / len(values)


def read_parquet(
    path: Path, fields: Collection[str] | None
) -> Iterator[tuple[int, list[dict], float]]:
    with parquet(path) as table:
        first, rows, names = 1, max(table.metadata.num_rows, 1), table.schema_arrow.names
        wanted = [name for name in names if fields is None or name in fields]
        # A column that is not read may hold pictures, or dates that Python does not know.
        unread = {name: "not read" for name in names if name not in wanted}
        # By row group: pyarrow cannot join two of them where texts in messages are dictionaries.
        for batch in itertools.chain.from_iterable(
            table.iter_batches(BATCH_RECORDS, [group], wanted)
            for group in range(table.num_row_groups)
        ):
            values = [unread.copy() for _ in range(batch.num_rows)]
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                column = values_of(column, name, path, first)
                for record, value in zip(values, column, strict=True):
                    record[name] = value
            yield first, values, (first - 1 + batch.num_rows) / rows
            first += batch.num_rows


def values_of(column: Any, name: str, path: Path, first: int) -> list:
    """The values of a column; raises `InputError` for one that Python cannot hold."""
    try:
        return column.to_pylist()
    except (ValueError, TypeError, ArithmeticError) as error:
        if len(column) == 1:
            raise InputError(f"{path}:{first}: {name} cannot be read ({error})") from None
        return [values_of(column.slice(k, 1), name, path, first + k)[0] for k in range(len(column))]


@contextlib.contextmanager
def parquet(path: Path) -> Iterator[Any]:
    """The parquet file, opened to be read in small pieces."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        # `pre_buffer`, pyarrow's default, would hold a whole row group, and that may be the file:
        # Open-Orca's needed 1 GB instead of 142 MiB.
        with pyarrow.parquet.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as table:
            yield table
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # the names, too
        raise InputError(f"{path}: not a readable parquet file ({error})") from None


def parse(raw: object, path: Path, number: int) -> dict | None:
    """The object of one record, given as a line's bytes or parsed; None for a blank line."""
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
            raise InputError(
                f"{path}:{number}: not JSON ({error}), expected one JSON object a line"
            ) from None
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise InputError(f"{path}:{number}: found a JSON {kind}, expected an object")
    return record
