"""BIG-Bench Hard: 27 tasks that language models found hard, answered in steps after three examples.

Setting (Ivison et al. 2023, appendix A): 40 questions of each task; the task's official prompt
(cot-prompts/*.txt without its first two lines) and the question in one user turn; the answer begins
with "A:"; greedy, at most 512 new tokens. Chat models end by themselves; a base model stops at a
blank line (from 2024-02 on the original stops there with chat format, too, and its scores are not
comparable). What follows the first "the answer is" up to a full stop counts, else the whole answer.
Case and punctuation do not matter. The score is the mean over tasks. Source: open-instruct
eval/bbh/run_eval.py of 2023-11-28.

Where ours differs: the original draws its questions in the order of the file system, ours the same
from each task every time. Punctuation that is the answer does matter: without it every row of
brackets (dyck_languages) equals every other of its length, and -7 is 7 (multistep_arithmetic_two).
"""

import re
import string

from decoding.sampling import Sampling
from evals.harness import (
    ask,
    checked,
    fewest_dropped,
    finishes,
    mean_and_error,
    mean_of_means,
    need,
    read_json,
    read_text,
    record_of,
    result,
    sample,
)
from program.errors import InputError

SAMPLED = 40  # of each task
MAX_NEW_TOKENS = 512
PUNCTUATION = re.compile(f"(?!-[0-9])[{re.escape(string.punctuation)}]")


def load(folder, options):
    """Questions of each task's .json, with the examples of its file in cot-prompts."""
    inner = folder / "bbh"  # as in a checkout of the authors' repository
    tasks = {path.stem: path for path in (inner if inner.is_dir() else folder).glob("*.json")}
    prompts = {path.stem: path for path in need(folder, "cot-prompts").glob("*.txt")}
    if not tasks:
        raise InputError(f"{folder}: found no .json, expected BIG-Bench Hard's")
    for name in sorted(tasks.keys() ^ prompts.keys()):
        found = tasks.get(name) or prompts[name]
        missing = f"cot-prompts/{name}.txt" if name in tasks else f"{name}.json"
        raise InputError(f"{found}: found no {missing}, expected one for each")
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


def read_questions(path):
    """The list of {"input", "target"} in a task's file."""
    found = checked(read_json(path), {"examples": list}, path)["examples"]
    if not found:
        raise InputError(f"{path}: found no examples, expected the task's questions")
    fields = {"input": str, "target": str}
    return [checked(row, fields, f"{path}: example {n}") for n, row in enumerate(found, 1)]


def examples(path):
    """(what the task is, its worked examples) of a file in cot-prompts."""
    lines = read_text(path).split("\n", 2)
    beginning, *shots = lines[-1].strip().split("\n\nQ: ")
    if len(lines) < 3 or not shots:
        raise InputError(f"{path}: found no 'Q: ' after a blank line, expected worked examples")
    return beginning, shots


def prompt(tokenizer, item, options, most_tokens):
    """(token ids, examples left out): a question after as many examples as `most_tokens` allows."""

    def make(shots):
        chosen = item["shots"][len(item["shots"]) - shots :]
        text = "\n\nQ: ".join([item["beginning"], *chosen, item["input"]])
        return ask(tokenizer, text + ("" if options.chat else "\n"), options, "A:")

    return fewest_dropped(make, len(item["shots"]), most_tokens)


def score(item, text):
    """The answer that a text comes to, and whether it is right."""
    found = re.search(r"[Tt]he answer is (.*?)\.", text)
    answer = (found.group(1) if found else text).strip()
    return {"answer": answer, "correct": plain(answer) == plain(item["target"])}


def plain(text):
    """A text without case and punctuation but for a minus sign; as it is if that leaves nothing."""
    return PUNCTUATION.sub("", text.lower()).strip() or text


def evaluate(generator, records, folder, options):
    """Right answers in percent, the mean over tasks."""
    items, tokenizer = load(folder, options), generator.tokenizer
    sampling = Sampling(MAX_NEW_TOKENS, stop=() if options.chat else ("\n\n",))
    most_tokens = generator.context - MAX_NEW_TOKENS
    for own in records.pending(items, together="task"):
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
    found, tasks = records.of(items), {}
    for item, record in zip(items, found, strict=True):
        tasks.setdefault(item["task"], []).append(record["correct"])
    return result(
        "% right",
        *mean_of_means(tasks.values()),
        len(items),
        {"shots": 3, "max_new_tokens": MAX_NEW_TOKENS, "temperature": 0.0},
        tasks={task: mean_and_error(correct)[0] for task, correct in tasks.items()},
        prompts_with_fewer_examples=sum(record["examples_left_out"] > 0 for record in found),
        finishes=finishes(found),
    )
