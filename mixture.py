"""Build the Tulu V2 mixture (326,154 conversations) from its raw sources, or check a finished one.

    python mixture.py --raw raw --tokenizer tokenizer.model --out tulu-v2-sft-mixture.jsonl
    python mixture.py --check tulu-v2-sft-mixture.jsonl

Raw records become conversations (`mixture_sources.py`), a random sample is drawn where the original
drew one, conversations with one of `KEYWORDS` are dropped, and the rest is written for `sft.py
--data`, one JSON object a line. Sources follow one another in the order of `SOURCES`, the rows of
each in the order of its raw files; the mixture is not shuffled, training does that. The table at
the end compares with the published counts. Memory does not grow with the files.

Where this differs from open-instruct's `reformat_datasets.py` (at 60ceefa):
- The original seeds one stream of random numbers and draws everything from it, Tulu V1 and other
  data sets included, so that even its authors cannot redraw the released samples. Here every source
  has a stream of its own, made from the seed and the source's name: its sample is the same
  whichever others are built, under every version of Python and on every machine.
- A sample keeps the order of the raw file; the original's is shuffled. (`cot_17` and
  `gpt4_alpaca_17` are in both cases the row at position 17 of the sample.)
- The order of the sources is fixed; the original's is the one in which the disk lists its folders.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import random
from collections import Counter
from pathlib import Path

import sentencepiece
from tqdm import tqdm

from program.errors import InputError, reported
from tulu_mixture.readers import count, files_in, find_files, located, records, without
from tulu_mixture.sources import SCIENCE_TASKS, SOURCES, field, sharegpt_texts

# Any message of any role that contains one of these, in upper or lower case, also inside a longer
# word, loses the whole conversation: "bombard", "Lombardy" and everyone called Claude go with them.
KEYWORDS = (
    *("OpenAI", "Open AI", "ChatGPT", "Chat GPT", "BingChat", "Bing Chat", "BARD", "Palm"),
    *("GPT-3", "GPT3", "GPT 3", "GPT-4", "GPT4", "GPT 4", "GPT-3.5", "GPT3.5", "GPT 3.5"),
    *("Anthropic", "Claude", "LAION", "Open Assistant", "OpenAssistant"),
)
LOWERED = tuple(word.lower() for word in KEYWORDS)


def main():
    args = parse_args()
    chosen = [source for source in SOURCES if source.name in args.sources]
    if args.check:
        check(args.check, chosen)
        return
    paths = find_files(args.raw, chosen)
    tokenizer = load_tokenizer(args.tokenizer, chosen)
    if args.out.suffix != ".jsonl":
        raise InputError(f"--out {args.out}: expected a name that ends in .jsonl")
    if not args.out.parent.is_dir():
        raise InputError(f"--out {args.out}: no folder {args.out.parent}")
    if args.out.exists() and not (args.overwrite and args.out.is_file()):
        raise InputError(f"--out {args.out}: exists; --overwrite replaces a file")

    reports = {source.name: Report() for source in chosen}
    bar = tqdm(total=sum(source.before for source in chosen), unit=" conversations", disable=None)
    with bar, written_aside(args.out) as out:
        for source in chosen:
            report = reports[source.name]
            bar.set_description(source.name)
            stream = random_stream(args.seed, source.name)
            rows = conversations(source, paths[source.name], stream, tokenizer, report)
            for conversation in rows:
                bar.update()
                report.sampled += 1
                if source.name != "hard_coded" and has_keyword(conversation):
                    continue
                report.kept[conversation["dataset"]] += 1
                out.write(json.dumps(conversation, ensure_ascii=False) + "\n")
    print_table(chosen, reports)
    print(f"written: {args.out}")


@dataclasses.dataclass
class Report:
    """What became of one source."""

    read: int = 0  # raw rows
    sampled: int = 0  # conversations before the keyword filter
    kept: Counter = dataclasses.field(default_factory=Counter)  # and after it, by `dataset`
    dropped: Counter = dataclasses.field(default_factory=Counter)  # left out, by reason


def conversations(source, paths, stream, tokenizer, report):
    """The source's conversations before the keyword filter, in their final form."""
    for _ in range(source.repeat):
        position = report.read = 0  # a repeated source repeats its ids, and its rows count once
        for path in paths:
            rows = converted(source, path, stream, tokenizer, report)
            if source.sample:
                rows = sample(rows, source.sample, count(path), stream)
            for result in itertools.chain.from_iterable(rows):
                if isinstance(result, str):
                    report.dropped[result] += 1
                    continue
                yield {"dataset": source.name, "id": f"{source.name}_{position}", **result}
                position += 1


def converted(source, path, stream, tokenizer, report):
    """For every row of a raw file, what the source's converter makes of it.

    That includes the rows that no sample will take: an error is found whatever the seed.
    """
    rows, before = records(path), report.read
    if source.name == "sharegpt":
        rows = with_token_counts(rows, tokenizer)
    for place, record in rows:
        report.read += 1
        with located(place):
            results = list(source.convert(record, stream))
        yield results
    if report.read == before:
        raise InputError(f"{path}: no records")


def sample(rows, wanted: int, left: int, stream):
    """`wanted` of the `left` rows, in their order: Knuth's algorithm S (volume 2, section 3.4.2).

    A row is taken with the chance (still wanted) / (rows left), which makes every set of rows
    equally likely, needs no memory, and ends with exactly as many as wanted.
    """
    for row in rows:
        take = stream.random() * left < wanted
        wanted, left = wanted - take, left - 1
        if take:
            yield row


