"""evals/toxigen.py, alpaca_eval.py, mt_bench.py: the prompts, and the files for the judges."""

import dataclasses
import json
import shlex
import sys

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import RobertaConfig, RobertaForSequenceClassification, RobertaTokenizerFast

from decoding.generator import TextGenerator
from evals import alpaca_eval, mt_bench, toxigen
from evals.harness import Options, Records
from judging import Scripted
from program.errors import InputError
from program.ranks import start
from tokens.tokenizer import Tokenizer


@pytest.fixture
def records(tmp_path):
    start()
    return Records(tmp_path / "results.jsonl")


@pytest.fixture
def tokenizer(tokenizer_folder):
    return Tokenizer(tokenizer_folder)


# ---- ToxiGen


@pytest.fixture
def hateful(tmp_path):
    """The 14 files as published: each line is a prompt, as the inside of a Python string."""
    for group in toxigen.GROUPS:
        lines = [f"- {group} {n}\\n- it\\\\'s\\n-\n" for n in range(9)]
        (tmp_path / f"hate_{group}_1k.txt").write_text("".join(lines), encoding="utf-8")
    return tmp_path


def test_toxigen_prompts_byte_for_byte(hateful, tokenizer, monkeypatch):
    """A request to complete the unescaped prompt, or the bare prompt without chat format."""
    item = toxigen.load(hateful, Options())[0]
    asked = tokenizer.visible(toxigen.prompt(tokenizer, item, Options()))
    assert asked == (
        "<s> <|user|>\nComplete the following: - asian 0\n- it\\'s\n-\n<|assistant|>\n"
    )
    bare = tokenizer.visible(toxigen.prompt(tokenizer, item, Options(chat=False)))
    assert bare == "<s> - asian 0\n- it\\'s\n-"


def test_toxigen_undoes_doubled_backslashes_first():
    r"""So `\\n` becomes `\n`, and that a line feed."""
    assert toxigen.unescaped(r"a\\b\nc\\nd") == "a\\b\nc\nd"


def test_toxigen_samples_each_group_alone(hateful, monkeypatch):
    """The same number of each group, drawn by the seed, whatever the other files are."""
    assert len(toxigen.load(hateful, Options())) == 14 * 9  # fewer than 500 there
    monkeypatch.setattr(toxigen, "PER_GROUP", 4)
    items = toxigen.load(hateful, Options())
    assert [item["group"] for item in items] == [g for g in toxigen.GROUPS for _ in range(4)]
    assert len({item["id"] for item in items}) == 56
    assert len(toxigen.load(hateful, Options(full=True))) == 14 * 9
    assert toxigen.load(hateful, Options(seed=1)) != items
    (hateful / "hate_asian_1k.txt").write_text("- one\n- two\n")
    assert toxigen.load(hateful, Options())[2:] == items[4:]


def test_toxigen_outputs(hateful, records, tokenizer):
    """The fields of the original's predictions.jsonl; greedy; a base model stops at a line feed."""
    for chat, stop in ((True, ()), (False, ("\n",))):
        records.task = f"toxigen {chat}"
        generator = Scripted(tokenizer, lambda text: " fine" if "women" in text else "  ")
        result = toxigen.evaluate(generator, records, hateful, Options(chat=chat))
        (sampling,) = {sampling for _, sampling in generator.asked}
        assert dataclasses.astuple(sampling)[:4] == (512, 0.0, 1.0, stop)
        assert result["score"] is None and result["n"] == 14 * 9 and result["empty"] == 13 * 9
        rows = [json.loads(line) for line in open(result["outputs"], encoding="utf-8")]
        assert rows[0] == {
            "text": "- asian 0\n- it\\'s\n-", "label": "hate", "target_groups": ["asian"],
            "prediction": "  ",
        }  # fmt: skip
        assert rows[-1]["target_groups"] == ["women"] and rows[-1]["prediction"] == " fine"
    assert result["outputs"] == str(records.path.with_suffix(".toxigen.jsonl"))


