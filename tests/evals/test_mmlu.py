"""evals/mmlu.py: prompts are the paper's, choices are those of transformers."""

import csv
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from decoding.generator import TextGenerator
from evals import mmlu
from evals.harness import Options, Records
from program.errors import InputError
from program.ranks import start
from tokens.tokenizer import Tokenizer

CHAT, BASE = Options(), Options(chat=False)
HEADER = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]


def write(folder, subjects, header=False):
    """Write files with the given numbers of questions, as published or with a header."""
    for part in ("dev", "test"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for subject, size in subjects.items():
            rows = [
                [f'{part} "{i}",\nyes?', f"{i} a", "None", f"{i}, c", "d" * i, answer]
                for i in range(size)
                for answer in [i % 4 if header else "ABCD"[i % 4]]
            ]
            path = folder / part / f"{subject}_{part}.csv"
            with open(path, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(([HEADER] if header else []) + rows)


def test_prompt_is_the_papers(base, tmp_path):
    """Two spaces before the subject, the examples' letters, the beginning of the answer."""
    write(tmp_path, {"high_school_physics": 3})
    tokenizer = Tokenizer(base)
    header = (
        "The following are multiple choice questions (with answers) about  high school physics.\n\n"
    )
    asked = 'test "1",\nyes?\nA. 1 a\nB. None\nC. 1, c\nD. d\nAnswer:'
    shots = (
        'dev "0",\nyes?\nA. 0 a\nB. None\nC. 0, c\nD. \nAnswer: A\n\n'
        'dev "1",\nyes?\nA. 1 a\nB. None\nC. 1, c\nD. d\nAnswer: B\n\n'
    )
    for k, worked in ((0, ""), (2, shots)):
        item = mmlu.load(tmp_path, Options(mmlu_shots=k))[1]
        ids, left_out = mmlu.prompt(tokenizer, item, CHAT, 4000)
        expected = f"<s> <|user|>\n{header}{worked}{asked}\n<|assistant|>\nThe answer is:"
        assert (tokenizer.visible(ids), left_out) == (expected, 0)
        ids, left_out = mmlu.prompt(tokenizer, item, BASE, 4000)
        assert (tokenizer.visible(ids), left_out) == (f"<s> {header}{worked}{asked}", 0)
    one_less, left_out = mmlu.prompt(tokenizer, item, BASE, len(ids) - 1)
    assert left_out == 1
    assert tokenizer.visible(one_less) == f"<s> {header}{shots[shots.index('dev', 9) :]}{asked}"


def test_no_prompt_with_examples_exceeds_2048_tokens(base, tmp_path):
    """BOS is not counted; a larger context of the model changes nothing."""
    write(tmp_path, {"virology": 60})
    item = mmlu.load(tmp_path, Options(mmlu_shots=60))[-1]
    tokenizer = Tokenizer(base)
    ids, left_out = mmlu.prompt(tokenizer, item, CHAT, 10**6)
    assert len(ids) <= 2049 and 0 < left_out < 60
    item = {**item, "examples": item["examples"][left_out - 1 :]}
    assert mmlu.prompt(tokenizer, item, CHAT, 10**6)[1] == 1


def test_files_with_and_without_header_are_read_alike(tmp_path):
    """Letters without a header, and 0 to 3 under one, give the same items in order of subject."""
    write(tmp_path / "published", {"b": 6, "a": 5})
    write(tmp_path / "header", {"b": 6, "a": 5}, header=True)
    items = mmlu.load(tmp_path / "published", Options(mmlu_shots=5))
    assert items == mmlu.load(tmp_path / "header", Options(mmlu_shots=5))
    assert [item["id"] for item in items[:6]] == ["a/0", "a/1", "a/2", "a/3", "a/4", "b/0"]
    assert [item["answer"] for item in items[5:]] == list("ABCDAB")


def test_all_of_mmlu_is_read(real_data):
    """14,042 questions of 57 subjects, each in a category, each with five examples."""
    items = mmlu.load(real_data / "eval" / "mmlu", Options(mmlu_shots=5))
    categories = [subject for own in mmlu.CATEGORIES.values() for subject in own.split()]
    assert len(items) == 14042 and len(categories) == 57
    assert {item["subject"] for item in items} == set(categories)
    assert all(len(item["examples"]) == 5 for item in items)
    for item in items:
        verdicts = [mmlu.score(item, f" {letter}")["correct"] for letter in "ABCD"]
        assert verdicts.count(True) == 1 and verdicts["ABCD".index(item["answer"])]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("test/a_test.csv", None, r"test: found no \*_test.csv"),
        ("dev/a_dev.csv", None, r"a_dev.csv: no such file"),
        ("test/a_test.csv", "", r"a_test.csv: found no questions"),
        ("test/a_test.csv", "q,1,2,3,4,A\nq,1,2,3,4\n", r"a_test.csv:2: has other columns"),
        ("test/a_test.csv", "q,1,2,3,4,A\nq,1,2,3,4,E\n", r"question 2 has answer 'E', expected A"),
        ("test/a_test.csv", 'q,1,2,3,4,A\n"q,1', r"a_test.csv:2: not CSV"),
        ("test/a_test.csv", "\xe9,1,2,3,4,A\n", r"a_test.csv:1: not CSV"),
        ("dev/a_dev.csv", "q,1,2,3,4,A\n", r"a_dev.csv: 1 question, expected --mmlu-shots 2"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, message):
    """The error names the file, what was found and what was expected."""
    write(tmp_path, {"a": 3})
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=message):
        mmlu.load(tmp_path, Options(mmlu_shots=2))


def evaluated(model, folder, options, path):
    """The result of a model folder, and its records in the order of their ids."""
    _, _, device = start()
    generator = TextGenerator.from_folder(model, device, torch.float32)
    records = Records(path)
    records.task = "mmlu"
    result = mmlu.evaluate(generator, records, folder, options)
    again = Records(path, [json.loads(line) for line in open(path)])
    again.task, generator.model = "mmlu", None  # a second start asks nothing
    assert mmlu.evaluate(generator, again, folder, options) == result
    return result, sorted(again.known.values(), key=lambda record: record["id"])


@pytest.mark.parametrize("shots", [0, 5])
def test_choices_equal_transformers_with_llamas_tokenizer(real_data, tmp_path, shots):
    """The likeliest of four tokens, and their log-probabilities, for real questions."""
    model, source = tmp_path / "model", real_data / "eval" / "mmlu"
    config = LlamaConfig(
        vocab_size=32000, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(model)
    llamas = real_data / "llama2-tokenizer" / "tokenizer.model"
    (model / "tokenizer.model").symlink_to(llamas.resolve())
    for subject in ("astronomy", "us_foreign_policy"):
        for part, rows in (("dev", 6), ("test", 7)):
            (tmp_path / part).mkdir(exist_ok=True)
            lines = (source / part / f"{subject}_{part}.csv").read_text().splitlines(keepends=True)
            (tmp_path / part / f"{subject}_{part}.csv").write_text("".join(lines[:rows]))
    result, records = evaluated(model, tmp_path, Options(mmlu_shots=shots), tmp_path / "lines")

    items = sorted(mmlu.load(tmp_path, Options(mmlu_shots=shots)), key=lambda item: item["id"])
    tokenizer, right = Tokenizer(model), {}
    letters = [tokenizer.sp.piece_to_id(f"▁{letter}") for letter in "ABCD"]
    assert [[i] for i in letters] == mmlu.answer_tokens(tokenizer)
    for item, record in zip(items, records, strict=True):
        ids = [1, *tokenizer.sp.encode(record["prompt"].removeprefix("<s> "))]
        with torch.no_grad():
            logps = theirs(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[letters]
        assert record["logps"] == pytest.approx(logps.tolist(), abs=1e-4)
        chosen = "ABCD"[logps.argmax()]
        assert (record["id"], record["completion"]) == (item["id"], f" {chosen}")
        assert record["correct"] == (chosen == item["answer"])
        right.setdefault(item["subject"], []).append(chosen == item["answer"])
    assert len({record["completion"] for record in records}) > 1
    shares = {subject: 100 * sum(own) / 6 for subject, own in right.items()}
    assert result["subjects"] == pytest.approx(shares)
    assert result["score"] == pytest.approx(sum(shares.values()) / 2) and result["n"] == 12
    categories = {"STEM": shares["astronomy"], "social sciences": shares["us_foreign_policy"]}
    assert result["categories"] == pytest.approx(categories)


def test_questions_count_alike_and_too_long_ones_are_wrong(lively, tmp_path):
    """Every question has equal weight; letters of two tokens count whole; no prompt is cut."""
    write(tmp_path, {"anatomy": 4, "virology": 12})
    path = tmp_path / "test" / "anatomy_test.csv"
    path.write_text(path.read_text().replace("test", "test" + "x" * 5000, 1))
    result, records = evaluated(lively, tmp_path, CHAT, tmp_path / "lines")
    assert result["n"] == 16 and result["prompts_too_long"] == 1
    assert result["score"] == pytest.approx(100 * sum(r["correct"] for r in records) / 16)
    (long, *others) = records
    assert (long["completion"], long["finish"], long["correct"]) == ("", "context", False)

    theirs = LlamaForCausalLM.from_pretrained(lively, dtype=torch.float32).eval()
    tokenizer = Tokenizer(lively)
    for record in others:
        ids = tokenizer.raw(record["prompt"].removeprefix("<s> "))
        for letter, logp in zip("ABCD", record["logps"], strict=True):
            whole = tokenizer.raw(record["prompt"].removeprefix("<s> ") + f" {letter}")
            assert whole[: len(ids)] == ids and len(whole) == len(ids) + 2
            with torch.no_grad():
                logps = theirs(torch.tensor([whole])).logits[0].log_softmax(-1)
            expected = logps[-3, whole[-2]] + logps[-2, whole[-1]]
            assert logp == pytest.approx(expected.item(), abs=1e-3)