def random_stream(seed: int, name: str) -> random.Random:
    """Random numbers that depend on the seed and the source's name alone.

    Only its `random()` is used: that sequence is the one that Python promises not to change.
    """
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return random.Random(int.from_bytes(digest, "big"))


def with_token_counts(rows, tokenizer):
    """Add `tokens`, the number of tokens of each message, to ShareGPT's records.

    Batches of texts go to SentencePiece, which encodes them on all cores. (The original's tokenizer
    takes a literal `</s>` in a text for one token; here it is text, of a few tokens.)
    """
    while batch := list(itertools.islice(rows, 256)):
        texts = []
        for place, record in batch:
            with located(place):
                texts += sharegpt_texts(record)
        lengths = map(len, tokenizer.encode(texts, num_threads=os.cpu_count()))
        for place, record in batch:
            tokens = list(itertools.islice(lengths, len(record["conversations"])))
            yield place, {**record, "tokens": tokens}


def has_keyword(conversation) -> bool:
    for message in conversation["messages"]:
        text = message["content"].lower()
        if any(word in text for word in LOWERED):
            return True
    return False


def check(paths, chosen):
    """Compare a finished mixture with the published counts; `InputError` where one is not met."""
    reports = {source.name: Report() for source in chosen}
    names = {source.name for source in SOURCES}
    for path in files_in(paths):
        for place, record in tqdm(records(path), desc=path.name, unit=" rows", disable=None):
            with located(place):
                dataset = field(record, "dataset", str)
                name = "science" if dataset.startswith("science.") else dataset
                if name not in names:
                    raise InputError(f"dataset {dataset!r} is not one of the mixture's")
                if not field(record, "messages", list):
                    raise InputError("no messages")
            if name in reports:
                reports[name].kept[dataset] += 1
    wrong = print_table(chosen, reports)
    if wrong:
        raise InputError(f"{', '.join(map(str, paths))}: counts other than published: {wrong}")


def print_table(chosen, reports) -> str:
    """Print what became of each source beside what was published; return the kept that differ."""
    lines = []
    for source in chosen:
        report = reports[source.name]
        # A finished mixture tells nothing of what was read and filtered: 0, printed as a dash.
        counts = [report.read, report.sampled, max(0, report.sampled - report.kept.total())]
        counts += [report.kept.total(), source.before, source.after]
        lines.append((source.name, counts))
        if source.name == "science":
            tasks = SCIENCE_TASKS | {task: 0 for task in report.kept if task not in SCIENCE_TASKS}
            for task, after in tasks.items():
                lines.append((f"  {task}", [0, 0, 0, report.kept[task], 0, after]))
    sums = zip(*(counts for name, counts in lines if not name.startswith(" ")), strict=True)
    lines.append(("total", [sum(column) for column in sums]))

    titles = ("rows read", "sampled", "filtered", "kept", "sampled*", "kept*")
    print(f"{'source':30}" + "".join(f"{title:>11}" for title in titles) + "  * published")
    samples = {source.name for source in chosen if source.sample}
    wrong, drawn_anew = [], False
    for name, counts in lines:
        _, sampled, _, kept, before, after = counts
        differs = [f"{sampled - before:+,} sampled"] if sampled and before != sampled else []
        if kept != after:
            differs.append(f"{kept - after:+,} kept" + " (a random sample)" * (name in samples))
            drawn_anew |= name in samples
            wrong.append(f"{name.strip()} {kept:,} instead of {after:,}")
        cells = "".join(f"{count:>11,}" if count else f"{'-':>11}" for count in counts)
        verdict = "differs: " + ", ".join(differs) if differs else "as published"
        print(f"{name:30}{cells}  {verdict}")
    if drawn_anew:
        print(
            "The original's random samples cannot be drawn again, and how many conversations the"
            " filter takes from another sample is chance: its kept count cannot be met exactly."
        )
    for source in chosen:
        for what, number in reports[source.name].dropped.items():
            print(f"left out of {source.name}, as in the original: {number:,} {what}")
    return "; ".join(wrong)


def load_tokenizer(path, chosen):
    """The tokenizer whose tokens ShareGPT is split by; None where ShareGPT is not built."""
    if "sharegpt" not in (source.name for source in chosen):
        return None
    if path is None or not path.is_file():
        rest = [source.name for source in chosen if source.name != "sharegpt"]
        raise InputError(
            f"--tokenizer {path or 'is missing'}: expected Llama's tokenizer.model, by whose tokens"
            f" ShareGPT is split (every Llama 2 checkpoint has it){without(rest)}"
        )
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError:
        raise InputError(f"--tokenizer {path}: no SentencePiece model") from None


@contextlib.contextmanager
def written_aside(path: Path):
    """A text file that takes its name when it is complete; where that fails, nothing is left."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(aside, "x", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(message)


def parse_args():
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    names = [source.name for source in SOURCES]
    add = parser.add_argument
    add("--raw", type=Path, help="folder of the raw files, under their published names")
    add("--out", type=Path, help="the mixture, a .jsonl file")
    add("--tokenizer", type=Path, help="Llama's tokenizer.model, to split ShareGPT")
    add("--sources", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    add("--seed", type=int, default=42, help="of the random samples and templates (42)")
    add("--overwrite", action="store_true", help="replace --out where it exists")
    add("--check", type=Path, nargs="+", metavar="FILE", help="finished mixture: files or folders")
    args = parser.parse_args()
    if args.check and (args.raw or args.out):
        parser.error("--check takes neither --raw nor --out")
    if not args.check and not (args.raw and args.out):
        parser.error("expected --raw and --out, or --check")
    return args


if __name__ == "__main__":
    with reported():
        main()
