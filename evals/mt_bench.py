"""MT-Bench: 80 questions in eight categories, each with a second turn that builds on the first.

The paper's setting: FastChat's llm_judge. GPT-4-0613 grades each answer alone, from 1 to 10; the
score is the mean of 160 grades. The settings of the answers here are FastChat's defaults (whether
the authors changed any is not known): one answer to a question, at most 1,024 new tokens,
temperature 0.7 for writing and roleplay, 0.1 for stem and humanities, 0 for the rest. The second
turn sees the model's own first answer.

Source: Ivison et al. 2023, appendix A and table 8; lm-sys/FastChat fastchat/llm_judge/common.py and
gen_model_answer.py (Zheng et al. 2023, arXiv 2306.05685). File: data/mt_bench/question.jsonl there.

The judge is a paid service, so there is no score here: results.mt_bench.jsonl has the answers, one
line each in FastChat's format, and the result states the commands.

With `--judge DIR` a Llama grades the answers (judges.py), in FastChat's prompts for single answers,
greedily. For math, reasoning and coding it sees reference answers: GPT-4's where the folder has
FastChat's reference_answer/gpt-4.jsonl, as there, otherwise those that question.jsonl has. The
standard error is that of the questions' means, whose two grades go together.

Where ours differs: FastChat's "tulu" template puts no </s> after the first answer, and the model
never saw such a text in training; ours is the format of training. transformers, which FastChat
uses, samples among the 50 likeliest tokens by default; ours samples among all. FastChat takes any
number in brackets for a grade; here one outside 1 to 10 counts as unreadable.
"""

import re
import statistics
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

from decoding.generator import TextGenerator
from decoding.sampling import Sampling
from evals import judges
from evals.harness import (
    Options,
    Records,
    answer_all,
    finishes,
    json_lines,
    mean_and_error,
    model_name,
    published,
    read_jsonl,
    record_of,
    result,
    seed_of,
    write_outputs,
)  # fmt: skip
from program.errors import InputError
from tokens.tokenizer import Tokenizer

TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0,
    "reasoning": 0.0, "stem": 0.1, "humanities": 0.1,
}  # fmt: skip
SETTINGS = {"max_new_tokens": 1024, "temperature": TEMPERATURES}
FIELDS = ("question_id", "category", "turns")
WITH_REFERENCE = ("math", "reasoning", "coding")
JUDGE_SAMPLING = Sampling(max_new_tokens=2048)
JUDGE = (
    "in FastChat's fastchat/llm_judge: cp {path} data/mt_bench/model_answer/{name}.jsonl && "
    "python gen_judgment.py --model-list {name} && python show_result.py --model-list {name}"
)


def load(folder: Path, options: Options) -> list[dict]:
    """The questions. Raises `InputError` for a bad file, and for --no-chat."""
    if not options.chat:
        raise InputError("found --no-chat with mt_bench, which is a conversation: drop one of them")
    path = published(folder, "question.jsonl")
    questions = read_jsonl(path, FIELDS)
    for number, question in enumerate(questions, 1):
        turns = question["turns"]
        if not isinstance(turns, list) or [type(turn) for turn in turns] != [str, str]:
            raise InputError(f"{path}:{number}: found other turns than two strings")
        if question["category"] not in TEMPERATURES:
            raise InputError(
                f"{path}:{number}: found category {question['category']!r}, expected one of "
                f"{', '.join(TEMPERATURES)}"
            )
    if not questions or len({q["question_id"] for q in questions}) < len(questions):
        raise InputError(f"{path}: found no questions, or a question_id twice")
    return [{"id": str(question["question_id"]), **question} for question in questions]


def turns(items: list[dict], n: int, answers: Sequence[tuple[str, ...]] = ()) -> list[dict]:
    """The items of the n-th turn. All items of one turn are asked before those of the next.

    answers: those to the turns before, of each item; without any, those of the first turn.
    """
    answers = answers or [()] * len(items)
    return [
        {**item, "id": f"{item['id']}/{n}", "answers": earlier}
        for item, earlier in zip(items, answers, strict=True)
    ]


