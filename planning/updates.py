"""The updates of a run, as far as memory and time depend on them: lengths in, rows out.

Lengths are those of a data set that is there, or the published figures of Tulu 2's two.
"""

from dataclasses import dataclass

import numpy as np

from data import plan_rows, update_count, update_members
from model import LlamaConfig
from planning.speed import Row
from program.errors import InputError

SAMPLE = 24  # updates of which rows are planned for the time, evenly over the run
EXTREME = 8  # and for the memory: those with the most tokens, those with the longest records


@dataclass(frozen=True)
class Lengths:
    """Of each sequence its tokens, those trained, and those shared with the record's first one.

    All three are (records, sequences of a record), as `Documents` has them.
    """

    name: str
    tokens: np.ndarray
    trained: np.ndarray
    shared: np.ndarray

    @property
    def in_rows(self) -> np.ndarray:
        """(records,): the tokens of a record in a row, in which a pair's prompt stands once."""
        return (self.tokens - self.shared).sum(1)

    @property
    def squares(self) -> np.ndarray:
        """(records,): the sum of the squared lengths, less what is counted once."""
        return (self.tokens**2 - self.shared**2).sum(1)


def mixture() -> Lengths:
    """326,154 conversations with the lengths that the paper states of the Tulu V2 mixture.

    Quartiles 230 and 1,464, mean 1,097, 63,900 above 2,048 and 20 above 8,192 (Ivison et al. 2023,
    section 2.1); linear between, the median chosen for the mean. Assumed: 0.3 % above 4,096, at
    which ShareGPT's were split; 0.6 of the tokens trained, as of Code Alpaca and GSM8K.
    """
    count = 326_154
    shares = [0, 0.25, 0.5, 0.75, 1 - 63_900 / count, 0.997, 1 - 20 / count, 1]
    tokens = [20, 230, 594, 1464, 2048, 4096, 8192, 8192]
    quantiles = np.interp((np.arange(count) + 0.5) / count, shares, tokens)
    return spread("the Tulu V2 mixture (lengths by the paper's figures)", quantiles[:, None], 0.6)


def ultrafeedback() -> Lengths:
    """61,966 pairs of prompts of 185 and answers of 305 tokens on average, spread like chats.

    The means are recalled figures of UltraFeedback (binarized, November 2023), not counted; the
    spread is log-normal with sigma 0.9, up to 2,048 tokens each, about what the models that
    answered could write. Answers are trained.
    """
    count = 61_966
    chances = np.random.default_rng(0).standard_normal((count, 3))
    sizes = np.exp(0.9 * chances - 0.405) * (185, 305, 305)
    sizes = np.clip(sizes.astype(np.int64), 1, 2048)
    prompt, answers = sizes[:, :1], sizes[:, 1:]
    name, shared = "UltraFeedback (lengths by recalled means)", prompt * (0, 1)
    return Lengths(name, prompt + answers, answers, shared)


def spread(name: str, tokens: np.ndarray, share: float) -> Lengths:
    """`Lengths` (records, sequences) with the same share of each record's tokens trained."""
    tokens = tokens.astype(np.int64)
    trained = np.maximum(1, tokens * share).astype(np.int64)
    return Lengths(name, tokens, trained, np.zeros_like(tokens))


def cut(lengths: Lengths, max_seq_len: int) -> Lengths:
    """The same, with sequences cut at so many tokens."""
    tokens = np.minimum(lengths.tokens, max_seq_len)
    trained, shared = (np.minimum(part, tokens) for part in (lengths.trained, lengths.shared))
    return Lengths(lengths.name, tokens, trained, shared)


def part(lengths: Lengths, share: float, seed: int) -> Lengths:
    """The same without a share of the records, drawn by the seed; one stays at least."""
    count = len(lengths.tokens)
    stay = np.sort(np.random.default_rng(seed).permutation(count)[int(share * count) :])
    return Lengths(
        lengths.name, *(x[stay] for x in (lengths.tokens, lengths.trained, lengths.shared))
    )


def check_rows(lengths: Lengths, micro_tokens: int) -> None:
    """Raise `InputError` where the longest record does not fit into one row."""
    longest = int(lengths.in_rows.max())
    if longest > micro_tokens:
        raise InputError(
            f"--micro-tokens is {micro_tokens}, expected at least {longest}, the longest record of "
            f"{lengths.name}; a smaller --max-seq-len cuts it"
        )


