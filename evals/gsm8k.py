"""GSM8K: grade-school word problems, answered in steps after eight worked examples.

Setting (Ivison et al. 2023, appendix A): 200 of the 1,319 test problems; the eight examples of Wei
et al. 2022 (arXiv 2201.11903, table 20), always in their order, in one user turn; the answer begins
with "Answer:"; greedy, at most 512 new tokens. Chat models end by themselves, base models at a line
feed. The last number of the answer counts. Source: open-instruct eval/gsm/run_eval.py and
examplars.py of 2023-11-28. The sample is the original's: `random.sample` after seed 42.

Where ours differs: numbers are compared as numbers. The original's pattern finds 5 in "-5", and its
comparison ignores punctuation, so that 3.5 is 35, 18.00 is not 18, and -5 is 5.
"""

import re
from pathlib import Path

from decoding.sampling import Sampling
from evals.harness import (
    ask,
    fewest_dropped,
    finishes,
    mean_and_error,
    need,
    read_jsonl,
    record_of,
    result,
    sample,
)
from program.errors import InputError

SAMPLED = 200
MAX_NEW_TOKENS = 512
FIELDS = {"question": str, "answer": str}
EXAMPLES = read_jsonl(Path(__file__).with_name("gsm8k_examples.jsonl"), FIELDS)
# A minus after a letter, a digit or a bracket takes away; after anything else it is a sign.
NUMBER = re.compile(r"((?<![\w)\]])[-−])?\$?(\d*\.\d+|\d+)")


def load(folder, options):
    """The problems of test.jsonl, each with the number that is right."""
    path, items = need(folder, "test.jsonl"), []
    for number, row in enumerate(read_jsonl(path, FIELDS)):
        _, mark, answer = row["answer"].rpartition("####")
        target = last_number(answer)
        if not mark or target is None:
            raise InputError(f"{path}: answer {number + 1} does not end in '####' and a number")
        items.append({"id": f"test/{number}", "question": row["question"], "target": target})
    if not items:
        raise InputError(f"{path}: found no problems, expected GSM8K's")
    return sample(items, SAMPLED, options)


def prompt(tokenizer, item, options, most_tokens):
    """(token ids, examples left out): a problem after as many examples as `most_tokens` allows."""

    def make(shots):
        chosen = EXAMPLES[len(EXAMPLES) - shots :]
        blocks = [f"Answer the following question{'s' if chosen else ''}."]
        blocks += [f"Question: {e['question']}\nAnswer: {e['answer']}" for e in chosen]
        blocks.append(f"Question: {item['question'].strip()}")
        text = "\n\n".join(blocks) + ("" if options.chat else "\n")
        return ask(tokenizer, text, options, "Answer:")

    return fewest_dropped(make, len(EXAMPLES), most_tokens)


def last_number(text):
    """The last number of a text, as a string without commas; None where there is none."""
    found = NUMBER.findall(re.sub(r"(\d),(\d)", r"\1\2", text))
    if not found:
        return None
    sign, digits = found[-1]
    return ("-" if sign else "") + digits


def score(item, text):
    """The number that an answer gives, and whether it is right."""
    answer = last_number(text)
    correct = answer is not None and float(answer) == float(item["target"])
    return {"answer": answer, "correct": correct}


def evaluate(generator, records, folder, options):
    """Right answers in percent."""
    items, tokenizer = load(folder, options), generator.tokenizer
    sampling = Sampling(MAX_NEW_TOKENS, stop=() if options.chat else ("\n",))
    most_tokens = generator.context - MAX_NEW_TOKENS
    for own in records.pending(items):
        asked = [prompt(tokenizer, item, options, most_tokens) for item in own]
        answers = generator.generate([ids for ids, _ in asked], sampling, advance=records.advance)
        records.add(
            [
                record_of(tokenizer, item, ids, answer)
                | {"examples_left_out": left_out}
                | score(item, answer.text)
                for item, (ids, left_out), answer in zip(own, asked, answers, strict=True)
            ]
        )  # fmt: skip
    found = records.of(items)
    return result(
        "% right",
        *mean_and_error([record["correct"] for record in found]),
        len(items),
        {"shots": len(EXAMPLES), "max_new_tokens": MAX_NEW_TOKENS, "temperature": 0.0},
        prompts_with_fewer_examples=sum(record["examples_left_out"] > 0 for record in found),
        finishes=finishes(found),
    )