def prompt(tokenizer: Tokenizer, item: dict, options: Options,
           answers: Sequence[str] = ()) -> list[int]:  # fmt: skip
    """Token ids of the next turn, after the turns that `answers` answered."""
    messages = []
    for question, answer in zip(item["turns"], answers, strict=False):
        messages += [{"role": "user", "content": question}]
        messages += [{"role": "assistant", "content": answer}]
    messages += [{"role": "user", "content": item["turns"][len(answers)]}]
    return tokenizer.prompt(messages)


def score(item: dict, text: str) -> dict:
    """The answer as the judge and the next turn get it. The verdict is the judge's."""
    return {"answer": text.strip()}


def evaluate(generator: TextGenerator, records: Records, folder: Path, options: Options) -> dict:
    """No score without the judge; the answers go to results.mt_bench.jsonl."""
    items, name = load(folder, options), model_name(generator)
    answered, answers = [], ()

    def prompt_text(item):
        return generator.tokenizer.visible(
            prompt(generator.tokenizer, item, options, item["answers"])
        )

    for n in (1, 2):
        asked = turns(items, n, answers)
        for batch in records.pending(asked, prompt=prompt_text, settings=SETTINGS):
            records.add(answer_turn(generator, records, batch, options))
        answered.append(records.of(asked))
        answers = [(record["answer"],) for record in answered[-1]]
    path = write_outputs(records, "mt_bench.jsonl", json_lines(lines(items, *answered, name)))
    return result(
        "grade of 10",
        None,
        None,
        2 * len(items),
        SETTINGS,
        outputs=path,
        judge=JUDGE.format(path=path, name=name),
        finishes=finishes(answered[0] + answered[1]),
    )


def answer_turn(generator: TextGenerator, records: Records, batch: list[dict],
                options: Options) -> list[dict]:  # fmt: skip
    """Records of a batch of one turn."""
    tokenizer, new = generator.tokenizer, {}
    for temperature in sorted({TEMPERATURES[item["category"]] for item in batch}):
        sampling = Sampling(SETTINGS["max_new_tokens"], temperature, seed=options.seed)
        part = [i for i, item in enumerate(batch) if TEMPERATURES[item["category"]] == temperature]
        prompts = [prompt(tokenizer, batch[i], options, batch[i]["answers"]) for i in part]
        seeds = [seed_of(batch[i]) for i in part]
        answers = generator.generate(prompts, sampling, seeds, records.advance)
        for i, ids, answer in zip(part, prompts, answers, strict=True):
            record = record_of(tokenizer, batch[i], ids, answer)
            new[i] = record | score(batch[i], answer.text)
    return [new[i] for i in range(len(batch))]


def lines(items: list[dict], first: list[dict], second: list[dict], name: str) -> list[dict]:
    """FastChat's records of answers: one choice with two turns for each question."""
    rows = []
    for item, one, two in zip(items, first, second, strict=True):
        answers = [one["answer"], two["answer"]]
        key = f"{name} {item['question_id']} {answers}".encode()
        rows.append(
            {
                "question_id": item["question_id"],
                "answer_id": f"{zlib.crc32(key):08x}",
                "model_id": name,
                "choices": [{"index": 0, "turns": answers}],
                "tstamp": time.time(),
            }
        )
    return rows


# ---- The judge


def check_judged(folder: Path) -> None:
    """Raise `InputError` for a bad file of reference answers."""
    references(folder)


