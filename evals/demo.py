"""The demo's held-out prompts: small tasks whose right answers a program knows (demo.py).

The score is the share of right answers, in either form; beside it stands the share of those in
whole sentences, the form that the demo's preference pairs like better.
"""

from decoding.sampling import Sampling
from demo.tasks import LONGEST_ANSWER, prefers, solves
from evals.harness import finishes, mean_and_error, need, read_jsonl, record_of, result

SAMPLING = Sampling(max_new_tokens=LONGEST_ANSWER)


def load(folder, options):
    """The prompts of held_out.jsonl."""
    rows = read_jsonl(need(folder, "held_out.jsonl"), ("kind", "messages", "answer"))
    return [{"id": f"held_out_{number}", **row} for number, row in enumerate(rows)]


def score(item, text):
    """Whether an answer is right, and whether it is a right sentence."""
    return {"right": solves(item["answer"], text), "sentence": prefers(item["answer"], text)}


def evaluate(generator, records, folder, options):
    """Right answers in percent, of all prompts and of each kind."""
    items = load(folder, options)
    for own in records.pending(items):
        prompts = [generator.tokenizer.prompt(item["messages"]) for item in own]
        answers = generator.generate(prompts, SAMPLING)
        records.add(
            [
                record_of(generator.tokenizer, item, ids, answer) | score(item, answer.text)
                for item, ids, answer in zip(own, prompts, answers, strict=True)
            ]
        )  # fmt: skip
    found = records.of(items)
    kinds = {}
    for record, item in zip(found, items, strict=True):
        kinds.setdefault(item["kind"], []).append(record["right"])
    return result(
        "% right",
        *mean_and_error([record["right"] for record in found]),
        len(items),
        {"max_new_tokens": LONGEST_ANSWER, "temperature": 0.0},
        in_sentences=mean_and_error([record["sentence"] for record in found])[0],
        kinds={kind: mean_and_error(right)[0] for kind, right in kinds.items()},
        finishes=finishes(found),
    )
