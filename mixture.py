"""Build the Tulu V2 mixture (326,154 conversations) from its raw sources, or check a finished one.

    python mixture.py --raw raw --tokenizer tokenizer.model --out tulu-v2-sft-mixture.jsonl
    python mixture.py --check tulu-v2-sft-mixture.jsonl

Sources: flan_v2 cot oasst1 lima gpt4_alpaca code_alpaca sharegpt wizardlm open_orca science
hard_coded. Their raw records become conversations (`tulu_mixture/sources.py`). Where the original
drew a random sample, so does this; conversations with one of `KEYWORDS` are dropped. The rest is
written for `sft.py --data`, one JSON object a line. The sources keep the order above and their rows
that of the raw files; the mixture is not shuffled, since training does that. The table at the end
compares the counts with the published ones. Memory does not grow with the files.

Where this differs from open-instruct's `reformat_datasets.py` (at 60ceefa):
- The original draws everything from one seeded stream of random numbers, for Tulu V1 and other data
  sets too, so that even its authors cannot draw the released samples again. Here every source has a
  stream of its own, made from the seed and the source's name. So its sample does not depend on the
  other sources, on the version of Python, or on the machine.
- A sample keeps the order of the raw file; the original shuffles it. (In both, `cot_17` and
  `gpt4_alpaca_17` name the row at position 17 of the sample.)
- The order of the sources is fixed; the original takes the order in which the disk lists its
  folders.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
from sentencepiece import SentencePieceProcessor
from tqdm import tqdm

from program.errors import InputError, reported
from program.files import written_aside
from program.flags import parse_args
from tulu_mixture.readers import count, files_in, find_files, located, records, without
from tulu_mixture.sources import SCIENCE_TASKS, SOURCES, Source, field, sharegpt_texts

# A conversation is dropped if any of its messages, of any role, contains one of these in upper or
# lower case, even inside a longer word: "bombard", "Lombardy" and everyone called Claude go, too.
KEYWORDS = (
    *("OpenAI", "Open AI", "ChatGPT", "Chat GPT", "BingChat", "Bing Chat", "BARD", "Palm"),
    *("GPT-3", "GPT3", "GPT 3", "GPT-4", "GPT4", "GPT 4", "GPT-3.5", "GPT3.5", "GPT 3.5"),
    *("Anthropic", "Claude", "LAION", "Open Assistant", "OpenAssistant"),
)
LOWERED = tuple(word.lower() for word in KEYWORDS)


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """The flags of mixture.py."""

    raw: str | None = None  # folder of the raw files, under their published names
    out: str | None = None  # the mixture, a .jsonl file
    tokenizer: str | None = None  # Llama's tokenizer.model, to split ShareGPT
    sources: list[str] | None = None  # the sources to build or check (default: all)
    seed: int = 42  # of the random samples and templates
    overwrite: bool = False  # replace --out where it exists
    check: list[str] | None = None  # a finished mixture: files or folders


def main(flags: dict) -> None:
    config = MixtureConfig(**flags)
    chosen = chosen_sources(config.sources)
    if config.check:
        if config.raw or config.out:
            raise InputError("--check takes neither --raw nor --out")
        check(list(map(Path, config.check)), chosen)
        return
    if not (config.raw and config.out):
        raise InputError("expected --raw and --out, or --check (--help lists the flags)")
    paths = find_files(Path(config.raw), chosen)
    tokenizer = load_tokenizer(config.tokenizer, chosen)
    out = Path(config.out)
    if out.suffix != ".jsonl":
        raise InputError(f"--out {out}: expected a name that ends in .jsonl")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: no folder {out.parent}")
    if out.exists() and not (config.overwrite and out.is_file()):
        raise InputError(f"--out {out}: exists; --overwrite replaces a file")

    reports = {source.name: Report() for source in chosen}
    bar = tqdm(total=sum(source.before for source in chosen), unit=" conversations", disable=None)
    with bar, written_aside(out) as file:
        for source in chosen:
            report = reports[source.name]
            bar.set_description(source.name)
            stream = random_stream(config.seed, source.name)
            rows = conversations(source, paths[source.name], stream, tokenizer, report)
            for conversation in rows:
                bar.update()
                report.sampled += 1
                if source.name != "hard_coded" and has_keyword(conversation):
                    continue
                report.kept[conversation["dataset"]] += 1
                file.write(json.dumps(conversation, ensure_ascii=False) + "\n")
    print_table(chosen, reports)
    print(f"written: {out}")


@dataclasses.dataclass
class Report:
    """What became of one source."""

    read: int = 0  # raw rows
    sampled: int = 0  # conversations before the keyword filter
    kept: Counter = dataclasses.field(default_factory=Counter)  # and after it, by `dataset`
    dropped: Counter = dataclasses.field(default_factory=Counter)  # left out, by reason


def chosen_sources(names: list[str] | None) -> list[Source]:
    """The sources of these names (None: all), in the order of `SOURCES`."""
    known = [source.name for source in SOURCES]
    for name in names or ():
        if name not in known:
            raise InputError(f"--sources: found {name!r}, expected some of {' '.join(known)}")
    return [source for source in SOURCES if names is None or source.name in names]


def conversations(source: Source, paths: list[Path], stream: random.Random,
                  tokenizer: SentencePieceProcessor | None,
                  report: Report) -> Iterator[dict]:  # fmt: skip
    """The source's conversations in their final form, before the keyword filter."""
    for _ in range(source.repeat):
        position = report.read = 0  # a repeated source repeats its ids; its rows count once
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


