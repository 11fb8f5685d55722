"""The conversations to choose from: what their records say beside the tokens; writing those kept.

The files are read one record at a time. In memory stay two short texts a candidate.
"""

import hashlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from program.files import written_aside
from tokens import readers
from tokens.documents import Documents
from tokens.shapes import FIELDS, conversation, is_pair, pair, texts
from tokens.tokenizer import Tokenizer


def encode_query(record: dict, tokenizer: Tokenizer) -> list[tuple[list[int], list[bool]]]:
    """`[(ids, trained)]` of a conversation or, for a pair, of its prompt with the chosen answer."""
    if not is_pair(record):
        return [tokenizer.encode(conversation(record))]
    messages = pair(record)[0]
    answer = len(tokenizer.prompt(messages[:-1]))
    ids, trained = tokenizer.encode(messages)
    return [(ids, [False] * answer + trained[answer:])]


def records_of(documents: Documents, fields: Collection[str]) -> Iterator[dict]:
    """The record of each document, in their order; of a file of columns, only `fields`."""
    wanted = set(zip(documents.file[:, 0].tolist(), documents.numbers[:, 0].tolist(), strict=True))
    for file, path in enumerate(documents.paths):
        for number, record in readers.records(path, fields):
            if (file, number) in wanted:
                yield record


def describe(documents: Documents) -> tuple[list[str], list, np.ndarray]:
    """(sources, ids, original) of all candidates.

    sources: the record's `dataset`, or else the name of its file. original (n,) int64: the first
    candidate of the same roles and stripped texts, which is itself where there is no duplicate.
    """
    sources, ids, original, seen = [], [], [], {}
    for i, record in enumerate(records_of(documents, {*FIELDS, "dataset", "id"})):
        name = record.get("dataset")
        name = name if isinstance(name, str) else documents.paths[documents.file[i, 0]].name
        sources.append(name)
        ids.append(record.get("id"))
        said = json.dumps(texts(conversation(record))).encode()
        original.append(seen.setdefault(hashlib.blake2b(said, digest_size=16).digest(), i))
    return sources, ids, np.array(original, np.int64)


def tasks_of(queries: Documents) -> list[str]:
    """The task of each query: its `task`, or `dataset`, or the name of its file."""
    tasks = []
    for i, record in enumerate(records_of(queries, {*FIELDS, "task", "dataset"})):
        names = [record.get("task"), record.get("dataset")]
        names.append(queries.paths[queries.file[i, 0]].name)
        tasks.append(next(name for name in names if isinstance(name, str)))
    return tasks


def write_kept(path: Path, documents: Documents, chosen: np.ndarray) -> None:
    """Write the records `chosen` to a `.jsonl`, in the data's order and as they stand there."""
    places = zip(documents.file[chosen, 0].tolist(), documents.numbers[chosen, 0], strict=True)
    wanted = {(file, int(number)) for file, number in places}
    with written_aside(path, "wb") as out:
        for file, source in enumerate(documents.paths):
            for first, batch, _ in readers.read_batches(source):
                for number, raw in enumerate(batch, first):
                    if (file, number) in wanted:
                        out.write(line_of(raw))


def line_of(raw: object) -> bytes:
    """A record's line: its own bytes where it has some, else what it holds as JSON."""
    if isinstance(raw, bytes):
        return raw.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n") + b"\n"
    return json.dumps(raw, ensure_ascii=False, default=str).encode() + b"\n"


def write_scores(
    path: Path, documents: Documents, sources: list[str], ids: list, best: np.ndarray,
    query: np.ndarray | None, chosen: np.ndarray,
) -> None:  # fmt: skip
    """Write FILE.scores.jsonl: one line a candidate, kept or not, in the order of the data.

    record: the line, or the place, from 1 in its file; several files: its name, too. score, and
    query, the number from 1 of the query that it comes from (null where there are none).
    """
    kept = np.zeros(len(documents), np.bool_)
    kept[chosen] = True
    with written_aside(path) as out:
        for i in range(len(documents)):
            line = {"record": int(documents.numbers[i, 0]), "dataset": sources[i], "id": ids[i]}
            line |= {"score": float(best[i]), "query": None if query is None else int(query[i]) + 1}
            line |= {"tokens": int(documents.tokens[i]), "kept": bool(kept[i])}
            if len(documents.paths) > 1:
                line["file"] = documents.paths[documents.file[i, 0]].name
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
