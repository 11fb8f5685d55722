"""The token cache: every record of a data file encoded once, by all cores, then memory-mapped.

A cache is a folder `FILE.tokens-<hash>/` of three arrays. It is made under another name and renamed
when complete; one that is damaged later is made again. Called by documents.py.
"""

import contextlib
import functools
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from program.errors import InputError, RunError, one_line
from program.files import folder_written_aside, fsync, open_locked
from program.workers import in_order
from tokens.readers import parse, read_batches
from tokens.shapes import FIELDS
from tokens.tokenizer import Tokenizer

FORMAT = 3  # of the arrays and of the encoding; a new number makes every cache again
# tokens and trained: all tokens of the file. index (documents, 4): tokens, trained tokens, trained
# spans (answers) and number of the record.
ARRAYS = {"tokens": np.int32, "trained": np.bool_, "index": np.int64}


def token_cache(path: Path, model_folder: str | Path, encode_record: Callable,
                fallback: str | Path | None = None) -> tuple[dict, str]:  # fmt: skip
    """The arrays of `path`'s token cache, which is made if there is none, and the cache's key.

    The cache stands beside the file or, where that folder cannot be written, in the folder
    `fallback`. Any number of processes may call this at once: one makes it, the others wait.
    """
    key = cache_key(path, model_folder, encode_record)
    folders = [path.parent] if fallback is None else [path.parent, Path(fallback)]
    places = [folder / f"{path.name}.tokens-{key[:16]}" for folder in folders]
    for place in places:
        if (arrays := open_cache(place)) is not None:
            return arrays, key
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            lock_file = open_locked(f"{place}.lock")
        except OSError as error:
            refusal = error
            continue
        with lock_file:
            try:
                arrays = open_cache(place)  # another process may have made it while we waited
                if arrays is None:
                    make_cache(place, path, model_folder, encode_record)
                    arrays = open_cache(place)
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(lock_file.name)
        return arrays, key
    raise InputError(
        f"{refusal.filename}: {refusal.strerror}, and the token cache must stand beside the data "
        "or in --out"
    )


def cache_key(path: Path, model_folder: str | Path, encode_record: Callable) -> str:
    """SHA-256 of all that decides the tokens: data, tokenizer, its `legacy`, and the encoding."""
    tokenizer = loaded_tokenizer(str(model_folder))
    sha = hashlib.sha256(f"{FORMAT} {encode_record.__name__} {tokenizer.legacy}".encode())
    sha.update(tokenizer.model)
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            sha.update(block)
    return sha.hexdigest()


def open_cache(place: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a cache, tokens memory-mapped; None where it is absent or was cut short."""
    try:
        index = np.fromfile(place / "index", ARRAYS["index"]).reshape(-1, 4)
        arrays = {n: np.memmap(place / n, ARRAYS[n], mode="r") for n in ("tokens", "trained")}
        sizes = {name: len(array) for name, array in arrays.items()}
        if set(sizes.values()) != {index[:, 0].sum()}:
            raise ValueError(f"found {sizes}, expected {index[:, 0].sum()} by its index")
        return arrays | {"index": index}
    except (OSError, ValueError) as error:
        if place.exists():
            print(f"warning: {place} is damaged ({error}) and is made again", file=sys.stderr)
        return None


def make_cache(place: Path, path: Path, model_folder: str | Path, encode_record: Callable) -> None:
    """Encode `path` with all cores into the folder `place`, which appears whole or not at all."""
    encode = functools.partial(encode_batch, path, str(model_folder), encode_record)
    bar = tqdm(
        total=100, desc=f"tokenising {path.name}", leave=False, disable=None,
        bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining}{postfix}",
    )  # fmt: skip
    tokens = 0
    try:
        with bar, folder_written_aside(place) as folder:
            with contextlib.ExitStack() as stack:
                files = [stack.enter_context(open(folder / name, "wb")) for name in ARRAYS]
                batches = read_batches(path, FIELDS)
                for arrays, done in in_order(encode, batches, path.stat().st_size):
                    for file, array in zip(files, arrays, strict=True):
                        file.write(array.tobytes())
                    tokens += len(arrays[0])
                    bar.update(100 * done - bar.n)
                    rate = tokens / max(bar.format_dict["elapsed"], 1e-3)
                    bar.set_postfix_str(f", {tokens:,} tokens, {rate:,.0f} tokens/s", refresh=False)
            if not tokens:
                raise InputError(f"{path}: no records in it, expected conversations")
            for name in ARRAYS:
                fsync(folder / name)
    except OSError as error:
        raise RunError(f"{place}: the token cache could not be made ({one_line(error)})") from None


def encode_batch(path: Path, model_folder: str, encode_record: Callable, first: int,
                 batch: list) -> tuple[np.ndarray, ...]:  # fmt: skip
    """Arrays (tokens, trained, index) of consecutive records, numbered from `first`."""
    tokenizer = loaded_tokenizer(model_folder)
    # Bytes take a tenth of the time that a numpy array for each record would.
    tokens, trained, index = bytearray(), bytearray(), []
    for number, raw in enumerate(batch, first):
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
            spans = mask.count(b"\1\0") + mask[-1]  # each ends before a 0, or at the end
            index.append((len(ids), mask.count(1), spans, number))
    index = np.array(index, np.int64).reshape(-1, 4)
    return np.frombuffer(tokens, np.int32), np.frombuffer(trained, np.bool_), index


@functools.lru_cache
def loaded_tokenizer(model_folder: str) -> Tokenizer:
    """The tokenizer of a folder, loaded once in each process."""
    return Tokenizer(model_folder)
