"""Data files in, packed rows of token ids out; run alone, it shows what training would see:

    python data.py --model DIR --data FILE

    readers.py     token_cache.py: chat.py on all cores             data.py
    files ──► records ──► token ids and loss mask, memory-mapped ──► updates ──► packed rows (T,)

sft.py and dpo.py draw every update from here. The mixture's 326,154 conversations are tokenised
once and never held in memory.
"""

import functools
import hashlib
import heapq
import sys
import tempfile
from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

from program.errors import InputError, reported
from tokens.readers import data_files, parse, read_batches
from tokens.records import encode_conversation
from tokens.token_cache import loaded_tokenizer, token_cache


class Documents:
    """The token sequences of some data files, cut to `max_seq_len`, less those that train nothing.

    encode_record(record, tokenizer) makes a list of `(ids, trained)`, as `encode_conversation`:
    `per_record` of them, which stay together or are left out together.
    lengths and trained_counts (n,) int64 are in memory, the tokens on disk: `documents[i]` is
    `(ids, trained)`, two arrays of the i-th sequence. Raises `InputError` for bad data, and where
    nothing is left to train on.
    """

    def __init__(
        self, paths, model_folder, max_seq_len, encode_record, fallback=None, per_record=1
    ):
        self.paths, self.per_record = data_files(paths), per_record
        found = [token_cache(p, model_folder, encode_record, fallback) for p in self.paths]
        self.caches = [arrays for arrays, _ in found]
        self.key = hashlib.sha256(" ".join(key for _, key in found).encode()).hexdigest()
        index = np.concatenate([cache["index"] for cache in self.caches])
        full_lengths, trained_counts, self.turns, self.record_numbers = index.T
        self.file = np.repeat(np.arange(len(found)), [len(c["index"]) for c in self.caches])
        self.start = np.concatenate(
            [np.cumsum(c["index"][:, 0]) - c["index"][:, 0] for c in self.caches]
        )
        self.lengths = np.minimum(full_lengths, max_seq_len)
        self.trained_counts = trained_counts.copy()
        cut = full_lengths > max_seq_len
        for i in np.flatnonzero(cut):
            self.trained_counts[i] = np.count_nonzero(self[i][1])
        whole = (self.trained_counts > 0).reshape(-1, per_record).all(1)  # (records,)
        self.truncated = int(cut.reshape(-1, per_record).any(1).sum())
        self.skipped = int((~whole).sum())
        self.kind = "conversations" if per_record == 1 else "pairs"
        if not whole.any():
            raise InputError(
                f"{self.paths[0]}: none of the {len(whole)} {self.kind} has a trained token in "
                f"its first {max_seq_len} tokens, expected assistant messages"
            )
        self.records = int(whole.sum())
        keep = np.flatnonzero(whole.repeat(per_record))
        for name in ("file", "start", "lengths", "trained_counts", "turns", "record_numbers"):
            setattr(self, name, getattr(self, name)[keep])

    def summary(self):
        """One line for the user."""
        return (
            f"{self.records:,} {self.kind}, {self.lengths.sum():,} tokens, "
            f"{self.trained_counts.sum():,} trained; {self.truncated:,} truncated, "
            f"{self.skipped:,} without a trained token skipped"
        )

    @property
    def record_lengths(self):
        """(records,) tokens of a record's sequences together: a pair stays in one row."""
        return self.lengths.reshape(-1, self.per_record).sum(1)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        cache = self.caches[self.file[i]]
        span = slice(self.start[i], self.start[i] + self.lengths[i])
        return cache["tokens"][span], cache["trained"][span]

    def names(self, indices):
        """Where documents come from, `file:record (id …)`: read from the files again."""
        wanted = {(self.file[i], self.record_numbers[i]) for i in indices}
        for file in sorted({file for file, _ in wanted}):
            path = self.paths[file]
            for first, records, _ in read_batches(path):
                for number, raw in enumerate(records, first):
                    if (file, number) in wanted:
                        record = parse(raw, path, number)
                        yield f"{path}:{number} (id {record.get('id', record.get('prompt_id'))})"


