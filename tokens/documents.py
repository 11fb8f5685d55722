"""The records of data files as token sequences, memory-mapped: what data.py packs into rows."""

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from program.errors import InputError, amount
from tokens import readers
from tokens.shapes import FIELDS, remark
from tokens.token_cache import token_cache


class Documents:
    """The records of some data files as token sequences of at most `max_seq_len` tokens.

    A record is `per_record` sequences: one for a conversation, two for a pair (chosen, rejected).
    `encode_record(record, tokenizer)` makes them, a list of `(ids, trained)`. Records in which a
    sequence trains nothing are left out, and counted. The sequences of a pair begin with the same
    prompt, which stands in a packed row once.

    model_folder: of the tokenizer. fallback: the folder for the token cache where the data's cannot
    be written. too_long: a record with a longer sequence is "cut" on the right, left out ("drop"),
    or an "error". documents[i] is record i, a list of `(ids, trained)`: two arrays, memory-mapped.
    Raises `InputError` for bad data, and where nothing is left to train on. In memory, int64:

        lengths          (records, per_record)   tokens of each sequence
        trained_counts   (records, per_record)   those that are trained
        shared           (records, per_record)   at its head in common with the record's first
        tokens           (records,)              what a record takes in a row
        squares          (records,)              its squared lengths, by which attention costs
    """

    def __init__(
        self, paths: Sequence[str | Path], model_folder: str | Path, max_seq_len: int,
        encode_record: Callable, fallback: str | Path | None = None, per_record: int = 1,
        too_long: str = "cut",
    ) -> None:  # fmt: skip
        self.given, self.paths = paths, readers.data_files(paths)
        caches = [token_cache(p, model_folder, encode_record, fallback) for p in self.paths]
        self.caches = [{n: np.asarray(a) for n, a in arrays.items()} for arrays, _ in caches]
        self.key = hashlib.sha256(" ".join(key for _, key in caches).encode()).hexdigest()
        # Of each sequence: the file, where its tokens start there, and what the index says of it.
        indices = [cache["index"] for cache in self.caches]
        tokens, trained, turns, numbers = np.concatenate(indices).T
        file = np.repeat(np.arange(len(indices)), [len(index) for index in indices])
        start = np.concatenate([index[:, 0].cumsum() - index[:, 0] for index in indices])
        prompts = tokens - trained
        lengths, trained = np.minimum(tokens, max_seq_len), trained.copy()
        for i in np.flatnonzero(tokens > max_seq_len):
            mask = self.caches[file[i]]["trained"][start[i] : start[i] + max_seq_len]
            trained[i] = np.count_nonzero(mask)
        columns = np.stack([file, start, lengths, trained, turns, numbers, prompts])
        columns = columns.reshape(len(columns), -1, per_record)  # (7, records, per_record)
        over = (tokens > max_seq_len).reshape(-1, per_record).any(1)
        if too_long == "error" and over.any():
            i = int(over.argmax())
            raise InputError(
                f"{self.paths[columns[0, i, 0]]}:{columns[5, i, 0]}: "
                f"{tokens.reshape(-1, per_record)[i].max()} tokens, expected at most "
                f"{max_seq_len}, --max-seq-len (--too-long is error)"
            )
        drop = over & (too_long == "drop")
        if drop.any():
            self.key = hashlib.sha256(f"{self.key} drop".encode()).hexdigest()
        trains = (columns[3] > 0).all(1) & ~drop
        self.dropped, self.truncated = int(drop.sum()), int((over & ~drop).sum())
        self.skipped = int((~trains & ~drop).sum())
        self.kind = "conversations" if per_record == 1 else "pairs"
        if not trains.any():
            raise InputError(
                f"{self.paths[0]}: none of the {amount(len(trains), self.kind)} has a trained "
                f"token in its first {max_seq_len} tokens, expected assistant messages"
                + (f" (--too-long drop leaves out {self.dropped})" if self.dropped else "")
            )
        *columns, prompts = columns[:, trains]
        self.file, self.start, self.lengths, self.trained_counts, self.turns, self.numbers = columns
        self.shared = np.zeros_like(self.lengths)
        if per_record > 1:
            self.shared[:, 1] = [
                self.shared_prompt(i, *lengths) for i, lengths in enumerate(prompts)
            ]
        self.tokens = (self.lengths - self.shared).sum(1)
        self.squares = (self.lengths**2 - self.shared**2).sum(1)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        sequences = []
        for file, start, length in zip(self.file[i], self.start[i], self.lengths[i], strict=True):
            arrays, span = self.caches[file], slice(start, start + length)
            sequences.append((arrays["tokens"][span], arrays["trained"][span]))
        return sequences

    def shared_prompt(self, i: int, chosen_prompt: int, rejected_prompt: int) -> int:
        """Tokens of the prompt of pair i; 0 if chosen and rejected have not the same ids there."""
        (chosen, _), (rejected, _) = self[i]
        same = np.array_equal(chosen[:chosen_prompt], rejected[:rejected_prompt])
        return chosen_prompt if same else 0

    def sequences(self, records: Iterable[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The sequences of some records, one after the other, as `pack_row` takes them."""
        return [sequence for i in records for sequence in self[i]]

    def part(self, chosen: np.ndarray) -> "Documents":
        """The documents of the `chosen` records alone, (records,) of bool."""
        part = copy.copy(self)
        for name, array in vars(self).items():
            if isinstance(array, np.ndarray):  # one row a record
                setattr(part, name, array[chosen])
        part.key = hashlib.sha256(self.key.encode() + chosen.tobytes()).hexdigest()
        return part

    def summary(self) -> str:
        """One line for the user; before it, one for each folder and each converted shape."""
        remarks = {}  # text → the first record of a file that it is true of
        for path in self.paths:
            number, record = next(readers.records(path, FIELDS))
            remarks.setdefault(remark(record, self.kind == "pairs"), f"{path}:{number}")
        lines = [f"{text}\n" for text in map(readers.found_in, self.given) if text]
        lines += [f"{place}: {text}\n" for text, place in remarks.items() if text]
        if apart := self.lengths.shape[1] > 1 and int((self.shared[:, 1] == 0).sum()):
            lines.append(f"{amount(apart, 'pairs')} with two prompts, computed twice each\n")
        return "".join(lines) + (
            f"{amount(len(self), self.kind)}, {amount(self.tokens.sum(), 'tokens')}, "
            f"{self.trained_counts.sum():,} trained; {self.truncated:,} truncated, "
            f"{f'{self.dropped:,} longer ones left out, ' if self.dropped else ''}"
            f"{self.skipped:,} without a trained token skipped"
        )

    def names(self, records: Iterable[int]) -> Iterator[str]:
        """Where records come from, `file:line (id …)`: read from the files again."""
        wanted = {(self.file[i, 0], self.numbers[i, 0]) for i in records}
        for file in sorted({file for file, _ in wanted}):
            path = self.paths[file]
            for number, record in readers.records(path, ("id", "prompt_id")):
                if (file, number) in wanted:
                    yield f"{path}:{number} (id {record.get('id', record.get('prompt_id'))})"


def check_micro_tokens(documents: Documents, micro_tokens: int) -> None:
    """Raise `InputError` where the longest conversation, or pair, does not fit into one row."""
    longest, most = int(documents.tokens.argmax()), documents.tokens.max()
    if most > micro_tokens:
        raise InputError(
            f"--micro-tokens is {micro_tokens}, expected at least {most}, the tokens of the "
            f"longest of the {documents.kind} ({next(documents.names([longest]))})"
        )
