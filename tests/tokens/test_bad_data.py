"""Bad data: one line says where and what the fault is, and nothing is written.

Most cases call `sft.main` in this process and check the error it raises. A few start the program,
because `errors.reported` turns that error into a line and an exit status.
"""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import data
import sft
from conftest import listing

SFT = Path(sft.__file__)


def records(*messages):
    return "".join(json.dumps({"messages": m}) + "\n" for m in messages)


GOOD = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
USER = [{"role": "user", "content": "one"}]


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("x.jsonl", b"", "x.jsonl: no records in it, expected conversations"),
        ("x.jsonl", b"\n \n\r\n", "x.jsonl: no records in it"),
        ("x.jsonl.gz", b"", "x.jsonl.gz: no records in it"),
        ("x.json", b"[]", "x.json: no records in it"),
        ("x.jsonl", records(GOOD, GOOD).encode() + b'{"messages": [\n', "x.jsonl:3: not JSON"),
        ("x.jsonl", records(GOOD).encode() + b'\n\n{"a": "\xff"}\n', "x.jsonl:4: not UTF-8 (byte"),
        ("x.jsonl", "\ufeff{}".encode("utf-16"), "x.jsonl:1: not UTF-8 (byte 0xff at 0)"),
        ("x.jsonl", gzip.compress(b"{}", mtime=0), "x.jsonl:1: not UTF-8"),
        ("x.jsonl", bytes(range(256)) * 9, "x.jsonl:1: not"),
        ("x.jsonl", b"\0" * 5000, "x.jsonl:1: not JSON"),
        ("x.jsonl", b"[" * 100_000, "x.jsonl:1: not JSON"),
        ("x.jsonl", b"1" * 5000, "x.jsonl:1: not JSON"),
        ("x.jsonl", b"[]", "x.jsonl:1: found a JSON list, expected an object"),
        ("x.jsonl", b'"text"', "x.jsonl:1: found a JSON str, expected an object"),
        ("x.jsonl", json.dumps([{"messages": GOOD}], indent=1).encode(), "x.jsonl:1: not JSON"),
        ("x.jsonl", b"{}", "x.jsonl:1: found no field, expected messages, or conversations, or"),
        ("x.jsonl", b'{"text": 1, "q": ""}', "x.jsonl:1: found q, text, expected messages, or co"),
        ("x.jsonl", b'{"messages": null}', "x.jsonl:1: found messages (null), expected messages"),
        ("x.jsonl", b'{"messages": []}', "x.jsonl:1: messages is [], expected a list"),
        ("x.jsonl", b'{"messages": "hi"}', 'x.jsonl:1: messages is "hi", expected a list'),
        ("x.jsonl", b'{"messages": {"a": 1}}', 'x.jsonl:1: messages is {"a": 1}, expected a list'),
        ("x.jsonl", b'{"messages": ["hi"]}', 'x.jsonl:1: messages[0] is "hi", expected an object'),
        (
            "x.jsonl",
            records(GOOD, [{"role": "human", "content": "hi"}]).encode(),
            'x.jsonl:2: messages[0].role is "human", expected one of system, user, assistant',
        ),
        ("x.jsonl", records([{"content": "hi"}]).encode(), "x.jsonl:1: messages[0].role is null"),
        ("x.jsonl", records([{"role": ["user"]}]).encode(), 'messages[0].role is ["user"]'),
        (
            "x.jsonl",
            records(GOOD, [*USER, {"role": "assistant", "content": None}]).encode(),
            "x.jsonl:2: messages[1].content is null, expected a string",
        ),
        (
            "x.jsonl",
            records([{"role": "user", "content": [{"type": "text"}]}]).encode(),
            'x.jsonl:1: messages[0].content[0] is {"type": "text"}, expected a part of type text',
        ),
        (
            "x.jsonl",
            b'{"messages": [{"role": "user", "content": "a\\ud800b"}]}',
            "x.jsonl:1: messages[0].content holds the lone surrogate '\\ud800' at character 1",
        ),
        ("x.jsonl", records(USER, USER).encode(), "none of the 2 conversations has a trained"),
        ("x.jsonl.gz", records(GOOD).encode(), "x.jsonl.gz:1: not a whole gzip file"),
        (
            "x.jsonl.gz",
            gzip.compress(records(*[GOOD] * 99).encode(), mtime=0)[:-20],
            "not a whole gzip file",
        ),
        ("x.json", b'{"messages": []}', "x.json:1: messages is [], expected a list"),
        ("x.json", records(GOOD).encode() + b"[]", "x.json:2: found a JSON list, expected an obj"),
        ("x.json", json.dumps({"a": GOOD}, indent=1).encode(), "expected one JSON object a line"),
        ("x.json", b"\xff\xfe", "x.json:1: not UTF-8"),
        ("x.json", b"[" * 100_000, "x.json: not JSON (maximum recursion depth"),
        ("x.json", b"[{},\n{]", "x.json: not JSON (Expecting property name enclosed in double quo"),
        ("x.json", b"[{},\n{]", "line 2 column 2 (char 6)), expected a list of records"),
        ("x.json", b'[{"a": "\xff"}]', "x.json: not JSON ('utf-8' codec can't decode byte 0xff"),
        ("x.json", b'[{"a": 1}] [', "x.json: not JSON (Extra data: line 1 column 12"),
        ("x.json", b"[1]", "x.json:1: found a JSON int, expected an object"),
        ("x.json", b"[null]", "x.json:1: found a JSON NoneType, expected an object"),
        (
            "x.json",
            json.dumps([{"messages": GOOD}, {"messages": []}], indent=1).encode(),
            "x.json:2: messages is [], expected a list",
        ),
        ("x.parquet", b"PAR1 nonsense", "x.parquet: not a readable parquet file"),
        ("x.parquet", b"", "x.parquet: not a readable parquet file"),
        ("x.txt", b"hello", "x.txt: unknown kind of file, expected .jsonl, .jsonl.gz, .json, .par"),
        ("x.csv", b"a,b", "x.csv: unknown kind of file"),
    ],
)
def test_bad_data_file(refused, tmp_path, name, content, expected):
    """A file of the wrong kind or content is refused by name, and by line where it has lines."""
    (tmp_path / name).write_bytes(content)
    assert expected in refused(data=[str(tmp_path / name)])


