"""evals/tydiqa.py: prompts, samples and F1 are the paper's; languages have equal weight."""

import json
import random

import pytest

from decoding.generator import Completion
from evals import tydiqa
from evals.harness import Options, Records
from program.errors import InputError
from program.ranks import start
from tokens.tokenizer import Tokenizer

CHAT, BASE, FULL = Options(), Options(chat=False), Options(full=True)


def published(questions):
    """A file's content in the layout of TyDiQA-GoldP, from (id, context, question, answers)."""
    paragraphs = [
        {"context": context, "qas": [{"id": name, "question": question, "answers": answers}]}
        for name, context, question, texts in questions
        for answers in [[{"text": text, "answer_start": 0} for text in texts]]
    ]
    return json.dumps({"version": "TyDiQA-GoldP-1.1", "data": [{"paragraphs": paragraphs}]})


def write(folder, dev, train):
    """Write both files with the given numbers of questions per language, languages mixed."""
    for part, sizes in (("dev", dev), ("train", train)):
        names = [(i, language) for language, n in sizes.items() for i in range(n)]
        rows = [
            (f"{language}-{part}-{i}", f"Context {i}.", f"{language} {part} {i}?", [f"{part} {i}"])
            for i, language in sorted(names)
        ]
        (folder / f"tydiqa-goldp-v1.1-{part}.json").write_text(published(rows))


def item_of(language, context="Snow is white.", example="Grass is green."):
    return {
        "id": "1", "language": language, "context": context, "question": "What is snow?",
        "answers": ["white"],
        "example": {"context": example, "question": "What is grass?", "answers": ["green", "G"]},
    }  # fmt: skip


@pytest.mark.parametrize(
    "language, instruction, passage, question, answer",
    [
        ("english", "Answer the following question based on the information in the given passage.",
         "Passage:", "Question:", "Answer:"),
        ("finnish", "Vastaa seuraavaan kysymykseen annetun kappaleen tiedon perusteella.",
         "Kappale:", "Kysymys:", "Vastaus:"),
        ("russian", "Ответьте на следующий вопрос на основе информации в данном отрывке.",
         "Отрывок:", "Вопрос:", "Ответ:"),
    ],
)  # fmt: skip
def test_prompt_is_the_papers(base, language, instruction, passage, question, answer):
    """Labels of the language, one worked example, and the blank line of the original."""
    tokenizer = Tokenizer(base)
    worked = f"{passage} Grass is green.\n{question} What is grass?\n{answer} green\n\n"
    asked = f"{passage} Snow is white.\n{question} What is snow?\n"
    for example, most_tokens, left_out in ((worked, 4000, 0), ("", 5, 1)):
        text = f"{instruction}\n\n{example}{asked}"
        item = item_of(language)
        ids, dropped = tydiqa.prompt(tokenizer, item, CHAT, most_tokens)
        assert tokenizer.visible(ids) == f"<s> <|user|>\n{text}\n<|assistant|>\n{answer}"
        assert dropped == left_out
        ids, dropped = tydiqa.prompt(tokenizer, item, BASE, most_tokens)
        assert (tokenizer.visible(ids), dropped) == (f"<s> {text}{answer}", left_out)


def test_all_nine_languages_have_their_texts():
    """Nine languages have four texts each, and the labels end in a colon."""
    assert len(tydiqa.TEMPLATES) == 9
    for instruction, *labels in tydiqa.TEMPLATES.values():
        assert len(labels) == 3 and all(label.endswith(":") for label in labels)
        assert instruction == instruction.strip()


def test_passages_are_cut_to_512_tokens(base):
    """BOS counts, in the example, too; half a character is dropped; a short passage stays."""
    tokenizer = Tokenizer(base)
    passage = "".join(chr(0x0C05 + i % 8) for i in range(300))  # Telugu: three tokens a character
    assert len(tokenizer.raw(passage)) == 1 + 1 + 3 * 300
    # BOS and "▁" leave 510 of 512 tokens: 170 characters, and one more word 169 and a third.
    assert tydiqa.beginning(tokenizer, passage) == passage[:170]
    assert tydiqa.beginning(tokenizer, "." + passage) == "." + passage[:169]
    assert tydiqa.beginning(tokenizer, passage[:170]) == passage[:170]
    item = item_of("telugu", "." + passage, passage)
    text = tokenizer.visible(tydiqa.prompt(tokenizer, item, CHAT, 4000)[0])
    label = tydiqa.TEMPLATES["telugu"][1]
    assert f"{label} {passage[:170]}\n" in text and f"{label} .{passage[:169]}\n" in text


