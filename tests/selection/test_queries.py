"""Queries are what our evaluations ask, with an answer after it."""

import json

import pytest

from evals import bbh, gsm8k, mmlu, tydiqa
from evals.harness import Options
from program.errors import InputError
from selection.queries import make_queries
from tokens.tokenizer import Tokenizer


def begins_with(tokenizer, record, prompt):
    """Whether a record's ids begin with a prompt's, but for the piece where its answer begins.

    The chat format strips a user's text, which is why the prompts here end in no white space.
    """
    ids, _ = tokenizer.encode(record["messages"])
    return ids[: len(prompt) - 1] == list(prompt)[:-1]


def test_gsm8k(base):
    """The eight examples as questions without examples."""
    tokenizer, records = Tokenizer(base), make_queries(["gsm8k"], None)
    assert len(records) == len(gsm8k.EXAMPLES) == 8
    for record, example in zip(records, gsm8k.EXAMPLES, strict=True):
        prompt, left_out = gsm8k.prompt(tokenizer, example, Options(), 0)
        assert left_out == 8 and begins_with(tokenizer, record, prompt)
        assert record["messages"][1]["content"] == f"Answer: {example['answer']}"


def test_mmlu_and_bbh(base, tmp_path):
    """The dev questions, not the test's; BBH's worked examples, each alone."""
    for part, rows in (
        ("dev", "How many?,1,2,3,4,B\nWho?,a,b,c,d,D\n"),
        ("test", "No,1,2,3,4,A\n"),
    ):
        (tmp_path / "mmlu" / part).mkdir(parents=True)
        (tmp_path / "mmlu" / part / f"college_logic_{part}.csv").write_text(rows)
    (tmp_path / "bbh" / "cot-prompts").mkdir(parents=True)
    text = "canary\n---\nSay it.\n\nQ: One?\nA: Let's think.\nSo 1.\n\nQ: Two?\nA: So 2."
    (tmp_path / "bbh" / "cot-prompts" / "counting.txt").write_text(text)
    tokenizer, records = Tokenizer(base), make_queries(["mmlu", "bbh"], tmp_path)
    questions = mmlu.read_questions(tmp_path / "mmlu/dev/college_logic_dev.csv")
    for record, question in zip(records[:2], questions, strict=True):
        item = {"subject": "college_logic", "examples": [], **question}
        assert begins_with(tokenizer, record, mmlu.prompt(tokenizer, item, Options(), 999)[0])
        assert record["messages"][1]["content"] == f"The answer is: {question['answer']}"
    answers = ["A: Let's think.\nSo 1.", "A: So 2."]
    for record, asked, answer in zip(records[2:], ("One?", "Two?"), answers, strict=True):
        item = {"beginning": "Say it.", "shots": [], "input": asked}
        assert begins_with(tokenizer, record, bbh.prompt(tokenizer, item, Options(), 999)[0])
        assert record["messages"][1]["content"] == answer
    assert [record["dataset"] for record in records] == ["mmlu"] * 2 + ["bbh"] * 2
    assert len({record["id"] for record in records}) == 4


def test_tydiqa(base, tmp_path):
    """The training question that stands as the example before each of a language."""
    folder = tmp_path / "tydiqa"
    folder.mkdir()
    for part, word in (("dev", "tested"), ("train", "example")):
        qas = [
            {"id": f"{language}-1", "question": f"{word}?", "answers": [{"text": f"{word}!"}]}
            for language in ("english", "finnish")
        ]
        data = {"data": [{"paragraphs": [{"context": "Snow is white.", "qas": qas}]}]}
        (folder / f"tydiqa-goldp-v1.1-{part}.json").write_text(json.dumps(data))
    tokenizer, records = Tokenizer(base), make_queries(["tydiqa"], tmp_path)
    assert len(records) == 2
    for record, item in zip(records, tydiqa.load(folder, Options()), strict=True):
        assert "tested" not in json.dumps(record)
        asked = tokenizer.visible(tokenizer.encode(record["messages"])[0])
        alone = {**item, "question": "example?"}
        prompt = tokenizer.visible(tydiqa.prompt(tokenizer, alone, Options(), 0)[0])
        assert asked.replace("\n", "").startswith(prompt.replace("\n", ""))


def test_a_task_without_examples_is_refused(tmp_path):
    """HumanEval has none of its own; an empty folder has none."""
    for task, message in (("humaneval", "expected some of mmlu"), ("mmlu", "found no examples")):
        with pytest.raises(InputError, match=message):
            make_queries([task], tmp_path)