@pytest.mark.parametrize("depth", [200, 600, 900, 3000])
def test_deeply_nested_messages(refused, tmp_path, depth):
    """Deep nesting is refused like any other fault, also where it can be read but not printed."""
    (tmp_path / "x.jsonl").write_text(
        '{"messages": [' + '{"role": "user", "content": ' + "[" * depth + "]" * depth + "}]}"
    )
    assert "x.jsonl:1: " in refused(data=[str(tmp_path / "x.jsonl")])


def test_missing_data(refused, tmp_path):
    """A path that does not exist, or a folder without data, is named."""
    (tmp_path / "empty").mkdir()
    assert "no/such.jsonl: no such file or folder" in refused(data=["no/such.jsonl"])
    assert "~/such.jsonl: no such file or folder" in refused(data=["~/such.jsonl"])
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "gone.jsonl")
    assert "link.jsonl: no such file" in refused(data=[str(tmp_path / "link.jsonl")])
    expected = "empty: no .jsonl, .jsonl.gz, .json, .parquet file in this folder"
    assert expected in refused(data=[str(tmp_path / "empty")])


def test_token_cache_as_data(refused, base, tmp_path):
    """Pointing --data at a token cache is refused, not trained on."""
    path = tmp_path / "x.jsonl"
    path.write_text(records(GOOD))
    data.Documents([path], base, 100, data.encode_conversation)
    (cache,) = tmp_path.glob("*.tokens-*")
    assert f"{cache}" in refused(data=[str(cache)])


def test_error_in_the_second_file(refused, conversations, tmp_path):
    """An error in the second file names that file."""
    (tmp_path / "x.jsonl").write_text(records(GOOD) + "{\n")
    assert "x.jsonl:2: " in refused(data=[str(conversations), str(tmp_path / "x.jsonl")])


