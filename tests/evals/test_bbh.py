"""evals/bbh.py: prompts are the paper's, answers are found, tasks have equal weight."""

import json
import shutil
from pathlib import Path

import pytest

from decoding.generator import Completion
from evals import bbh
from evals.harness import Options, Records
from program.errors import InputError
from program.ranks import start
from tokens.tokenizer import Tokenizer

CHAT, BASE, FULL = Options(), Options(chat=False), Options(full=True)
SHOTS = "Do it.\n\nQ: a?\nA: So the answer is x.\n\nQ: b?\nA: So the answer is y.\n\nQ: c?\nA: z."


def write(folder, sizes):
    """Write tasks with the given numbers of questions. The target of question i is (i)."""
    (folder / "cot-prompts").mkdir(exist_ok=True)
    for name, size in sizes.items():
        examples = [{"input": f"{name} {i}?", "target": f"({i})"} for i in range(size)]
        (folder / f"{name}.json").write_text(json.dumps({"examples": examples}))
        (folder / "cot-prompts" / f"{name}.txt").write_text(f"canary\n-----\n{SHOTS}\n")


def test_reference_answers_are_right_and_others_wrong(real_data):
    """All of BBH: a target, worded as in the examples, is right; every other target is wrong."""
    items = bbh.load(real_data / "eval" / "bbh", FULL)
    assert len(items) == 24 * 250 + 187 + 146 + 178
    targets = {}
    for item in items:
        targets.setdefault(item["task"], set()).add(item["target"])
    assert len(targets) == 27
    for item in items:
        verdict = bbh.score(item, f" Let's think. So the answer is {item['target']}.\n\nQ: more")
        assert verdict == {"answer": item["target"], "correct": True}
        assert bbh.score(item, item["target"])["correct"]
        for other in targets[item["task"]] - {item["target"]}:
            assert not bbh.score(item, f"So the answer is {other}.")["correct"]
        assert not bbh.score(item, "")["correct"]


def test_prompts_are_the_papers(real_data):
    """The file without its first two lines, the question, and the beginning of the answer."""
    folder = real_data / "eval" / "bbh"
    tokenizer = Tokenizer(real_data / "llama2-tokenizer")
    items = bbh.load(folder, CHAT)
    assert len(items) == 27 * 40
    for item in items[::40]:
        with open(folder / "cot-prompts" / f"{item['task']}.txt", encoding="utf-8") as file:
            task_prompt = "".join(file.readlines()[2:]).strip()
        asked = task_prompt + "\n\nQ: " + item["input"]
        text = "<|user|>\n" + asked + "\n<|assistant|>\nA:"
        expected = [1, *tokenizer.sp.encode(text)]
        assert bbh.prompt(tokenizer, item, CHAT, 3584) == (expected, 0)
        expected = [1, *tokenizer.sp.encode(asked + "\nA:")]
        assert bbh.prompt(tokenizer, item, BASE, 3584) == (expected, 0)


@pytest.mark.parametrize(
    "target, text, answer, correct",
    [
        ("(B)", " It is C. The answer is (B). So the answer is (C).", "(B)", True),
        ("(B)", " the answer is b.", "b", True),
        ("(B)", " So the answer is (B)", "(B)", True),
        ("(B)", " So the answer is (B)\n\nIt is.", "(B)", True),
        ("(B)", " So the answer is\n(B)", "(B)", True),
        ("(B)", " So the answer is (C)", "(C)", False),
        ("(B)", " The answer is (C)\nNo, the answer is (B).", "(B)", True),
        ("(B)", " So the answer is", "So the answer is", False),
        ("(B)", " (B)\n", "(B)", True),
        ("Yes", " yes!", "yes!", True),
        ("-7", " So the answer is 7.", "7", False),
        ("7", " So the answer is -7.", "-7", False),
        ("] )", " So the answer is ] ).", "] )", True),
        ("] )", " So the answer is ) ].", ") ]", False),
        ("] )", " So the answer is ] ) ].", "] ) ]", False),
        ("cat dog", " So the answer is cat, dog.", "cat, dog", True),
    ],
)
def test_extraction(target, text, answer, correct):
    """What follows "the answer is" counts, or else everything; punctuation counts if it matters."""
    assert bbh.score({"target": target}, text) == {"answer": answer, "correct": correct}


def test_examples_are_left_out_from_the_front(base, tmp_path):
    """The task's description and the last examples stay."""
    write(tmp_path, {"task": 1})
    tokenizer, (item,) = Tokenizer(base), bbh.load(tmp_path, CHAT)
    whole, _ = bbh.prompt(tokenizer, item, CHAT, 4000)
    ids, left_out = bbh.prompt(tokenizer, item, CHAT, len(whole) - 1)
    expected = "Do it.\n\nQ: b?\nA: So the answer is y.\n\nQ: c?\nA: z.\n\nQ: task 0?"
    assert left_out == 1
    assert tokenizer.visible(ids) == f"<s> <|user|>\n{expected}\n<|assistant|>\nA:"
    ids, left_out = bbh.prompt(tokenizer, item, BASE, 1)
    assert (tokenizer.visible(ids), left_out) == ("<s> Do it.\n\nQ: task 0?\nA:", 3)


