"""evaluate.py on the tiny model: what it writes, how it continues, what it refuses."""

import json
import math
import random
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import evaluate
from decoding.generator import TextGenerator
from decoding.sampling import Sampling
from evals.harness import Options, Records, digest_of, mean_and_error, sample, seed_of
from program.errors import InputError
from program.flags import parse_args
from program.ranks import start
from tokens.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture
def flags(base, tmp_path):
    """Flags of an evaluation of the tiny model on 70 made-up prompts, more than one chunk."""
    (tmp_path / "data" / "demo").mkdir(parents=True)
    rows = [
        {"kind": "even" if k % 2 else "odd", "answer": "4",
         "messages": [{"role": "user", "content": f"What is {k} plus 2?"}]}
        for k in range(70)
    ]  # fmt: skip
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "data" / "demo" / "held_out.jsonl").write_text(lines)
    return {"model": str(base), "tasks": ["demo"], "data": str(tmp_path / "data"),
            "out": str(tmp_path / "out" / "results.json")}  # fmt: skip


def written(flags):
    """The scores and the records that an evaluation wrote."""
    out = Path(flags["out"])
    lines = out.with_suffix(".jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return json.loads(out.read_text()), [record for record in records if "task" in record]


def test_scores_and_records(flags, capsys):
    """Every prompt has a record; the scores follow from the records; a table is printed."""
    evaluate.main(flags)
    results, records = written(flags)
    assert [record["id"] for record in records] == [f"held_out_{k}" for k in range(70)]
    assert records[3]["prompt"] == "<s> <|user|>\nWhat is 3 plus 2?\n<|assistant|>\n"
    demo = results["tasks"]["demo"]
    assert demo["n"] == 70 and demo["score"] == 100 * sum(r["right"] for r in records) / 70
    assert set(demo["kinds"]) == {"odd", "even"} and sum(demo["finishes"].values()) == 70
    assert {"model", "date", "config", "environment"} <= results.keys()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["demo"] and printed[2].startswith(Path(flags["model"]).name)


def test_an_interrupted_evaluation_continues(flags, monkeypatch):
    """Only prompts without a record are asked; a half line is removed; the scores are the same."""
    evaluate.main(flags | {"out": flags["out"].replace("results", "whole")})
    asked, real = [], TextGenerator.generate

    def count(self, prompts, *more):
        if len(asked) == 1 and prompts:
            asked.append(0)
            raise KeyboardInterrupt
        asked.append(len(prompts))
        return real(self, prompts, *more)

    monkeypatch.setattr(TextGenerator, "generate", count)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(flags)
    with open(Path(flags["out"]).with_suffix(".jsonl"), "a") as file:
        file.write('{"task": "demo", "id": "held_')
    evaluate.main(flags)
    assert asked == [64, 0, 6]
    results, records = written(flags)
    whole, others = written(flags | {"out": flags["out"].replace("results", "whole")})
    assert records == others
    assert {**results["tasks"]["demo"], "seconds": 0} == {**whole["tasks"]["demo"], "seconds": 0}
    evaluate.main(flags)  # once more: nothing is left to ask
    assert asked == [64, 0, 6]


def test_a_changed_question_is_asked_again(flags, monkeypatch, capsys):
    """Question, answer to be given, settings of the task, prompt: what changed is asked, and said.

    A changed answer, too: the record holds the verdict on it.
    """
    evaluate.main(flags)
    first, before = written(flags)
    path = Path(flags["data"]) / "demo" / "held_out.jsonl"
    lines = path.read_text().splitlines()
    lines[3] = lines[3].replace("What is 3 plus", "What was 3 plus")
    lines[5] = lines[5].replace('"answer": "4"', '"answer": "7"')
    path.write_text("\n".join(lines[:-1]) + "\n")
    capsys.readouterr()
    evaluate.main(flags)
    assert "demo: 2 of 69 items have changed since" in capsys.readouterr().err
    results, records = written(flags)
    assert [record["id"] for record in records[70:]] == ["held_out_3", "held_out_5"]
    assert records[:70] == before and "What was 3 plus 2?" in records[70]["prompt"]
    assert results["tasks"]["demo"]["n"] == 69
    assert len(results["tasks"]["demo"]["items_sha256"]) == 64
    assert results["tasks"]["demo"]["items_sha256"] != first["tasks"]["demo"]["items_sha256"]
    evaluate.main(flags)
    assert "have changed" not in capsys.readouterr().err and len(written(flags)[1]) == 72
    monkeypatch.setattr("evals.demo.SAMPLING", Sampling(max_new_tokens=3))
    evaluate.main(flags)
    assert "demo: 69 of 69 items have changed" in capsys.readouterr().err
    monkeypatch.setattr(Tokenizer, "visible", lambda self, ids: "another prompt")
    evaluate.main(flags)
    assert "demo: 69 of 69 items have changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, expected",
    [
        (
            {"messages": [{"role": "user", "content": None}]},
            r"record 2: messages\[0\].content is nu",
        ),
        ({"messages": "Hi"}, "messages is a str, expected a list"),
        ({"answer": 4}, "answer is a int, expected a str"),
    ],
)
def test_a_bad_question_of_the_demo_is_named(flags, changes, expected):
    """The line and the field, before the model is loaded."""
    path = Path(flags["data"]) / "demo" / "held_out.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1] |= changes
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=expected):
        evaluate.main(flags)


