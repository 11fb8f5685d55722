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

Where ours differs: FastChat's "tulu" template puts no </s> after the first answer, and the model
never saw such a text in training; ours is the format of training. transformers, which FastChat
uses, samples among the 50 likeliest tokens by default; ours samples among all.
"""

import time
import zlib

from decoding.sampling import Sampling
from evals.harness import (
    finishes,
    json_lines,
    model_name,
    published,
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
SETTINGS = {"max_new_tokens": 1024, "temperature": TEMPERATURES}
FIELDS = ("question_id", "category", "turns")
JUDGE = (
    "in FastChat's fastchat/llm_judge: cp {path} data/mt_bench/model_answer/{name}.jsonl && "
    "python gen_judgment.py --model-list {name} && python show_result.py --model-list {name}"
)


def load(folder, options):
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


def turns(items, n, answers=()):
    """The items of the n-th turn. All items of one turn are asked before those of the next.

    answers: those to the turns before, of each item; without any, those of the first turn.
    """
    answers = answers or [()] * len(items)
    return [
        {**item, "id": f"{item['id']}/{n}", "answers": earlier}
        for item, earlier in zip(items, answers, strict=True)
    ]


def prompt(tokenizer, item, options, answers=()):
    """Token ids of the next turn, after the turns that `answers` answered."""
    messages = []
    for question, answer in zip(item["turns"], answers, strict=False):
        messages += [{"role": "user", "content": question}]
        messages += [{"role": "assistant", "content": answer}]
    messages += [{"role": "user", "content": item["turns"][len(answers)]}]
    return tokenizer.prompt(messages)


def score(item, text):
    """The answer as the judge and the next turn get it. The verdict is the judge's."""
    return {"answer": text.strip()}


def evaluate(generator, records, folder, options):
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


def answer_turn(generator, records, batch, options):
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


def lines(items, first, second, name):
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