def test_samples_do_not_depend_on_the_folders_order(tmp_path, monkeypatch):
    """A task's sample depends neither on the order of the files nor on other tasks."""
    write(tmp_path, {"b": 60, "a": 50, "c": 3})
    expected = bbh.load(tmp_path, CHAT)
    assert [item["task"] for item in expected] == ["a"] * 40 + ["b"] * 40 + ["c"] * 3
    glob = Path.glob
    for order in (sorted, lambda paths: sorted(paths, reverse=True)):
        monkeypatch.setattr(Path, "glob", lambda path, pattern, o=order: o(glob(path, pattern)))
        assert bbh.load(tmp_path, CHAT) == expected
    assert bbh.load(tmp_path, Options(seed=1)) != expected
    assert len(bbh.load(tmp_path, FULL)) == 113
    (tmp_path / "a.json").unlink()
    (tmp_path / "cot-prompts" / "a.txt").unlink()
    assert bbh.load(tmp_path, CHAT) == expected[40:]


def test_a_checkout_of_the_authors_repository_is_read_alike(tmp_path):
    """Its questions are in bbh/, its prompts beside that folder; the items are the same."""
    write(tmp_path, {"a": 2, "b": 2})
    expected = bbh.load(tmp_path, CHAT)
    (tmp_path / "bbh").mkdir()
    for name in ("a.json", "b.json"):
        shutil.move(tmp_path / name, tmp_path / "bbh" / name)
    assert bbh.load(tmp_path, CHAT) == expected


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", None, r"a.txt: found no a.json"),
        ("cot-prompts/a.txt", None, r"a.json: found no cot-prompts/a.txt"),
        ("a.json", "{", r"a.json: not JSON"),
        ("a.json", "{}", r"a.json: found no examples"),
        ("a.json", '{"examples": []}', r"a.json: found no examples, expected the task's"),
        ("a.json", '{"examples": [{"input": "q"}]}', r"a.json: example 1: found no target"),
        ("a.json", "\xe9", r"a.json: not UTF-8"),
        ("cot-prompts/a.txt", "\xe9", r"a.txt: not UTF-8"),
        ("cot-prompts/a.txt", "x\ny\nDo it.\n", r"a.txt: found no 'Q: ' after a blank line"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, message):
    """The error names the file, what was found and what was expected."""
    write(tmp_path, {"a": 2, "b": 2})
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=message):
        bbh.load(tmp_path, CHAT)
    with pytest.raises(InputError, match="cot-prompts: no such file"):
        bbh.load(tmp_path / "elsewhere", CHAT)


class Answering:
    """A stand-in for `TextGenerator` that answers every question with (0)."""

    def __init__(self, tokenizer):
        self.tokenizer, self.context, self.calls = tokenizer, 4096, []

    def generate(self, prompts, sampling, seeds=None, advance=None):
        self.calls.append(([self.tokenizer.visible(ids) for ids in prompts], sampling))
        return [Completion([], " So the answer is (0).", "eos") for _ in prompts]


@pytest.mark.parametrize("options, stop", [(CHAT, ()), (BASE, ("\n\n",))])
def test_tasks_count_alike(base, tmp_path, options, stop):
    """One right of 2 and one of 5 give 35 %; the prompts of a call are of one task."""
    start()
    write(tmp_path, {"a": 2, "b": 5})
    generator, records = Answering(Tokenizer(base)), Records(tmp_path / "lines.jsonl")
    records.task = "bbh"
    result = bbh.evaluate(generator, records, tmp_path, options)
    assert result["score"] == pytest.approx(35.0) and result["n"] == 7
    assert result["tasks"] == {"a": pytest.approx(50.0), "b": pytest.approx(20.0)}
    # Each task's squared error is its variance (n - 1 in the denominator) over n.
    assert result["stderr"] == pytest.approx(100 * (0.5 / 2 + 0.2 / 5) ** 0.5 / 2)
    (first, sampling), (second, _) = generator.calls
    assert [len(first), len(second)] == [2, 5] and all("Q: b " not in text for text in first)
    assert sampling.stop == stop and sampling.max_new_tokens == 512 and sampling.temperature == 0
    lines = [json.loads(line) for line in open(records.path)]
    assert [line["correct"] for line in lines] == [True, False, True, False, False, False, False]
    assert [line["prompt"] for line in lines] == first + second