@dataclass(frozen=True)
class Updates:
    """Some updates of a run, each as lists of `Row`, one list for each rank; and their number."""

    rows: list[list[list[Row]]]
    extreme: list[list[list[Row]]]  # of updates that take the most memory
    total: int
    tokens: float  # of an update, on average, all ranks together


def sample_updates(
    lengths: Lengths, batch_size: int, epochs: int, micro_tokens: int, ranks: int,
    config: LlamaConfig, seed: int = 42,
) -> Updates:  # fmt: skip
    """The rows of up to `SAMPLE` updates of the run, planned as the loops plan them."""
    _, total = update_count(len(lengths.tokens), batch_size, epochs)
    count = len(lengths.tokens)

    def rows_of(step):
        _, members = update_members(count, batch_size, seed, step)
        parts = sizes[members], squares[members], trained[members]
        plan = plan_rows(parts[0], ranks, micro_tokens, config.hidden_size, parts[1])
        return [[row_of(*(part[r] for part in parts)) for r in rank] for rank in plan]

    sizes, squares, trained = lengths.in_rows, lengths.squares, lengths.trained.sum(1)
    members = (update_members(count, batch_size, seed, step)[1] for step in range(total))
    tokens, longest = np.array([(sizes[m].sum(), sizes[m].max()) for m in members]).T
    extreme = {*tokens.argsort()[-EXTREME:], *longest.argsort()[-EXTREME:]}
    steps = np.unique(np.linspace(0, total - 1, SAMPLE).astype(int))
    rows, extreme_rows = [rows_of(step) for step in steps], [rows_of(step) for step in extreme]
    return Updates(rows, extreme_rows, total, tokens[steps].mean())


def largest_rows(
    sizes: np.ndarray, trained: np.ndarray, squares: np.ndarray, ranks: int, micro_tokens: int,
    hidden_size: int,
) -> tuple[int, int, int]:  # fmt: skip
    """(tokens of the longest row, most trained tokens of a row, most rows of a rank) of updates.

    sizes, trained and squares (updates, records of an update) are `plan_rows`'s of data.py, whose
    rows these are exactly, of all updates at once: turn k lays the k-th longest record of each.
    """
    longest_first = (-sizes).argsort(axis=1, kind="stable")
    sizes, trained, squares = (
        np.take_along_axis(each, longest_first, 1) for each in (sizes, trained, squares)
    )
    costs, first = sizes + squares / (12 * hidden_size), ranks * np.arange(len(sizes))
    done = np.zeros((len(sizes), ranks))
    # Of each update's ranks: the rows begun, and of each row the free (-1: not begun) and trained
    # tokens.
    begun = np.zeros(done.size, np.int64)
    free, predicted = np.full((done.size, 1), -1), np.zeros((done.size, 1), np.int64)
    for size, train, cost in zip(sizes.T, trained.T, costs.T, strict=True):
        place = first + done.argmin(1)  # the rank with the least to do
        done.flat[place] += cost
        if begun.max() == free.shape[1]:
            free = np.pad(free, ((0, 0), (0, begun.max())), constant_values=-1)
            predicted = np.pad(predicted, ((0, 0), (0, begun.max())))
        left = free[place] - size[:, None]
        row = np.where(left < 0, micro_tokens, left).argmin(1)  # the fullest that takes it
        new = (left < 0).all(1)
        row = np.where(new, begun[place], row)
        free[place, row] = np.where(new, micro_tokens, free[place, row]) - size
        predicted[place, row] += train
        begun[place] += new
    return micro_tokens - free[free >= 0].min(), predicted.max(), begun.max()


def row_of(tokens: np.ndarray, squares: np.ndarray, trained: np.ndarray) -> Row:
    """The `Row` of records, all (n,); an empty one is 1 token."""
    return Row(max(1, int(tokens.sum())), int(squares.sum()), int(trained.sum()))


def extent(updates: Updates, micro_tokens: int) -> tuple[int, int, int]:
    """(tokens of the longest row, most rows of a rank, trained tokens of a row): for memory.

    Of the updates that were planned; a tenth more for the others, at most --micro-tokens.
    """
    ranks = [rank for update in updates.rows + updates.extreme for rank in update]
    rows = [row for rank in ranks for row in rank]
    longest = min(micro_tokens, int(1.1 * max(row.tokens for row in rows)))
    predicted = min(longest, int(1.1 * max(row.predicted for row in rows)))
    return longest, max(map(len, ranks)), predicted
