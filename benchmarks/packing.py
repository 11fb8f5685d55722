"""How many tokens one update of SFT computes, packed and padded: counted, nothing is timed.

    python bench.py packing --data FILE --tokenizer DIR        writes results/packing.json

Default data: sft/code_alpaca_gsm8k.jsonl. The conversations are those of sft.py's first update. A
padded batch is as wide as its longest conversation; EasyLM, which trained Tulu 2, padded all of
them to 8,192 tokens. `python plot.py packing` draws the file.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.inputs import InputFlags, first_documents
from benchmarks.measure import write
from data import plan_rows, update_members
from program.flags import parse_args
from program.ranks import start
from tokens.records import encode_conversation


@dataclass(frozen=True)
class PackingConfig(InputFlags):
    """Flags of `python bench.py packing`; the defaults are sft.py's."""

    batch_size: int = 128  # conversations in one update
    micro_tokens: int = 16384  # most tokens in one packed row
    max_seq_len: int = 8192  # tokens; a longer conversation is cut on the right
    out: str = "results/packing.json"  # the counts


def main(arguments):
    """Count, print a table, and write the JSON file."""
    config = PackingConfig(**parse_args(PackingConfig, arguments))
    _, _, device = start()
    with tempfile.TemporaryDirectory() as folder:
        default, longest = "sft/code_alpaca_gsm8k.jsonl", config.max_seq_len
        documents = first_documents(config, default, None, folder, longest, encode_conversation)
        _, members = update_members(len(documents), config.batch_size, config.seed, 0)
        update = documents.sequences(members)
        lengths = [len(ids) for ids, _ in update]
        trained = [np.flatnonzero(mask).tolist() for _, mask in update]
    rows = plan_rows(np.array(lengths), 1, config.micro_tokens, 4096)[0]  # 7B's hidden_size
    counts = computed(lengths, rows, config.max_seq_len)
    facts = {"data": Path(config.data or default).name, "row_tokens": config.micro_tokens}
    facts |= {"lengths": lengths, "trained": [spans(positions) for positions in trained]}
    facts |= {"rows": [list(map(int, row)) for row in rows], "computed_tokens": counts}
    write("packing", config, arguments, device, **facts)
    for layout, tokens in counts.items():
        print(f"{layout:<28} {tokens:>9,} tokens, {sum(lengths) / tokens:6.1%} of them useful")


def computed(lengths, rows, max_seq_len):
    """Tokens that the forward passes of one update compute, by layout."""
    counts = {"packed": sum(lengths[i] for row in rows for i in row)}
    for batch in (4, 16):
        batches = [lengths[i : i + batch] for i in range(0, len(lengths), batch)]
        counts[f"padded, {batch} a batch"] = sum(max(b) * len(b) for b in batches)
    counts[f"padded to {max_seq_len:,}"] = max_seq_len * len(lengths)
    return counts


def spans(positions):
    """Sorted positions as runs `[first, end)`: [3, 4, 5, 9] is [[3, 6], [9, 10]]."""
    runs = np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)
    return [[int(run[0]), int(run[-1]) + 1] for run in runs]
