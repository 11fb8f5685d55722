"""evals/judges.py and its benchmarks: the published prompts, and verdicts by hand."""

import hashlib
import json
import math
import statistics
from pathlib import Path

import pytest

from evals import alpaca_eval, judges, mt_bench, truthfulqa
from evals.harness import Options, Records
from judging import QUESTIONS, ROWS, Scripted, instructions, ranking, read
from program.errors import InputError
from program.ranks import start
from tokens.tokenizer import Tokenizer

# SHA-256 of system message, a zero byte and user message, as published (see judges.py).
PUBLISHED = {
    "alpaca_eval": "891e5b5c2b6ace8f",
    "single-v1": "7d276fe1d4b3f18f",
    "single-math-v1": "226191a3df0fe7a9",
    "single-v1-multi-turn": "a91a5b4266b4e377",
    "single-math-v1-multi-turn": "572e584361120697",
}


def test_the_prompts_are_the_published_ones():
    """Byte for byte, the published slips of the pen included."""
    for name, text in judges.PROMPTS.items():
        whole = f"{text['system']}\0{text['user']}".encode()
        assert hashlib.sha256(whole).hexdigest().startswith(PUBLISHED.pop(name)), name
    assert not PUBLISHED


def test_a_prompt_is_a_system_and_a_user_turn(tokenizer_folder):
    """The places are filled, and what looks like a place inside an answer stays as it is."""
    tokenizer = Tokenizer(tokenizer_folder)
    fields = {"question": "Why {answer}?", "answer": "{question}\\1 {}", "id": 3}
    text = tokenizer.visible(judges.judge_prompt(tokenizer, "single-v1", fields))
    assert text.startswith(
        "<s> <|system|>\nYou are a helpful assistant.\n<|user|>\n[Instruction]\nPlease act as"
    )
    assert text.endswith(
        '"Rating: [[5]]".\n\n[Question]\nWhy {answer}?\n\n[The Start of Assistant\'s Answer]\n'
        "{question}\\1 {}\n[The End of Assistant's Answer]\n<|assistant|>\n"
    )


@pytest.mark.parametrize(
    "text, first, second",
    [
        ("[{'model': 'model_1', 'rank': 1}, {'model': 'model_2', 'rank': 2}]", 1, 0),
        (' [{"model": "model_2", "rank": 1}, {"model": "model_1", "rank": 2}]\n', 0, 1),
        ("[{'model': 'model_1', 'rank': 3}]", None, None),
        ("[{'model': 'model_1', 'rank': True}]", None, None),
        ("[{'model': 'model_2', 'rank': 1}]", None, None),
        ("model_1 is better", None, None),
        ("[{'rank': 1}]", None, None),
        ("5", None, None),
        ("(" * 5000, None, None),
    ],
)
def test_verdicts_of_alpaca_eval(text, first, second):
    """The rank of model_1 decides: it is the model's own, or that of the other answer."""
    assert alpaca_eval.verdict({"place": 1}, text) == {"wins": first}
    assert alpaca_eval.verdict({"place": 2}, text) == {"wins": second}


@pytest.mark.parametrize(
    "text, value",
    [
        ("Good. Rating: [[7]]", 7), ("[3] of [[8.5]]", 8.5), ("Rating: [4]", 4), ("7", None),
        ("[[0]]", None), ("[[10]]", 10), ("[[11]]", None), ("[[1]] [[2]]", 1), ("", None),
    ],
)  # fmt: skip
def test_grades_of_mt_bench(text, value):
    """The first number in double brackets, else in single ones; outside 1 to 10 unreadable."""
    assert mt_bench.grade({}, text) == {"grade": value}


def answered(tmp_path, module, folder, tokenizer, answer):
    """Records of a task to which a model gave `answer(prompt)`, and the task's result."""
    start()
    records = Records(tmp_path / "results.jsonl")
    records.task = module.__name__.removeprefix("evals.")
    return records, module.evaluate(Scripted(tokenizer, answer), records, folder, Options())


def judged(records, module, folder, tokenizer, result, answer):
    """The result after a judge that says `answer(prompt)`, and what it was asked."""
    records.task = module.__name__.removeprefix("evals.") + "/judge"
    generator = Scripted(tokenizer, answer)
    module.judge("judge", "weights", generator, records, folder, Options())
    folders = {"judge": "models/strict"}
    return module.judged(records, folder, Options(), folders, result), generator.asked


