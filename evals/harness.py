"""What the benchmarks share: options, prompts, items, records, a mean and its error.

A benchmark is a file of plain functions: `load` its items, `prompt` one, `score` an answer, and
`evaluate` all, which is a loop of this shape:

    for own in records.pending(items):                  this rank's part of what is still to do
        prompts = [prompt(generator.tokenizer, item, options) for item in own]
        completions = generator.generate(prompts, SAMPLING, seeds=[seed_of(i) for i in own])
        records.add([… one dict for each item …])       written by rank 0, known to every rank
    return result(…)                                    from records.of(items)
"""

import csv
import itertools
import json
import os
import random
import statistics
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from program.errors import InputError
from program.ranks import gather_lists
from tokens.readers import parse, read_batches


@dataclass(frozen=True)
class Options:
    """What holds for every benchmark of an evaluation."""

    full: bool = False  # all items, where the paper drew a sample
    chat: bool = True  # Tulu's chat format; a base model is asked without
    mmlu_shots: int = 0
    seed: int = 42  # of samples of items and of tokens


class Records:
    """The JSON lines of an evaluation: a record for each item of each task, with its verdict.

    An evaluation that was interrupted finds its records there, and goes on with the items that have
    none. Every rank knows all of them; rank 0 writes.
    """

    def __init__(self, path, found=()):
        """found: the records of `path`, from an earlier start."""
        self.path, self.task, self.found = path, None, {}
        for record in found:
            self.found[record["task"], record["id"]] = record

    def pending(self, items, per_rank=64, together=None):
        """Lists of this rank's items without a record; `add` theirs before the next. A bar shows.

        items: dicts with an "id" that is unique in the task. together: a field; a list holds
        neighbours with one value of it, whose prompts begin alike (decoding.py reads that once).
        """
        rank, world = dist.get_rank(), dist.get_world_size()
        left = [item for item in items if (self.task, item["id"]) not in self.found]
        self.done = len(items) - len(left)
        self.bar = tqdm(total=len(items), initial=self.done, desc=self.task,
                        unit="item", disable=rank > 0, dynamic_ncols=True)  # fmt: skip
        for _, group in itertools.groupby(left, lambda item: together and item[together]):
            group = list(group)
            for begin in range(0, len(group), per_rank * world):
                yield group[begin : begin + per_rank * world][rank::world]
        self.bar.close()

    def advance(self):
        """Move the bar as this rank has one more answer; the others will have theirs, too."""
        self.bar.update(min(dist.get_world_size(), self.bar.total - self.bar.n))

    def add(self, own):
        """Keep this rank's records: dicts with the item's "id". Every rank calls it."""
        fresh = [{"task": self.task, **record} for record in gather_lists(own)]
        for record in fresh:
            self.found[self.task, record["id"]] = record
        if dist.get_rank() == 0:
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in fresh)
        self.done += len(fresh)
        self.bar.update(self.done - self.bar.n)  # what `advance` foresaw is counted here

    def of(self, items):
        """The records of `items`, in their order."""
        return [self.found[self.task, item["id"]] for item in items]


# ---- Prompts


def ask(tokenizer, text, options, prefill=""):
    """Token ids of one user turn and the beginning of its answer, or of the bare text.

    The text is not stripped: the paper's training did that, its evaluation did not. Without chat
    format the prefill follows after a space, if the text does not end in white space already.
    """
    if options.chat:
        return tokenizer.raw(f"<|user|>\n{text}\n<|assistant|>\n{prefill}")
    joint = " " if prefill and not text[-1:].isspace() else ""
    return tokenizer.raw(text + joint + prefill)


def fewest_dropped(make, shots, most_tokens):
    """(ids, shots left out): `make(k)` with the last k examples, as many as `most_tokens` allows.

    The examples nearest to the question stay. With none left, the prompt is what it is.
    """
    for dropped in range(shots + 1):
        ids = make(shots - dropped)
        if len(ids) <= most_tokens:
            return ids, dropped
    return ids, shots


# ---- Items


