"""token_cache.py: a cache holds what the tokenizer makes, and no other cache is ever read."""

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from conftest import train_tokenizer
from data import encode_conversation
from program import workers as workers_module
from program.errors import InputError
from program.files import open_locked
from tokens import readers, token_cache
from tokens.readers import read_batches
from tokens.tokenizer import Tokenizer


@pytest.fixture
def data(conversations, tmp_path):
    """A copy of the conversations, with blank lines, in a folder of its own."""
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "a.jsonl"
    path.write_text(conversations.read_text().replace("\n", "\n\n"))
    return path


@pytest.fixture
def model(tokenizer_folder, tmp_path):
    """A copy of the tokenizer, to be changed."""
    return shutil.copytree(tokenizer_folder, tmp_path / "model")


@pytest.fixture
def made(monkeypatch):
    """The folders that `make_cache` was called for."""
    made, original = [], token_cache.make_cache

    def spy(place, *rest):
        made.append(place)
        original(place, *rest)

    monkeypatch.setattr(token_cache, "make_cache", spy)
    # A tokenizer changed on disk takes effect in the next process; here, at the next call.
    monkeypatch.setattr(token_cache, "loaded_tokenizer", Tokenizer)
    return made


def cached(path, model, **options):
    return token_cache.token_cache(path, model, encode_conversation, **options)


def expected(path, model):
    """Tokens, mask and index straight from the tokenizer."""
    tokens, trained, index = [], [], []
    for number, line in enumerate(path.read_text().split("\n"), 1):
        if line:
            messages = json.loads(line)["messages"]
            ids, mask = Tokenizer(model).encode(messages)
            tokens, trained = tokens + ids, trained + mask
            answers = sum(m["role"] == "assistant" for m in messages)
            index.append([len(ids), sum(mask), answers, number])
    return {"tokens": tokens, "trained": trained, "index": index}


def lists(arrays):
    return {name: array.tolist() for name, array in arrays.items()}


def test_cache_holds_what_the_tokenizer_makes(data, model):
    """Ids, mask, lengths, counts, answers and record numbers, in types that hold them."""
    arrays, _ = cached(data, model)
    assert lists(arrays) == expected(data, model)
    assert {n: a.dtype.type for n, a in arrays.items()} == token_cache.ARRAYS
    assert isinstance(arrays["tokens"], np.memmap) and isinstance(arrays["trained"], np.memmap)


@pytest.mark.parametrize("records, size", [(1, 1 << 20), (5, 1 << 20), (512, 300), (512, 1 << 20)])
def test_borders_of_batches_change_nothing(data, model, records, size, monkeypatch):
    """The arrays are equal with batches of one record, of five, of few bytes, or with one batch."""
    monkeypatch.setattr(readers, "BATCH_RECORDS", records)
    monkeypatch.setattr(readers, "BATCH_BYTES", size)
    assert lists(cached(data, model)[0]) == expected(data, model)


