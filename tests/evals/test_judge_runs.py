"""evaluate.py with judges: one model at a time in the memory, resumed, bad judges refused."""

import gc
import json
import math
import statistics
import weakref
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import evaluate
from decoding.generator import TextGenerator
from evals import alpaca_eval, mt_bench, truthfulqa
from judging import QUESTIONS, ROWS, instructions, read
from program.errors import InputError
from tokens.tokenizer import Tokenizer


@pytest.fixture
def flags(base, tmp_path):
    """Flags of an evaluation of the tiny model by itself, on all tasks that have judges."""
    data = tmp_path / "data"
    for task in ("truthfulqa", "alpaca_eval", "mt_bench"):
        (data / task).mkdir(parents=True)
    (data / "truthfulqa" / "TruthfulQA.csv").write_text("\n".join(ROWS) + "\n")
    instructions(data / "alpaca_eval", rows=2)
    text = "".join(json.dumps(question) + "\n" for question in QUESTIONS[:1])
    (data / "mt_bench" / "question.jsonl").write_text(text)
    folders = dict.fromkeys(("model", "truth_judge", "info_judge", "judge"), str(base))
    return folders | {
        "tasks": ["truthfulqa", "alpaca_eval", "mt_bench"], "data": str(data),
        "out": str(tmp_path / "out" / "results.json"), "context": 700,
    }  # fmt: skip


@pytest.fixture
def short(monkeypatch):
    """Answers and judgements of a few tokens, to save time."""
    monkeypatch.setattr(alpaca_eval, "SAMPLING", alpaca_eval.Sampling(4))
    monkeypatch.setattr(alpaca_eval, "JUDGE_SAMPLING", alpaca_eval.Sampling(3))
    monkeypatch.setattr(mt_bench, "JUDGE_SAMPLING", mt_bench.Sampling(3))
    monkeypatch.setitem(mt_bench.SETTINGS, "max_new_tokens", 4)


def test_one_judge_after_the_other(flags, short, monkeypatch, capsys):
    """Each model is gone when the next is loaded; a second run asks no judge about anything.

    The verdicts of TruthfulQA's are transformers' probability of " yes".
    """
    models, real = [], TextGenerator.from_folder

    def load(*arguments, **options):
        assert not any(model() for model in models), "two models in the memory"
        generator = real(*arguments, **options)
        models.append(weakref.ref(generator.model))
        return generator

    monkeypatch.setattr(TextGenerator, "from_folder", load)
    evaluate.main(flags)
    gc.collect()
    assert len(models) == 4
    out, printed = Path(flags["out"]), capsys.readouterr().out
    tasks = json.loads(out.read_text())["tasks"]
    records = [r for r in read(out.with_suffix(".jsonl")) if "task" in r]
    found = tasks["truthfulqa"]
    name = Path(flags["judge"]).name
    assert "50.2" in printed and f"truthfulqa: by {name} and {name}" in printed
    assert "73.9" not in printed, "the paper's win rate beside that of another judge"
    assert found["metric"] == "% true and informative" and 0 <= found["mc2"] <= 100
    verdicts = {
        role: [r["yes"] for r in records if r["task"] == f"truthfulqa/{role}"]
        for role in truthfulqa.ENDINGS
    }
    assert found["percent_true"] == 100 * statistics.fmean(verdicts["truth_judge"])
    assert found["percent_informative"] == 100 * statistics.fmean(verdicts["info_judge"])
    both = [a and b for a, b in zip(*verdicts.values(), strict=True)]
    assert found["score"] == 100 * statistics.fmean(both)
    check_probabilities(flags["truth_judge"], records)
    assert sum(r["task"] == "alpaca_eval/judge" for r in records) == 4
    assert sum(r["task"] == "mt_bench/judge" for r in records) == 2

    before = out.with_suffix(".jsonl").read_text().count("\n")
    for method in ("generate", "option_logps"):
        monkeypatch.delattr(TextGenerator, method)
    evaluate.main(flags)
    assert out.with_suffix(".jsonl").read_text().count("\n") == before + 1  # another start
    again = json.loads(out.read_text())["tasks"]
    for task in tasks:
        assert again[task] | {"seconds": 0} == tasks[task] | {"seconds": 0}


def check_probabilities(folder, records):
    """`p_yes` of every record is the model's probability of " yes" after the authors' prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = Tokenizer(folder)
    answers = [r["answer"] for r in records if r["task"] == "truthfulqa"]
    for role, ending in (("truth_judge", "True:"), ("info_judge", "Helpful:")):
        for n, record in enumerate(r for r in records if r["task"] == f"truthfulqa/{role}"):
            prompt = f"Q: What is {n} plus 2?\nA: {answers[n].strip()}\n{ending}"
            assert record["prompt"] == "<s> " + prompt
            ids, whole = ([1, *tokenizer.sp.encode(text)] for text in (prompt, prompt + " yes"))
            with torch.no_grad():
                logps = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            at = range(len(ids) - 1, len(whole) - 1)
            logp = sum(logps[i, whole[i + 1]].item() for i in at)
            # fp32 logits of some ones are 1e-6 off, and a few tokens sum.
            assert record["p_yes"] == pytest.approx(math.exp(logp), rel=1e-4)
            assert record["yes"] == (record["p_yes"] >= 0.5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"truth_judge": None}, "--truth-judge and --info-judge go together"),
        ({"tasks": ["truthfulqa"]}, "--judge: found no task for it, expected alpaca_eval or mt_b"),
        ({"tasks": ["mt_bench"]}, "--truth-judge: found no task for it, expected truthfulqa"),
        ({"judge": "nowhere"}, "--judge: nowhere: no such folder"),
        ({"judge": str(Path(__file__).parent)}, "no such file|no tokenizer"),
    ],
)
def test_bad_judges_are_named_before_the_model_is_loaded(flags, changes, message, monkeypatch):
    """The error names the flag or the folder, and nothing is written."""
    monkeypatch.delattr(TextGenerator, "from_folder")
    with pytest.raises(InputError, match=message):
        evaluate.main(flags | changes)
    assert not Path(flags["out"]).parent.exists()


def test_alpaca_eval_needs_the_other_answers(flags, monkeypatch):
    """A file without text-davinci-003's answers is refused before the model is loaded."""
    path = Path(flags["data"]) / "alpaca_eval" / "alpaca_eval.json"
    path.write_text('[{"instruction": "Say.", "dataset": "koala"}]')
    monkeypatch.delattr(TextGenerator, "from_folder")
    with pytest.raises(InputError, match="record 1: found no output"):
        evaluate.main(flags)