def converted(source: Source, path: Path, stream: random.Random,
              tokenizer: SentencePieceProcessor | None,
              report: Report) -> Iterator[list]:  # fmt: skip
    """What the source's converter makes of every row of a raw file, one list a row.

    Rows that the sample leaves out are converted, too, so that errors do not depend on the seed.
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


def sample(rows: Iterable, wanted: int, left: int, stream: random.Random) -> Iterator:
    """`wanted` of the `left` rows, in their order: Knuth's algorithm S (volume 2, section 3.4.2).

    A row is taken with probability (still wanted) / (rows left). So every set of rows is equally
    likely, no row is kept in memory, and exactly as many are taken as wanted.
    """
    for row in rows:
        take = stream.random() * left < wanted
        wanted, left = wanted - take, left - 1
        if take:
            yield row


def random_stream(seed: int, name: str) -> random.Random:
    """Random numbers that depend on the seed and the source's name alone.

    Only `random()` is called: Python promises never to change that sequence.
    """
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return random.Random(int.from_bytes(digest, "big"))


def with_token_counts(rows: Iterator[tuple[str, dict]],
                      tokenizer: SentencePieceProcessor) -> Iterator[tuple[str, dict]]:  # fmt: skip
    """Add `tokens`, the number of tokens of each message, to ShareGPT's records.

    SentencePiece encodes the texts in batches, on all cores. (The original's tokenizer makes one
    token of a literal `</s>` in a text; here it is text, of a few tokens.)
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


def has_keyword(conversation: dict) -> bool:
    """Whether the keyword filter drops the conversation."""
    for message in conversation["messages"]:
        text = message["content"].lower()
        if any(word in text for word in LOWERED):
            return True
    return False


def check(paths: list[Path], chosen: list[Source]) -> None:
    """Compare a finished mixture with the published counts; raises `InputError` if any differs."""
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


def print_table(chosen: list[Source], reports: dict[str, Report]) -> str:
    """Print each source's counts beside the published ones; returns the kept counts that differ."""
    lines = []
    for source in chosen:
        report = reports[source.name]
        # With --check nothing is known of the rows read and filtered: 0, printed as a dash.
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
    wrong, redrawn = [], False
    for name, counts in lines:
        _, sampled, _, kept, before, after = counts
        differs = [f"{sampled - before:+,} sampled"] if sampled and before != sampled else []
        if kept != after:
            differs.append(f"{kept - after:+,} kept" + " (a random sample)" * (name in samples))
            redrawn |= name in samples
            wrong.append(f"{name.strip()} {kept:,} instead of {after:,}")
        cells = "".join(f"{count:>11,}" if count else f"{'-':>11}" for count in counts)
        verdict = "differs: " + ", ".join(differs) if differs else "as published"
        print(f"{name:30}{cells}  {verdict}")
    if redrawn:
        print(
            "The original's random samples cannot be drawn again. How many conversations the filter"
            " drops from another sample is chance, so those kept counts cannot be met exactly."
        )
    for source in chosen:
        for what, number in reports[source.name].dropped.items():
            print(f"left out of {source.name}, as in the original: {what}: {number:,}")
    return "; ".join(wrong)


def load_tokenizer(path: str | None, chosen: list[Source]) -> SentencePieceProcessor | None:
    """The tokenizer in whose tokens ShareGPT's chunks are measured; None without ShareGPT."""
    if "sharegpt" not in (source.name for source in chosen):
        return None
    if path is None or not Path(path).is_file():
        rest = [source.name for source in chosen if source.name != "sharegpt"]
        raise InputError(
            f"--tokenizer {path or 'is missing'}: expected Llama's tokenizer.model, by whose tokens"
            f" ShareGPT is split (it is in every Llama 2 checkpoint){without(rest)}"
        )
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError:
        raise InputError(f"--tokenizer {path}: no SentencePiece model") from None


if __name__ == "__main__":
    with reported():
        main(parse_args(MixtureConfig))