def test_alpaca_eval_both_orders(tmp_path, tokenizer_folder):
    """A judge that looks at the place gives 50 %, one that looks at the answer its own rate."""
    folder, tokenizer = instructions(tmp_path), Tokenizer(tokenizer_folder)
    records, result = answered(tmp_path, alpaca_eval, folder, tokenizer, lambda text: "new")

    def place(text):
        return ranking(1)

    biased, asked = judged(records, alpaca_eval, folder, tokenizer, result, place)
    assert (biased["score"], biased["stderr"], biased["unreadable"]) == (50.0, 0.0, 0)
    assert biased["percent_same_in_both_orders"] == 0 and biased["judgements"] == 8
    assert biased["metric"] == "% wins by strict" and "not comparable" in biased["note"]
    assert len(asked) == 8 and asked[0][1].max_new_tokens == 100 and asked[0][1].temperature == 0
    texts = [text for text, _ in asked if '"instruction": """Say 0."""' in text]
    assert ['"answer": """old 0"""' in text.split("model_2")[0] for text in texts] == [True, False]

    def by_answer(text):  # the model wins 0, loses 1, is unreadable once at 2 and always at 3
        number = int(text.split("Say ")[1][0])
        new_is_second = '"model_2",\n        "answer": """new"""' in text
        if number == 3 or (number == 2 and new_is_second):
            return "I cannot say."
        return ranking(2 if new_is_second == (number != 1) else 1)

    records = Records(tmp_path / "again.jsonl", read(records.path)[:4])
    fair, _ = judged(records, alpaca_eval, folder, tokenizer, result, by_answer)
    # Wins of the instructions 0 to 2: 1, 0 and, by one readable verdict, 1.
    assert fair["score"] == pytest.approx(100 * 2 / 3) and fair["unreadable"] == 3
    assert fair["stderr"] == pytest.approx(100 * statistics.stdev([1, 0, 1]) / 3**0.5)
    assert fair["percent_same_in_both_orders"] == 100
    records = Records(tmp_path / "mute.jsonl", answers_of(records))
    mute, _ = judged(records, alpaca_eval, folder, tokenizer, result, lambda text: "")
    assert mute["score"] is None and mute["unreadable"] == 8


def answers_of(records):
    """The records of answers, without judgements."""
    return [record for (task, _), record in records.known.items() if "/" not in task]


def test_mt_bench_by_hand(tmp_path, tokenizer_folder):
    """Math is graded beside its references, the rest without; mean, error, turns, categories."""
    text = "".join(json.dumps(question) + "\n" for question in QUESTIONS)
    (tmp_path / "question.jsonl").write_text(text)
    tokenizer = Tokenizer(tokenizer_folder)
    records, result = answered(tmp_path, mt_bench, tmp_path, tokenizer, lambda text: "mine")

    def grade(text):
        if "Sort." in text:
            return "no grade" if "Faster." in text else "[[3]]"
        return "[[9]]" if "Twice?" in text else "[[6]]" if "1+1?" in text else "Rating: [[4]]"

    found, asked = judged(records, mt_bench, tmp_path, tokenizer, result, grade)
    every = [4, 4, 6, 9, 3]
    assert found["score"] == statistics.fmean(every) and found["unreadable"] == 1
    error = statistics.stdev([4, 7.5, 3]) / 3**0.5
    assert found["stderr"] == pytest.approx(error)
    assert found["by_turn"] == {"1": pytest.approx(13 / 3), "2": 6.5}
    assert found["by_category"] == {"writing": 4, "math": 7.5, "coding": 3}
    assert found["metric"] == "grade of 10 by strict" and asked[0][1].max_new_tokens == 2048
    prompts = [record["judge_prompt"] for record in read(records.path)[6:]]
    general = ["single-v1", "single-v1-multi-turn"]
    math_too = ["single-math-v1", "single-math-v1-multi-turn"]
    assert prompts == general + math_too + general
    assert asked[2][0].endswith(
        "[Question]\n1+1?\n\n[The Start of Reference Answer]\n2\n[The End of Reference Answer]\n\n"
        "[The Start of Assistant's Answer]\nmine\n[The End of Assistant's Answer]\n<|assistant|>\n"
    )
    assert asked[3][0].endswith(
        "### User:\n1+1?\n\n### Reference answer:\n2\n\n"
        "### User:\nTwice?\n\n### Reference answer:\n4\n\n<|The End of Reference Answer|>\n\n\n"
        "<|The Start of Assistant A's Conversation with User|>\n\n### User:\n1+1?\n\n"
        "### Assistant A:\nmine\n\n### User:\nTwice?\n\n### Assistant A:\nmine\n\n"
        "<|The End of Assistant A's Conversation with User|>\n<|assistant|>\n"
    )


