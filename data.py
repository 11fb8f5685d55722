"""Data files in, packed rows of token ids out; run alone, it shows what training would see:

    python data.py --model DIR --data FILE

    tokens/readers.py   tokens/token_cache.py: every record, by all cores        data.py
    files ──► records ──► token ids and loss mask, memory-mapped ──► updates ──► packed rows (T,)

sft.py and dpo.py draw every update from here. The mixture's 326,154 conversations are tokenised
once and never held in memory.
"""

import functools
import heapq
import tempfile
from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

from program.errors import InputError, reported
from program.flags import check_bounds, parse_args
from tokens import readers
from tokens.documents import Documents, amount, check_micro_tokens
from tokens.records import encode_conversation, encode_pair
from tokens.report import print_lengths, print_sequences
from tokens.shapes import FIELDS, is_pair
from tokens.token_cache import loaded_tokenizer

# ---- Updates


def update_count(records, batch_size, epochs):
    """(updates of an epoch, of the run): the last partial batch of an epoch is dropped."""
    per_epoch = max(1, records // batch_size)
    return per_epoch, per_epoch * epochs


def schedule(records, kind, batch_size, epochs):
    """One line for the user: how many updates of what, and what is left out of every epoch."""
    per_epoch, total = update_count(records, batch_size, epochs)
    each = min(batch_size, records)
    text = f"{amount(total, 'updates')} of {amount(each, kind)}, {per_epoch:,} an epoch"
    if left_out := records - per_epoch * each:
        verb = "is" if left_out == 1 else "are"
        text += f"; {left_out:,} of the {amount(records, kind)} {verb} left out of each epoch"
    return text


def update_members(records, batch_size, seed, step):
    """(epoch, indices) of the records of update `step`, both from 0.

    Every epoch is a permutation that depends on nothing but (seed, epoch), so that a resumed run,
    or one on other ranks, needs no more than the step to see the same data.
    """
    per_epoch, _ = update_count(records, batch_size, 1)
    epoch, batch = divmod(step, per_epoch)
    order = epoch_order(records, seed, epoch)
    return epoch, order[batch * batch_size : (batch + 1) * batch_size]


@functools.lru_cache(maxsize=2)
def epoch_order(records, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(records)


def plan_rows(lengths, ranks, row_tokens, hidden_size):
    """Lay records out as `rows[rank][k]`, lists of indices into `lengths` (n,), their tokens.

    First whole records are dealt to ranks, costliest first to the rank with the least to do. A
    token costs 24·E² FLOPs in a block's matrices (7B's F) and 4·E per token before it in attention:
    n tokens cost in proportion to n + n²/(12·E). Then each rank packs its share by best-fit
    decreasing: the longest record goes to the fullest row that still takes it. Every rank gets as
    many rows, the last ones empty, since FSDP needs every rank in every forward pass.
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
    passes = max(map(len, rows))
    return [own + [[] for _ in range(passes - len(own))] for own in rows]


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


def pack_row(sequences):
    """Arrays of one packed row from the `(ids, trained)` of its documents.

    input_ids (T,) int64 · doc_start (T,) int32 · predict (N,) int64, the positions before each
    trained token · labels (N,) int64, those tokens. Without documents: one token, none predicted.

        documents   [1 7 8 2] [1 9 2]        trained  8, 2 and 2
        input_ids    1 7 8 2   1 9 2         predict  1 2 5
        doc_start    0 0 0 0   4 4 4         labels   8 2 2
    """
    sequences = sequences or [(np.zeros(1, np.int32), np.zeros(1, np.bool_))]
    lengths = [len(ids) for ids, _ in sequences]
    input_ids = np.concatenate([ids for ids, _ in sequences]).astype(np.int64)
    trained = np.flatnonzero(np.concatenate([mask for _, mask in sequences]))
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
    data: list[str] | None = None  # conversations or preference pairs, as for sft.py and dpo.py
    pairs: bool | None = None  # show pairs (default: if the first record has chosen and rejected)
    max_seq_len: int = 8192  # tokens; a longer conversation is cut on the right
    batch_size: int = 128  # conversations (pairs) in one update
    micro_tokens: int = 16384  # most tokens in one packed row
    seed: int = 42  # of the order of the data
    show: int = 3  # conversations (pairs) to print, trained tokens told from the rest


def main(flags):
    config = DataConfig(**flags)
    if not config.model or not config.data:
        raise InputError("--model DIR and --data FILE are needed")
    check_bounds(config)
    pairs = config.pairs
    if pairs is None:
        first = next(readers.records(readers.data_files(config.data)[0], FIELDS), (0, {}))
        pairs = is_pair(first[1])
    encode_record, per_record = (encode_pair, 2) if pairs else (encode_conversation, 1)
    # Where the data's folder cannot be written, the cache lives as long as this command.
    with tempfile.TemporaryDirectory() as temporary:
        documents = Documents(
            config.data, config.model, config.max_seq_len, encode_record, temporary, per_record
        )
        check_micro_tokens(documents, config.micro_tokens)
        print(documents.summary())
        print(schedule(len(documents), documents.kind, config.batch_size, epochs=1))
        turns, lengths = documents.turns, documents.lengths.sum(1)
        if not pairs:
            print(f"{turns.sum():,} assistant turns, {turns.mean():.2f} a conversation")
        print_lengths(lengths, documents.kind[:-1])
        print_rows(lengths, config, documents.kind)
        tokenizer = loaded_tokenizer(str(config.model))
        for i in range(min(config.show, len(documents))):
            print_sequences(tokenizer, next(documents.names([i])), documents[i])


def print_rows(lengths, config, kind):
    """How full rows of all the data are, those of 20 updates, and how full padded batches."""
    longest_first = (-lengths).argsort(kind="stable")
    overall = len(best_fit_decreasing(lengths, longest_first, config.micro_tokens))
    per_epoch, _ = update_count(len(lengths), config.batch_size, 1)
    rows = tokens = 0
    updates = min(per_epoch, 20)
    for step in range(updates):
        _, members = update_members(len(lengths), config.batch_size, config.seed, step)
        rows += len(plan_rows(lengths[members], 1, config.micro_tokens, 4096)[0])
        tokens += lengths[members].sum()
    row = config.micro_tokens
    print(
        f"packed into rows of {row:,} tokens: {lengths.sum() / overall / row:.2%} full over all "
        f"the data; an update of {min(config.batch_size, len(lengths))} {kind} takes "
        f"{rows / updates:.1f} rows on one rank, {tokens / rows / row:.1%} full"
    )
    order = epoch_order(len(lengths), config.seed, 0)
    for batch in (4, 16):
        batches = lengths[order[: len(order) // batch * batch]].reshape(-1, batch)
        if batches.size:
            useful = batches.sum() / (batches.max(1) * batch).sum()
            print(f"  (padded to the longest of {batch}: {useful:.0%} useful)")


if __name__ == "__main__":
    with reported():
        main(parse_args(DataConfig))
