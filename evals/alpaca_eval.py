"""AlpacaEval: open requests, on which GPT-4 compares the answers with text-davinci-003's.

The paper's setting: the 805 instructions as they stand, one user turn each; greedy, at most 8,192
new tokens (within the model's context); the score is the win rate in AlpacaEval 1, by the package
alpaca-eval 0.3.1 with its annotator alpaca_eval_gpt4. Later versions of the package give clearly
other numbers. The paper also reports the answers' mean length in characters, because judges like
long ones.

Source: Ivison et al. 2023, appendix A; open-instruct eval/alpaca_farm/run_eval.py. File:
alpaca_eval.json of the data set tatsu-lab/alpaca_eval.

The judge is a paid service, so there is no score here: results.alpaca_eval.json is the list of
outputs that alpaca_eval reads, and the result says the command. The original writes a line for each
output into its .json file, which the package's command line does not read.
"""

import json
import statistics

from decoding.sampling import Sampling
from evals.harness import (
    ask,
    checked,
    finishes,
    model_name,
    need,
    read_json,
    record_of,
    result,
    write_outputs,
)
from program.errors import InputError

FIELDS = ("instruction", "dataset")
SAMPLING = Sampling(max_new_tokens=8192)
JUDGE = (
    "pip install alpaca-eval==0.3.1 && "
    "alpaca_eval --annotators_config alpaca_eval_gpt4 --model_outputs {path}"
)


def load(folder, options):
    """The instructions; raises `InputError` for anything but a list of them."""
    path = need(folder, "alpaca_eval.json")
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: found no list of instructions, expected the published one")
    for number, row in enumerate(rows, 1):
        checked(row, FIELDS, f"{path}: record {number}")
        if not isinstance(row["instruction"], str):
            raise InputError(f"{path}: record {number}: the instruction is no string")
    return [
        {"id": str(number), **{field: row[field] for field in FIELDS}}
        for number, row in enumerate(rows, 1)
    ]


def prompt(tokenizer, item, options):
    """Token ids of the instruction as a user turn; of the bare instruction without chat format."""
    return ask(tokenizer, item["instruction"], options)


def score(item, text):
    """No verdict, but the answer's length in characters."""
    return {"characters": len(text)}


def evaluate(generator, records, folder, options):
    """No score without the judge; the answers go to results.alpaca_eval.json."""
    items = load(folder, options)
    for own in records.pending(items):
        prompts = [prompt(generator.tokenizer, item, options) for item in own]
        answers = generator.generate(prompts, SAMPLING, advance=records.advance)
        records.add(
            [
                record_of(generator.tokenizer, item, ids, answer) | score(item, answer.text)
                for item, ids, answer in zip(own, prompts, answers, strict=True)
            ]
        )  # fmt: skip
    found = records.of(items)
    outputs = [
        {"dataset": item["dataset"], "instruction": item["instruction"],
         "output": record["completion"], "generator": model_name(generator)}
        for item, record in zip(items, found, strict=True)
    ]  # fmt: skip
    text = json.dumps(outputs, ensure_ascii=False, indent=1) + "\n"
    path = write_outputs(records, "alpaca_eval.json", text)
    return result(
        "% wins",
        None,
        None,
        len(items),
        {"max_new_tokens": SAMPLING.max_new_tokens, "temperature": 0.0},
        mean_characters=statistics.fmean(record["characters"] for record in found),
        outputs=path,
        judge=JUDGE.format(path=path),
        finishes=finishes(found),
    )
