"""What `python data.py` shows of the tokens: the lengths of records, and what is trained."""

import sys

import numpy as np

from program.errors import amount
from tokens.shapes import SIDES
from tokens.tokenizer import Tokenizer

MOST = 2000  # tokens of a sequence that are shown


def print_lengths(lengths: np.ndarray, kind: str = "conversation") -> None:
    """Percentiles of the lengths, and their histogram in powers of two."""
    shares = (5, 25, 50, 75, 95, 99, 100)
    values = zip(shares, np.percentile(lengths, shares), strict=True)
    percentiles = ", ".join(f"{share} %: {value:,.0f}" for share, value in values)
    print(f"tokens of a {kind}: mean {lengths.mean():,.0f}; percentiles {percentiles}")
    powers = np.ceil(np.log2(lengths)).astype(int)
    counts = np.bincount(powers)
    for power in range(powers.min(), powers.max() + 1):
        bar = "█" * round(50 * counts[power] / counts.max())
        print(f"  ≤ {2**power:>7,} {counts[power]:>9,} {bar}")


def print_sequences(
    tokenizer: Tokenizer, name: str, sequences: list[tuple[np.ndarray, np.ndarray]]
) -> None:
    """A conversation, or a pair as its prompt, the chosen and the rejected answer.

    sequences: its one or two `(ids, trained)`. The two of a pair begin alike, with the prompt.
    """
    if len(sequences) == 1:
        ((ids, trained),) = sequences
        print(f"\n{name}, {amount(len(ids), 'tokens')}:\n{highlight(tokenizer, ids, trained)}")
        return
    answer = int(np.argmax(sequences[0][1]))
    parts = [("prompt", sequences[0], slice(answer))]
    parts += [(side, s, slice(answer, None)) for side, s in zip(SIDES, sequences, strict=True)]
    for part, (ids, trained), span in parts:
        ids, trained = ids[span], trained[span]
        long = amount(len(ids), "tokens")
        print(f"\n{name}, {part}, {long}:\n{highlight(tokenizer, ids, trained)}")


def highlight(tokenizer: Tokenizer, ids: np.ndarray, trained: np.ndarray) -> str:
    """The text of some tokens, BOS and EOS written out, what is trained in green (or in ⟦⟧).

    Of more than `MOST` the middle is left out.
    """
    if len(ids) > MOST:
        parts = slice(MOST // 2), slice(-MOST // 2, None)
        head, tail = (highlight(tokenizer, ids[part], trained[part]) for part in parts)
        return f"{head}\n… {amount(len(ids) - MOST, 'tokens')} …\n{tail}"
    begin, end = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("⟦", "⟧")
    text = ""
    for run in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(trained)) + 1):
        shown = tokenizer.visible(ids[run].tolist())
        text += f"{begin}{shown}{end}" if trained[run[0]] else shown
    return text
