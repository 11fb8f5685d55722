"""evals/gsm8k.py: prompts are the paper's, and answers are read as a person reads them."""

import json
import random

import pytest
import torch
from transformers import LlamaForCausalLM

from decoding.generator import TextGenerator
from evals import gsm8k
from evals.harness import Options, Records
from program.errors import InputError
from program.ranks import start
from tokens.tokenizer import Tokenizer

CHAT, BASE, FULL = Options(), Options(chat=False), Options(full=True)


def write(folder, answers):
    """Write a test.jsonl of short problems with these answers."""
    rows = [{"question": f"What is {i} plus 2?\n", "answer": a} for i, a in enumerate(answers)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("split, problems", [("test", 1319), ("train", 7473)])
def test_reference_answers_are_right_and_others_wrong(real_data, tmp_path, split, problems):
    """All of GSM8K: the published solutions are right; their number plus one is wrong."""
    source = real_data / "eval" / "gsm8k" / f"{split}.jsonl"
    (tmp_path / "test.jsonl").symlink_to(source.resolve())
    items = gsm8k.load(tmp_path, FULL)
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    assert len(items) == problems
    for item, row in zip(items, rows, strict=True):
        number = row["answer"].split("#### ")[1]
        assert gsm8k.score(item, row["answer"])["correct"]
        assert gsm8k.score(item, f" So the answer is {number}.")["correct"]
        other = int(number.replace(",", "")) + 1
        assert not gsm8k.score(item, f" So the answer is {other}.")["correct"]
        assert not gsm8k.score(item, f" So the answer is {-int(other - 1) or 1}.")["correct"]
        assert gsm8k.score(item, "") == {"answer": None, "correct": False}


@pytest.mark.parametrize(
    "text, number",
    [
        (" So the answer is 5.", "5"),
        (" The answer is -5.", "-5"),
        (" a loss of -$1,250.50", "-1250.50"),
        (" a loss of $-3.", "-3"),
        (" a loss of −3", "-3"),
        (" 12-5", "5"),
        (" (8)-5", "5"),
        (" 12 - 5 = 7. So the answer is 7", "7"),
        (" 1,234,567 people", "1234567"),
        (" it is .5", ".5"),
        (" 7.\n\nQuestion: 8?", "8"),
        (" twelve", None),
        ("", None),
    ],
)
def test_the_last_number_counts(text, number):
    """Commas are dropped, a sign is kept, a minus between two numbers is not a sign."""
    assert gsm8k.last_number(text) == number


def test_numbers_are_compared_as_numbers():
    """18.00 equals 18; 3.5 does not equal 35, and -18 does not equal 18."""
    assert gsm8k.score({"target": "18"}, "It costs $18.00")["correct"]
    assert not gsm8k.score({"target": "35"}, "3.5")["correct"]
    assert not gsm8k.score({"target": "18"}, "-18")["correct"]


def test_prompt_is_the_papers(base):
    """Instruction, the eight examples of Wei et al. in order, problem, beginning of the answer."""
    tokenizer = Tokenizer(base)
    ids, left_out = gsm8k.prompt(tokenizer, {"question": " Who? \n"}, CHAT, 4000)
    text = tokenizer.visible(ids)
    assert left_out == 0
    assert text.startswith(
        "<s> <|user|>\nAnswer the following questions.\n\n"
        "Question: There are 15 trees in the grove. Grove workers will plant trees in the grove "
        "today. After they are done, there will be 21 trees. How many trees did the grove workers "
        "plant today?\nAnswer: There are 15 trees originally. Then there were 21 trees after some "
        "more were planted. So there must have been 21 - 15 = 6. So the answer is 6.\n\n"
        "Question: If there are 3 cars in the parking lot and 2 more cars arrive, "
    )
    assert text.endswith(
        " 23 - 15 is 8. So the answer is 8.\n\nQuestion: Who?\n<|assistant|>\nAnswer:"
    )
    blocks = text.split("\n\nQuestion: ")[1:]
    answers = [block.split("So the answer is ")[1] for block in blocks[:-1]]
    assert answers == ["6.", "5.", "39.", "8.", "9.", "29.", "33.", "8."]
    assert all(block.count("\nAnswer: ") == 1 for block in blocks[:-1])
    ids, _ = gsm8k.prompt(tokenizer, {"question": "Who?"}, BASE, 4000)
    without_chat = text.replace("<|user|>\n", "").replace("\n<|assistant|>\n", "\n")
    assert tokenizer.visible(ids) == without_chat


def test_examples_are_left_out_from_the_front(base):
    """No more are left out than must be, and the rest still has the paper's form."""
    tokenizer, item = Tokenizer(base), {"question": "Who?"}
    whole, _ = gsm8k.prompt(tokenizer, item, CHAT, 4000)
    ids, left_out = gsm8k.prompt(tokenizer, item, CHAT, len(whole) - 1)
    assert left_out == 1 and "15 trees" not in tokenizer.visible(ids)
    assert "questions.\n\nQuestion: If there are 3 cars" in tokenizer.visible(ids)
    ids, left_out = gsm8k.prompt(tokenizer, item, CHAT, 5)
    assert left_out == 8
    expected = "Answer the following question.\n\nQuestion: Who?\n<|assistant|>\nAnswer:"
    assert tokenizer.visible(ids) == "<s> <|user|>\n" + expected


def test_sample_is_the_originals(tmp_path):
    """The 200 problems of `random.sample` after seed 42; another seed draws others."""
    write(tmp_path, [f"#### {i}" for i in range(300)])
    random.seed(42)
    expected = set(random.sample(range(300), 200))
    assert {int(item["target"]) for item in gsm8k.load(tmp_path, CHAT)} == expected
    assert {int(i["target"]) for i in gsm8k.load(tmp_path, Options(seed=1))} != expected
    assert len(gsm8k.load(tmp_path, FULL)) == 300


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "test.jsonl: no such file"),
        ("", "test.jsonl: found no problems"),
        ('{"question": "a", "answer": "#### 1"}\n{"question": ', "test.jsonl:2: not JSON"),
        ('{"question": "a"}\n', "test.jsonl:1: found no answer"),
        ('{"question": "a", "answer": 3}\n', "test.jsonl:1: answer is a int, expected a str"),
        ('{"question": "a", "answer": "3"}\n', "test.jsonl: answer 1 does not end in '####'"),
    ],
)
def test_bad_files_are_refused(tmp_path, content, message):
    """The error names the file, what was found and what was expected."""
    if content is not None:
        (tmp_path / "test.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        gsm8k.load(tmp_path, CHAT)


@pytest.mark.parametrize("options", [CHAT, BASE])
def test_evaluation_equals_transformers(lively, tmp_path, options, monkeypatch):
    """A random model's answers are those of transformers; a second start asks nothing again."""
    monkeypatch.setattr(gsm8k, "MAX_NEW_TOKENS", 90)
    _, _, device = start()
    generator = TextGenerator.from_folder(lively, device, torch.float32)
    theirs = LlamaForCausalLM.from_pretrained(lively, dtype=torch.float32).to(device)
    write(tmp_path, ["#### 1"] * 6)
    expected = []
    for item in gsm8k.load(tmp_path, options):
        ids, _ = gsm8k.prompt(generator.tokenizer, item, options, 4000)
        new = theirs.generate(
            torch.tensor([ids], device=device), max_new_tokens=90, do_sample=False, eos_token_id=2
        )[0, len(ids) :]
        text = generator.tokenizer.continuation([i for i in new.tolist() if i != 2])
        expected.append(text if options.chat else text.split("\n")[0])
    numbers = [gsm8k.last_number(text) for text in expected]
    assert options == BASE or len(set(numbers)) > 1
    # Every second problem's reference is what the model says, if it says a number.
    write(tmp_path, [f"#### {n if i % 2 and n else '123456'}" for i, n in enumerate(numbers)])
    right = sum(n is not None for n in numbers[1::2])

    records = Records(tmp_path / "lines.jsonl")
    records.task = "gsm8k"
    result = gsm8k.evaluate(generator, records, tmp_path, options)
    lines = sorted((json.loads(line) for line in open(records.path)), key=lambda line: line["id"])
    assert [line["completion"] for line in lines] == expected
    assert result["score"] == pytest.approx(100 * right / 6) and result["n"] == 6
    assert sum(result["finishes"].values()) == 6 and result["prompts_with_fewer_examples"] == 0

    again = Records(records.path, lines)
    again.task, generator.model = "gsm8k", None
    assert gsm8k.evaluate(generator, again, tmp_path, options) == result
