"""mixture.py as a whole: builds from hand-made raw files, sampling, the keyword filter, the table,
--check, and the errors for bad input."""

import csv
import gzip
import io
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import sentencepiece

import mixture
from program.errors import InputError
from program.flags import parse_args
from tulu_mixture.readers import records
from tulu_mixture.sources import SCIENCE_TASKS, SOURCES

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("TULU_DATA", ROOT.parent / "shared" / "data"))
real_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data in {DATA} (TULU_DATA)")
SOURCE = {source.name: source for source in SOURCES}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("text", "hit"),
    [
        *((word, True) for word in mixture.KEYWORDS),
        *((word.upper(), True) for word in mixture.KEYWORDS),
        ("They began to bombard the city.", True),
        ("Milan is in Lombardy.", True),
        ("napalm", True),
        ("Claudette", True),
        ("the bards of Wales", True),
        ("gpt-2, open  ai, bing, b ard", False),
    ],
)
def test_keyword_filter(text, hit):
    """A keyword hits in upper and lower case, in a message of any role, even inside a word."""
    for i in range(3):
        roles = ("system", "user", "assistant")
        messages = [{"role": r, "content": text if n == i else "x"} for n, r in enumerate(roles)]
        assert mixture.has_keyword({"messages": messages}) is hit


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory):
    """A tiny SentencePiece model."""
    model = io.BytesIO()
    words = ["the answer to a question is a text of words"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_writer=model, vocab_size=60, model_type="bpe",
        byte_fallback=False, minloglevel=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def write_raw(raw):
    """Write every raw file in its published format, with a few records each."""
    import pyarrow
    import pyarrow.parquet

    def lines(name, rows):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        opened = gzip.open if name.endswith(".gz") else open
        with opened(raw / name, "wt", encoding="utf-8") as file:
            file.write(text)

    def array(name, rows):
        (raw / name).write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")

    raw.mkdir()
    texts = [{"inputs": f"q{i}", "targets": f"a{i} é"} for i in range(7)]
    texts[3]["inputs"] = "Where is Lombardy?"
    lines("flan_v2_resampled_50k.jsonl", texts)
    lines("cot_zsopt.jsonl", texts[:3])
    lines("cot_fsopt.jsonl", texts[3:])
    answer = {"role": "assistant", "text": "a", "deleted": False, "labels": {}, "replies": []}
    prompt = {**answer, "role": "prompter", "text": "q"}
    trees = [{"prompt": {**prompt, "replies": [answer]}}, {"prompt": prompt}]
    lines("2023-04-12_oasst_ready.trees.jsonl.gz", trees)
    lines("train.jsonl", [{"conversations": ["q", "a", "q"]}])
    alpaca = [{"instruction": f"i{i}", "input": "x" * (i % 2), "output": "o"} for i in range(9)]
    array("alpaca_gpt4_data.json", alpaca)
    array("code_alpaca_20k.json", alpaca)
    turns = [{"from": "human", "value": "question"}, {"from": "gpt", "value": "answer ü 字"}]
    array("sg_90k_part1_html_cleaned.json", [{"id": "s0", "conversations": turns * 2}])
    array("sg_90k_part2_html_cleaned.json", [{"id": "s1", "conversations": []}])
    wizard = [{"idx": f"w{i}", "conversations": turns} for i in range(5)]
    array("WizardLM_evol_instruct_V2_143k.json", wizard)
    orca = [
        {"id": f"flan.{i}", "system_prompt": "", "question": "q", "response": "a"} for i in range(5)
    ]
    table = pyarrow.Table.from_pylist(orca)
    pyarrow.parquet.write_table(table, raw / "1M-GPT4-Augmented.parquet", row_group_size=2)
    lines("science_train.jsonl", [{"input": "q", "output": "a", "dataset": "scierc_ner"}])
    with open(raw / "hard_coded_examples.csv", "w", encoding="utf-8-sig", newline="") as file:
        rows = [["Prompt", "Output"], ["Are you ChatGPT?", 'No,\nI am "Tulu".'], ["q", "a"]]
        csv.writer(file).writerows(rows)
    return raw


@pytest.fixture
def raw(tmp_path):
    return write_raw(tmp_path / "raw")


def run(*arguments):
    """Run mixture.py with these arguments in this process."""
    mixture.main(parse_args(mixture.MixtureConfig, [*map(str, arguments)]))


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_whole_build(raw, tmp_path, tokenizer_model, capsys):
    """All sources in order; ids by position; keyword hits are dropped, but not hard-coded ones."""
    out = tmp_path / "mixture.jsonl"
    run("--raw", raw, "--out", out, "--tokenizer", tokenizer_model)
    rows = read(out)
    assert [list(row) for row in rows] == [["dataset", "id", "messages"]] * len(rows)
    assert Counter(row["dataset"] for row in rows) == {
        "flan_v2": 6, "cot": 6, "oasst1": 1, "lima": 1, "gpt4_alpaca": 9, "code_alpaca": 9,
        "sharegpt": 1, "wizardlm": 5, "open_orca": 5, "science.scierc_ner": 1, "hard_coded": 20,
    }  # fmt: skip
    order = [source.name for source in SOURCES]
    places = [order.index(row["dataset"].partition(".")[0]) for row in rows]
    assert places == sorted(places)
    ids = [row["id"] for row in rows]
    # The filter comes after the ids: position 3 is the conversation about Lombardy.
    assert ids[:12] == [f"{n}_{i}" for n in ("flan_v2", "cot") for i in (0, 1, 2, 4, 5, 6)]
    assert {"sharegpt_s0_0", "wizardlm_w4", "open_orca_flan.0", "science_0"} < set(ids)
    assert ids[-20:] == ["hard_coded_0", "hard_coded_1"] * 10
    assert rows[-2]["messages"] == [user("Are you ChatGPT?"), assistant('No,\nI am "Tulu".')]
    printed = capsys.readouterr().out.splitlines()
    table = {line.split()[0]: line.split()[1:] for line in printed if line}
    assert table["flan_v2"][:6] == ["7", "7", "1", "6", "50,000", "49,123"]
    assert " ".join(table["flan_v2"][6:]) == "differs: -49,993 sampled, -49,117 kept"
    assert " ".join(table["cot"][6:]).endswith("-49,741 kept (a random sample)")
    assert table["hard_coded"][:4] == ["2", "20", "-", "20"]
    # 7 + 7 + 2 + 1 + 9 + 9 + 2 + 5 + 5 + 1 + 2 rows; the sum of the Counter above, and two hits.
    assert table["total"][:6] == ["50", "66", "2", "64", "330,490", "326,154"]
    for what in (
        "oasst1, as in the original: trees",
        "sharegpt, as in the original: conversations",
    ):
        assert any(what in line and line.endswith(": 1") for line in printed)


def test_same_seed_same_bytes(raw, tmp_path, tokenizer_model):
    """A seed fixes every byte, another seed draws other templates, and no other file is left."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        arguments = ("--out", tmp_path / f"{name}.jsonl", "--seed", seed)
        run("--raw", raw, "--tokenizer", tokenizer_model, *arguments)
    a, b, c = ((tmp_path / f"{name}.jsonl").read_bytes() for name in "abc")
    assert a == b != c
    assert not list(tmp_path.glob("*.partial"))


def test_a_source_does_not_depend_on_the_others(raw, tmp_path, tokenizer_model):
    """Sources built one by one, in any order, give the lines of a build of all."""
    whole = tmp_path / "whole.jsonl"
    run("--raw", raw, "--out", whole, "--tokenizer", tokenizer_model)
    parts = b""
    for source in SOURCES:
        part = tmp_path / f"{source.name}.jsonl"
        flags = ("--tokenizer", tokenizer_model) if source.name == "sharegpt" else ()
        run("--raw", raw, "--out", part, "--sources", source.name, *flags)
        parts += part.read_bytes()
    assert parts == whole.read_bytes()
    some = tmp_path / "some.jsonl"
    run("--raw", raw, "--out", some, "--sources", "lima", "code_alpaca", "flan_v2")
    names = list(dict.fromkeys(row["dataset"] for row in read(some)))
    assert names == ["flan_v2", "lima", "code_alpaca"]


def test_random_stream_is_the_published_generator():
    """A stream is MT19937 seeded with SHA-256 of "seed name": NumPy's makes the same numbers."""
    import hashlib

    stream = mixture.random_stream(42, "cot")
    digest = hashlib.sha256(b"42 cot").digest()
    words = numpy.frombuffer(digest, ">u4")[::-1].astype(numpy.uint32)  # least significant first
    expected = numpy.random.RandomState(words).random_sample(5)
    assert [stream.random() for _ in range(5)] == expected.tolist()


def sample_of(path, size, seed):
    """The positions (0, 1, …) of the rows sampled from a FLAN file."""
    source = replace(SOURCE["cot"], sample=size)
    stream = mixture.random_stream(seed, "cot")
    made = mixture.conversations(source, [path], stream, None, mixture.Report())
    return [int(c["messages"][1]["content"]) for c in made]


def test_samples_are_exact_ordered_and_even(tmp_path):
    """A sample has the right size, no row twice, file order; all rows are equally likely."""
    path = tmp_path / "rows.jsonl"
    rows = ({"inputs": "q", "targets": str(i)} for i in range(11))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sample_of(path, 11, 1) == sample_of(path, 50, 1) == list(range(11))
    counts = Counter()
    for seed in range(700):
        sample = sample_of(path, 4, seed)
        assert len(sample) == 4 and sample == sorted(set(sample))
        counts.update(sample)
    # Binomial: 700 draws at 4/11 are 254.5 with a standard deviation of 12.7. Five of those.
    assert all(abs(counts[i] - 254.5) < 64 for i in range(11))


def test_rows_outside_of_the_sample_are_checked(raw, tmp_path):
    """A broken row is an error, whether or not the seed draws it."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"inputs": "q", "targets": "0"}\n' * 20 + '{"inputs": "q"}\n')
    for seed in range(5):
        with pytest.raises(InputError, match="rows.jsonl:21: no field 'targets'"):
            sample_of(path, 1, seed)


def test_missing_files(raw, tmp_path):
    """The message names the file, where it is published, and the flag that goes on without it."""
    (raw / "train.jsonl").unlink()
    (raw / "sg_90k_part2_html_cleaned.json").unlink()
    with pytest.raises(InputError) as error:
        run("--raw", raw, "--out", tmp_path / "out.jsonl", "--sources", "lima", "science", "cot")
    assert "no train.jsonl of lima" in str(error.value)
    assert "huggingface.co/datasets/GAIR/lima" in str(error.value)
    assert str(error.value).endswith("; to go on without: --sources cot science")
    with pytest.raises(InputError) as error:
        run("--raw", raw, "--out", tmp_path / "out.jsonl", "--sources", "sharegpt")
    assert "sg_90k_part2_html_cleaned.json of sharegpt" in str(error.value)
    assert "part1" not in str(error.value) and "--sources" not in str(error.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_other_places_and_endings(raw, tmp_path):
    """A raw file may be in its source's folder, or in another format; two copies are an error."""
    flags = ("--raw", raw, "--overwrite", "--out", tmp_path / "out.jsonl", "--sources")
    run(*flags, "lima", "hard_coded", "oasst1")
    expected = (tmp_path / "out.jsonl").read_bytes()
    (raw / "lima").mkdir()
    (raw / "train.jsonl").rename(raw / "lima" / "train.jsonl")
    rows = [row for _, row in records(raw / "hard_coded_examples.csv")]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (raw / "hard_coded_examples.jsonl").write_text(lines)
    packed = raw / "2023-04-12_oasst_ready.trees.jsonl.gz"
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    with pytest.raises(InputError, match="hard_coded_examples.csv and .*jsonl: expected one"):
        run(*flags, "lima", "hard_coded", "oasst1")
    (raw / "hard_coded_examples.csv").unlink()
    run(*flags, "lima", "hard_coded", "oasst1")
    assert (tmp_path / "out.jsonl").read_bytes() == expected


def test_output_is_whole_or_untouched(raw, tmp_path):
    """A file is replaced only with --overwrite, and an error half-way leaves it as it was."""
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    with pytest.raises(InputError, match="exists; --overwrite replaces a file"):
        run("--raw", raw, "--out", out, "--sources", "lima")
    with open(raw / "science_train.jsonl", "a") as file:
        file.write('{"input": "q"}\n')
    with pytest.raises(InputError, match="science_train.jsonl:2: no field 'output'"):
        run("--raw", raw, "--out", out, "--sources", "lima", "science", "--overwrite")
    assert out.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["out.jsonl"]
    run("--raw", raw, "--out", out, "--sources", "lima", "--overwrite")
    assert len(read(out)) == 1
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(InputError, match="folder.jsonl: exists"):
        run("--raw", raw, "--out", tmp_path / "folder.jsonl", "--sources", "lima", "--overwrite")
    (raw / "train.jsonl").write_text("\n")
    with pytest.raises(InputError, match="train.jsonl: no records"):
        run("--raw", raw, "--out", out, "--sources", "lima", "--overwrite")


def test_help_lists_the_sources():
    """--help shows the module's docstring: every source is in it, in the order of the mixture."""
    listed = mixture.__doc__.partition("Sources: ")[2].partition(".")[0]
    assert listed.split() == [source.name for source in SOURCES]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "expected --raw and --out, or --check"),
        (("--raw", "r"), "expected --raw and --out, or --check"),
        (("--check", "f", "--out", "o.jsonl"), "--check takes neither --raw nor --out"),
        (("--raw", "nowhere", "--out", "o.jsonl"), "--raw nowhere: no such folder"),
        (("--raw", ".", "--out", "o.jsonl", "--sources", "dolly"), "found 'dolly', expected some"),
        (("--raw", ".", "--out", "o.jsonl", "--seed", "x"), "argument --seed: invalid int"),
        (("--raw", "RAW", "--out", "o.jsonl"), "--tokenizer is missing: expected Llama's"),
        (("--raw", "RAW", "--out", "o.jsonl", "--tokenizer", "no"), "--tokenizer no: expected"),
        (("--raw", "RAW", "--out", "o.jsonl", "--tokenizer", __file__), "no SentencePiece model"),
        (("--raw", "RAW", "--out", "o.json", "--sources", "lima"), "expected a name that ends in"),
        (("--raw", "RAW", "--out", "no/o.jsonl", "--sources", "lima"), "no folder no"),
        (("--check", "nowhere.jsonl"), "nowhere.jsonl: No such file"),
        (("--check", "RAW/train.jsonl"), "train.jsonl:1: no field 'dataset'"),
    ],
)
def test_bad_flags(raw, tmp_path, flags, message):
    """Every mistake on the command line prints one line that begins with `error: `; status 2."""
    flags = [flag.replace("RAW", str(raw)) for flag in flags]
    command = [sys.executable, str(ROOT / "mixture.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


PUBLISHED = {source.name: source.after for source in SOURCES if source.name != "science"}
PUBLISHED |= SCIENCE_TASKS


def test_check_passes_on_the_published_counts_and_on_nothing_else(tmp_path, capsys):
    """The right counts pass, also over several files of a folder; one conversation more fails."""
    line = '{{"dataset": "{}", "id": "x", "messages": [{{"role": "user", "content": "q"}}]}}\n'
    lines = {name: line.format(name) * number for name, number in PUBLISHED.items()}
    folder = tmp_path / "released"
    folder.mkdir()
    flan = lines.pop("flan_v2")
    (folder / "one.jsonl").write_text(flan)
    with gzip.open(folder / "two.jsonl.gz", "wt", compresslevel=1) as file:
        file.write("".join(lines.values()))
    run("--check", folder)
    printed = capsys.readouterr().out
    assert "differs" not in printed and printed.count("as published") == 11 + 6 + 1
    assert "326,154" in printed
    (folder / "one.jsonl").write_text(flan + line.format("flan_v2"))
    with pytest.raises(InputError, match="one.jsonl: .* flan_v2 49,124 instead of 49,123"):
        run("--check", folder / "one.jsonl", "--sources", "flan_v2")
    assert "differs: +1 kept" in capsys.readouterr().out


def test_check_of_some_sources_and_of_parquet(tmp_path, capsys):
    """--sources limits the comparison; parquet, the released data set's format, is read."""
    import pyarrow
    import pyarrow.parquet

    row = {"dataset": "hard_coded", "id": "x", "messages": [user("q"), assistant("a")]}
    other = {**row, "dataset": "lima"}
    path = tmp_path / "train-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row] * 140 + [other]), path)
    run("--check", path, "--sources", "hard_coded")
    with pytest.raises(InputError, match="lima 1 instead of 1,018"):
        run("--check", path, "--sources", "hard_coded", "lima")
    wrong = {**row, "dataset": "dolly"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, wrong]), path)
    with pytest.raises(InputError, match=":2: dataset 'dolly' is not one of the mixture's"):
        run("--check", path)