def in_order(path, model, workers, monkeypatch):
    """All arrays of a file, made by the pool with so many workers."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(workers), raising=False)
    encode = functools.partial(token_cache.encode_batch, path, str(model), encode_conversation)
    parts = [arrays for arrays, _ in token_cache.in_order(encode, read_batches(path), 1 << 30)]
    return [np.concatenate(arrays).tolist() for arrays in zip(*parts, strict=True)]


@pytest.mark.parametrize("workers", [1, 3])
def test_number_of_workers_changes_nothing(data, model, workers, monkeypatch):
    """The arrays are equal, and in order, with more batches than the workers hold at once."""
    monkeypatch.setattr(readers, "BATCH_RECORDS", 2)
    assert in_order(data, model, workers, monkeypatch) == list(expected(data, model).values())


def test_an_error_in_a_worker_names_file_and_line(data, model, monkeypatch):
    """An error in a worker names file and line, as it would without workers."""
    monkeypatch.setattr(readers, "BATCH_RECORDS", 2)
    data.write_text(data.read_text() + '{"messages": []}\n')
    with pytest.raises(InputError, match=r"a.jsonl:49: messages is \[\]"):
        in_order(data, model, 2, monkeypatch)


class Pool:
    """Replaces the process pool; a task is done when its result is asked for."""

    def __init__(self, workers, *rest):
        self.submitted = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, encode, first, records):
        self.submitted += 1
        return type("Future", (), {"result": lambda _: encode(first, records)})()


def test_no_more_is_read_than_workers_can_soon_take(monkeypatch):
    """At most four batches per worker are read and not yet handed on, however long the file."""
    monkeypatch.setattr(workers_module, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3), raising=False)
    held = []

    def batches():
        for k in range(500):
            held.append(k)
            yield k, [], k / 500

    most = 0
    for k, (first, done) in enumerate(token_cache.in_order(lambda f, _: f, batches(), 1 << 30)):
        most = max(most, len(held))
        assert (first, done) == (k, k / 500)
        held.pop(0)
    assert k == 499 and most <= 12


def test_cache_is_made_once(data, model, made):
    """A cache is made once; another model folder with the same tokenizer reads it, too."""
    first, key = cached(data, model)
    again, same = cached(data, shutil.copytree(model, model.with_name("copy")))
    assert len(made) == 1 and key == same and lists(first) == lists(again)
    assert sorted(p.name for p in data.parent.iterdir()) == ["a.jsonl", made[0].name]


@pytest.mark.parametrize("change", ["data", "tokenizer", "legacy", "encoding", "format"])
def test_another_input_is_another_cache(data, model, change, made, monkeypatch):
    """Other data, tokenizer, `legacy`, encoding or cache format is another cache."""
    before = cached(data, model)
    encode = encode_conversation
    if change == "data":
        data.write_text(data.read_text().replace("dog", "cat", 1))
    elif change == "tokenizer":
        train_tokenizer(model, vocab_size=340)
    elif change == "legacy":
        (model / "tokenizer_config.json").write_text('{"legacy": true}')
    elif change == "encoding":

        def encode(record, tokenizer):
            return encode_conversation(record, tokenizer) * 2
    else:
        monkeypatch.setattr(token_cache, "FORMAT", token_cache.FORMAT + 1)
    arrays, key = token_cache.token_cache(data, model, encode)
    assert len(set(made)) == 2 and key != before[1]
    if change == "encoding":
        assert len(arrays["index"]) == 2 * len(before[0]["index"])
    else:
        assert lists(arrays) == expected(data, model)
    assert cached(data, model)[1] == (before[1] if change == "encoding" else key)


def test_every_part_of_a_large_file_counts(tmp_path, model):
    """For the key, for which a file is read in pieces of 4 MiB."""
    path, seen = tmp_path / "large", set()
    content = bytearray(range(256)) * (9 << 12)  # 9 MiB
    for at in (None, 0, 5 << 20, len(content) - 1):
        if at is not None:
            content[at] ^= 1
        path.write_bytes(content)
        seen.add(token_cache.cache_key(path, model, encode_conversation))
    assert len(seen) == 4


def cut(place):
    path = place / "tokens"
    path.write_bytes(path.read_bytes()[:-4])


def cut_odd(place):
    path = place / "index"
    path.write_bytes(path.read_bytes()[:-9])


def cut_row(place):
    path = place / "index"
    path.write_bytes(path.read_bytes()[:-32])


def empty(place):
    (place / "trained").write_bytes(b"")


def drop(place):
    (place / "index").unlink()


@pytest.mark.parametrize("damage", [cut, cut_odd, cut_row, empty, drop])
def test_a_cache_cut_short_is_made_again(data, model, made, damage, capsys):
    """A cache that was cut short is made again, with a warning, and never read."""
    cached(data, model)
    damage(made[0])
    arrays, _ = cached(data, model)
    assert "is damaged" in capsys.readouterr().err
    assert made[0] == made[1] and lists(arrays) == expected(data, model)
    cached(data, model)
    assert len(made) == 2 and capsys.readouterr().err == ""


def test_what_was_left_half_made_is_no_cache(data, model, made):
    """A kill leaves a `.partial` folder and a lock file; both are swept away."""
    _, key = cached(data, model)
    shutil.move(made[0], made[0].with_name(made[0].name + ".partial"))
    made[0].with_name(made[0].name + ".lock").touch()
    assert lists(cached(data, model)[0]) == expected(data, model)
    assert sorted(p.name for p in data.parent.iterdir()) == ["a.jsonl", made[0].name]


def test_a_failure_leaves_nothing(data, model):
    """Bad data, or no data, leaves no file, also where several ranks meet it at once."""
    good = data.read_text()
    for text, problem in ((good + "{\n" + good, ":49: not JSON"), (" \n", ": no records in it")):
        data.write_text(text)
        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(cached, data, model) for _ in range(4)]
            failures = [future.exception() for future in futures]
        for failure in failures:
            assert isinstance(failure, InputError) and f"a.jsonl{problem}" in str(failure)
        assert [p.name for p in data.parent.iterdir()] == ["a.jsonl"]


def test_many_that_start_at_once_make_it_once(data, model, made):
    """Of many at once, one makes the cache (threads here: locks belong to open files)."""
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda _: cached(data, model), range(6)))
    assert len(made) == 1
    for arrays, _ in results:
        assert lists(arrays) == expected(data, model)


def test_a_lock_is_held_on_the_file_that_is_there(tmp_path):
    """Whoever waited for a lock file that was unlinked then locks the new one of that name."""
    path = tmp_path / "lock"
    first = open_locked(path)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(open_locked, path)
        time.sleep(0.2)  # until it waits; if it is slower, the test only sees less
        assert not waiting.done()
        path.unlink()
        first.close()
        with waiting.result(timeout=10) as second:
            assert os.path.samestat(os.fstat(second.fileno()), path.stat())


def test_where_the_data_cannot_be_written_the_fallback_is_used(data, model, made, tmp_path):
    """The fallback is used, and found again; without one, the error names the place."""
    probe, _ = cached(data, model)
    place = made[0]
    shutil.rmtree(place)
    # A folder in the lock file's place stops even root, whom permissions do not.
    place.with_name(place.name + ".lock").mkdir()
    with pytest.raises(InputError, match="a.jsonl.tokens-.*token cache must stand"):
        cached(data, model)
    for _ in range(2):
        arrays, _ = cached(data, model, fallback=tmp_path / "new" / "out")
        assert lists(arrays) == expected(data, model)
    assert made[1:] == [tmp_path / "new" / "out" / place.name]


def test_workers_do_not_import_torch():
    """The modules of a worker do not import torch, which takes seconds and memory."""
    code = "import sys, tokens.token_cache, tokens.records; assert 'torch' not in sys.modules"
    root = Path(token_cache.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
