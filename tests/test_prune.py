"""prune.py as its users start it: what is kept, what is kept on disk, and what is refused."""

import functools
import json
import shutil

import numpy as np
import pytest

import prune
from conftest import listing, run_program
from program.errors import InputError
from program.files import hold_file
from selection import embeddings, influence
from selection import scores as held_scores

LESS = {"projection": 512, "warmup_epochs": 2, "warmup_share": 0.5}


def record(question, answer, **fields):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **fields}


QUERIES = [
    record("What is 2 plus 2? Think of the quick fox.", "The answer is 4.", dataset="sums"),
    record("def add(a, b): over the lazy dog?", "return a + b", dataset="code"),
]
# Near-copies: other words at the end of the question.
COPIES = [
    record("What is 2 plus 2? Think of the quick dog.", "The answer is 4.", id="copy 1"),
    record("def add(a, b): over the lazy fox?", "return a + b", id="copy 2"),
]


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def setting(lively, conversations, tmp_path):
    """Flags of a run on 24 conversations and near-copies of two queries, the 8th and the last."""
    records = lines(conversations)
    records.insert(7, COPIES[0])
    return {
        "model": str(lively),
        "data": [str(write(tmp_path / "data.jsonl", [*records, COPIES[1]]))],
        "queries": [str(write(tmp_path / "queries.jsonl", QUERIES))],
        "out": str(tmp_path / "kept.jsonl"),
        "keep": 6,
        "micro_tokens": 600,
    }


def run(setting, **flags):
    """(kept lines, scores) of a run in this process."""
    flags = setting | flags
    prune.main(flags)
    out = prune.Path(flags["out"])
    return lines(out), lines(prune.scores_path(out))


@pytest.mark.parametrize("method", ["rds", "less"])
def test_a_near_copy_of_a_query_ranks_first(method, setting):
    """Of all candidates by its query, whose number stands beside it; so two kept are the copies."""
    kept, scores = run(setting, method=method, keep=2, **LESS)
    assert [line["id"] for line in kept] == ["copy 1", "copy 2"]
    best = sorted(scores, key=lambda line: -line["score"])[:2]
    assert {(line["record"], line["query"]) for line in best} == {(8, 1), (26, 2)}
    assert [line["record"] for line in scores] == list(range(1, 27))


def test_kept_conversations_stand_as_in_the_data(setting, monkeypatch):
    """Byte for byte and in its order; those that the scores file says; another --keep is free."""
    run(setting)
    monkeypatch.setattr(prune, "load_hf", None)  # cannot be called
    data = prune.Path(setting["data"][0]).read_bytes().splitlines(keepends=True)
    for flags in ({"keep": 6}, {"keep": 26}, {"keep": 9, "select": "global"}):
        _, scores = run(setting, **flags)
        kept = [line["record"] for line in scores if line["kept"]]
        assert len(kept) == flags["keep"]
        assert prune.Path(setting["out"]).read_bytes() == b"".join(data[k - 1] for k in kept)
    best = sorted(scores, key=lambda line: (-line["score"], line["record"]))[:9]
    assert {line["record"] for line in best} == set(kept)


@pytest.mark.parametrize("method", ["rds", "less"])
def test_two_ranks_agree_with_one(method, setting, tmp_path):
    """Scores to rounding: less's warm-up sums gradients in another order."""
    _, one = run(setting, method=method, **LESS)
    flags = [["--" + name.replace("_", "-"), *(v if isinstance(v, list) else [v])]
             for name, v in (setting | LESS | {"method": method}).items()]  # fmt: skip
    shutil.rmtree(next(tmp_path.glob("scores-*")))
    run_program("prune.py", *sum(flags, []), ranks=2)
    two = lines(prune.scores_path(prune.Path(setting["out"])))
    assert [line["kept"] for line in two] == [line["kept"] for line in one]
    values = [[line["score"] for line in scores] for scores in (one, two)]
    assert np.allclose(*values, rtol=0, atol=1e-4)


class Killed(BaseException):
    """What no code of ours catches."""


@pytest.mark.parametrize("method, kills", [("rds", (5, 3)), ("less", (3, 7, 14, 40))])
def test_killed_and_continued_agrees(method, kills, setting, monkeypatch, tmp_path):
    """Again and again, after so many rows: less in its warm-up and at both checkpoints."""
    _, whole = run(setting, method=method, **LESS)
    shutil.rmtree(next(tmp_path.glob("scores-*")))
    monkeypatch.setattr(prune, "LESS_GROUP", 4)
    module, make, made = embeddings if method == "rds" else influence, embeddings.row_tensors, []

    def until_killed(sequences, device):
        made.append(sequences)
        if len(made) > calls[0]:
            raise Killed
        return make(sequences, device)

    monkeypatch.setattr(module, "row_tensors", until_killed)
    calls = [0]
    for calls[0] in kills:
        made.clear()
        with pytest.raises(Killed):
            run(setting, method=method, **LESS)
    made.clear()
    calls[0] = 1000
    _, continued = run(setting, method=method, **LESS)
    assert len(made) < {"rds": 8, "less": 25}[method]  # the rest: nothing is computed twice
    # less: groups of other sizes are projected, products in another order.
    values = [[line["score"] for line in scores] for scores in (whole, continued)]
    assert np.allclose(*values, rtol=0, atol=1e-6 if method == "less" else 0)
    assert [line["kept"] for line in continued] == [line["kept"] for line in whole]