def test_error_in_a_large_file(refused, tmp_path):
    """In a file large enough for several processes, one error names the line."""
    path, size = tmp_path / "x.jsonl", 5 << 20
    line = records([{"role": "user", "content": "one " * 5000}, GOOD[1]])
    path.write_text(line * (size // len(line)) + "{broken\n" + line * 3)
    assert f"x.jsonl:{size // len(line) + 1}: not JSON" in refused(data=[str(path)])


def test_parquet(refused, base, tmp_path, monkeypatch):
    """Parquet is refused without messages, of other types, empty, damaged, or without pyarrow."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "x.parquet"

    def write(**columns):
        parquet.write_table(pyarrow.table(columns), path)
        return str(path)

    assert "x.parquet:1: found text, expected messages, or" in refused(data=[write(text=["a"])])
    assert "x.parquet:1: messages is" in refused(data=[write(messages=[b"bytes"])])
    content = [[{"role": "user", "content": b"bytes"}]]
    assert "x.parquet:1: messages[0].content is" in refused(data=[write(messages=content)])
    assert "x.parquet: no records" in refused(data=[write(messages=pyarrow.array([], "string"))])

    texts = [os.urandom(20).hex() for _ in range(2000)]
    write(messages=[[{"role": "user", "content": text}, GOOD[1]] for text in texts])
    assert len(data.Documents([path], base, 100, data.encode_conversation)) == 2000
    content = bytearray(path.read_bytes())
    content[2000:4000] = os.urandom(2000)
    path.write_bytes(content)
    assert "x.parquet: not a readable parquet file" in refused(data=[str(path)])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "x.parquet: reading parquet needs pyarrow: pip install" in refused(data=[str(path)])


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff" + records(GOOD, GOOD),
        records(GOOD, GOOD).replace("\n", "\r\n"),
        "\n\n" + records(GOOD, GOOD)[:-1],
        records([GOOD[0], {"role": "assistant", "content": ""}], GOOD),
        records(GOOD, GOOD).replace('"messages"', '"score": NaN, "messages"'),
        records([GOOD[0] | {"name": 5}, GOOD[1] | {"tool": None}], GOOD),
        records([{"role": "user", "content": "x" * 1_000_000}, GOOD[1]], GOOD, GOOD),
    ],
    ids=["BOM", "CRLF", "blank lines", "empty answer", "NaN", "extra fields", "huge line"],
)
def test_unusual_but_right(base, tmp_path, content):
    """Data that looks odd but is right is read."""
    path = tmp_path / "x.jsonl"
    path.write_text(content, newline="")
    assert len(data.Documents([path], base, 8192, data.encode_conversation)) == 2


def test_a_path_given_twice_counts_twice(base, conversations):
    """A file that is named twice has twice the weight."""
    documents = data.Documents([conversations] * 2, base, 8192, data.encode_conversation)
    assert len(documents) == 48


# ---- The whole program


def run_to_the_end(launcher, *flags, program=SFT):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launcher, str(program), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)


def test_error_line_and_exit_status(base, tmp_path):
    """One line on standard error that begins with `error: `, and exit status 2."""
    path = tmp_path / "x.jsonl"
    path.write_text(records(GOOD) + "{\n")
    flags = ["--model", base, "--data", path, "--out", tmp_path / "out"]
    for program in (SFT, SFT.with_name("data.py")):
        extra = [] if program == SFT else flags[-2:]
        given = [flag for flag in flags if flag not in extra]
        done = run_to_the_end([sys.executable], *given, program=program)
        assert done.returncode == 2
        assert done.stdout == ""
        lines = done.stderr.strip().splitlines()
        assert lines[-1].startswith(f"error: {path}:2: not JSON"), done.stderr
        assert "Traceback" not in done.stderr and len(lines) == 1, done.stderr
    assert listing(tmp_path) == [path]


TWO_RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def test_error_line_under_torchrun(base, tmp_path):
    """Where two ranks meet the same error, the line is printed once, and torchrun fails."""
    flags = ["--model", base, "--data", tmp_path / "none.jsonl", "--out", tmp_path / "out"]
    done = run_to_the_end(TWO_RANKS, *flags)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1, done.stderr
    assert f"error: {tmp_path / 'none.jsonl'}: no such file or folder\n" in done.stderr
    assert not (tmp_path / "out").exists()


def test_error_of_one_rank_under_torchrun(base, preferences, tmp_path):
    """An error of rank 0 alone (only it checks the output folder) is printed once, too."""
    (tmp_path / "config.json").write_text("{}")
    flags = ["--model", base, "--data", preferences, "--out", tmp_path]
    done = run_to_the_end(TWO_RANKS, *flags, program=SFT.with_name("dpo.py"))
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1, done.stderr
    assert f"error: --out {tmp_path}: holds a finished run" in done.stderr
    assert "[rank1]" not in done.stderr, done.stderr  # torch puts this before a rank's traceback