def test_reference_answers_of_gpt_4_come_first(tmp_path):
    """Where the folder has FastChat's file, its answers are taken; a bad one is named."""
    (tmp_path / "question.jsonl").write_text(json.dumps(QUESTIONS[1]) + "\n")
    assert mt_bench.references(tmp_path) == {111: ["2", "4"]}
    (tmp_path / "reference_answer").mkdir()
    path = tmp_path / "reference_answer" / "gpt-4.jsonl"
    path.write_text('{"question_id": 111, "choices": [{"turns": ["two", "four"]}]}\n')
    assert mt_bench.references(tmp_path) == {111: ["two", "four"]}
    for bad, message in (
        ('{"question_id": 111, "choices": []}', "gpt-4.jsonl:1: found no choices"),
        ('{"question_id": 111, "choices": [{"turns": ["two"]}]}', "are not two strings"),
    ):
        path.write_text(bad + "\n")
        with pytest.raises(InputError, match=message):
            mt_bench.check_judged(tmp_path)


def test_both_judges_must_say_yes(tmp_path):
    """Of four answers two are true, two informative, one is both; p = 0.5 counts as yes."""
    (tmp_path / "TruthfulQA.csv").write_text("\n".join([*ROWS, ROWS[1]]) + "\n")

    class Sure:
        tokenizer = None

        def __init__(self, tokenizer, chances):
            self.tokenizer, self.chances = tokenizer, chances

        def option_logps(self, prompts, options):
            return [[math.log(chance)] for chance in self.chances]

    start()
    records = Records(tmp_path / "results.jsonl")
    records.known = {("truthfulqa", str(n)): {"answer": f" {n} "} for n in range(1, 5)}
    folder = Path(__file__).parent
    for role, chances in (("truth_judge", [0.5, 0.9, 0.4, 0.1]), ("info_judge", [1, 0.2, 0.6, 0])):
        records.task = f"truthfulqa/{role}"
        chances = [max(chance, 1e-300) for chance in chances]
        generator = Sure(FakeTokenizer(), chances)
        truthfulqa.judge(role, "weights", generator, records, tmp_path, Options())
    folders = {"truth_judge": folder / "t", "info_judge": folder / "i"}
    result = {"score": 33.0, "stderr": 1.0, "metric": "MC2"}
    found = truthfulqa.judged(records, tmp_path, Options(), folders, result)
    assert (found["score"], found["percent_true"], found["percent_informative"]) == (25, 50, 50)
    assert found["stderr"] == pytest.approx(100 * statistics.stdev([1, 0, 0, 0]) / 2)
    assert found["mc2"] == 33.0 and found["note"].startswith("by t and i")


class FakeTokenizer:
    """Characters as tokens."""

    def raw(self, text):
        return list(text)

    def visible(self, ids):
        return "".join(ids)


def test_another_judge_judges_again(tmp_path, tokenizer_folder, capsys):
    """A judgement belongs to its judge's weights and to the answer that it saw."""
    folder, tokenizer = instructions(tmp_path), Tokenizer(tokenizer_folder)
    records, _ = answered(tmp_path, alpaca_eval, folder, tokenizer, lambda text: "new")
    records.task, asked = "alpaca_eval/judge", []
    for key in ("one", "one", "other", "other"):
        if len(asked) == 3:
            records.known["alpaca_eval", "2"]["completion"] = "changed"
        generator = Scripted(tokenizer, lambda text: ranking(1))
        alpaca_eval.judge("judge", key, generator, records, folder, Options())
        asked.append(len(generator.asked))
    assert asked == [8, 0, 8, 2]