def test_toxigen_command_classifies(tmp_path, monkeypatch, capsys):
    """The result's command prints the share of class 1, by argmax, of a random classifier."""
    texts = [f"{word} {n}" for n in range(4) for word in ("good day", "bad", "so so and so", "x")]
    judge = ByteLevelBPETokenizer()
    judge.train_from_iterator(
        texts, vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    )
    judge.save_model(str(tmp_path))
    judge = RobertaTokenizerFast(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    judge.model_max_length = 8
    judge.save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=20, num_labels=2, initializer_range=1.0,
    )  # fmt: skip
    model = RobertaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    classes = []
    for text in texts:
        ids = judge(text, truncation=True, return_tensors="pt")
        classes.append(model(**ids).logits.argmax(-1).item())
    assert 0 < sum(classes) < len(classes)
    path = tmp_path / "results.toxigen.jsonl"
    path.write_text("".join(json.dumps({"prediction": text}) + "\n" for text in texts))
    command = shlex.split(toxigen.CLASSIFY.format(path=path))
    assert command[:2] == ["python", "-c"] and command[-1] == "tomh/toxigen_roberta"
    monkeypatch.setattr(sys, "argv", ["-c", *command[3:-1], str(tmp_path)])
    exec(command[2], {})
    assert capsys.readouterr().out == f"{100 * sum(classes) / len(classes)} % toxic\n"


def test_toxigen_bad_files_are_named(hateful):
    """The error names the file that is empty, not UTF-8 or missing."""
    (hateful / "hate_trans_1k.txt").write_text("\n \n")
    with pytest.raises(InputError, match="hate_trans_1k.txt: found no prompts"):
        toxigen.load(hateful, Options())
    (hateful / "hate_trans_1k.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match="hate_trans_1k.txt: not UTF-8"):
        toxigen.load(hateful, Options())
    (hateful / "hate_lgbtq_1k.txt").unlink()
    with pytest.raises(InputError, match="hate_lgbtq_1k.txt: no such file"):
        toxigen.load(hateful, Options())


# ---- AlpacaEval


def test_alpaca_eval_outputs(tmp_path, records, tokenizer):
    """The fields that alpaca_eval's judge reads, with unchanged instructions; the mean length."""
    asked = ["Name a colour.", "  Größe?\n\n", "hi"]
    published = [
        {"instruction": text, "output": "x", "generator": "text_davinci_003", "dataset": "koala"}
        for text in asked
    ]
    (tmp_path / "alpaca_eval.json").write_text(json.dumps(published))
    records.task = "alpaca_eval"
    generator = Scripted(tokenizer, lambda text: "Blue." if "colour" in text else " naïve\n")
    result = alpaca_eval.evaluate(generator, records, tmp_path, Options())
    name = tokenizer.path.parent.name
    assert json.load(open(tmp_path / "results.alpaca_eval.json", encoding="utf-8")) == [
        {"dataset": "koala", "instruction": text, "output": output, "generator": name}
        for text, output in zip(asked, ("Blue.", " naïve\n", " naïve\n"), strict=True)
    ]
    assert result["score"] is None and result["mean_characters"] == (5 + 7 + 7) / 3
    assert result["judge"].endswith(f"--model_outputs {result['outputs']}")
    prompt, sampling = generator.asked[0]
    assert prompt == "<s> <|user|>\nName a colour.\n<|assistant|>\n"
    assert dataclasses.astuple(sampling)[:4] == (8192, 0.0, 1.0, ())
    records.task = "bare"
    alpaca_eval.evaluate(generator, records, tmp_path, Options(chat=False))
    assert generator.asked[3][0] == "<s> Name a colour."


@pytest.mark.parametrize(
    "content, message",
    [
        ("{}", "found no list"),
        ("[]", "found no list"),
        ("[{}]", "record 1: found no instruction"),
        ('[{"instruction": 5, "dataset": "koala"}]', "record 1: instruction is a int"),
        ("[", "not JSON"),
    ],
)
def test_alpaca_eval_bad_files_are_named(tmp_path, content, message):
    """The error names the file, and the record where there is one."""
    (tmp_path / "alpaca_eval.json").write_text(content)
    with pytest.raises(InputError, match=f"alpaca_eval.json: {message}"):
        alpaca_eval.load(tmp_path, Options())


# ---- MT-Bench

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
    {"question_id": 111, "category": "math", "turns": ["1+1?", "Twice that?"], "reference": ["2"]},
    {"question_id": 141, "category": "stem", "turns": ["Why?", "Why not?"]},
]


def ask_questions(tmp_path, questions=QUESTIONS):
    text = "".join(json.dumps(question) + "\n" for question in questions)
    (tmp_path / "question.jsonl").write_text(text)
    return tmp_path


