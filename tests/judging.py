"""Answers by hand for the tests of judges: a stand-in for the model, and published files."""

import json
from pathlib import Path

from decoding.generator import Completion

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."],
     "reference": ["a", "b"]},
    {"question_id": 111, "category": "math", "turns": ["1+1?", "Twice?"], "reference": ["2", "4"]},
    {"question_id": 121, "category": "coding", "turns": ["Sort.", "Faster."]},
]  # fmt: skip


ROWS = [
    "Question,Best Answer,Correct Answers,Incorrect Answers",
    *(f"What is {n} plus 2? ,It is {n + 2},It is {n + 2},It is 9" for n in range(3)),
]


class Scripted:
    """A stand-in for `TextGenerator` that answers a prompt with `answer(its text)`."""

    most = 16  # sequences at a time

    def __init__(self, tokenizer, answer):
        self.tokenizer, self.answer, self.asked = tokenizer, answer, []

    def generate(self, prompts, sampling, seeds=None, advance=None):
        texts = [self.tokenizer.visible(ids) for ids in prompts]
        self.asked += [(text, sampling) for text in texts]
        return [Completion([5], self.answer(text), "eos") for text in texts]


def instructions(folder, rows=4):
    """alpaca_eval.json with a few instructions."""
    published = [
        {"instruction": f"Say {n}.", "output": f"old {n}", "generator": "x", "dataset": "koala"}
        for n in range(rows)
    ]
    (folder / "alpaca_eval.json").write_text(json.dumps(published))
    return folder


def ranking(first):
    return str([{"model": "model_1", "rank": first}, {"model": "model_2", "rank": 3 - first}])


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
