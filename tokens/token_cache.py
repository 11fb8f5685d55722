"""The token cache: every record of a data file encoded once, by all cores, then memory-mapped.

A cache is a folder `FILE.tokens-<hash>/` of three arrays and a manifest with their checksums. It is
made under another name and renamed when whole; one that was cut short or damaged is made anew.
Called by data.py.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from program.errors import InputError, RunError, one_line
from tokens.readers import parse, read_batches
from tokens.tokenizer import Tokenizer

FORMAT = 1  # of the arrays and of the encoding: with a new number every cache is made anew
# tokens and trained (all tokens of the file); index (documents, 4): tokens, trained tokens, trained
# spans (answers) and number of the record.
ARRAYS = {"tokens": np.int32, "trained": np.bool_, "index": np.int64}


def token_cache(path, model_folder, encode_record, fallback=None):
    """The arrays of `path`'s token cache, made first where there is none, and the cache's key.

    It stands beside the file or, where that folder cannot be written, in the folder `fallback`. Any
    number of processes may call this at once: one makes it, the others wait for its lock.
    """
    key = cache_key(path, model_folder, encode_record)
    places = [path.parent] if fallback is None else [path.parent, Path(fallback)]
    places = [place / f"{path.name}.tokens-{key[:16]}" for place in places]
    for place in places:
        if (arrays := open_cache(place)) is not None:
            return arrays, key
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            lock = open_locked(f"{place}.lock")
        except OSError as error:
            refusal = error
            continue
        with lock:
            try:
                arrays = open_cache(place)  # by whoever held the lock before us
                if arrays is None:
                    make_cache(place, path, model_folder, encode_record)
                    arrays = open_cache(place)
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(lock.name)
        return arrays, key
    raise InputError(f"{refusal.filename}: {refusal.strerror}, and the token cache needs a place")


def open_locked(path):
    """The file `path`, open and locked; whoever holds it unlinks it before closing it."""
    while True:
        lock = open(path, "w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                return lock
        lock.close()  # unlinked while we waited: others may hold a new file of that name


def cache_key(path, model_folder, encode_record):
    """Hash of all that decides the tokens: data, tokenizer, its `legacy`, the encoding."""
    tokenizer = loaded_tokenizer(str(model_folder))
    digest = hashlib.sha256(f"{FORMAT} {encode_record.__name__} {tokenizer.legacy}".encode())
    digest.update(tokenizer.path.read_bytes())
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def open_cache(place):
    """Memory-mapped arrays of a whole cache; None where it is absent, cut short or damaged."""
    try:
        manifest = json.loads((place / "manifest.json").read_text())
        for name in ARRAYS:
            if checksum(place / name) != manifest[name]:
                raise ValueError(f"{name} is not what was written")
        arrays = {
            n: np.fromfile(place / n, t) if n == "index" else memory_map(place / n, t)
            for n, t in ARRAYS.items()
        }
        return arrays | {"index": arrays["index"].reshape(-1, 4)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        if place.exists():
            print(f"warning: {place} is damaged ({error}) and is made anew", file=sys.stderr)
        return None


def memory_map(path, dtype):
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def checksum(path):
    """[bytes, CRC-32] of a file."""
    crc = size = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return [size, crc]


def make_cache(place, path, model_folder, encode_record):
    """Tokenise `path` with all cores into the folder `place`, which appears whole or not at all."""
    partial = place.with_name(place.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    encode = functools.partial(encode_batch, path, str(model_folder), encode_record)
    bar = tqdm(
        total=100,
        desc=f"tokenising {path.name}",
        leave=False,
        disable=None,
        bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining}{postfix}",
    )
    try:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(partial / name, "wb")) for name in ARRAYS]
            tokens = documents = 0
            for arrays, done in in_order(encode, read_batches(path), path.stat().st_size):
                for file, array in zip(files, arrays, strict=True):
                    file.write(array.tobytes())
                tokens, documents = tokens + len(arrays[0]), documents + len(arrays[2])
                bar.update(100 * done - bar.n)
                rate = tokens / max(bar.format_dict["elapsed"], 1e-3)
                bar.set_postfix_str(f", {tokens:,} tokens, {rate:,.0f} tokens/s", refresh=False)
        if not documents:
            raise InputError(f"{path}: no records in it, expected conversations")
        manifest = {name: checksum(partial / name) for name in ARRAYS}
        (partial / "manifest.json").write_text(json.dumps(manifest))
        shutil.rmtree(place, ignore_errors=True)  # a damaged one
        os.rename(partial, place)
    except OSError as error:
        raise RunError(f"{place}: the token cache could not be made ({one_line(error)})") from None
    finally:
        bar.close()
        shutil.rmtree(partial, ignore_errors=True)  # what a failure left


def in_order(encode, batches, size):
    """`(encode(batch), done)` for every batch of `(first, records, done)`, on all cores.

    No more batches are read than the workers can soon take, so memory stays bounded. A file under
    4 MB (a second's work) is not worth starting processes.
    """
    if size < 4 << 20:
        for first, records, done in batches:
            yield encode(first, records), done
        return
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # A fork of this process would copy torch's threads and the GPU's state in mid-air.
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(workers, context, follow_parent) as pool:
        waiting = deque()
        for first, records, done in batches:
            waiting.append((pool.submit(encode, first, records), done))
            if len(waiting) > 3 * workers:
                future, done = waiting.popleft()
                yield future.result(), done
        for future, done in waiting:
            yield future.result(), done


def follow_parent():
    """In a worker: leave Ctrl-C to the process that started it, and end when that one is gone."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=wait, daemon=True).start()


def encode_batch(path, model_folder, encode_record, first, records):
    """Arrays (tokens, trained, index) of consecutive records; `first` is the first one's number."""
    tokenizer = loaded_tokenizer(model_folder)
    # Bytes, not numpy, where an array would be made for each record: a tenth of the time.
    tokens, trained, index = bytearray(), bytearray(), []
    for number, raw in enumerate(records, first):
        if (record := parse(raw, path, number)) is None:
            continue
        try:
            documents = encode_record(record, tokenizer)
        except ValueError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        for ids, mask in documents:
            mask = bytes(mask)
            tokens += np.fromiter(ids, np.int32, len(ids)).data
            trained += mask
            turns = mask.count(b"\1\0") + mask[-1]  # ends of trained spans
            index.append((len(ids), mask.count(1), turns, number))
    return (
        np.frombuffer(tokens, np.int32),
        np.frombuffer(trained, np.bool_),
        np.array(index, np.int64).reshape(-1, 4),
    )


@functools.lru_cache
def loaded_tokenizer(model_folder):
    """The tokenizer of a folder, loaded once in each worker."""
    return Tokenizer(model_folder)