def sample(items, n, options):
    """The paper's n items, drawn by `options.seed`, in their order; all with --full or too few."""
    if options.full or n >= len(items):
        return list(items)
    chosen = random.Random(options.seed).sample(range(len(items)), n)
    return [items[i] for i in sorted(chosen)]


def seed_of(item):
    """A number that is the item's own, whatever else is asked: the source of its samples."""
    return zlib.crc32(str(item["id"]).encode())


def need(folder, name):
    """The path of a benchmark's file; raises `InputError` where it is missing."""
    path = folder / name
    if not path.exists():
        raise InputError(f"{path}: no such file, expected the benchmark's as published")
    return path


def read_jsonl(path, fields):
    """Records of a .jsonl or .jsonl.gz, each `checked`; raises `InputError` with the line."""
    records = []
    for first, lines, _ in read_batches(path):
        for number, line in enumerate(lines, first):
            record = parse(line, path, number)
            if record is not None:  # a blank line
                records.append(checked(record, fields, f"{path}:{number}"))
    return records


def read_text(path):
    """The content of a text file, which must be UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error})") from None


def read_json(path):
    """The content of a .json file."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON ({error})") from None


def read_csv(path, columns=None):
    """Rows of a .csv as dicts by its header, or by `columns` where it has none."""
    rows = []
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, columns, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    expected = ", ".join(name for name in row if name)
                    raise InputError(f"{path}:{reader.line_num}: has other columns than {expected}")
                rows.append(row)
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path}:{reader.line_num + 1}: not CSV ({error})") from None
    return rows


def checked(record, fields, where):
    """The record, if it is an object with all `fields`: names, or a dict of names and types."""
    if not isinstance(record, dict):
        raise InputError(f"{where}: found no object, expected one with {', '.join(fields)}")
    for name in fields:
        if name not in record:
            raise InputError(f"{where}: found no {name}, expected {', '.join(fields)}")
        if isinstance(fields, dict) and not isinstance(record[name], fields[name]):
            found, expected = type(record[name]).__name__, fields[name].__name__
            raise InputError(f"{where}: {name} is a {found}, expected a {expected}")
    return record


# ---- Results


def mean_and_error(values):
    """Mean and its standard error, both times 100, of scores from 0 to 1; a single one has none."""
    mean = 100 * statistics.fmean(values)
    if len(values) == 1:
        return mean, None
    return mean, 100 * statistics.stdev(values) / len(values) ** 0.5


def mean_of_means(groups):
    """Mean of the groups' means, each counting alike, and its standard error; both times 100."""
    means, errors = zip(*map(mean_and_error, groups), strict=True)
    if None in errors:
        return statistics.fmean(means), None
    return statistics.fmean(means), sum(error**2 for error in errors) ** 0.5 / len(errors)


def result(metric, score, error, n, settings, **more):
    """What evaluate.py prints and writes of a task: the score in percent and how it came about."""
    return {"metric": metric, "score": score, "stderr": error, "n": n, "settings": settings, **more}


def write_outputs(records, name, text):
    """Write what a judge will read beside the records: `results.jsonl` → `results.{name}`.

    Rank 0 writes; the path is returned on every rank.
    """
    path = Path(records.path).with_suffix(f".{name}")
    if is_main():
        aside = path.with_name(path.name + ".partial")
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    return str(path)


def json_lines(rows):
    """Text of a .jsonl file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def model_name(generator):
    """What a judge's table shall call the model: its folder's name, without spaces."""
    return "-".join(generator.tokenizer.path.resolve().parent.name.split())


def finishes(records):
    """How many answers ended why."""
    found = [record["finish"] for record in records]
    return {name: found.count(name) for name in sorted(set(found))}


def record_of(tokenizer, item, ids, completion):
    """What every record of an answer holds: the prompt as text, the answer, and why it ended."""
    return {"id": item["id"], "prompt": tokenizer.visible(ids),
            "completion": completion.text, "finish": completion.finish}  # fmt: skip


def is_main():
    """Whether this process is rank 0, which writes."""
    return int(os.environ.get("RANK", 0)) == 0
