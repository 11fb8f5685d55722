"""Data files in, packed rows of token ids out; run alone, it shows what training would see:

    python data.py --model DIR --data FILE

    tokens/readers.py   tokens/token_cache.py: every record, by all cores        data.py
    files ──► records ──► token ids and loss mask, memory-mapped ──► updates ──► packed rows (T,)

sft.py and dpo.py draw every update from here. The mixture's 326,154 conversations are tokenised
once and never held in memory.
"""

import functools
import heapq
import subprocess
import sys
import tempfile
from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kernels.attention_tiles import attention_tiles
from program.errors import InputError, amount, reported
from program.flags import check_bounds, parse_args
from tokens import readers
from tokens.documents import Documents, check_micro_tokens
from tokens.records import encode_conversation, encode_pair
from tokens.report import print_lengths, print_sequences
from tokens.shapes import FIELDS, is_pair
from tokens.token_cache import loaded_tokenizer

# ---- Updates


def update_count(records: int, batch_size: int, epochs: int) -> tuple[int, int]:
    """(updates of an epoch, of the run): the last partial batch of an epoch is dropped."""
    per_epoch = max(1, records // batch_size)
    return per_epoch, per_epoch * epochs


def schedule(records: int, kind: str, batch_size: int, epochs: int) -> str:
    """One line for the user: how many updates of what, and what is left out of every epoch."""
    per_epoch, total = update_count(records, batch_size, epochs)
    each = min(batch_size, records)
    text = f"{amount(total, 'updates')} of {amount(each, kind)}, {per_epoch:,} an epoch"
    if left_out := records - per_epoch * each:
        verb = "is" if left_out == 1 else "are"
        text += f"; {left_out:,} of the {amount(records, kind)} {verb} left out of each epoch"
    return text


def update_members(records: int, batch_size: int, seed: int, step: int) -> tuple[int, np.ndarray]:
    """(epoch, indices) of the records of update `step`, both from 0.

    Every epoch is a permutation that depends on nothing but (seed, epoch), so that a resumed run,
    or one on other ranks, needs no more than the step to see the same data.
    """
    per_epoch, _ = update_count(records, batch_size, 1)
    epoch, batch = divmod(step, per_epoch)
    order = epoch_order(records, seed, epoch)
    return epoch, order[batch * batch_size : (batch + 1) * batch_size]


@functools.lru_cache(maxsize=2)
def epoch_order(records: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(records)


def plan_rows(lengths: np.ndarray, ranks: int, row_tokens: int, hidden_size: int,
              squares: np.ndarray | None = None) -> list[list[list[int]]]:  # fmt: skip
    """Lay records out as `rows[rank][k]`, lists of indices into `lengths` (n,), their tokens.

    First whole records are dealt to ranks, costliest first to the rank with the least to do. A
    token costs 24·E² FLOPs in a block's matrices (7B's F) and 4·E per token before it in attention:
    n tokens cost in proportion to n + n²/(12·E). squares (n,): what takes the place of n² in a pair
    (`Documents.squares`). Then each rank packs its share by best-fit decreasing: the longest record
    goes to the fullest row that still takes it. All ranks get equally many rows, the last ones
    empty if need be: FSDP needs every rank in every forward pass.
    """
    squares = lengths**2 if squares is None else squares
    shares = [(0.0, rank, []) for rank in range(ranks)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        cost, rank, share = heapq.heappop(shares)
        share.append(i)
        cost += lengths[i] + squares[i] / (12 * hidden_size)
        heapq.heappush(shares, (cost, rank, share))
    shares.sort(key=lambda share: share[1])
    rows = [best_fit_decreasing(lengths, share, row_tokens) for _, _, share in shares]
    passes = max(map(len, rows))
    return [own + [[] for _ in range(passes - len(own))] for own in rows]


def best_fit_decreasing(lengths: np.ndarray, longest_first: Iterable[int],
                        row_tokens: int) -> list[list[int]]:  # fmt: skip
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


def pack_row(sequences: list[tuple], shared: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Arrays of one packed row, which the model takes, from the `(ids, trained)` of its sequences.

    shared (sequences,): how many tokens at its head a sequence has in common with the one before,
    as rejected has the prompt in common with chosen; 0 for all others. They stand in the row once,
    and are not trained. Two documents; and a pair, whose prompt is `1 5`:

        documents   [1 7 8 2] [1 9 2]         pair        [1 5 8 6 2] [1 5 9 2], shared 0 and 2
        input_ids    1 7 8 2   1 9 2          input_ids    1 5 8 6 2 9 2
        positions    0 1 2 3   0 1 2          positions    0 1 2 3 4 2 3
        doc_start    0 0 0 0   4 4 4          doc_start    0 0 0 0 0 0 0
        doc_end      4 4 4 4   7 7 7          doc_end      7 7 5 5 5 7 7
        predict      1 2 5                    predict      1 2 3 1 5
        labels       8 2 2                    labels       8 6 2 9 2

    Token i sees j where doc_start[i] <= j <= i < doc_end[j]. predict (N,) are the positions in the
    row before each trained token, labels (N,) those tokens. T tokens: input_ids, positions, predict
    and labels int64, doc_start and doc_end int32; tiles: see `attention_tiles`. Without sequences:
    one token, none predicted.
    """
    if not sequences:
        sequences, shared = [(np.zeros(1, np.int32), np.zeros(1, np.bool_))], None
    shared = np.array([0] * len(sequences) if shared is None else shared)
    lengths = np.array([len(ids) for ids, _ in sequences])
    own = lengths - shared  # tokens that the row has of each sequence alone
    first = own.cumsum() - own  # where those stand in the row
    start = np.maximum.accumulate(np.where(shared == 0, first, 0))
    doc_start, doc_end = np.repeat([start, first + own], own, axis=1).astype(np.int32)
    for k in np.flatnonzero(shared):
        doc_end[start[k] : start[k] + shared[k]] = first[k] + own[k]
    # Of each trained token: its sequence, and the place there of the token before it.
    masks = [mask for _, mask in sequences]
    k = np.repeat(np.arange(len(masks)), [np.count_nonzero(mask) for mask in masks])
    before = np.concatenate([np.flatnonzero(mask) for mask in masks]) - 1
    input_ids = [ids[n:] for (ids, _), n in zip(sequences, shared, strict=True)]
    return {
        "input_ids": np.concatenate(input_ids).astype(np.int64),
        "positions": np.arange(own.sum()) - np.repeat(first - shared, own),
        "doc_start": doc_start,
        "doc_end": doc_end,
        "tiles": attention_tiles(doc_start, doc_end),
        "predict": np.where(before < shared[k], start[k] + before, first[k] + before - shared[k]),
        "labels": np.concatenate([ids[mask] for ids, mask in sequences]).astype(np.int64),
    }


# ---- What a user should see before spending GPU days


@dataclass(frozen=True)
class DataConfig:
    """The flags of `python data.py`; the defaults are those of sft.py and dpo.py."""

    model: str | None = None  # Hugging Face folder whose tokenizer encodes the data
    data: list[str] | None = None  # conversations or preference pairs, as for sft.py and dpo.py
    pairs: bool | None = None  # show pairs (default: if the first record has chosen and rejected)
    max_seq_len: int = 8192  # tokens; a longer conversation is cut on the right
    too_long: str = "cut"  # what becomes of a longer one: cut, drop or error
    epochs: int | None = None  # passes over the data (default: 2, of pairs 3)
    batch_size: int | None = None  # conversations (pairs) in one update (default: 128, of pairs 32)
    micro_tokens: int = 16384  # most tokens in one packed row
    seed: int = 42  # of the order of the data
    show: int | None = None  # print the first so many (default: longest, shortest, a random one)
    gpu: str | None = None  # say, too, what plan.py says of training on GPUs of this kind
    gpus: int = 1  # how many of them


def main(flags: dict) -> None:
    config = DataConfig(**flags)
    if not config.model or not config.data:
        raise InputError("--model DIR and --data FILE are needed")
    check_bounds(config)
    pairs = config.pairs
    if pairs is None:
        first = next(readers.records(readers.data_files(config.data)[0], FIELDS), (0, {}))
        pairs = is_pair(first[1])
    encode_record, per_record = (encode_pair, 2) if pairs else (encode_conversation, 1)
    defaults = {"epochs": 3, "batch_size": 32} if pairs else {"epochs": 2, "batch_size": 128}
    given = {name: n for name in defaults if (n := getattr(config, name)) is not None}
    config = replace(config, **(defaults | given))
    # Where the data's folder cannot be written, the cache lives as long as this command.
    with tempfile.TemporaryDirectory() as temporary:
        documents = Documents(
            config.data, config.model, config.max_seq_len, encode_record, temporary, per_record,
            config.too_long,
        )  # fmt: skip
        check_micro_tokens(documents, config.micro_tokens)
        print(documents.summary())
        print(schedule(len(documents), documents.kind, config.batch_size, config.epochs))
        turns, lengths = documents.turns, documents.tokens
        if not pairs:
            print(f"{amount(turns.sum(), 'assistant turns')}, {turns.mean():.2f} a conversation")
        print_lengths(lengths, documents.kind[:-1])
        print_rows(lengths, config, documents.kind)
        tokenizer = loaded_tokenizer(str(config.model))
        if config.gpu:
            print_plan(config, "dpo" if pairs else "sft")
        for title, i in chosen_to_show(lengths, config):
            print_sequences(tokenizer, title + next(documents.names([i])), documents[i])


def print_plan(config: DataConfig, stage: str) -> None:
    """The words of plan.py on these data: whether they fit, and how long they take."""
    command = [sys.executable, Path(__file__).with_name("plan.py"), "--stage", stage]
    names = "model data gpu gpus epochs batch_size max_seq_len too_long micro_tokens seed"
    for name in names.split():
        value = getattr(config, name)
        command += ["--" + name.replace("_", "-"), *(value if name == "data" else [str(value)])]
    sys.stdout.flush()
    subprocess.run(command)


def chosen_to_show(lengths: np.ndarray, config: DataConfig) -> list[tuple[str, int]]:
    """(title, record) of those that are printed; lengths (records,)."""
    if config.show is not None:
        return [("", i) for i in range(min(config.show, len(lengths)))]
    random = np.random.default_rng([config.seed, 0, 2]).integers(len(lengths))
    return [("longest: ", lengths.argmax()), ("shortest: ", lengths.argmin()), ("random: ", random)]


def print_rows(lengths: np.ndarray, config: DataConfig, kind: str) -> None:
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
        f"the data; an update of {amount(min(config.batch_size, len(lengths)), kind)} takes "
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