@real_data
def test_real_raw_files(tmp_path, capsys):
    """Code-Alpaca, and records of ShareGPT's published schema, with the Llama 2 tokenizer."""
    raw = tmp_path / "raw"
    raw.mkdir()
    code = (DATA / "raw" / "code_alpaca_2k.json").read_bytes()
    (raw / "code_alpaca_20k.json").write_bytes(code)
    shared = (DATA / "raw" / "sharegpt_dummy_conversation.json").read_bytes()
    (raw / "sg_90k_part1_html_cleaned.json").write_bytes(shared)
    (raw / "sg_90k_part2_html_cleaned.json").write_bytes(shared)
    model = DATA / "llama2-tokenizer" / "tokenizer.model"
    out = tmp_path / "out.jsonl"
    sources = ("--sources", "code_alpaca", "sharegpt")
    run("--raw", raw, "--out", out, "--tokenizer", model, *sources)
    rows = read(out)
    originals = json.loads(code)
    for row in (row for row in rows if row["dataset"] == "code_alpaca"):
        original = originals[int(row["id"].removeprefix("code_alpaca_"))]
        prompt, answer = (message["content"] for message in row["messages"])
        assert original["instruction"].strip() in prompt and original["input"].strip() in prompt
        assert answer.strip() == original["output"].strip()
    expected = {
        f"sharegpt_{r['id']}_0": [turn["value"] for turn in r["conversations"]]
        for r in json.loads(shared)
    }
    chats = [row for row in rows if row["dataset"] == "sharegpt"]
    assert chats
    for row in chats:
        assert [m["content"] for m in row["messages"]] == expected[row["id"]]
    assert not any(mixture.has_keyword(row) for row in rows)


@real_data
def test_token_counts_are_those_of_the_tokenizer():
    """The counts of a batch are those of its texts one by one."""
    model = DATA / "llama2-tokenizer" / "tokenizer.model"
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    texts = ["", "a", "  two  spaces", "字 é \U0001f600", "line\nline", "word " * 5000]
    turns = [{"from": "human", "value": text} for text in texts]
    rows = [(f"line {i}", {"id": str(i), "conversations": turns[i:]}) for i in range(600)]
    for i, (_, record) in enumerate(mixture.with_token_counts(iter(rows), tokenizer)):
        assert record["tokens"] == [len(tokenizer.encode(text)) for text in texts[i:]]
