"""MT-Bench: 80 questions in eight categories, each with a second turn that builds on the first.

The paper's setting: FastChat's llm_judge, answers graded from 1 to 10 by GPT-4-0613 one at a time,
the mean of 160 grades. Its settings for answers are FastChat's defaults (which of them the authors
changed is not known): at most 1,024 new tokens, one answer a question, temperature 0.7 for writing
and roleplay, 0.1 for stem and humanities, 0 for the rest. The second turn sees the model's own
first answer.

Source: Ivison et al. 2023, appendix A and table 8; lm-sys/FastChat fastchat/llm_judge/common.py and
gen_model_answer.py (Zheng et al. 2023, arXiv 2306.05685). File: data/mt_bench/question.jsonl there.

The judge is a paid service, so there is no score here: results.mt_bench.jsonl has FastChat's lines
of answers, and the result says the commands.

Where ours differs: FastChat's "tulu" template puts no </s> after the first answer, which the model
never saw in training; ours is the training's format. transformers, under FastChat, samples among
the 50 likeliest tokens by default; ours among all.
"""

import time
import zlib

from decoding.sampling import Sampling
from evals.harness import (
    finishes,
    json_lines,
    model_name,
    need,
    read_jsonl,
    record_of,
    result,
    seed_of,
    write_outputs,
)  # fmt: skip
from program.errors import InputError

TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0,
    "reasoning": 0.0, "stem": 0.1, "humanities": 0.1,
}  # fmt: skip
FIELDS = ("question_id", "category", "turns")
JUDGE = (
    "in FastChat's fastchat/llm_judge: cp {path} data/mt_bench/model_answer/{name}.jsonl && "
    "python gen_judgment.py --model-list {name} && python show_result.py --model-list {name}"
)


def load(folder, options):
    """The questions; raises `InputError` for a bad file, and where chat format is turned off."""
    if not options.chat:
        raise InputError("mt_bench is a conversation: it cannot be asked with --no-chat")
    path = need(folder, "question.jsonl")
    questions = read_jsonl(path, FIELDS)
    for number, question in enumerate(questions, 1):
        turns = question["turns"]
        if not isinstance(turns, list) or [type(turn) for turn in turns] != [str, str]:
            raise InputError(f"{path}:{number}: found no two turns, expected two strings")
        if question["category"] not in TEMPERATURES:
            raise InputError(
                f"{path}:{number}: found category {question['category']!r}, expected one of "
                f"{', '.join(TEMPERATURES)}"
            )
    if not questions or len({q["question_id"] for q in questions}) < len(questions):
        raise InputError(f"{path}: found no questions or a question_id twice")
    return [{"id": str(question["question_id"]), **question} for question in questions]


def turns(items, n):
    """The items of the n-th turn, which are asked after those of the turn before it."""
    return [{**item, "id": f"{item['id']}/{n}"} for item in items]


def prompt(tokenizer, item, options, answers=()):
    """Token ids of the turn that follows as many `answers` as there were."""
    messages = []
    for question, answer in zip(item["turns"], answers, strict=False):
        messages += [{"role": "user", "content": question}]
        messages += [{"role": "assistant", "content": answer}]
    messages += [{"role": "user", "content": item["turns"][len(answers)]}]
    return tokenizer.prompt(messages)


def score(item, text):
    """No verdict, but the answer as the judge gets it, and the next turn."""
    return {"answer": text.strip()}


def evaluate(generator, records, folder, options):
    """No score without the judge; the answers go to results.mt_bench.jsonl."""
    items = load(folder, options)
    first, second = turns(items, 1), turns(items, 2)
    for own in records.pending(first):
        records.add(answered(generator, records, own, [()] * len(own), options))
    begun = {record["id"]: record["answer"] for record in records.of(first)}
    for own in records.pending(second):
        before = [(begun[f"{item['question_id']}/1"],) for item in own]
        records.add(answered(generator, records, own, before, options))
    found = [records.of(first), records.of(second)]
    name = model_name(generator)
    path = write_outputs(records, "mt_bench.jsonl", json_lines(lines(items, *found, name)))
    return result(
        "grade of 10",
        None,
        None,
        2 * len(items),
        {"max_new_tokens": 1024, "temperature": TEMPERATURES},
        outputs=path,
        judge=JUDGE.format(path=path, name=name),
        finishes=finishes(found[0] + found[1]),
    )


def answered(generator, records, own, before, options):
    """Records of the items of one turn, given each one's answers before it."""
    tokenizer, found = generator.tokenizer, {}
    for temperature in sorted({TEMPERATURES[item["category"]] for item in own}):
        sampling = Sampling(1024, temperature, seed=options.seed)
        part = [i for i, item in enumerate(own) if TEMPERATURES[item["category"]] == temperature]
        prompts = [prompt(tokenizer, own[i], options, before[i]) for i in part]
        seeds = [seed_of(own[i]) for i in part]
        answers = generator.generate(prompts, sampling, seeds, records.advance)
        for i, ids, answer in zip(part, prompts, answers, strict=True):
            record = record_of(tokenizer, own[i], ids, answer)
            found[i] = record | score(own[i], answer.text)
    return [found[i] for i in range(len(own))]


def lines(items, first, second, name):
    """FastChat's answers: one choice of two turns for each question."""
    found = []
    for item, one, two in zip(items, first, second, strict=True):
        answers = [one["answer"], two["answer"]]
        key = f"{name} {item['question_id']} {answers}".encode()
        found.append(
            {
                "question_id": item["question_id"],
                "answer_id": f"{zlib.crc32(key):08x}",
                "model_id": name,
                "choices": [{"index": 0, "turns": answers}],
                "tstamp": time.time(),
            }
        )
    return found
