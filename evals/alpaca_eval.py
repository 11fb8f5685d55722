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

With `--judge DIR` a Llama compares the answers (judges.py), in the prompt of alpaca_eval_gpt4 and
with its rule for reading the verdict. It reads each pair twice, with the model's answer second and
first, because judges favour a place (the package draws one of the two orders). The score is the
mean over the instructions of the verdicts that can be read.
"""

import ast
import json
import statistics
from pathlib import Path

from decoding.generator import TextGenerator
from decoding.sampling import Sampling
from evals import judges
from evals.harness import (
    Options,
    Records,
    answer_all,
    checked,
    finishes,
    mean_and_error,
    model_name,
    prompt_ids,
    published,
    read_json,
    result,
    write_outputs,
)
from program.errors import InputError
from tokens.tokenizer import Tokenizer

FIELDS = {"instruction": str, "dataset": object}
SAMPLING = Sampling(max_new_tokens=8192)
JUDGE_SAMPLING = Sampling(max_new_tokens=100)
JUDGE = (
    "pip install alpaca-eval==0.3.1 && "
    "alpaca_eval --annotators_config alpaca_eval_gpt4 --model_outputs {path}"
)


def load(folder: Path, options: Options) -> list[dict]:
    """The instructions. Raises `InputError` unless the file is a list of them."""
    return [
        {"id": str(number), **{field: row[field] for field in FIELDS}}
        for number, row in enumerate(rows_of(folder, FIELDS), 1)
    ]


def rows_of(folder: Path, fields: dict[str, type]) -> list[dict]:
    """The published list. Raises `InputError` unless each of its objects has these fields."""
    path = published(folder, "alpaca_eval.json")
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: found no list of instructions, expected the published one")
    for number, row in enumerate(rows, 1):
        checked(row, fields, f"{path}: record {number}")
    return rows


def prompt(tokenizer: Tokenizer, item: dict, options: Options) -> list[int]:
    """Token ids of the instruction: a user turn, or the bare text without chat format."""
    return prompt_ids(tokenizer, item["instruction"], options)


def score(item: dict, text: str) -> dict:
    """The answer's length in characters. The verdict is the judge's."""
    return {"characters": len(text)}


def evaluate(generator: TextGenerator, records: Records, folder: Path, options: Options) -> dict:
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


# ---- The judge


def check_judged(folder: Path) -> None:
    """Raise `InputError` where an instruction has no answer of text-davinci-003 beside it."""
    rows_of(folder, {**FIELDS, "output": str})


def judge(
    role: str, key: str, generator: TextGenerator, records: Records, folder: Path, options: Options
) -> None:
    """Ask the judge about each pair of answers twice, the model's second and first."""
    items = load(folder, options)
    references = [row["output"] for row in rows_of(folder, {**FIELDS, "output": str})]
    pairs = []
    for item, record, other in zip(
        items, records.of(items, "alpaca_eval"), references, strict=True
    ):
        for place, outputs in ((2, (other, record["completion"])),
                               (1, (record["completion"], other))):  # fmt: skip
            pairs.append(
                {"id": f"{item['id']}/{place}", "instruction": item["instruction"],
                 "output_1": outputs[0], "output_2": outputs[1], "place": place, "judge": key}
            )  # fmt: skip

    def make_prompt(pair):
        return judges.judge_prompt(generator.tokenizer, "alpaca_eval", pair), {}

    answer_all(generator, records, pairs, make_prompt, verdict, JUDGE_SAMPLING)


def verdict(pair: dict, text: str) -> dict:
    """`wins`: 1 where the judge ranks the model's answer first, 0 for the other, None unreadable.

    As the package reads it: a Python list of dicts in which model_1 has the rank 1 or 2.
    """
    try:
        rank = next(one for one in ast.literal_eval(text) if one["model"] == "model_1")["rank"]
    except (ValueError, SyntaxError, TypeError, KeyError, StopIteration, MemoryError,
            RecursionError):  # fmt: skip
        rank = None
    if type(rank) is not int or rank not in (1, 2):
        return {"wins": None}
    return {"wins": int((rank == 1) == (pair["place"] == 1))}


def judged(
    records: Records, folder: Path, options: Options, folders: dict[str, str], result: dict
) -> dict:
    """The result with the win rate by this judge, and how far its verdicts depend on the order."""
    items = load(folder, options)
    orders = [records.of([{"id": f"{item['id']}/{place}"} for place in (2, 1)],
                         "alpaca_eval/judge") for item in items]  # fmt: skip
    verdicts = [[r["wins"] for r in both if r["wins"] is not None] for both in orders]
    rates = [statistics.fmean(readable) for readable in verdicts if readable]
    score, error = mean_and_error(rates) if rates else (None, None)
    twice = [readable for readable in verdicts if len(readable) == 2]
    return result | {
        "metric": f"% wins by {judges.names_of(folders)}",
        "score": score,
        "stderr": error,
        "judges": folders,
        "judgements": 2 * len(items),
        "unreadable": 2 * len(items) - sum(map(len, verdicts)),
        "percent_same_in_both_orders": mean_and_error([a == b for a, b in twice])[0]
        if twice else None,
        "note": judges.NOT_GPT4,
    }  # fmt: skip
