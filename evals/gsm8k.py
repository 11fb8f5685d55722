"""GSM8K: word problems of grade school, answered step by step after eight worked examples.

Setting (Ivison et al. 2023, appendix A): 200 of the 1,319 test problems. The eight examples of Wei
et al. 2022 (arXiv 2201.11903, table 20) stand in their order, with the problem, in one user turn.
The answer begins with "Answer:"; it is greedy, with at most 512 new tokens. A chat model ends it by
itself; a base model stops at a line feed. The last number of the answer counts. Source:
open-instruct eval/gsm/run_eval.py and examplars.py of 2023-11-28. The sample is the original's:
`random.sample` after seed 42.

Where ours differs: numbers are compared as numbers. The original's pattern finds 5 in "-5", and its
comparison ignores punctuation, so that 3.5 equals 35, 18.00 does not equal 18, and -5 equals 5.
"""

import re
from pathlib import Path

from decoding.generator import TextGenerator
from decoding.sampling import Sampling
from evals.harness import (
    Options,
    Records,
    answer_all,
    finishes,
    fit_examples,
    mean_and_error,
    prompt_ids,
    published,
    read_jsonl,
    result,
    sample,
)
from program.errors import InputError
from tokens.tokenizer import Tokenizer

SAMPLED = 200
MAX_NEW_TOKENS = 512
FIELDS = {"question": str, "answer": str}
EXAMPLES = read_jsonl(Path(__file__).with_name("gsm8k_examples.jsonl"), FIELDS)
# A minus after a letter, a digit or a bracket is a subtraction; elsewhere it is a sign.
NUMBER = re.compile(r"((?<![\w)\]])[-−])?\$?(\d*\.\d+|\d+)")


def load(folder: Path, options: Options) -> list[dict]:
    """The problems of test.jsonl, each with its right number, "target"."""
    path, items = published(folder, "test.jsonl"), []
    for number, row in enumerate(read_jsonl(path, FIELDS)):
        _, mark, answer = row["answer"].rpartition("####")
        target = last_number(answer)
        if not mark or target is None:
            raise InputError(f"{path}: answer {number + 1} does not end in '####' and a number")
        items.append({"id": f"test/{number}", "question": row["question"], "target": target})
    if not items:
        raise InputError(f"{path}: found no problems, expected GSM8K's")
    return sample(items, SAMPLED, options)


def prompt(
    tokenizer: Tokenizer, item: dict, options: Options, max_tokens: int
) -> tuple[list[int], int]:
    """(token ids, examples left out): a problem after as many examples as `max_tokens` allows."""

    def make(shots):
        chosen = EXAMPLES[len(EXAMPLES) - shots :]
        blocks = [f"Answer the following question{'s' if chosen else ''}."]
        blocks += [f"Question: {e['question']}\nAnswer: {e['answer']}" for e in chosen]
        blocks.append(f"Question: {item['question'].strip()}")
        text = "\n\n".join(blocks) + ("" if options.chat else "\n")
        return prompt_ids(tokenizer, text, options, "Answer:")

    return fit_examples(make, len(EXAMPLES), max_tokens)


def last_number(text: str) -> str | None:
    """The last number of a text, as a string without commas. None if there is no number."""
    numbers = NUMBER.findall(re.sub(r"(\d),(\d)", r"\1\2", text))
    if not numbers:
        return None
    sign, digits = numbers[-1]
    return ("-" if sign else "") + digits


def score(item: dict, text: str) -> dict:
    """The number that an answer ends with, and whether it is right."""
    answer = last_number(text)
    correct = answer is not None and float(answer) == float(item["target"])
    return {"answer": answer, "correct": correct}


def evaluate(generator: TextGenerator, records: Records, folder: Path, options: Options) -> dict:
    """Right answers in percent."""
    items = load(folder, options)
    sampling = Sampling(MAX_NEW_TOKENS, stop=() if options.chat else ("\n",))
    max_tokens = generator.context - MAX_NEW_TOKENS

    def make_prompt(item):
        ids, left_out = prompt(generator.tokenizer, item, options, max_tokens)
        return ids, {"examples_left_out": left_out}

    answered = answer_all(generator, records, items, make_prompt, score, sampling)
    return result(
        "% right",
        *mean_and_error([record["correct"] for record in answered]),
        len(items),
        {"shots": len(EXAMPLES), "max_new_tokens": MAX_NEW_TOKENS, "temperature": 0.0},
        prompts_with_fewer_examples=sum(record["examples_left_out"] > 0 for record in answered),
        finishes=finishes(answered),
    )