def test_exact_duplicates_are_counted_and_dropped(setting, tmp_path, capsys):
    """Equal roles and stripped texts, whatever else the record holds; the first stays."""
    again = record(" What is 2 plus 2? Think of the quick dog.\n", "The answer is 4. ", id="again")
    path = write(tmp_path / "data.jsonl", [COPIES[0], again, *QUERIES, {**again, "id": "third"}])
    setting |= {"data": [str(path)], "keep": 3}
    kept, _ = run(setting, drop_duplicates=True)
    assert "2 exact duplicates" in capsys.readouterr().out
    assert [line.get("id") for line in kept] == ["copy 1", None, None]
    kept, _ = run(setting, select="global", queries=[setting["queries"][0]], keep=5)
    assert len(kept) == 5
    with pytest.raises(InputError, match="--keep is 4, expected at most 3"):
        run(setting, drop_duplicates=True, keep=4)


def test_other_methods_need_no_queries(setting, tmp_path):
    """length keeps the longest answers, balanced as many of each source, random what is drawn."""
    setting = {name: value for name, value in setting.items() if name != "queries"}
    _, scores = run(setting, method="length")
    assert all(line["query"] is None for line in scores)
    least = min(line["score"] for line in scores if line["kept"])
    assert all(line["score"] <= least for line in scores if not line["kept"])
    records = [record(f"{k} dogs?", "the fox", dataset="ab"[k % 9 == 0]) for k in range(45)]
    setting["data"] = [str(write(tmp_path / "two.jsonl", records))]
    kept, _ = run(setting, method="balanced", keep=8)
    assert sorted(line["dataset"] for line in kept) == ["a"] * 4 + ["b"] * 4
    first, _ = run(setting, method="random", keep=8)
    assert (first, run(setting, method="random", keep=8, seed=1)[0] == first) == (
        run(setting, method="random", keep=8)[0],
        False,
    )
    for method in ("perplexity", "ifd"):
        kept, scores = run(setting, method=method, keep=8)
        assert len(kept) == 8 and min(line["score"] for line in scores) > 0


def test_pairs_are_queries_by_their_chosen_answers(setting, tmp_path):
    """The scores are those of the conversations that they choose."""
    _, expected = run(setting)
    pairs = [
        {
            "chosen": query["messages"],
            "rejected": [query["messages"][0], {"role": "assistant", "content": "No."}],
            "dataset": query["dataset"],
        }
        for query in QUERIES
    ]
    setting["queries"] = [str(write(tmp_path / "pairs.jsonl", pairs))]
    assert run(setting)[1] == expected


def test_files_of_other_kinds_and_several(setting, tmp_path):
    """A list in a .json becomes lines; scores name the file."""
    (tmp_path / "more.json").write_text(json.dumps(COPIES))
    setting["data"].append(str(tmp_path / "more.json"))
    kept, scores = run(setting, keep=4)
    assert [line["id"] for line in kept] == ["copy 1", "copy 2"] * 2
    assert [(line["file"], line["record"]) for line in scores[-2:]] == [
        ("more.json", 1),
        ("more.json", 2),
    ]