def test_two_ranks_score_as_one(flags):
    """Two ranks, each with a share of the prompts, write the records of one process."""
    evaluate.main(flags)
    other = flags | {"out": flags["out"].replace("results", "two")}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["evaluate.py", "--model", other["model"], "--tasks", "demo"]
    command += ["--data", other["data"], "--out", other["out"]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    by_id = [sorted(written(f)[1], key=lambda r: r["id"]) for f in (flags, other)]
    assert by_id[0] == by_id[1]


def test_one_evaluation_at_a_time(flags, monkeypatch):
    """A second one with the same --out is refused before it loads the model."""
    monkeypatch.setattr(evaluate, "hold", partial(evaluate.hold, patience=0))

    def meanwhile(*arguments):
        with pytest.raises(InputError, match="results.json: another run is writing there"):
            evaluate.main(flags)
        raise KeyboardInterrupt

    monkeypatch.setattr(TextGenerator, "from_folder", meanwhile)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(flags)


def test_a_task_without_questions(flags):
    """A file of blank lines is refused: it has no mean."""
    (Path(flags["data"]) / "demo" / "held_out.jsonl").write_text("\n")
    with pytest.raises(InputError, match="demo: found no questions"):
        evaluate.main(flags)


def test_scores_are_not_written_over_a_folder(flags):
    """An --out that is a folder is refused at once, not when the first task is done."""
    Path(flags["out"]).mkdir(parents=True)
    with pytest.raises(InputError, match="results.json, expected a file"):
        evaluate.main(flags)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"seed": 1}, "another evaluation, with seed 42 where this one has 1"),
        ({"context": 100}, "with context 4096 where this one has 100"),
        ({"chat": False}, "with chat True"),
    ],
)
def test_another_evaluation_is_not_mixed_in(flags, changes, expected, monkeypatch):
    """Records of other settings are refused before the model is loaded, and stay as they are."""
    evaluate.main(flags)
    monkeypatch.delattr(TextGenerator, "from_folder")
    before = Path(flags["out"]).with_suffix(".jsonl").read_bytes()
    with pytest.raises(InputError, match=expected):
        evaluate.main(flags | changes)
    assert Path(flags["out"]).with_suffix(".jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("--tasks gsm9k", "found gsm9k, expected some of mmlu"),
        ("--tasks demo demo", "a task twice"),
        ("--tasks mmlu", "found no --data DIR"),
        ("--tasks gsm8k --data nowhere", "nowhere/gsm8k/.*no such file"),
        ("--out results.txt", "ends in .json"),
        ("--mmlu-shots 6", "--mmlu-shots is 6"),
        ("--dtype float16", "--dtype is float16"),
        ("--slots 0", "--slots is 0"),
    ],
)
def test_bad_flags(base, arguments, expected, tmp_path, monkeypatch):
    """The error names the flag or the file, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", str(base), *arguments.split()]
    with pytest.raises(InputError, match=expected):
        evaluate.main(parse_args(evaluate.EvalConfig, arguments))
    assert not list(tmp_path.iterdir())


def test_without_a_demo_model_it_says_how_to_make_one(tmp_path, monkeypatch):
    """The error names the command that trains the demo's model."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no demo model, expected one made by `torchrun sft.py`"):
        evaluate.main({})


def test_items_are_asked_in_lists_of_one_field(tmp_path):
    """At most `per_rank` in each, in their order; with `group_by`, of one value of that field."""
    start()
    items = [{"id": str(k), "subject": "a" if k < 3 else "b"} for k in range(7)]
    key = digest_of([items[6], None])
    earlier = [{"task": "t", "id": "6", "key": key}, {"task": "u", "id": "0", "key": key}]
    records = Records(tmp_path / "lines.jsonl", earlier)
    records.task = "t"

    def lists(**options):
        return ["".join(item["id"] for item in own) for own in records.pending(items, **options)]

    assert lists(per_rank=2, group_by="subject") == ["01", "2", "34", "5"]
    assert lists(per_rank=2) == ["01", "23", "45"]
    assert lists() == ["012345"]


def test_the_table_sets_the_papers_scores_under_their_tasks():
    """Of Tulu 2 7B 46.4 on TydiQA, 36.9 on HumanEval (the paper's table 1); none for others."""
    scores = {"tydiqa": (20.0, 1.5), "demo": (30.0, None), "humaneval": (40.0, 2.0)}
    scores["toxigen"] = (None, None)
    tasks = {
        name: {"metric": f"of {name}", "score": score, "stderr": error}
        for name, (score, error) in scores.items()
    }
    rows = evaluate.table({"model": "runs/ours", "tasks": tasks}).splitlines()
    rows = [re.split("  +", row.strip()) for row in rows]
    assert rows[0] == list(tasks) and rows[1] == [f"of {name}" for name in tasks]
    assert rows[2] == ["ours", "20.0 ± 1.5", "30.0", "40.0 ± 2.0", "see below"]
    assert rows[3] == ["Tulu 2 7B", "46.4", "36.9", "7.0"]  # the demo's cell is empty
    assert len(rows) == 3 + 6


def test_mean_and_error():
    """3 right answers of 4: mean 75 %, standard error sqrt(p (1 - p) / (n - 1))."""
    mean, error = mean_and_error([True, True, False, True])
    assert (mean, error) == (75.0, pytest.approx(100 * math.sqrt(0.75 * 0.25 / 3)))
    assert mean_and_error([0.5]) == (50.0, None)


def test_samples_of_items():
    """n items in their order, drawn by the seed; all with --full; every item has its own seed."""
    items = [{"id": f"item {k}"} for k in range(50)]
    drawn = sample(items, 7, Options())
    assert len(drawn) == 7 and drawn == sorted(drawn, key=items.index)
    assert drawn == sample(items, 7, Options()) != sample(items, 7, Options(seed=1))
    assert sample(items, 7, Options(full=True)) == sample(items, 50, Options()) == items
    random.Random(0).shuffle(items)
    assert len({seed_of(item) for item in items}) == 50
