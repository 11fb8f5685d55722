"""Random files of JSON: read as json.loads and zlib read them, or refused by number."""

import gzip
import json
import random
import zlib

from random_records import outcome, some_conversation, some_pair
from tokens import readers

BOM = b"\xef\xbb\xbf"
ODD = [
    *[BOM, b"\0", b"\r", b"\r\n", b"\n", b"\n\n", b" ", b"\t", b"\x0b", b"\x0c", b"\x85"],
    *[b"\xc2\xa0", b"\xed\xa0\x80", b"\xff", b"\xc0\x80", "é".encode("utf-16"), b"\\ud800"],
    *[b"NaN", b"-Infinity", b"1e999", b"-0", b"1" * 5000, b'"', b"\\", b"\\u0000", b",", b":"],
    *[b"]", b"}", b"{", b"[", b"[]", b"null", b'{"a": 1}', b'{"a": 1}\n', b'"a": 5, '],
    *[b"[" * 150, b"[" * 100_000, b'{"a":' * 150],
]  # fmt: skip


def mutated(rng, content, times, other):
    """`content` with bytes cut off, taken out, doubled, changed or put in, or `other`'s end."""
    content = bytearray(content)
    for _ in range(times):
        i = rng.randint(0, len(content))
        j = min(len(content), i + rng.randint(1, 20))
        start, end, put = rng.choice(
            [(i, None, b""), (i, j, b""), (i, i, content[i:j]), (i, None, other[len(other) // 2 :])]
            + [(i, i + 1, bytes([rng.randrange(256)])), (i, j, rng.choice(ODD))]
            + [(i, i, rng.choice(ODD))] * 3
        )
        content[start:end] = put
    return bytes(content)


def some_content(rng):
    """Records as lines or as a list, written in many ways."""
    made = [rng.choice([some_conversation, some_pair])(rng)[0] for _ in range(rng.randint(1, 5))]
    ascii_only, pretty = rng.random() < 0.5, rng.choice([None, 1])
    if rng.random() < 0.3:
        text = json.dumps(made, ensure_ascii=ascii_only, indent=pretty)
    else:
        end = rng.choice(["\n", "\n", "\r\n", "\r", "\n\n", "\n \n"])
        lines = [json.dumps(record, ensure_ascii=ascii_only) for record in made]
        text = end.join(lines) + rng.choice(["", end])
    return rng.choice([b"", b"", b"", BOM, BOM * 2, b" \n", b"\n" + BOM]) + text.encode()


def gzipped(rng, content):
    """In one member or two, with zeros after each, and perhaps what is no gzip."""
    cut = rng.randint(0, len(content))
    members = rng.choice([[content], [content[:cut], content[cut:]]])
    raw = b"".join(gzip.compress(m, 1, mtime=0) + bytes(rng.choice([0, 0, 9])) for m in members)
    if len(members) == 1 and rng.random() < 0.3:  # behind its header, of which zlib sees more
        raw = raw[:10] + mutated(rng, raw[10:], 1, raw)
    return raw + rng.choice([b"", b"", b"", b"garbage", b"\x1f\x8b", b"\n"])


def of_lines(content):
    """`(records with their numbers, number of the first bad line or None)`."""
    found, lines = [], content.removesuffix(b"\n").split(b"\n") if content else []
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if text.strip():
                found.append((number, dict_of(json.loads(text))))
        except (ValueError, RecursionError):
            return found, number
    return found, None


def of_list(content):
    """As `of_lines`; a file that is no list at all is bad at 0."""
    content = content.removeprefix(BOM)
    try:
        values = json.loads(content.decode())
    except (ValueError, RecursionError):
        return [], 0
    found = []
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            return found, number
        found.append((number, value))
    return found, None


def dict_of(value):
    if not isinstance(value, dict):
        raise ValueError(value)
    return value


def unzipped(raw):
    """`(bytes, whether they are whole)`."""
    content = b""
    while raw:
        member = zlib.decompressobj(wbits=31)
        try:
            content += member.decompress(raw)
        except zlib.error:
            return content, False
        if not member.eof:
            return content, False
        raw = member.unused_data.lstrip(b"\0")
    return content, True


def check_json_file(rng, folder):
    content, other = some_content(rng), some_content(rng)
    if rng.random() < 0.4:
        content = mutated(rng, content, rng.choice([1, 1, 2, 4]), other)
    readers.BATCH_RECORDS, readers.BATCH_BYTES = rng.choice([(1, 1 << 20), (512, 1 << 20), (3, 30)])
    path = folder / rng.choice(["a.jsonl", "a.json", "a.jsonl.gz"])
    whole = True
    if path.suffix == ".gz":
        raw = gzipped(rng, content)
        content, whole = unzipped(raw)
        path.write_bytes(raw)
    else:
        path.write_bytes(content)
    is_list = path.suffix == ".json" and content.removeprefix(BOM).lstrip().startswith(b"[")
    found, bad = outcome(path)
    if whole:  # NaN equals no NaN, its text does
        assert repr((found, bad)) == repr((of_list if is_list else of_lines)(content)), path
    else:
        assert bad is not None, "a damaged gzip file was taken"


def test_json_files_are_read_as_json_reads_them(tmp_path, monkeypatch):
    """Or refused, with the number of the line or of the record; a damaged gzip file always."""
    monkeypatch.setattr(readers, "BATCH_RECORDS", 512)  # `check_json_file` varies both
    monkeypatch.setattr(readers, "BATCH_BYTES", 1 << 20)
    for seed in range(1000):
        check_json_file(random.Random(seed), tmp_path)
