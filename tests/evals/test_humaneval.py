"""evals/humaneval.py: published file, prompt, unbiased estimator, verdicts."""

import dataclasses
import gzip
import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from decoding.generator import Completion, TextGenerator
from evals import humaneval
from evals.harness import Options, Records
from program.errors import InputError
from program.ranks import start
from tokens.tokenizer import Tokenizer

PROBLEMS = [
    {
        "task_id": "HumanEval/0",
        "prompt": 'def twice(x):\n    """ Two times x. """\n',
        "canonical_solution": "    return 2 * x\n",
        "entry_point": "twice",
        "test": "def check(f):\n    assert f(3) == 6\n    assert f(0) == 0\n",
    },
    {
        "task_id": "HumanEval/1",
        "prompt": 'import math\n\ndef root(x):\n    """ Its square root. """\n',
        "canonical_solution": "    return math.sqrt(x)\n",
        "entry_point": "root",
        "test": "def check(candidate):\n    assert candidate(9) == 3\n",
    },
]


def write(folder, problems):
    folder.mkdir(exist_ok=True)
    with gzip.open(folder / "HumanEval.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(problem) + "\n" for problem in problems)
    return folder


@pytest.fixture
def records(tmp_path):
    start()
    records = Records(tmp_path / "results.jsonl")
    records.task = "humaneval"
    return records


class Scripted:
    """A stand-in for `TextGenerator` whose answer depends on the number of the sample."""

    def __init__(self, tokenizer, answer):
        self.tokenizer, self.answer, self.count = tokenizer, answer, 0
        self.prompts, self.samplings, self.seeds = [], [], []

    def generate(self, prompts, sampling, seeds, advance):
        self.prompts += prompts
        self.samplings.append(sampling)
        self.seeds += seeds
        texts = [self.answer(self.count + i) for i in range(len(prompts))]
        self.count += len(prompts)
        return [Completion([5], text, "stop") for text in texts]


def test_pass_at_k_is_the_mean_over_all_choices():
    """The estimate is the share, of all choices of k samples out of n, with one that passed."""
    for n, passed in [(1, 0), (1, 1), (5, 0), (5, 2), (6, 5), (7, 7), (9, 1)]:
        samples = [True] * passed + [False] * (n - passed)
        for k in range(1, n + 1):
            choices = list(itertools.combinations(samples, k))
            mean = sum(any(choice) for choice in choices) / len(choices)
            assert humaneval.pass_at_k(n, passed, k) == pytest.approx(mean, abs=1e-12)


def test_score_of_twenty_samples(records, tmp_path, tokenizer_folder):
    """5 and 20 right of 20: the score by hand; the paper's sampling, the evaluation's seed."""
    right = [problem["canonical_solution"] for problem in PROBLEMS]
    folder = write(tmp_path / "humaneval", PROBLEMS)
    generator = Scripted(
        Tokenizer(tokenizer_folder), lambda i: right[i // 20] if i % 4 == 0 or i >= 20 else "    x"
    )
    result = humaneval.evaluate(generator, records, folder, Options(seed=7))
    # None of 10 passes: C(15, 10) / C(20, 10) = 3003 / 184756.
    assert result["metric"] == "pass@10" and result["n"] == 2
    assert result["score"] == pytest.approx(100 * (1 - 3003 / 184756 + 1) / 2)
    assert result["pass_at_1"] == pytest.approx(100 * (5 / 20 + 1) / 2)
    assert result["finishes"] == {"stop": 40} and result["timed_out"] == 0
    assert "filter" in result["settings"]["sandbox"]
    (sampling,) = set(generator.samplings)
    assert dataclasses.astuple(sampling) == (
        512, 0.8, 0.95, ("\nclass", "\ndef", "\n#", "\nif", "\nprint"), 7,
    )  # fmt: skip
    assert len(set(generator.seeds)) == 40  # every sample has its own
    sp = generator.tokenizer.sp
    assert generator.prompts[0] == [sp.bos_id(), *sp.encode(PROBLEMS[0]["prompt"])]
    assert generator.prompts[39] == [sp.bos_id(), *sp.encode(PROBLEMS[1]["prompt"])]
    lines = [json.loads(line) for line in open(records.path, encoding="utf-8")]
    assert [line["id"] for line in lines] == [
        f"HumanEval/{p}/{i}" for p in (0, 1) for i in range(20)
    ]
    assert (
        lines[0]["prompt"] == "<s> " + PROBLEMS[0]["prompt"] and lines[0]["completion"] == right[0]
    )
    assert lines[0]["passed"] and not lines[1]["passed"]
    assert lines[1]["outcome"].startswith("failed: AssertionError")
    # Nothing is asked again.
    resumed = Records(records.path, lines)
    resumed.task = "humaneval"
    assert humaneval.evaluate(generator, resumed, folder, Options(seed=7)) == result
    assert generator.count == 40


def test_program_is_the_originals():
    """Prompt, completion, tests and the call of the tests, byte for byte."""
    item, text = PROBLEMS[0], "    return x + x"
    assert humaneval.program(item, text) == (
        'def twice(x):\n    """ Two times x. """\n    return x + x\n'
        "def check(f):\n    assert f(3) == 6\n    assert f(0) == 0\n"
        "\ncheck(twice)"
    )


@pytest.mark.parametrize(
    "text, passes",
    [
        ("    return 2 * x", True),
        ("    print('x' * 10**6)\n    return x + x\n", True),
        ("    return x ** 2", False),
        ("    return 2 * y", False),
        ("return 2 * x", False),  # a lost indentation
        ("    import sys; sys.exit(0)", False),
        ("    import os; os._exit(0)", False),
        ("", False),  # a docstring alone returns None
    ],
)
def test_verdicts(text, passes):
    """Right functions pass; wrong ones, broken ones and early exits fail."""
    assert humaneval.score(PROBLEMS[0], text)["passed"] is passes


def test_a_tiny_model_end_to_end(records, tmp_path, base, monkeypatch):
    """Real decoding: completions continue the bare prompt and end before a stop string."""
    monkeypatch.setattr(humaneval, "SAMPLES", 10)
    folder = write(tmp_path / "humaneval", PROBLEMS[:1])
    generator = TextGenerator.from_folder(base, torch.device("cpu"), torch.float32, 120)
    result = humaneval.evaluate(generator, records, folder, Options(chat=True))
    assert result["score"] == 0.0 and result["n"] == 1
    lines = [json.loads(line) for line in open(records.path, encoding="utf-8")]
    assert len({line["completion"] for line in lines}) > 1  # samples differ
    assert all(stop not in line["completion"] for line in lines for stop in humaneval.STOP)
    assert all("<|user|>" not in line["prompt"] for line in lines)


def test_bad_files_are_named(tmp_path):
    """The error names the file, and the line where there is one."""
    with pytest.raises(InputError, match=r"HumanEval.jsonl.gz: no such file"):
        humaneval.load(tmp_path, Options())
    for problems, message in [
        ([PROBLEMS[0], {"task_id": "HumanEval/1"}], r"gz:2: found no prompt"),
        ([{**PROBLEMS[0], "test": 5}], r"gz:1: test is a int, expected a str"),
        ([PROBLEMS[0], PROBLEMS[0]], r"task_id twice"),
    ]:
        with pytest.raises(InputError, match=message):
            humaneval.load(write(tmp_path, problems), Options())
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match=r"HumanEval.jsonl.gz:1: not a whole gzip file"):
        humaneval.load(tmp_path, Options())


def test_canonical_solutions_pass_and_empty_ones_fail(real_data):
    """All 164 published solutions pass; an empty body fails."""
    items = humaneval.load(real_data / "eval" / "humaneval", Options())[:: humaneval.SAMPLES]
    assert len(items) == 164
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        right = pool.map(humaneval.score, items, [item["canonical_solution"] for item in items])
        wrong = pool.map(humaneval.score, items[::8], ["    pass\n"] * len(items))
        failed = [
            item["id"] for item, verdict in zip(items, right, strict=True) if not verdict["passed"]
        ]
    assert failed == []
    assert not any(verdict["passed"] for verdict in wrong)
