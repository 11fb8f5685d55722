"""AlpacaEval: GPT-4 compares answers to open requests with those of text-davinci-003.

The paper's setting: the 805 instructions as they stand, one user turn each; greedy, with at most
8,192 new tokens (within the model's context). The score is the win rate in AlpacaEval 1, by the
package alpaca-eval 0.3.1 with its annotator alpaca_eval_gpt4. Later versions of the package give
clearly different numbers. The paper also reports the mean length of the answers in characters,
because judges like long answers.

Source: Ivison et al. 2023, appendix A; open-instruct eval/alpaca_farm/run_eval.py. File:
alpaca_eval.json of the data set tatsu-lab/alpaca_eval.

The judge is a paid service, so there is no score here: results.alpaca_eval.json is the list of
outputs that alpaca_eval reads, and the result states the command. The original writes one JSON line
for each output into its .json file, which the package's command line does not read.
"""

import json
import statistics

from decoding.sampling import Sampling
from evals.harness import (
    answer_all,
    checked,
    finishes,
    model_name,
    prompt_ids,
    published,
    read_json,
    result,
    write_outputs,
)
from program.errors import InputError

FIELDS = {"instruction": str, "dataset": object}
SAMPLING = Sampling(max_new_tokens=8192)
JUDGE = (
    "pip install alpaca-eval==0.3.1 && "
    "alpaca_eval --annotators_config alpaca_eval_gpt4 --model_outputs {path}"
)


def load(folder, options):
    """The instructions. Raises `InputError` unless the file is a list of them."""
    path = published(folder, "alpaca_eval.json")
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: found no list of instructions, expected the published one")
    for number, row in enumerate(rows, 1):
        checked(row, FIELDS, f"{path}: record {number}")
    return [
        {"id": str(number), **{field: row[field] for field in FIELDS}}
        for number, row in enumerate(rows, 1)
    ]


def prompt(tokenizer, item, options):
    """Token ids of the instruction: a user turn, or the bare text without chat format."""
    return prompt_ids(tokenizer, item["instruction"], options)


def score(item, text):
    """The answer's length in characters. The verdict is the judge's."""
    return {"characters": len(text)}


def evaluate(generator, records, folder, options):
    """No score without the judge; the answers go to results.alpaca_eval.json."""
    items, name = load(folder, options), model_name(generator)

    def make_prompt(item):
        return prompt(generator.tokenizer, item, options), {}

    answered = answer_all(generator, records, items, make_prompt, score, SAMPLING)
    outputs = [
        {"dataset": item["dataset"], "instruction": item["instruction"],
         "output": record["completion"], "generator": name}
        for item, record in zip(items, answered, strict=True)
    ]  # fmt: skip
    text = json.dumps(outputs, ensure_ascii=False, indent=1) + "\n"
    path = write_outputs(records, "alpaca_eval.json", text)
    return result(
        "% wins",
        None,
        None,
        len(items),
        {"max_new_tokens": SAMPLING.max_new_tokens, "temperature": 0.0},
        mean_characters=statistics.fmean(record["characters"] for record in answered),
        outputs=path,
        judge=JUDGE.format(path=path),
        finishes=finishes(answered),
    )