def references(folder: Path) -> dict:
    """{question_id: [reference of each turn]}, of the questions that have them."""
    path, found = folder / "reference_answer" / "gpt-4.jsonl", {}
    if path.is_file():
        for number, row in enumerate(read_jsonl(path, ("question_id", "choices")), 1):
            try:
                found[row["question_id"]] = row["choices"][0]["turns"]
            except (LookupError, TypeError):
                raise InputError(f"{path}:{number}: found no choices[0].turns") from None
    else:
        path = published(folder, "question.jsonl")
        for row in read_jsonl(path, FIELDS):
            if "reference" in row:
                found[row["question_id"]] = row["reference"]
    for question, answers in found.items():
        if not isinstance(answers, list) or [type(text) for text in answers] != [str, str]:
            raise InputError(
                f"{path}: the reference answers of question {question} are not two strings"
            )
    return found


def judge(role: str, key: str, generator: TextGenerator, records: Records, folder: Path,
          options: Options) -> None:  # fmt: skip
    """Ask the judge for a grade of both answers to every question."""
    items, known, graded = load(folder, options), references(folder), []
    first, second = (records.of(turns(items, n), "mt_bench") for n in (1, 2))
    for item, *answers in zip(items, first, second, strict=True):
        answers = [record["answer"] for record in answers]
        reference = known.get(item["question_id"]) if item["category"] in WITH_REFERENCE else None
        for turn in (1, 2):
            fields = judge_fields(turn, item["turns"], answers, reference)
            graded.append({"id": f"{item['id']}/{turn}", "judge": key, **fields})

    def make_prompt(item):
        return judges.judge_prompt(generator.tokenizer, item["prompt"], item), {
            "judge_prompt": item["prompt"]
        }

    answer_all(generator, records, graded, make_prompt, grade, JUDGE_SAMPLING)


def judge_fields(turn: int, questions: list[str], answers: list[str],
                 reference: list[str] | None) -> dict[str, str]:  # fmt: skip
    """The name of FastChat's prompt for a turn, and what fills its places."""
    fields = {"prompt": "single-math-v1" if reference else "single-v1"}
    if turn == 1:
        fields |= {"question": questions[0], "answer": answers[0]}
    else:
        fields["prompt"] += "-multi-turn"
        for n, (question, answer) in enumerate(zip(questions, answers, strict=True), 1):
            fields |= {f"question_{n}": question, f"answer_{n}": answer}
    for n, text in enumerate((reference or [])[:turn], 1):
        fields[f"ref_answer_{n}"] = text
    return fields


def grade(item: dict, text: str) -> dict:
    """The grade in the judge's answer: the first number in double, or else single, brackets."""
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", text) or re.search(r"\[(\d+\.?\d*)\]", text)
    value = float(found[1]) if found else 0.0
    return {"grade": value if 1 <= value <= 10 else None}


def judged(records: Records, folder: Path, options: Options, folders: dict[str, str],
           result: dict) -> dict:  # fmt: skip
    """The result with the mean grade by this judge, of both turns and of each, and by category."""
    items, by_turn, by_category, means = load(folder, options), {1: [], 2: []}, {}, []
    for item in items:
        both = records.of([{"id": f"{item['id']}/{n}"} for n in (1, 2)], "mt_bench/judge")
        grades = {n: r["grade"] for n, r in zip((1, 2), both, strict=True) if r["grade"]}
        for n, value in grades.items():
            by_turn[n].append(value)
            by_category.setdefault(item["category"], []).append(value)
        if grades:
            means.append(statistics.fmean(grades.values()))
    every = by_turn[1] + by_turn[2]
    error = mean_and_error(means)[1] if means else None
    return result | {
        "metric": f"grade of 10 by {judges.names_of(folders)}",
        "score": statistics.fmean(every) if every else None,
        "stderr": error / 100 if error is not None else None,
        "judges": folders,
        "by_turn": {str(n): statistics.fmean(v) for n, v in by_turn.items() if v},
        "by_category": {name: statistics.fmean(v) for name, v in by_category.items()},
        "judgements": 2 * len(items),
        "unreadable": 2 * len(items) - len(every),
        "note": judges.NOT_GPT4,
    }
