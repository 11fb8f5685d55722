"""What the benchmarks share: options, records, the answer loop, prompts, items, results.

A benchmark is a file of plain functions: `load` its items, make the `prompt` of one, `score` an
answer, and `evaluate` all of them, which has this shape:

    items = load(folder, options)
    answered = answer_all(generator, records, items, make_prompt, score, sampling)
    return result(…)                       computed from the answered records

`answer_all` is the loop of every benchmark that needs one answer for each item. Those that need
something else (log-probabilities of choices, a second turn) have a loop of their own around
`Records.pending` and `Records.add`.
"""

import csv
import dataclasses
import hashlib
import itertools
import json
import random
import statistics
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from decoding.generator import Completion, TextGenerator
from decoding.sampling import Sampling
from program.errors import InputError, amount
from program.files import written_aside
from program.progress import progress_bar
from program.ranks import gather_lists
from tokens import readers
from tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Options:
    """The settings that all benchmarks of an evaluation share."""

    full: bool = False  # ask all items, also where the paper drew a sample
    chat: bool = True  # Tulu's chat format; a base model gets the bare text
    mmlu_shots: int = 0
    seed: int = 42  # of samples of items and of tokens


class Records:
    """The JSON lines of an evaluation: a record for each item of each task, with its verdict.

    An interrupted evaluation reads its records back and continues with the items that have none.
    A record belongs to an item only with the item's key and prompt: a changed question is asked
    again. Every rank holds all records; rank 0 writes them.
    """

    def __init__(self, path: str | Path, earlier: Iterable[dict] = ()) -> None:
        """earlier: the records that `path` holds already."""
        self.path, self.task, self.known, self.keys = path, None, {}, {}
        self.per_rank = 64  # items of a batch, where no other number is asked for
        for record in earlier:
            self.known[record["task"], record["id"]] = record

    def pending(self, items: list[dict], per_rank: int | None = None, group_by: str | None = None,
                prompt: Callable | None = None,
                settings: dict | None = None) -> Iterator[list[dict]]:  # fmt: skip
        """Yield this rank's items that have no record, in batches of at most `per_rank`.

        The records of a batch must be `add`ed before the next batch. A progress bar is shown.

        items: dicts, each with an "id" that is unique in the task. group_by: a field; the items of
        a batch are neighbours that share its value, so their prompts begin alike, and the decoder
        computes that beginning once. prompt(item): its prompt as text, by default not compared.
        settings: what else decides the answers of this task, as JSON takes it.
        """
        rank, world, per_rank = dist.get_rank(), dist.get_world_size(), per_rank or self.per_rank
        self.keys = {item["id"]: digest_of([item, settings]) for item in items}
        left = [item for item in items if not self.is_answered(item, prompt)]
        changed = sum((self.task, item["id"]) in self.known for item in left)
        if changed and rank == 0:
            print(
                f"{self.task}: {changed:,} of {amount(len(items), 'items')} "
                f"{'has' if changed == 1 else 'have'} changed since the answer: asked again",
                file=sys.stderr,
            )
        self.done = len(items) - len(left)
        self.bar = progress_bar(total=len(items), initial=self.done, desc=self.task,
                                unit="item", disable=rank > 0)  # fmt: skip
        for _, group in itertools.groupby(left, lambda item: group_by and item[group_by]):
            group = list(group)
            for begin in range(0, len(group), per_rank * world):
                yield group[begin : begin + per_rank * world][rank::world]
        self.bar.close()

    def is_answered(self, item: dict, prompt: Callable | None) -> bool:
        """Whether an item has a record that its question, prompt and settings of today made."""
        record = self.known.get((self.task, item["id"]), {})
        if record.get("key") != self.keys[item["id"]]:
            return False
        return prompt is None or record["prompt"] == prompt(item)

    def advance(self) -> None:
        """Move the bar after an answer of this rank, on the guess that each rank has one more."""
        self.bar.update(min(dist.get_world_size(), self.bar.total - self.bar.n))

    def add(self, batch: list[dict]) -> None:
        """Keep the records of this rank's batch, dicts with the item's "id". All ranks call it."""
        new = [{"task": self.task, **record} for record in gather_lists(batch)]
        for record in new:
            record["key"] = self.keys[record["id"]]
            self.known[self.task, record["id"]] = record
        if dist.get_rank() == 0:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json_lines(new))
        self.done += len(new)
        self.bar.update(self.done - self.bar.n)  # the true count replaces the guess of `advance`

    def of(self, items: list[dict], task: str | None = None) -> list[dict]:
        """The records of `items`, in their order; of another task than the present one if named."""
        return [self.known[task or self.task, item["id"]] for item in items]


def answer_all(generator: TextGenerator, records: Records, items: list[dict], prompt: Callable,
               score: Callable, sampling: Sampling, per_rank: int | None = None,
               group_by: str | None = None, mapper: Callable = map) -> list[dict]:  # fmt: skip
    """Answer every item that has no record yet; the records of all items, in their order.

    prompt(item): the prompt's token ids, and a dict of what else the record shall hold.
    score(item, text): the verdict on an answer, a dict. per_rank, group_by: see `Records.pending`.
    mapper: calls `score` as `map` does; the `map` of a thread pool scores several answers at once.

    A sampled answer depends on its item and `sampling.seed`, not on the other items.
    """

    def prompt_text(item):
        return generator.tokenizer.visible(prompt(item)[0])

    settings = dataclasses.asdict(sampling)
    for batch in records.pending(items, per_rank, group_by, prompt_text, settings):
        prompts = [prompt(item) for item in batch]
        seeds = [seed_of(item) for item in batch]
        answers = generator.generate([ids for ids, _ in prompts], sampling, seeds, records.advance)
        verdicts = mapper(score, batch, [answer.text for answer in answers])
        records.add(
            [
                record_of(generator.tokenizer, item, ids, answer) | more | verdict
                for item, (ids, more), answer, verdict in zip(
                    batch, prompts, answers, verdicts, strict=True
                )
            ]
        )
    return records.of(items)


