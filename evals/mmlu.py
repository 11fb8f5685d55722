"""MMLU: multiple-choice questions of 57 subjects (Hendrycks et al. 2021, arXiv 2009.03300).

Setting (Ivison et al. 2023, appendix A): all 14,042 test questions, without examples. With
--mmlu-shots k, the first k questions of the subject's dev file come before it, as many as fit in
2,048 tokens. All of that is one user turn. The answer begins with "The answer is:", and the
likeliest of " A" to " D" as the next token counts. A base model continues the question's own
"Answer:". The score is the share of right answers of all questions. Source: open-instruct
eval/mmlu/run_eval.py of 2023-11-28; the categories are those of MMLU's authors.

Where ours differs: the original's weights have 8 bits. It leaves out the last examples of a prompt
that is too long, ours the first. Its pandas turns a choice "None" into "nan".
"""

from pathlib import Path

from decoding.generator import TextGenerator
from evals.harness import (
    Options,
    Records,
    fit_examples,
    mean_and_error,
    prompt_ids,
    published,
    read_csv,
    result,
)
from program.errors import InputError, amount
from tokens.tokenizer import Tokenizer

MAX_TOKENS = 2048 + 1  # the original counts without BOS
LETTERS = "ABCD"
COLUMNS = ("question", *LETTERS, "answer")
CATEGORIES = {
    "STEM": """abstract_algebra astronomy college_biology college_chemistry college_computer_science
        college_mathematics college_physics computer_security conceptual_physics
        electrical_engineering elementary_mathematics high_school_biology high_school_chemistry
        high_school_computer_science high_school_mathematics high_school_physics
        high_school_statistics machine_learning""",
    "humanities": """formal_logic high_school_european_history high_school_us_history
        high_school_world_history international_law jurisprudence logical_fallacies moral_disputes
        moral_scenarios philosophy prehistory professional_law world_religions""",
    "social sciences": """econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
        professional_psychology public_relations security_studies sociology us_foreign_policy""",
    "other": """anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging
        management marketing medical_genetics miscellaneous nutrition professional_accounting
        professional_medicine virology""",
}


def load(folder: Path, options: Options) -> list[dict]:
    """The questions of test/*_test.csv, each with its subject's examples from dev/*_dev.csv."""
    paths = sorted((folder / "test").glob("*_test.csv"))
    if not paths:
        raise InputError(f"{folder / 'test'}: found no *_test.csv, expected MMLU's")
    items, shots = [], options.mmlu_shots
    for path in paths:
        subject, examples = path.name.removesuffix("_test.csv"), []
        if shots:
            dev = published(folder / "dev", f"{subject}_dev.csv")
            examples = read_questions(dev)[:shots]
            if len(examples) < shots:
                found = amount(len(examples), "questions")
                raise InputError(f"{dev}: {found}, expected --mmlu-shots {shots}")
        items += [
            {"id": f"{subject}/{number}", "subject": subject, "examples": examples, **question}
            for number, question in enumerate(read_questions(path))
        ]
    return items


def read_questions(path: Path) -> list[dict[str, str]]:
    """The rows of a file, dicts by `COLUMNS` whose answer is a letter.

    MMLU's own files have no header. Copies with a header, and with 0 to 3 for A to D, give the same
    rows.
    """
    rows = read_csv(path, COLUMNS)
    if rows and (rows[0]["question"], rows[0]["answer"]) == ("question", "answer"):
        rows = rows[1:]
    if not rows:
        raise InputError(f"{path}: found no questions, expected one or more")
    for number, row in enumerate(rows, 1):
        answer = row["answer"].strip()
        if answer in ("0", "1", "2", "3"):
            answer = LETTERS[int(answer)]
        if answer not in tuple(LETTERS):
            raise InputError(f"{path}: question {number} has answer {answer!r}, expected A to D")
        row["answer"] = answer
    return rows


def prompt(
    tokenizer: Tokenizer, item: dict, options: Options, max_tokens: int
) -> tuple[list[int], int]:
    """(token ids, examples left out): a question after as many examples as `max_tokens` allows."""

    def make(shots):
        # Two spaces before the subject, as in the original.
        subject = " " + item["subject"].replace("_", " ")
        text = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        for example in item["examples"][len(item["examples"]) - shots :]:
            text += f"{question_text(example)} {example['answer']}\n\n"
        prefill = "The answer is:" if options.chat else ""
        return prompt_ids(tokenizer, text + question_text(item), options, prefill)

    return fit_examples(make, len(item["examples"]), min(max_tokens, MAX_TOKENS))


def question_text(question: dict[str, str]) -> str:
    """A question with its choices, up to where the letter of the answer belongs."""
    choices = "".join(f"\n{letter}. {question[letter]}" for letter in LETTERS)
    return f"{question['question']}{choices}\nAnswer:"


def score(item: dict, text: str) -> dict:
    """The letter chosen, and whether it is right."""
    answer = text.strip()
    return {"answer": answer, "correct": answer == item["answer"]}


def answer_tokens(tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of " A" to " D" after a colon: one id each with Llama's tokenizer."""
    before = len(tokenizer.raw(":"))
    return [tokenizer.raw(f": {letter}")[before:] for letter in LETTERS]


def evaluate(generator: TextGenerator, records: Records, folder: Path, options: Options) -> dict:
    """Right answers in percent."""
    items, tokenizer = load(folder, options), generator.tokenizer
    letters = answer_tokens(tokenizer)
    max_tokens = generator.context - max(map(len, letters))

    def prompt_text(item):
        return tokenizer.visible(prompt(tokenizer, item, options, max_tokens)[0])

    for batch in records.pending(items, per_rank=256, group_by="subject", prompt=prompt_text):
        prompts = [prompt(tokenizer, item, options, max_tokens) for item in batch]
        fitting = [ids for ids, _ in prompts if len(ids) <= max_tokens]
        option_logps = iter(generator.option_logps(fitting, [letters] * len(fitting)))
        new = []
        for item, (ids, left_out) in zip(batch, prompts, strict=True):
            fits = len(ids) <= max_tokens  # a prompt that does not fit counts as answered wrong
            logps = next(option_logps) if fits else []
            chosen = f" {LETTERS[logps.index(max(logps))]}" if fits else ""
            new.append(
                {"id": item["id"], "prompt": tokenizer.visible(ids), "examples_left_out": left_out,
                 "completion": chosen, "finish": "choice" if fits else "context", "logps": logps,
                 **score(item, chosen)}
            )  # fmt: skip
        records.add(new)
    return summary(items, records.of(items), options)


def summary(items: list[dict], records: list[dict], options: Options) -> dict:
    """The result, with the shares of right answers of each category and subject."""
    subjects, categories = {}, {}
    category_of = {name: category for category, names in CATEGORIES.items()
                   for name in names.split()}  # fmt: skip
    for item, record in zip(items, records, strict=True):
        subject = item["subject"]
        subjects.setdefault(subject, []).append(record["correct"])
        categories.setdefault(category_of.get(subject, "other"), []).append(record["correct"])
    return result(
        "% right",
        *mean_and_error([record["correct"] for record in records]),
        len(items),
        {"shots": options.mmlu_shots, "most_tokens": MAX_TOKENS},
        categories={name: mean_and_error(correct)[0] for name, correct in categories.items()},
        subjects={name: mean_and_error(correct)[0] for name, correct in subjects.items()},
        prompts_with_fewer_examples=sum(record["examples_left_out"] > 0 for record in records),
        prompts_too_long=sum(record["finish"] == "context" for record in records),
    )
