"""The demo's held-out prompts: small tasks whose right answers a program can check.

The score is the share of right answers, in either of the demo's two forms. Beside it stands the
share of right answers in whole sentences, the form that the demo's preference pairs prefer.
demo/tasks.py makes the prompts and checks the answers.
"""

from pathlib import Path

from decoding.generator import TextGenerator
from decoding.sampling import Sampling
from demo.tasks import LONGEST_ANSWER, prefers, solves
from evals.harness import (
    Options,
    Records,
    answer_all,
    finishes,
    mean_and_error,
    published,
    read_jsonl,
    result,
)
from program.errors import InputError
from tokens.shapes import plain_messages

SAMPLING = Sampling(max_new_tokens=LONGEST_ANSWER)


def load(folder: Path, options: Options) -> list[dict]:
    """The prompts of held_out.jsonl."""
    path = published(folder, "held_out.jsonl")
    rows = read_jsonl(path, {"kind": str, "messages": list, "answer": str})
    for number, row in enumerate(rows, 1):
        try:
            row["messages"] = plain_messages(row["messages"], "messages")
        except ValueError as error:
            raise InputError(f"{path}: record {number}: {error}") from None
    return [{"id": f"held_out_{number}", **row} for number, row in enumerate(rows)]


def score(item: dict, text: str) -> dict:
    """Whether an answer is right, and whether it is right and in a sentence."""
    return {"right": solves(item["answer"], text), "sentence": prefers(item["answer"], text)}


def evaluate(generator: TextGenerator, records: Records, folder: Path, options: Options) -> dict:
    """Right answers in percent, of all prompts and of each kind."""
    items = load(folder, options)

    def make_prompt(item):
        return generator.tokenizer.prompt(item["messages"]), {}

    answered = answer_all(generator, records, items, make_prompt, score, SAMPLING)
    kinds = {}
    for record, item in zip(answered, items, strict=True):
        kinds.setdefault(item["kind"], []).append(record["right"])
    return result(
        "% right",
        *mean_and_error([record["right"] for record in answered]),
        len(items),
        {"max_new_tokens": LONGEST_ANSWER, "temperature": 0.0},
        in_sentences=mean_and_error([record["sentence"] for record in answered])[0],
        kinds={kind: mean_and_error(right)[0] for kind, right in kinds.items()},
        finishes=finishes(answered),
    )
