"""The records of data files as token sequences, memory-mapped: what data.py packs into rows."""

import hashlib

import numpy as np

from program.errors import InputError
from tokens import readers
from tokens.shapes import FIELDS, remark
from tokens.token_cache import token_cache


class Documents:
    """The records of some data files as token sequences, cut to `max_seq_len`.

    A record is `per_record` sequences: one for a conversation, two for a pair (chosen, rejected).
    `encode_record(record, tokenizer)` makes them, a list of `(ids, trained)`. Records in which a
    sequence trains nothing are left out, and counted.

    model_folder: of the tokenizer. fallback: the folder for the token cache where the data's cannot
    be written. documents[i] is record i, a list of `(ids, trained)`: two arrays, memory-mapped.
    lengths and trained_counts (records, per_record) int64 are in memory. Raises `InputError` for
    bad data, and where nothing is left to train on.
    """

    def __init__(
        self, paths, model_folder, max_seq_len, encode_record, fallback=None, per_record=1
    ):
        self.paths = readers.data_files(paths)
        caches = [token_cache(p, model_folder, encode_record, fallback) for p in self.paths]
        self.caches = [arrays for arrays, _ in caches]
        self.key = hashlib.sha256(" ".join(key for _, key in caches).encode()).hexdigest()
        # Of each sequence: the file, where its tokens start there, and what the index says of it.
        indices = [cache["index"] for cache in self.caches]
        tokens, trained, turns, numbers = np.concatenate(indices).T
        file = np.repeat(np.arange(len(indices)), [len(index) for index in indices])
        start = np.concatenate([index[:, 0].cumsum() - index[:, 0] for index in indices])
        lengths, trained = np.minimum(tokens, max_seq_len), trained.copy()
        for i in np.flatnonzero(tokens > max_seq_len):
            mask = self.caches[file[i]]["trained"][start[i] : start[i] + max_seq_len]
            trained[i] = np.count_nonzero(mask)
        columns = np.stack([file, start, lengths, trained, turns, numbers])
        columns = columns.reshape(len(columns), -1, per_record)  # (6, records, per_record)
        trains = (columns[3] > 0).all(1)
        self.truncated = int((tokens > max_seq_len).reshape(-1, per_record).any(1).sum())
        self.skipped = int((~trains).sum())
        self.kind = "conversations" if per_record == 1 else "pairs"
        if not trains.any():
            raise InputError(
                f"{self.paths[0]}: none of the {len(trains)} {self.kind} has a trained token in "
                f"its first {max_seq_len} tokens, expected assistant messages"
            )
        self.file, self.start, self.lengths, self.trained_counts, self.turns, self.numbers = (
            columns[:, trains]
        )

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        sequences = []
        for file, start, length in zip(self.file[i], self.start[i], self.lengths[i], strict=True):
            arrays, span = self.caches[file], slice(start, start + length)
            sequences.append((arrays["tokens"][span], arrays["trained"][span]))
        return sequences

    def sequences(self, records):
        """The sequences of some records, one after the other, as `pack_row` takes them."""
        return [sequence for i in records for sequence in self[i]]

    def summary(self):
        """One line for the user, and one before it for each shape of record that is made fit."""
        remarks = {}  # text → the first record of a file that it is true of
        for path in self.paths:
            number, record = next(readers.records(path, FIELDS))
            remarks.setdefault(remark(record, self.kind == "pairs"), f"{path}:{number}")
        lines = [f"{place}: {text}\n" for text, place in remarks.items() if text]
        return "".join(lines) + (
            f"{amount(len(self), self.kind)}, {amount(self.lengths.sum(), 'tokens')}, "
            f"{self.trained_counts.sum():,} trained; {self.truncated:,} truncated, "
            f"{self.skipped:,} without a trained token skipped"
        )

    def names(self, records):
        """Where records come from, `file:line (id …)`: read from the files again."""
        wanted = {(self.file[i, 0], self.numbers[i, 0]) for i in records}
        for file in sorted({file for file, _ in wanted}):
            path = self.paths[file]
            for number, record in readers.records(path, ("id", "prompt_id")):
                if (file, number) in wanted:
                    yield f"{path}:{number} (id {record.get('id', record.get('prompt_id'))})"


def check_micro_tokens(documents, micro_tokens):
    """Raise `InputError` where the longest conversation, or pair, does not fit into one row."""
    lengths = documents.lengths.sum(1)
    longest = int(lengths.argmax())
    if lengths[longest] > micro_tokens:
        raise InputError(
            f"--micro-tokens is {micro_tokens}, expected at least {lengths[longest]}, the tokens "
            f"of the longest of the {documents.kind} ({next(documents.names([longest]))})"
        )


def amount(number, plural):
    """`1 pair`, `2 pairs`."""
    return f"{number:,} {plural if number != 1 else plural.removesuffix('s')}"
