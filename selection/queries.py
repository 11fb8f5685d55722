"""Queries from the benchmarks' own worked examples, never from the items that are tested.

MMLU's dev questions (57 x 5), GSM8K's 8 and BBH's 27 x 3 chain-of-thought examples, TyDiQA's one
training question a language: as in Ivison et al. 2025 (arXiv 2503.01807), in the words of our
evaluations. HumanEval has no examples: the paper takes 16 of its test problems, and ours does not.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from evals import bbh, gsm8k, mmlu, tydiqa
from evals.harness import Options, published
from program.errors import InputError
from program.files import written_aside


def mmlu_queries(folder: Path) -> Iterator[tuple[str, str, str]]:
    for path in sorted((folder / "dev").glob("*_dev.csv")):
        subject = path.name.removesuffix("_dev.csv")
        about = subject.replace("_", " ")
        text = f"The following are multiple choice questions (with answers) about  {about}.\n\n"
        for question in mmlu.read_questions(path):
            answer = f"The answer is: {question['answer']}"
            yield subject, text + mmlu.question_text(question), answer


def gsm8k_queries(folder: Path) -> Iterator[tuple[str, str, str]]:
    for example in gsm8k.EXAMPLES:
        question = f"Answer the following question.\n\nQuestion: {example['question']}"
        yield "example", question, f"Answer: {example['answer']}"


def bbh_queries(folder: Path) -> Iterator[tuple[str, str, str]]:
    for path in sorted(published(folder, "cot-prompts").glob("*.txt")):
        beginning, shots = bbh.examples(path)
        for shot in shots:
            question, mark, answer = shot.partition("\nA: ")
            if not mark:
                raise InputError(f"{path}: found a question without 'A: ', expected an answer")
            yield path.stem, f"{beginning}\n\nQ: {question}", f"A: {answer}"


def tydiqa_queries(folder: Path) -> Iterator[tuple[str, str, str]]:
    items = tydiqa.load(folder, Options())
    for language, example in {i["language"]: i["example"] for i in items}.items():
        instruction, passage, question, answer = tydiqa.TEMPLATES[language]
        text = f"{instruction}\n\n{passage} {example['context']}\n{question} {example['question']}"
        yield language, text, f"{answer} {example['answers'][0]}"


QUERIES = {
    "mmlu": mmlu_queries, "gsm8k": gsm8k_queries, "bbh": bbh_queries, "tydiqa": tydiqa_queries,
}  # fmt: skip


def write_queries(path: Path, tasks: list[str], eval_data: str | Path | None) -> int:
    """Write the tasks' queries to a `.jsonl`; their number."""
    records = make_queries(tasks, eval_data)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return len(records)


def make_queries(tasks: list[str], eval_data: str | Path | None) -> list[dict]:
    """Conversations of Tulu's schema for the tasks, whose files are in `eval_data/<task>`."""
    records = []
    for task in tasks:
        if task not in QUERIES:
            none = " (HumanEval has no examples, tests alone)" if task == "humaneval" else ""
            expected = ", ".join(QUERIES)
            raise InputError(f"--make-queries: found {task}, expected some of {expected}{none}")
        if task != "gsm8k" and eval_data is None:
            raise InputError("found no --eval-data DIR, expected the folder of the tasks' folders")
        found = list(QUERIES[task](Path(eval_data or "") / task))
        if not found:
            raise InputError(f"{Path(eval_data) / task}: found no examples, expected {task}'s")
        for number, (part, question, answer) in enumerate(found):
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            identity = f"{task}/{part}/{number}"
            records.append({"dataset": task, "id": identity, "messages": messages})
    return records