def test_a_comparison_counts_the_rows_that_two_choices_share(setting, tmp_path, capsys):
    """All of them with itself; a file of other data is refused."""
    run(setting)
    own = tmp_path / "kept.scores.jsonl"
    run(setting, compare=[str(own)], out=str(tmp_path / "other.jsonl"), keep=6)
    assert "6 of its 6 kept are kept here, too" in capsys.readouterr().out
    own.write_text(own.read_text().split("\n", 1)[1])
    with pytest.raises(InputError, match="25 candidates, expected the 26 of this data"):
        run(setting, compare=[str(own)])


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"method": "rsd"}, "--method is rsd, expected one of rds, less"),
        ({"select": "all"}, "--select is all, expected one of tasks"),
        ({"queries": None}, "found no --queries"),
        ({"keep": 27}, "--keep is 27, expected at most 26"),
        ({"keep": 0}, "--keep is 0, expected an integer from 1 up"),
        ({"out": "kept.json"}, "expected a file whose name ends in .jsonl"),
        ({"micro_tokens": 100}, "--micro-tokens is 100, expected at least"),
        ({"queries": ["nowhere.jsonl"]}, "nowhere.jsonl: no such file"),
        ({"warmup_lr": 0.0}, "--warmup-lr is 0.0, expected a number from 0 up, 0 excluded"),
        ({"method": "less", "lora_rank": 17}, "--lora-rank is 17, expected at most 16"),
        ({"make_queries": ["humaneval"]}, "--make-queries: found humaneval, expected some of mmlu"),
        ({"make_queries": ["mmlu"]}, "found no --eval-data"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_bad_flags_are_refused(flags, message, setting, tmp_path):
    """In a line that says what was expected; nothing is written."""
    before = listing(tmp_path)
    with pytest.raises(InputError, match=message):
        prune.main(setting | flags)
    assert listing(tmp_path) == before


def test_a_file_that_is_not_ours_is_not_overwritten(setting, tmp_path):
    """Nor one of --data or --queries, nor is the result put among the data."""
    mine = write(tmp_path / "kept.jsonl", [{"precious": True}])
    with pytest.raises(InputError, match="kept.jsonl is there, and not prune.py's"):
        run(setting)
    assert lines(mine) == [{"precious": True}]
    for out in (setting["data"][0], setting["queries"][0]):
        with pytest.raises(InputError, match="among --data or --queries"):
            run(setting, out=out)
    with pytest.raises(InputError, match="among --data or --queries"):
        run(setting, data=[str(tmp_path)])
    # Nor where the scores would go: a file of --data, or any other.
    shutil.copy(setting["data"][0], tmp_path / "rest.scores.jsonl")
    for data, message in (("rest.scores", "among --data"), ("data", "not prune.py's")):
        with pytest.raises(InputError, match=message):
            run(setting, data=[str(tmp_path / f"{data}.jsonl")], out=str(tmp_path / "rest.jsonl"))


def test_a_folder_of_data_is_read_but_not_written(setting, tmp_path):
    """A folder beside its files is another place; one that it stands for is not."""
    (tmp_path / "all" / "part").mkdir(parents=True)
    shutil.move(setting["data"][0], tmp_path / "all" / "part" / "data.jsonl")
    setting["data"] = [str(tmp_path / "all")]
    with pytest.raises(InputError, match="among --data"):
        run(setting, out=str(tmp_path / "all" / "part" / "kept.jsonl"))
    assert len(run(setting, out=str(tmp_path / "all" / "kept.jsonl"))[0]) == 6


def test_a_query_is_cut_but_not_to_its_prompt(setting, tmp_path):
    """A long one counts by its first tokens; without an answer in them it is refused."""
    scores = []
    for words in (900, 1200):
        long = record("What is 2 plus 2?", "four " * words, dataset="sums")
        setting["queries"] = [str(write(tmp_path / "long.jsonl", [long]))]
        scores.append(run(setting, max_seq_len=300)[1])
    assert scores[0] == scores[1]
    asked = record("2 " * 900, "four", dataset="sums")
    setting["queries"] = [str(write(tmp_path / "asked.jsonl", [asked, QUERIES[1]]))]
    with pytest.raises(InputError, match="first 300 tokens .--max-seq-len.: 1, expected"):
        run(setting, max_seq_len=300)


def test_changed_data_are_scored_again(setting):
    """What is kept of the old data is not taken for theirs; back again, it is free."""
    _, before = run(setting)
    path, own = prune.Path(setting["data"][0]), lines(prune.Path(setting["data"][0]))
    write(path, own[::-1])
    _, after = run(setting)
    assert np.allclose(
        [line["score"] for line in after], [line["score"] for line in before[::-1]], atol=1e-5
    )
    assert [line["id"] for line in after] == [line["id"] for line in before[::-1]]


def test_two_runs_at_once_do_not_share_an_output_or_scores(setting, tmp_path, monkeypatch):
    """The second one is refused, by name, also where only the scores are the same."""
    monkeypatch.setattr(held_scores, "hold_file", functools.partial(hold_file, patience=0.1))
    run(setting, method="less", **LESS)
    folder = next(tmp_path.glob("scores-*"))
    (folder / "scores").unlink()
    for name in (tmp_path / "kept.jsonl", folder):
        handle = hold_file(f"{name}.lock", name)
        with pytest.raises(InputError, match=f"{name.name}: another run is writing there"):
            run(setting, method="less", **LESS)
        handle.close()
    run(setting, method="less", **LESS)
    assert not list(tmp_path.glob("*.lock"))


def test_queries_are_the_benchmarks_own_examples(real_data, tmp_path):
    """285 of MMLU, 8 of GSM8K and 81 of BBH, none of which is tested."""
    out = tmp_path / "queries.jsonl"
    tasks = ["mmlu", "gsm8k", "bbh"]
    prune.main({"make_queries": tasks, "eval_data": str(real_data / "eval"), "out": str(out)})
    records = lines(out)
    counts = [sum(r["dataset"] == task for r in records) for task in tasks]
    assert counts == [285, 8, 81]
    for r in records:
        assert [m["role"] for m in r["messages"]] == ["user", "assistant"]
        assert all(m["content"].strip() for m in r["messages"])
    asked = {r["messages"][0]["content"].rpartition("Question: ")[2] for r in records}
    tested = {row["question"].strip() for row in lines(real_data / "eval/gsm8k/test.jsonl")}
    assert not asked & tested