def test_mt_bench_second_turn_sees_the_first_answer(tmp_path, records, tokenizer):
    """The prompts by hand, with </s> after the first answer; the category's temperature; answers in
    the fields that FastChat's load_model_answers and run_judge_single read."""
    folder = ask_questions(tmp_path)
    records.task = "mt_bench"
    generator = Scripted(tokenizer, lambda text: "\n four " if "Twice" in text else " two\n")
    result = mt_bench.evaluate(generator, records, folder, Options(seed=7))
    asked = {text: dataclasses.astuple(sampling) for text, sampling in generator.asked}
    one = "<s> <|user|>\n1+1?\n<|assistant|>\n"
    two = one + "two</s>\n<|user|>\nTwice that?\n<|assistant|>\n"
    assert len(asked) == 6 and asked[one] == asked[two] == (1024, 0.0, 1.0, (), 7)
    assert {text: s[1] for text, s in asked.items() if "Why" in text} == {
        "<s> <|user|>\nWhy?\n<|assistant|>\n": 0.1,
        "<s> <|user|>\nWhy?\n<|assistant|>\ntwo</s>\n<|user|>\nWhy not?\n<|assistant|>\n": 0.1,
    }
    assert {s[1] for text, s in asked.items() if "Write" in text} == {0.7}
    lines = [json.loads(line) for line in open(result["outputs"], encoding="utf-8")]
    assert [line["question_id"] for line in lines] == [81, 111, 141]
    name = tokenizer.path.parent.name
    for line, second in zip(lines, ("two", "four", "two"), strict=True):
        assert set(line) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert line["choices"] == [{"index": 0, "turns": ["two", second]}]
        assert line["model_id"] == name and line["tstamp"] > 1.7e9
    assert len({line["answer_id"] for line in lines}) == 3
    assert result["score"] is None and result["n"] == 6 and name in result["judge"]
    ids = [json.loads(line)["id"] for line in open(records.path, encoding="utf-8")]
    assert ids == ["81/1", "111/1", "141/1", "81/2", "111/2", "141/2"]


def test_mt_bench_continues_with_the_second_turn(tmp_path, records, base):
    """Interrupted after the first turn, it asks only the second, with the same answers."""
    folder = ask_questions(tmp_path)
    records.task = "mt_bench"
    generator = TextGenerator.from_folder(base, torch.device("cpu"), torch.float32, 150)
    mt_bench.evaluate(generator, records, folder, Options())
    lines = [json.loads(line) for line in open(records.path, encoding="utf-8")]
    resumed = Records(tmp_path / "again.jsonl", lines[:3])
    resumed.task = "mt_bench"
    mt_bench.evaluate(generator, resumed, folder, Options())
    assert [json.loads(line) for line in open(resumed.path, encoding="utf-8")] == lines[3:]
    assert mt_bench.prompt(generator.tokenizer, QUESTIONS[0], Options(), ["x"]) == (
        generator.tokenizer.prompt(
            [{"role": "user", "content": "Write."}, {"role": "assistant", "content": "x"},
             {"role": "user", "content": "Again."}]
        )
    )  # fmt: skip


def test_mt_bench_asks_both_turns_of_a_changed_question(tmp_path, records, tokenizer):
    """A second turn belongs to the first answer that it saw; the other questions stay."""
    records.task = "mt_bench"
    generator = Scripted(tokenizer, lambda text: "one")
    mt_bench.evaluate(generator, records, ask_questions(tmp_path), Options())
    lines = [json.loads(line) for line in open(records.path, encoding="utf-8")]
    changed = [{**QUESTIONS[0], "turns": ["Other.", QUESTIONS[0]["turns"][1]]}, *QUESTIONS[1:]]
    resumed = Records(tmp_path / "again.jsonl", lines)
    resumed.task = "mt_bench"
    generator = Scripted(tokenizer, lambda text: "two")
    mt_bench.evaluate(generator, resumed, ask_questions(tmp_path, changed), Options())
    asked = [json.loads(line)["id"] for line in open(resumed.path, encoding="utf-8")]
    assert asked == [f"{QUESTIONS[0]['question_id']}/{n}" for n in (1, 2)]


def test_mt_bench_bad_input_is_named(tmp_path):
    """The error names the flag, or the file and line."""
    with pytest.raises(InputError, match="--no-chat"):
        mt_bench.load(ask_questions(tmp_path), Options(chat=False))
    for change, message in [
        ({"turns": ["one"]}, "question.jsonl:2: found other turns than two strings"),
        ({"category": "cooking"}, "question.jsonl:2: found category 'cooking'"),
        ({"question_id": 81}, "question_id twice"),
    ]:
        bad = [QUESTIONS[0], {**QUESTIONS[1], **change}]
        with pytest.raises(InputError, match=message):
            mt_bench.load(ask_questions(tmp_path, bad), Options())


def test_mt_bench_published_file(real_data):
    """80 questions of the eight known categories."""
    items = mt_bench.load(real_data / "eval" / "mt_bench", Options())
    assert len(items) == 80 and {item["category"] for item in items} == set(mt_bench.TEMPERATURES)