def test_samples_are_the_originals(tmp_path):
    """The original's draws after seed 42: 100 of each language, then an example of each."""
    write(tmp_path, {"swahili": 120, "english": 150, "korean": 9}, {"korean": 30, "english": 40,
          "swahili": 50, "finnish": 5})  # fmt: skip
    random.seed(42)
    expected = [f"english-dev-{i}" for i in random.sample(range(150), 100)]
    expected += [f"korean-dev-{i}" for i in range(9)]
    expected += [f"swahili-dev-{i}" for i in random.sample(range(120), 100)]
    examples = [random.sample([f"{language} train {i}?" for i in range(n)], 1)[0]
                for language, n in (("english", 40), ("korean", 30), ("swahili", 50))]  # fmt: skip
    items = tydiqa.load(tmp_path, CHAT)
    assert [item["id"] for item in items] == expected
    assert list(dict.fromkeys(item["example"]["question"] for item in items)) == examples
    every = tydiqa.load(tmp_path, FULL)
    assert len(every) == 279 and all(item in every for item in items)
    assert tydiqa.load(tmp_path, Options(seed=1)) != items


@pytest.mark.parametrize(
    "answer, references, f1",
    [
        (" The white snow.", ["white snow"], 1),
        (" white\n", ["black", "White!"], 1),
        (" white snow falls", ["white snow"], 0.8),  # precision 2/3, recall 1
        (" snow snow", ["snow"], 2 / 3),  # precision 1/2, recall 1
        (" it is a very white", ["white"], 0.4),  # four words without the article
        (" black", ["white"], 0),
        ("", ["white"], 0),
        (" the", ["the"], 0),
        (" белый снег", ["снег"], 2 / 3),
    ],
)
def test_f1(answer, references, f1):
    """F1 against the best reference, in lower case, no punctuation, no English articles."""
    verdict = tydiqa.score({"answers": references}, answer)
    assert verdict == {"answer": answer.strip(), "f1": pytest.approx(f1)}


@pytest.mark.parametrize(
    "part, content, message",
    [
        ("dev", None, r"dev.json: no such file"),
        ("train", None, r"train.json: no such file"),
        ("dev", "[", r"dev.json: not JSON"),
        ("dev", '{"data": 3}', r"dev.json: data is a int, expected a list"),
        ("dev", '{"data": []}', r"dev.json: found no questions"),
        ("dev", published([("klingon-1", "c", "q", ["a"])]), r"klingon-1: expected an id that beg"),
        ("dev", published([("english-1", "c", "q", [])]), r"english-1: found no answers"),
        ("dev", published([("english-1", None, "q", [])]), r"context is a NoneType"),
        ("train", published([("korean-1", "c", "q", ["a"])]), r"found no english question"),
    ],
)
def test_bad_files_are_refused(tmp_path, part, content, message):
    """The error names the file, what was found and what was expected."""
    write(tmp_path, {"english": 2}, {"english": 2})
    path = tmp_path / f"tydiqa-goldp-v1.1-{part}.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        tydiqa.load(tmp_path, CHAT)


class Answering:
    """A stand-in for `TextGenerator` that answers every question with "dev 0 1"."""

    def __init__(self, tokenizer):
        self.tokenizer, self.context, self.calls = tokenizer, 4096, []

    def generate(self, prompts, sampling, seeds=None, advance=None):
        self.calls.append(([self.tokenizer.visible(ids) for ids in prompts], sampling))
        return [Completion([], " dev 0 1\n", "length") for _ in prompts]


@pytest.mark.parametrize("options, stop", [(CHAT, ()), (BASE, ("\n",))])
def test_languages_count_alike(base, tmp_path, options, stop):
    """F1 is 4/5 for references "dev 0" and "dev 1", else 2/5; a call is of one language."""
    start()
    write(tmp_path, {"english": 2, "finnish": 4}, {"english": 1, "finnish": 1})
    generator, records = Answering(Tokenizer(base)), Records(tmp_path / "lines.jsonl")
    records.task = "tydiqa"
    result = tydiqa.evaluate(generator, records, tmp_path, options)
    assert result["languages"] == {"english": pytest.approx(80), "finnish": pytest.approx(60)}
    assert result["score"] == pytest.approx(70) and result["n"] == 6
    # Variances (n - 1 in the denominator) are 0 and 4 · 0.2² / 3.
    assert result["stderr"] == pytest.approx(100 * (0 + 4 * 0.04 / 3 / 4) ** 0.5 / 2)
    (english, sampling), (finnish, _) = generator.calls
    assert [len(english), len(finnish)] == [2, 4]
    assert all("Question: english dev" in text for text in english)
    assert sampling.stop == stop and sampling.max_new_tokens == 50 and sampling.temperature == 0
