"""BIG-Bench Hard: 27 tasks that are hard for language models, answered step by step.

Setting (Ivison et al. 2023, appendix A): 40 questions of each task. One user turn holds the task's
official prompt with three worked examples (cot-prompts/*.txt without its first two lines) and the
question. The answer begins with "A:"; it is greedy, with at most 512 new tokens. A chat model ends
it by itself; a base model stops at a blank line. (From 2024-02 on the original stops there in chat
format, too, and its scores are not comparable.) What follows the first "the answer is", up to a
full stop, counts; without that phrase, the whole answer. Case and punctuation do not matter. The
score is the mean over tasks. Source: open-instruct eval/bbh/run_eval.py of 2023-11-28.

Where ours differs: the original counts an answer without the full stop ("So the answer is (B)" at
the end) as wrong, since it finds no phrase in it; with us the rest of its line counts, as the
content is right. The original's sample depends on the order in which the file system lists the
tasks; ours is drawn from each task alone. Punctuation matters where it is the answer: without it
every row of brackets (dyck_languages) equals every other one of its length, and -7 equals 7
(multistep_arithmetic_two).
"""

import re
import string
from pathlib import Path

from decoding.generator import TextGenerator
from decoding.sampling import Sampling
from evals.harness import (
    Options,
    Records,
    answer_all,
    checked,
    finishes,
    fit_examples,
    mean_and_error,
    mean_of_means,
    prompt_ids,
    published,
    read_json,
    read_text,
    result,
    sample,
)
from program.errors import InputError
from tokens.tokenizer import Tokenizer

SAMPLED = 40  # of each task
MAX_NEW_TOKENS = 512
PUNCTUATION = re.compile(f"(?!-[0-9])[{re.escape(string.punctuation)}]")


def load(folder: Path, options: Options) -> list[dict]:
    """The questions of each task's .json, with the examples of its file in cot-prompts."""
    inner = folder / "bbh"  # the layout of the authors' repository
    tasks = {path.stem: path for path in (inner if inner.is_dir() else folder).glob("*.json")}
    prompts = {path.stem: path for path in published(folder, "cot-prompts").glob("*.txt")}
    if not tasks:
        raise InputError(f"{folder}: found no .json, expected BIG-Bench Hard's")
    for name in sorted(tasks.keys() ^ prompts.keys()):
        path = tasks.get(name) or prompts[name]
        missing = f"cot-prompts/{name}.txt" if name in tasks else f"{name}.json"
        raise InputError(f"{path}: found no {missing}, expected both files of each task")
    items = []
    for name in sorted(tasks):
        beginning, shots = examples(prompts[name])
        questions = read_questions(tasks[name])
        items += sample(
            [
                {"id": f"{name}/{number}", "task": name, "beginning": beginning, "shots": shots,
                 "input": question["input"], "target": question["target"]}
                for number, question in enumerate(questions)
            ],
            SAMPLED, options,
        )  # fmt: skip
    return items


def read_questions(path: Path) -> list[dict]:
    """The list of {"input", "target"} in a task's file."""
    rows = checked(read_json(path), {"examples": list}, path)["examples"]
    if not rows:
        raise InputError(f"{path}: found no examples, expected the task's questions")
    fields = {"input": str, "target": str}
    return [checked(row, fields, f"{path}: example {n}") for n, row in enumerate(rows, 1)]


def examples(path: Path) -> tuple[str, list[str]]:
    """(description of the task, list of worked examples) of a file in cot-prompts."""
    lines = read_text(path).split("\n", 2)
    beginning, *shots = lines[-1].strip().split("\n\nQ: ")
    if len(lines) < 3 or not shots:
        raise InputError(f"{path}: found no 'Q: ' after a blank line, expected worked examples")
    return beginning, shots


def prompt(
    tokenizer: Tokenizer, item: dict, options: Options, max_tokens: int
) -> tuple[list[int], int]:
    """(token ids, examples left out): a question after as many examples as `max_tokens` allows."""

    def make(shots):
        chosen = item["shots"][len(item["shots"]) - shots :]
        text = "\n\nQ: ".join([item["beginning"], *chosen, item["input"]])
        return prompt_ids(tokenizer, text + ("" if options.chat else "\n"), options, "A:")

    return fit_examples(make, len(item["shots"]), max_tokens)


def score(item: dict, text: str) -> dict:
    """The answer that a text gives, and whether it is right."""
    match = re.search(r"[Tt]he answer is (.*?)\.", text)
    match = match or re.search(r"[Tt]he answer is\s+(.+)", text)
    answer = (match.group(1) if match else text).strip()
    return {"answer": answer, "correct": plain(answer) == plain(item["target"])}


def plain(text: str) -> str:
    """A text in lower case, no punctuation but minus signs; if nothing is left, the text itself."""
    return PUNCTUATION.sub("", text.lower()).strip() or text


def evaluate(generator: TextGenerator, records: Records, folder: Path, options: Options) -> dict:
    """Right answers in percent, the mean over tasks."""
    items = load(folder, options)
    sampling = Sampling(MAX_NEW_TOKENS, stop=() if options.chat else ("\n\n",))
    max_tokens = generator.context - MAX_NEW_TOKENS

    def make_prompt(item):
        ids, left_out = prompt(generator.tokenizer, item, options, max_tokens)
        return ids, {"examples_left_out": left_out}

    answered = answer_all(generator, records, items, make_prompt, score, sampling, group_by="task")
    tasks = {}
    for item, record in zip(items, answered, strict=True):
        tasks.setdefault(item["task"], []).append(record["correct"])
    return result(
        "% right",
        *mean_of_means(tasks.values()),
        len(items),
        {"shots": 3, "max_new_tokens": MAX_NEW_TOKENS, "temperature": 0.0},
        tasks={task: mean_and_error(correct)[0] for task, correct in tasks.items()},
        prompts_with_fewer_examples=sum(record["examples_left_out"] > 0 for record in answered),
        finishes=finishes(answered),
    )
