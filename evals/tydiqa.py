"""TyDiQA-GoldP: questions in nine languages about a given passage.

Setting (Ivison et al. 2023, appendix A): 100 questions of each language from the development set;
before each one worked example of its language from the training set, the same for all; instruction
and labels in that language, passages cut to 512 tokens (BOS among them), all in one user turn; the
answer begins with the language's "Answer:"; greedy, at most 50 new tokens. Chat models end by
themselves, base models at a line feed. The score is SQuAD's F1 (Rajpurkar et al. 2016, section
6.1), the mean over languages. Source: open-instruct eval/tydiqa/run_eval.py of 2023-11-28, whence
the texts of tydiqa_templates.json. Samples and examples are the original's: one `random` after seed
42 draws the questions of all languages, in alphabetical order, and then the examples.

Where ours differs: a cut passage neither begins with a literal "<s>" nor ends in the rest of a
character. --full asks all questions after the same examples; the original then drew others.
"""

import random
import re
import string
from collections import Counter
from pathlib import Path

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
    record_of,
    result,
)
from program.errors import InputError

SAMPLED = 100  # of each language
MAX_NEW_TOKENS = 50
PASSAGE_TOKENS = 512
# Of each language: instruction, and the labels of passage, question and answer.
TEMPLATES = read_json(Path(__file__).with_name("tydiqa_templates.json"))


def load(folder, options):
    """Questions of the development file, each with its language's example of the training file."""
    asked = by_language(need(folder, "tydiqa-goldp-v1.1-dev.json"))
    path = need(folder, "tydiqa-goldp-v1.1-train.json")
    known = by_language(path)
    if missing := sorted(asked.keys() - known.keys()):
        raise InputError(f"{path}: found no {missing[0]} question, expected an example of each")
    draw, chosen = random.Random(options.seed), {}
    for language in sorted(asked):
        found = asked[language]
        drawn = draw.sample(found, SAMPLED) if len(found) > SAMPLED else found
        chosen[language] = found if options.full else drawn
    examples = {language: draw.sample(known[language], 1)[0] for language in sorted(asked)}
    return [{**q, "example": examples[name]} for name, own in chosen.items() for q in own]


def by_language(path):
    """The questions of a file, a list for each language: SQuAD's layout, language in the id."""
    found = {}
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
                found.setdefault(language, []).append(
                    {"id": question["id"], "language": language, "context": paragraph["context"],
                     "question": question["question"], "answers": texts}
                )  # fmt: skip
    if not found:
        raise InputError(f"{path}: found no questions, expected TyDiQA's")
    return found


def prompt(tokenizer, item, options, most_tokens):
    """(token ids, examples left out): passage and question, after the example where it fits."""
    instruction, passage, question, answer = TEMPLATES[item["language"]]

    def told(one):
        context = beginning(tokenizer, one["context"])
        return f"{passage} {context}\n{question} {one['question']}\n"

    def make(shots):
        example = item["example"]
        shown = [f"{told(example)}{answer} {example['answers'][0]}"] if shots else []
        return ask(tokenizer, "\n\n".join([instruction, *shown, told(item)]), options, answer)

    return fewest_dropped(make, 1, most_tokens)


def beginning(tokenizer, text):
    """A text's first tokens, `PASSAGE_TOKENS` with BOS."""
    ids = tokenizer.raw(text)
    if len(ids) <= PASSAGE_TOKENS:
        return text
    return tokenizer.decode(ids[:PASSAGE_TOKENS]).rstrip("\N{REPLACEMENT CHARACTER}")


def score(item, text):
    """F1 of the answer's words against the reference that they match best, from 0 to 1."""
    answer = text.strip()
    best = max(f1(words(answer), words(reference)) for reference in item["answers"])
    return {"answer": answer, "f1": best}


def words(text):
    """A text's words as SQuAD compares them: without case, punctuation and English articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(found, expected):
    """Harmonic mean of precision and recall of two lists of words, 0 where none is shared."""
    shared = (Counter(found) & Counter(expected)).total()
    return 2 * shared / (len(found) + len(expected)) if shared else 0.0


def evaluate(generator, records, folder, options):
    """F1 in percent, the mean over languages."""
    items, tokenizer = load(folder, options), generator.tokenizer
    sampling = Sampling(MAX_NEW_TOKENS, stop=() if options.chat else ("\n",))
    most_tokens = generator.context - MAX_NEW_TOKENS
    for own in records.pending(items, together="language"):
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
    found, languages = records.of(items), {}
    for item, record in zip(items, found, strict=True):
        languages.setdefault(item["language"], []).append(record["f1"])
    return result(
        "F1",
        *mean_of_means(languages.values()),
        len(items),
        {"shots": 1, "max_new_tokens": MAX_NEW_TOKENS, "temperature": 0.0,
         "passage_tokens": PASSAGE_TOKENS},
        languages={name: mean_and_error(scores)[0] for name, scores in languages.items()},
        prompts_with_fewer_examples=sum(record["examples_left_out"] > 0 for record in found),
        finishes=finishes(found),
    )  # fmt: skip
