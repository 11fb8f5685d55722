"""Peak memory of sft.py and dpo.py on the same packed rows, each run in a process of its own:

    python bench.py memory --data FILE --tokenizer DIR

Default data: prefs/alpaca_eval_tulu2_13b.jsonl. The two answers of every pair are two conversations
for sft.py and one pair for dpo.py: the same documents in one row, with the same trained tokens.
dpo.py runs twice, since only its first run computes the reference's log-probabilities; no second
model is in memory in either. Of three updates the second is the first in which weights, gradients,
both moments and activations meet.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.dpo import first_pairs
from benchmarks.inputs import InputFlags, make_model
from benchmarks.measure import write
from program.errors import RunError
from program.flags import parse_args
from program.ranks import start

ROOT = Path(__file__).parent.parent
UPDATES = 3


@dataclass(frozen=True)
class MemoryBenchConfig(InputFlags):
    """Flags of `python bench.py memory`."""

    pairs: int = 16  # the first of the file, all of them in one row
    max_seq_len: int = 512  # tokens of prompt and answer; a longer one is cut on the right
    toy: bool = False  # a tiny model, to rehearse
    out: str = "results/memory.json"  # the figures


def main(arguments):
    """Measure, print the table, and write the JSON file."""
    config = MemoryBenchConfig(**parse_args(MemoryBenchConfig, arguments))
    _, _, device = start()
    with tempfile.TemporaryDirectory() as folder:
        documents = first_pairs(config, folder)
        model = make_model(config, folder)
        pairs, conversations = Path(folder) / "data.jsonl", Path(folder) / "conversations.jsonl"
        conversations.write_text(answers_as_conversations(pairs), encoding="utf-8")
        n, row = len(documents), int(documents.lengths.sum())
        once = int(documents.tokens.sum())  # every prompt once
        runs = {
            "sft.py": run("sft.py", config, folder, conversations, 2 * n, row),
            "dpo.py, which computes the reference": run("dpo.py", config, folder, pairs, n, once),
            "dpo.py, with the reference kept": run("dpo.py", config, folder, pairs, n, once),
        }
    trained = int(documents.trained_counts.sum())
    print(f"one row of {row:,} tokens, {once:,} for dpo.py, {trained:,} of them trained")
    for name, peaks in runs.items():
        print(f"{name:42}{max(peaks):8.3f} GiB")
    facts = {"pairs": n, "row_tokens": row, "dpo_row_tokens": once, "trained_tokens": trained}
    write("memory", config, arguments, device, model=model, **facts, peak_gib=runs)


def answers_as_conversations(pairs):
    """The text of a file of conversations: the chosen and the rejected one of every pair."""
    records = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
    sides = [record[side] for record in records for side in ("chosen", "rejected")]
    return "".join(json.dumps({"messages": messages}) + "\n" for messages in sides)


def run(program, config, folder, data, batch_size, row):
    """Peak memory (GiB) after each update of a run whose updates are one row of all the data."""
    with tempfile.TemporaryDirectory() as out:
        flags = {"model": folder, "data": data, "out": out, "batch-size": batch_size}
        flags |= {"max-seq-len": config.max_seq_len, "micro-tokens": row, "epochs": UPDATES}
        command = [sys.executable, program]
        for name, value in flags.items():
            command += [f"--{name}", str(value)]
        # glibc keeps freed blocks of up to 32 MB for later, in pieces that do not always fit again.
        # With this setting it gives back every block from 1 MB up: resident memory is memory in
        # use.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RunError(f"{program} failed: {done.stderr[-2000:]}")
        records = [json.loads(line) for line in (Path(out) / "metrics.jsonl").open()]
    updates = [record for record in records if "step" in record]
    tokens = [update["tokens"] for update in updates]
    assert tokens == [row] * UPDATES, f"{program}: updates of {tokens} tokens, expected {row} each"
    return [update["peak_memory_gib"] for update in updates]