def check_micro_tokens(documents, micro_tokens):
    """Raise `InputError` where the longest conversation, or pair, does not fit into one row."""
    lengths = documents.record_lengths
    longest = int(lengths.argmax())
    if lengths[longest] > micro_tokens:
        name = next(documents.names([longest * documents.per_record]))
        raise InputError(
            f"--micro-tokens is {micro_tokens}, expected at least {lengths[longest]}, the tokens "
            f"of the longest of the {documents.kind} ({name})"
        )


# ---- Updates


def update_count(documents, batch_size, epochs):
    """(updates of an epoch, of the run): the last partial batch of an epoch is dropped."""
    per_epoch = max(1, documents // batch_size)
    return per_epoch, per_epoch * epochs


def update_members(documents, batch_size, seed, step):
    """(epoch, indices) of the documents of update `step`, both from 0.

    Every epoch is a permutation that depends on nothing but (seed, epoch), so that a resumed run,
    or one on other ranks, needs no more than the step to see the same data.
    """
    per_epoch, _ = update_count(documents, batch_size, 1)
    epoch, batch = divmod(step, per_epoch)
    order = epoch_order(documents, seed, epoch)
    return epoch, order[batch * batch_size : (batch + 1) * batch_size]


@functools.lru_cache(maxsize=2)
def epoch_order(documents, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(documents)


def plan_rows(lengths, ranks, row_tokens, hidden_size):
    """Lay documents out as `rows[rank][k]`, lists of indices into `lengths`, as many for each rank.

    First whole documents are dealt to ranks, costliest first to the rank with the least to do. A
    token costs 24·E² FLOPs in a block's matrices (7B's F) and 2·E per token before it in attention:
    n tokens cost in proportion to n + n²/12E. Then each rank packs its own by best-fit decreasing:
    the longest document goes to the fullest row that still takes it. A rank short of rows gets
    empty ones, since FSDP needs every rank in every forward pass.
    """
    shares = [(0.0, rank, []) for rank in range(ranks)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        cost, rank, share = heapq.heappop(shares)
        share.append(i)
        cost += lengths[i] + lengths[i] ** 2 / (12 * hidden_size)
        heapq.heappush(shares, (cost, rank, share))
    rows = [
        best_fit_decreasing(lengths, share, row_tokens)
        for _, _, share in sorted(shares, key=lambda share: share[1])
    ]
    most = max(len(own) for own in rows)
    return [own + [[] for _ in range(most - len(own))] for own in rows]


def best_fit_decreasing(lengths, longest_first, row_tokens):
    """Rows of at most `row_tokens` tokens, nearly all of them full on Tulu's lengths."""
    rows, room = [], []  # room: sorted (free tokens, row)
    for i in longest_first:
        fit = bisect_left(room, (lengths[i], -1))
        if fit == len(room):
            free, row = row_tokens, len(rows)
            rows.append([])
        else:
            free, row = room.pop(fit)
        rows[row].append(i)
        insort(room, (free - lengths[i], row))
    return rows


def pack_row(documents):
    """Arrays of one packed row from its documents' `(ids, trained)`.

    input_ids (T,) int64 · doc_start (T,) int32 · predict (N,) int64, the positions before each
    trained token · labels (N,) int64, those tokens. No document: one token and nothing to predict.

        documents   [1 7 8 2] [1 9 2]        trained  8, 2 and 2
        input_ids    1 7 8 2   1 9 2         predict  1 2 5
        doc_start    0 0 0 0   4 4 4         labels   8 2 2
    """
    if not documents:
        documents = [(np.zeros(1, np.int32), np.zeros(1, np.bool_))]
    lengths = [len(ids) for ids, _ in documents]
    input_ids = np.concatenate([ids for ids, _ in documents]).astype(np.int64)
    trained = np.flatnonzero(np.concatenate([mask for _, mask in documents]))
    starts = np.cumsum(lengths) - lengths
    return {
        "input_ids": input_ids,
        "doc_start": np.repeat(starts, lengths).astype(np.int32),
        "predict": trained - 1,
        "labels": input_ids[trained],
    }


# ---- What a user should see before spending GPU days


@dataclass(frozen=True)
class DataConfig:
    """The flags of `python data.py`; the defaults are sft.py's."""

    model: str | None = None  # Hugging Face folder whose tokenizer encodes the data
    data: list[str] | None = None  # conversations: .jsonl, .jsonl.gz, .json, .parquet or folders
    max_seq_len: int = 8192  # tokens; a longer conversation is cut on the right
    batch_size: int = 128  # conversations in one update
    micro_tokens: int = 16384  # most tokens in one packed row
    seed: int = 42  # of the order of the data
    show: int = 3  # conversations to print, trained tokens told from the rest


def main(flags):
    from program.flags import check_bounds

    config = DataConfig(**flags)
    if not config.model or not config.data:
        raise InputError("--model DIR and --data FILE are needed")
    check_bounds(config)
    # Beside data that cannot be written to, the cache has no place to stay.
    with tempfile.TemporaryDirectory() as aside:
        documents = Documents(
            config.data, config.model, config.max_seq_len, encode_conversation, aside
        )
        describe(documents, config)


def describe(documents, config):
    """Print counts, lengths, how full the rows are, and the first conversations."""
    check_micro_tokens(documents, config.micro_tokens)
    print(documents.summary())
    print(f"{documents.turns.sum():,} assistant turns, {documents.turns.mean():.2f} a conversation")
    print_lengths(documents.lengths)
    print_rows(documents, config)
    tokenizer = loaded_tokenizer(str(config.model))
    for i in range(min(config.show, len(documents))):
        print(f"\n{next(documents.names([i]))}, {documents.lengths[i]} tokens:")
        print(highlight(tokenizer, *documents[i]))


def print_lengths(lengths):
    """Percentiles of the lengths, and their histogram in powers of two."""
    shares = (5, 25, 50, 75, 95, 99, 100)
    values = np.percentile(lengths, shares)
    print(
        "tokens of a conversation: mean "
        + f"{lengths.mean():,.0f}; percentiles "
        + ", ".join(f"{s} %: {v:,.0f}" for s, v in zip(shares, values, strict=True))
    )
    powers = np.ceil(np.log2(lengths)).astype(int)
    counts = np.bincount(powers)
    for power in range(powers.min(), powers.max() + 1):
        bar = "█" * round(50 * counts[power] / counts.max())
        print(f"  ≤ {2**power:>7,} {counts[power]:>9,} {bar}")


def print_rows(documents, config):
    """How full the packed rows are, and how full padded ones would be."""
    everything = sorted(range(len(documents)), key=lambda i: -documents.lengths[i])
    rows = len(best_fit_decreasing(documents.lengths, everything, config.micro_tokens))
    total = documents.lengths.sum()
    per_epoch, _ = update_count(len(documents), config.batch_size, 1)
    sample = range(min(per_epoch, 20))
    used = filled = 0
    for step in sample:
        _, members = update_members(len(documents), config.batch_size, config.seed, step)
        used += len(plan_rows(documents.lengths[members], 1, config.micro_tokens, 4096)[0])
        filled += documents.lengths[members].sum()
    row = config.micro_tokens
    print(
        f"packed into rows of {row:,} tokens: {total / rows / row:.2%} full over all the data; an "
        f"update of {min(config.batch_size, len(documents))} conversations takes "
        f"{used / len(sample):.1f} rows on one rank, {filled / used / row:.1%} full"
    )
    order = epoch_order(len(documents), config.seed, 0)
    for batch in (4, 16):
        whole = documents.lengths[order[: len(order) // batch * batch]].reshape(-1, batch)
        if whole.size:
            useful = whole.sum() / (whole.max(1) * batch).sum()
            print(f"  (padded to the longest of {batch}: {useful:.0%} useful)")


def highlight(tokenizer, ids, trained):
    """The text of some tokens, BOS and EOS written out, what is trained in green (or in ⟦⟧)."""
    begin, end = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("⟦", "⟧")
    text = ""
    for run in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(trained)) + 1):
        shown = tokenizer.visible(ids[run].tolist())
        text += f"{begin}{shown}{end}" if trained[run[0]] else shown
    return text


if __name__ == "__main__":
    with reported():
        from program.flags import parse_args

        main(parse_args(DataConfig))
