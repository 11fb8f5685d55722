"""Hundreds of random parquet files: the records that went in, whatever their columns' types.

And files with damaged bytes, which are read or refused.
"""

import random
import resource
import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pyarrow
import pytest
from pyarrow import parquet

from program.errors import InputError
from random_records import TEXTS, outcome
from tokens import readers
from tokens.readers import records
from tokens.shapes import FIELDS

CATEGORY = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())


def some_table(rng):
    """`(records, table)` of conversations beside other columns, of types that hold their values."""

    def text():
        return rng.choice([pyarrow.string(), pyarrow.large_string(), CATEGORY])

    def listed(item):
        return rng.choice([pyarrow.list_, pyarrow.large_list])(item)

    columns = {
        "messages": listed(pyarrow.struct([("role", text()), ("content", text())])),
        "prompt": text(),
        "chosen": pyarrow.null(),
        "input": rng.choice([pyarrow.float64(), pyarrow.int8()]),
        "tools": listed(listed(text())),
        "messages.old": pyarrow.binary(),
        "when": pyarrow.date32(),  # of days that Python does not know
    }
    names = rng.sample(list(columns), rng.randint(1, len(columns)))

    def row():
        said = [{"role": "user", "content": rng.choice(TEXTS)} for _ in range(rng.randrange(3))]
        values = {"messages": said, "prompt": rng.choice(TEXTS), "chosen": None, "input": 5}
        values |= {"tools": [[], ["a", None]], "messages.old": b"\xff", "when": 9_000_000}
        return {n: None if rng.random() < 0.1 else values[n] for n in names}

    rows = [row() for _ in range(rng.choice([0, 1, 3, 40]))]
    table = {n: pyarrow.array([row[n] for row in rows], columns[n]) for n in names}
    return rows, pyarrow.table(table)


def write_table(rng, table, path):
    parquet.write_table(
        table,
        path,
        row_group_size=rng.choice([1, 2, 1000]),
        use_dictionary=rng.random() < 0.5,
        compression=rng.choice(["none", "snappy", "zstd"]),
        data_page_version=rng.choice(["1.0", "2.0"]),
    )


def check_table(rng, folder):
    path = folder / "a.parquet"
    rows, table = some_table(rng)
    write_table(rng, table, path)
    readers.BATCH_RECORDS = rng.choice([1, 2, 512])
    found, bad = outcome(path, FIELDS)
    other = {"messages.old", "when"}
    rows = [row | dict.fromkeys(other & row.keys(), "not read") for row in rows]
    assert (found, bad) == (list(enumerate(rows, 1)), None)


def test_tables_give_their_records(tmp_path, monkeypatch):
    """Texts and lists of any kind, dictionaries in them, nulls, small row groups, small batches."""
    monkeypatch.setattr(readers, "BATCH_RECORDS", 512)  # `check_table` varies it
    for seed in range(150):
        check_table(random.Random(seed), tmp_path)


def read_damaged(seeds, folder):
    """Read tables with bytes changed, most of them in the footer; how many were read, or refused.

    For a process of its own: damaged bytes may have pyarrow want any amount of memory.
    """
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    signal.alarm(100)
    counts, path = {"read": 0, "refused": 0}, folder / "a.parquet"
    for seed in seeds:
        rng = random.Random(seed)
        write_table(rng, some_table(rng)[1], path)
        content = bytearray(path.read_bytes())
        footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
        for _ in range(rng.choice([1, 1, 2, 5])):
            i = rng.randrange(rng.choice([0, footer, footer]), len(content))
            content[i] = rng.choice([content[i] ^ 1 << rng.randrange(8), 0, 127, 255])
        if rng.random() < 0.1:
            del content[rng.randrange(len(content)) :]
        path.write_bytes(content)
        _, bad = outcome(path, rng.choice([None, FIELDS]))
        counts["read" if bad is None else "refused"] += 1
    return counts


def test_damaged_bytes_are_read_or_refused(tmp_path):
    """Never a traceback, a crash, or a process that hangs."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        counts = pool.submit(read_damaged, range(300), tmp_path).result()
    assert min(counts.values()) > 20, counts


def test_a_name_that_is_not_text(tmp_path):
    """The file is refused: a column whose name a damaged byte has made no UTF-8."""
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"messages": ["Hi"]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"messages", b"\xffessages"))
    with pytest.raises(InputError, match="a.parquet: not a readable parquet file .*utf-8"):
        list(records(path))
