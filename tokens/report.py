"""What `python data.py` shows of the tokens: the lengths of conversations, and what is trained."""

import sys

import numpy as np


def print_lengths(lengths):
    """Percentiles of the lengths, and their histogram in powers of two."""
    shares = (5, 25, 50, 75, 95, 99, 100)
    values = zip(shares, np.percentile(lengths, shares), strict=True)
    percentiles = ", ".join(f"{share} %: {value:,.0f}" for share, value in values)
    print(f"tokens of a conversation: mean {lengths.mean():,.0f}; percentiles {percentiles}")
    powers = np.ceil(np.log2(lengths)).astype(int)
    counts = np.bincount(powers)
    for power in range(powers.min(), powers.max() + 1):
        bar = "█" * round(50 * counts[power] / counts.max())
        print(f"  ≤ {2**power:>7,} {counts[power]:>9,} {bar}")


def highlight(tokenizer, ids, trained):
    """The text of some tokens, BOS and EOS written out, what is trained in green (or in ⟦⟧)."""
    begin, end = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("⟦", "⟧")
    text = ""
    for run in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(trained)) + 1):
        shown = tokenizer.visible(ids[run].tolist())
        text += f"{begin}{shown}{end}" if trained[run[0]] else shown
    return text
