"""TyDiQA-GoldP: questions in nine languages about a given passage.

Setting (Ivison et al. 2023, appendix A): 100 questions of each language from the development set.
Before each of them stands one worked example of its language from the training set, the same for
all questions. Instruction and labels are in that language; passages are cut to 512 tokens, BOS
included. All of that is one user turn. The answer begins with the language's "Answer:"; it is
greedy, with at most 50 new tokens. A chat model ends it by itself; a base model stops at a line
feed. The score is SQuAD's F1 (Rajpurkar et al. 2016, section 6.1), the mean over languages. Source:
open-instruct eval/tydiqa/run_eval.py of 2023-11-28, which also has the texts of
tydiqa_templates.json. Samples and examples are the original's: one `random` after seed 42 draws the
questions of all languages, in alphabetical order, and then the examples.

Where ours differs: a cut passage neither begins with a literal "<s>" nor ends in the first bytes of
a character. --full asks all questions after the same examples; the original then draws others.
"""

import random
import re
import string
from collections import Counter
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
    result,
)
from program.errors import InputError
from tokens.tokenizer import Tokenizer

SAMPLED = 100  # of each language
MAX_NEW_TOKENS = 50
PASSAGE_TOKENS = 512
# For each language: the instruction, and the labels of passage, question and answer.
TEMPLATES = read_json(Path(__file__).with_name("tydiqa_templates.json"))


def load(folder: Path, options: Options) -> list[dict]:
    """Questions of the development file, each with its language's example of the training file."""
    questions = by_language(published(folder, "tydiqa-goldp-v1.1-dev.json"))
    path = published(folder, "tydiqa-goldp-v1.1-train.json")
    training = by_language(path)
    if missing := sorted(questions.keys() - training.keys()):
        raise InputError(f"{path}: found no {missing[0]} question, expected an example of each")
    draw, chosen = random.Random(options.seed), {}
    for language in sorted(questions):
        all_of_it = questions[language]
        drawn = draw.sample(all_of_it, SAMPLED) if len(all_of_it) > SAMPLED else all_of_it
        chosen[language] = all_of_it if options.full else drawn
    # Drawn after the questions, as in the original: a draw depends on all before it.
    examples = {language: draw.sample(training[language], 1)[0] for language in sorted(questions)}
    return [
        {**question, "example": examples[language]}
        for language, items in chosen.items()
        for question in items
    ]


def by_language(path: Path) -> dict[str, list[dict]]:
    """The questions of a file in SQuAD's layout, as a dict from language to list.

    The language is the first part of a question's id.
    """
    questions = {}
    for article in checked(read_json(path), {"data": list}, path)["data"]:
        for paragraph in checked(article, {"paragraphs": list}, path)["paragraphs"]:
            checked(paragraph, {"context": str, "qas": list}, path)
            for question in paragraph["qas"]:
                checked(question, {"id": str, "question": str, "answers": list}, path)
                where, language = f"{path}: {question['id']}", question["id"].split("-")[0]
                if language not in TEMPLATES:
                    raise InputError(f"{where}: expected an id that begins with a language")
                texts = [checked(a, {"text": str}, where)["text"] for a in question["answers"]]
                if not texts:
                    raise InputError(f"{where}: found no answers, expected one or more")
                questions.setdefault(language, []).append(
                    {"id": question["id"], "language": language, "context": paragraph["context"],
                     "question": question["question"], "answers": texts}
                )  # fmt: skip
    if not questions:
        raise InputError(f"{path}: found no questions, expected TyDiQA's")
    return questions


def prompt(
    tokenizer: Tokenizer, item: dict, options: Options, max_tokens: int
) -> tuple[list[int], int]:
    """(token ids, examples left out): passage and question, after the example if it fits."""
    instruction, passage_label, question_label, answer_label = TEMPLATES[item["language"]]

    def question_text(question):
        passage = beginning(tokenizer, question["context"])
        return f"{passage_label} {passage}\n{question_label} {question['question']}\n"

    def make(shots):
        parts = [instruction]
        if shots:
            example = item["example"]
            parts.append(f"{question_text(example)}{answer_label} {example['answers'][0]}")
        text = "\n\n".join([*parts, question_text(item)])
        return prompt_ids(tokenizer, text, options, answer_label)

    return fit_examples(make, 1, max_tokens)


def beginning(tokenizer: Tokenizer, text: str) -> str:
    """The beginning of a text: at most `PASSAGE_TOKENS` tokens, BOS included."""
    ids = tokenizer.raw(text)
    if len(ids) <= PASSAGE_TOKENS:
        return text
    return tokenizer.decode(ids[:PASSAGE_TOKENS]).rstrip("\N{REPLACEMENT CHARACTER}")


def score(item: dict, text: str) -> dict:
    """F1, from 0 to 1, of the answer's words against those of the best-matching reference."""
    answer = text.strip()
    best = max(f1(words(answer), words(reference)) for reference in item["answers"])
    return {"answer": answer, "f1": best}


def words(text: str) -> list[str]:
    """A text's words as SQuAD compares them: in lower case, no punctuation, no English articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(answer: list[str], reference: list[str]) -> float:
    """Harmonic mean of precision and recall of two lists of words. 0 if they share no word."""
    shared = (Counter(answer) & Counter(reference)).total()
    return 2 * shared / (len(answer) + len(reference)) if shared else 0.0


def evaluate(generator: TextGenerator, records: Records, folder: Path, options: Options) -> dict:
    """F1 in percent, the mean over languages."""
    items = load(folder, options)
    sampling = Sampling(MAX_NEW_TOKENS, stop=() if options.chat else ("\n",))
    max_tokens = generator.context - MAX_NEW_TOKENS

    def make_prompt(item):
        ids, left_out = prompt(generator.tokenizer, item, options, max_tokens)
        return ids, {"examples_left_out": left_out}

    answered = answer_all(
        generator, records, items, make_prompt, score, sampling, group_by="language"
    )
    languages = {}
    for item, record in zip(items, answered, strict=True):
        languages.setdefault(item["language"], []).append(record["f1"])
    return result(
        "F1",
        *mean_of_means(languages.values()),
        len(items),
        {"shots": 1, "max_new_tokens": MAX_NEW_TOKENS, "temperature": 0.0,
         "passage_tokens": PASSAGE_TOKENS},
        languages={name: mean_and_error(scores)[0] for name, scores in languages.items()},
        prompts_with_fewer_examples=sum(record["examples_left_out"] > 0 for record in answered),
        finishes=finishes(answered),
    )  # fmt: skip