def record_of(tokenizer: Tokenizer, item: dict, ids: list[int], answer: Completion) -> dict:
    """What every record of an answer holds: the prompt as text, the answer, and why it ended."""
    return {"id": item["id"], "prompt": tokenizer.visible(ids),
            "completion": answer.text, "finish": answer.finish}  # fmt: skip


# ---- Prompts


def prompt_ids(tokenizer: Tokenizer, text: str, options: Options, prefill: str = "") -> list[int]:
    """Token ids of one user turn and the beginning of its answer, or of the bare text.

    The text is not stripped: the paper strips it in training, but not in evaluation. Without chat
    format a space stands before the prefill, unless the text ends in white space.
    """
    if options.chat:
        return tokenizer.raw(f"<|user|>\n{text}\n<|assistant|>\n{prefill}")
    joint = " " if prefill and not text[-1:].isspace() else ""
    return tokenizer.raw(text + joint + prefill)


def fit_examples(make: Callable, shots: int, max_tokens: int) -> tuple[list[int], int]:
    """(token ids, number of examples left out) of the longest prompt within `max_tokens`.

    make(k): token ids of the prompt with the last k of `shots` examples, those nearest to the
    question. A prompt that is too long without any example is returned as it is.
    """
    for left_out in range(shots + 1):
        ids = make(shots - left_out)
        if len(ids) <= max_tokens:
            break
    return ids, left_out


# ---- Items


def sample(items: list, n: int, options: Options) -> list:
    """n items drawn with `options.seed`, in their order. All with --full, or if n is enough."""
    if options.full or n >= len(items):
        return list(items)
    chosen = random.Random(options.seed).sample(range(len(items)), n)
    return [items[i] for i in sorted(chosen)]


def seed_of(item: dict) -> int:
    """The seed of an item's sampled answer. It depends on the item's id alone."""
    return zlib.crc32(str(item["id"]).encode())


def digest_of(value: object) -> str:
    """SHA-256 of a value, as JSON."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def published(folder: Path, name: str) -> Path:
    """The path of a benchmark's file or folder. Raises `InputError` if it does not exist."""
    path = folder / name
    if not (path.is_file() or path.is_dir()):  # a pipe would be waited for without end
        raise InputError(f"{path}: no such file, expected the benchmark's as published")
    return path


def read_jsonl(path: Path, fields: Iterable[str]) -> list[dict]:
    """Records of a .jsonl or .jsonl.gz, each `checked`. Raises `InputError` with the line."""
    return [checked(record, fields, f"{path}:{n}") for n, record in readers.records(path)]


def read_text(path: Path) -> str:
    """The content of a text file. Raises `InputError` unless it is UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error})") from None


def read_json(path: Path) -> Any:
    """The value in a .json file, of any JSON type. Raises `InputError` unless it is JSON."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON ({error})") from None


def read_csv(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, str]]:
    """Rows of a .csv as dicts. Their keys are `columns`, or by default the file's header."""
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


def checked(record: object, fields: Iterable[str], where: object) -> dict:
    """The record itself. Raises `InputError` unless it is an object with all `fields`.

    fields: their names, or a dict from names to Python types. where: file and line, for the error.
    """
    if not isinstance(record, dict):
        raise InputError(f"{where}: found no object, expected one with {', '.join(fields)}")
    for name in fields:
        if name not in record:
            raise InputError(f"{where}: found no {name}, expected {', '.join(fields)}")
        if isinstance(fields, dict) and not isinstance(record[name], fields[name]):
            kind, expected = type(record[name]).__name__, fields[name].__name__
            raise InputError(f"{where}: {name} is a {kind}, expected a {expected}")
    return record


# ---- Results


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard error, in percent, of scores from 0 to 1. One score has no error: None."""
    mean = 100 * statistics.fmean(values)
    if len(values) == 1:
        return mean, None
    return mean, 100 * statistics.stdev(values) / len(values) ** 0.5


def mean_of_means(groups: Iterable[Sequence[float]]) -> tuple[float, float | None]:
    """Mean of the groups' means, all with equal weight, and its standard error; in percent."""
    means, errors = zip(*map(mean_and_error, groups), strict=True)
    if None in errors:
        return statistics.fmean(means), None
    return statistics.fmean(means), sum(error**2 for error in errors) ** 0.5 / len(errors)


def result(metric: str, score: float | None, error: float | None, n: int, settings: dict,
           **more) -> dict:  # fmt: skip
    """What evaluate.py prints and writes for a task: score, standard error, items, settings."""
    return {"metric": metric, "score": score, "stderr": error, "n": n, "settings": settings, **more}


def write_outputs(records: Records, name: str, text: str) -> str:
    """Write the input of a judge beside the records, as `results.{name}`; its path, on every rank.

    Rank 0 writes.
    """
    path = Path(records.path).with_suffix(f".{name}")
    if dist.get_rank() == 0:
        with written_aside(path) as file:
            file.write(text)
    return str(path)


def json_lines(rows: Iterable[dict]) -> str:
    """Text of a .jsonl file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def model_name(generator: TextGenerator) -> str:
    """The model's name in a judge's table: the name of its folder, without spaces."""
    return "-".join(generator.tokenizer.path.resolve().parent.name.split())


def finishes(records: list[dict]) -> dict[str, int]:
    """The number of answers for each finish reason."""
    reasons = [record["finish"] for record in records]
    return {reason: reasons.count(reason) for reason in sorted(set(reasons))}
